"""What the multi-rank tests of all front ends share."""

import os

# The kinds of compressors that the promises are tested for, by either of Horovod's front ends.
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
# Of which to test, the exchange by hosts needs several.
EXCHANGES = os.environ.get("TEST_EXCHANGES", "allgather scatter_allgather").split()


def pretend_hosts(rank, size):
    """The host that a rank is to believe it is on: as many as TEST_HOSTS says, taking turns by ranks."""
    return rank % int(os.environ.get("TEST_HOSTS", size))


def start_horovod(hvd):
    """Initialise Horovod; where TEST_HOSTS is set, it tells of those hosts."""
    hvd.init(process_sets="dynamic")
    if "TEST_HOSTS" in os.environ:
        hosts = int(os.environ["TEST_HOSTS"])
        hvd.cross_rank = lambda: pretend_hosts(hvd.rank(), hvd.size())
        hvd.cross_size, hvd.local_size = lambda: hosts, lambda: hvd.size() // hosts


def make(front_end, kind, **options):
    """A compressor of `hvd_quant.torch` or `hvd_quant.tensorflow`."""
    name, arguments = KINDS[kind]
    return getattr(front_end, name)(**arguments, **options)


def in_turns(kinds, exchanges):
    """Every kind with one of the exchanges, in turns, and the first kind with all."""
    kinds, exchanges = list(kinds), list(exchanges)
    turns = [(kind, exchanges[i % len(exchanges)]) for i, kind in enumerate(kinds)]
    return turns + [(kinds[0], exchange) for exchange in exchanges[1:]]


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
