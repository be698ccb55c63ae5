"""Import what a front end for Horovod needs, or say how to install it."""

from importlib import import_module


def require(framework: str, name: str) -> None:
    """Import a framework, and Horovod for it.

    Args:
        framework: name of its package.
        name: its own name; in capitals, part of the variable that has Horovod built for it.

    Raises:
        ImportError: one of them is missing; the text says what to do.
    """
    try:
        import_module(framework)
    except ImportError as error:
        raise ImportError(f"hvd_quant.{framework} needs {name}: pip install {framework}") from error
    try:
        import_module(f"horovod.{framework}")
    except ImportError as error:
        raise ImportError(
            f"hvd_quant.{framework} needs Horovod 0.28 built with {name} (HOROVOD_WITH_{name.upper()}=1); "
            "scripts/setup.sh of hvd_quant builds it against current versions. Importing "
            f"horovod.{framework} said: {error}"
        ) from error
