"""Set-up of the tests that every rank runs together, under horovodrun; ../test_torch.py starts them."""

import common
import horovod.torch as hvd
import pytest
import torch
from combinations import keep_share
from shared import start_horovod

from hvd_quant.torch.transport import submit_as_many


@pytest.fixture(scope="session", autouse=True)
def _horovod():
    start_horovod(hvd)
    torch.set_num_threads(1)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    keep_share(items)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    item.failed = report.failed or getattr(item, "failed", False)
    return report


@pytest.fixture(autouse=True)
def _same_start(request):
    """Every test begins on all ranks together, with the same random numbers and as many operations submitted.

    So it ends, too, unless ranks are to do different things, which is marked as ``ranks_differ``: otherwise
    they would wait for ever when they submit an operation without a name.
    """
    torch.manual_seed(0)
    counts = common.counts_of_operations()
    submit_as_many(max(counts), counts[hvd.rank()])
    yield
    if not request.node.failed and request.node.get_closest_marker("ranks_differ") is None:
        counts = common.counts_of_operations()
        assert counts == counts[:1] * hvd.size()
