"""Explain why a call has failed, in the same words on every rank."""

from __future__ import annotations

import json
from collections.abc import Generator

import numpy as np

from hvd_quant.mpi.request import abandoned
from hvd_quant.mpi.transport import MpiTransport
from hvd_quant.reducer import polling
from hvd_quant.reducer.errors import Description, differences


def explain(transport: MpiTransport, call: Description, error: ValueError) -> Generator[None, None, str]:
    """Ask all ranks, which have all noticed, for the arguments of their calls. Waits for a limited time."""
    deadline = polling.clock.monotonic() + polling.PATIENCE_SECONDS
    answers: list[np.ndarray] = []
    description = np.frombuffer(json.dumps(call).encode(), np.uint8)
    # Others may have chosen an exchange of more collectives; the rest of them is empty then.
    for message in [description[:0]] * (3 - transport.collectives) + [description]:
        handle = transport.allgather(message, [len(message)] * transport.size, "mismatch")
        while not handle.ready():
            if polling.clock.monotonic() > deadline:
                abandoned.append(handle)
                return (
                    f"what the ranks have sent does not fit together ({error}), and they did not all "
                    f"answer when asked for their arguments. This one has {call}."
                )
            yield
        answers = handle.wait()
    calls = [json.loads(answer.tobytes()) for answer in answers]
    if found := differences(calls):
        return (
            "the ranks' arguments differ: "
            + "; ".join(found.values())
            + ". Make the same calls, in the same order, on every rank."
        )
    return f"the ranks' arguments are the same, but not all that they have sent is of use: {error}"
