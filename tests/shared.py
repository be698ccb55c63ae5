"""What the multi-rank tests of all plugs share."""

# The kinds of compressors that the promises are tested for, by either of Horovod's plugs.
KINDS = {
    "QSGD": ("QSGDCompressor", {}),
    "QSGD l2": ("QSGDCompressor", {"norm": "l2"}),
    "NUQSGD": ("NUQSGDCompressor", {}),
    "DQ-SGD": ("DQSGDCompressor", {"mean_bits": 3, "total_steps": 10}),
    "correlated": ("QSGDCompressor", {"rounding": "correlated"}),
    "correlated NUQSGD": ("NUQSGDCompressor", {"rounding": "correlated"}),
    "error feedback": ("QSGDCompressor", {"bits": 2, "error_feedback": True}),
    "error feedback, DQ-SGD": ("DQSGDCompressor", {"k": 30.0, "error_feedback": True}),
}
EXCHANGES = ["allgather", "scatter_allgather"]


def make(plug, kind, **options):
    """A compressor of `hvd_quant.torch` or `hvd_quant.tensorflow`."""
    name, arguments = KINDS[kind]
    return getattr(plug, name)(**arguments, **options)


def other_kind(kind):
    """The next one."""
    names = list(KINDS)
    return names[(names.index(kind) + 1) % len(names)]


def error_of(action):
    """The exception that an action raises, or None."""
    try:
        action()
    except Exception as error:
        return error
    return None
