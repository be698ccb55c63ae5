"""Refused configurations that can only be recognised by the caller's frames."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

from tensorflow.python.eager.polymorphic_function.polymorphic_function import Function

_FUNCTION_FILE = Function.__init__.__code__.co_filename


def refuse_xla() -> None:
    """Refuse to be traced for XLA, which compiles neither Horovod's operations nor ours.

    XLA's own message is of little help.

    Raises:
        RuntimeError: the function that is being traced is to be compiled by XLA.
    """
    for frame in _callers():  # nothing else shows whether XLA will compile it
        function = frame.f_locals.get("self") if frame.f_code.co_filename == _FUNCTION_FILE else None
        if isinstance(function, Function) and function._jit_compile:
            raise RuntimeError(
                "gradients cannot be exchanged in a function that XLA compiles: leave out jit_compile=True "
                "of the tf.function around it, and pass jit_compile=False to Keras's model.compile()"
            )


def refuse_horovods_optimizer_of_keras_3() -> None:
    """Refuse Horovod's own Keras optimizer under Keras 3. Called when a compressor is hashed.

    Horovod does that when the optimizer is made, and nothing else that we could notice. Under Keras 3 it
    never calls ``compress``, and replicas would silently diverge.

    Raises:
        RuntimeError: Horovod is making an optimizer of Keras 3.
    """
    for frame in _callers():
        if frame.f_globals.get("__name__") == "horovod._keras" and frame.f_code.co_name == "__init__":
            keras, optimizer = sys.modules.get("keras"), frame.f_locals.get("self")
            if keras is not None and isinstance(
                optimizer, getattr(keras, "Optimizer", keras.optimizers.Optimizer)
            ):
                raise RuntimeError(
                    "Horovod's DistributedOptimizer reduces no gradients of Keras 3. Use "
                    "hvd_quant.tensorflow.keras.DistributedOptimizer, which takes the same arguments, or "
                    "legacy Keras: pip install tf_keras, and set TF_USE_LEGACY_KERAS=1"
                )


def refuse_a_loss_scaler_around() -> None:
    """Refuse to apply gradients for a loss scaler: some ranks would skip a step in which others wait.

    Raises:
        RuntimeError: a loss scaler of Keras 3 has called.
    """
    import keras  # imported only if needed

    its_file = keras.optimizers.LossScaleOptimizer.apply.__code__.co_filename
    if any(frame.f_code.co_filename == its_file for frame in _callers()):
        raise RuntimeError(
            "a loss scaler must be in the DistributedOptimizer, and not around it, so that all ranks "
            "skip a step together: "
            "DistributedOptimizer(keras.optimizers.LossScaleOptimizer(optimizer), ...). "
            "Keras puts one around by itself under the policy mixed_float16."
        )


def refuse_overwritten(variables: Sequence[Any]) -> None:
    """Refuse pseudo-gradients, which nobody reduces.

    Raises:
        ValueError: a variable is overwritten by its gradient.
    """
    for variable in variables:
        if getattr(variable, "overwrite_with_gradient", False):
            raise ValueError(
                f"{variable.path} is overwritten by its gradient, as Keras's float8 quantization has it, and "
                "such gradients are not reduced"
            )


def _callers() -> Iterator[FrameType]:
    """Iterate over the frames of the callers, innermost first."""
    frame = sys._getframe(1).f_back
    while frame is not None:
        yield frame
        frame = frame.f_back
