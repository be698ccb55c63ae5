"""Runs tests/ranks/torch on several ranks, under both of Horovod's controllers, through horovodrun itself."""

import sys

import pytest
from launch import TESTS, horovodrun, need, python, run_checks

need("torch")

# How ranks meet is tested with 2 ranks under Gloo and with 3 under MPI; the mathematics with 2 under MPI, and
# what 3 ranks cut into other chunks with 3, too. With more ranks than cores, Gloo takes seconds for what MPI
# does in a tenth of one.
METRIC = "a_metric_between_backward_and_step"
# After hvd.join() ranks have counted differently, so that what joins by Horovod has a job of its own.
JOIN = "(check_join.py and not without_quantization)"
MEETING = f"check_exchange.py or check_moments.py or check_errors.py or {JOIN}"
EVERY_SCHEME = "all_ranks_get_the_mean or (same_bits and scatter)"
CHUNKS = "check_gradients.py or check_error_feedback.py or check_promises.py or check_schedule.py"
MATHEMATICS = f"{CHUNKS} or check_correlated.py or check_overrides.py or check_works_with.py"
BY_HOSTS = "mean_on_every_rank or non_finite or come_and_go or same_seed or one_by_one or left_and_finished"
PROMISES = "mean_on_every_rank or same_seed or sub_groups"
# Of the combinations of a check's parameters; see tests/support/combinations.py.
ALL, ONE_HALF, OTHER_HALF = "0/1", "0/2", "1/2"


@pytest.mark.parametrize("controller", ["mpi", "gloo"])
def test_a_first_job(controller):
    """What `scripts/test.sh --quick` runs on several ranks; started as users start theirs."""
    run_checks(
        2,
        controller,
        "torch/check_exchange.py",
        "mean_on_every_rank or same_seed or non_finite",
        interpreter=[sys.executable],
        at_once=False,
    )


@pytest.mark.parametrize(
    ("ranks", "controller", "share", "checks", "selection"),
    [
        (2, "mpi", ALL, "", f"{MATHEMATICS} or {METRIC} or unsupported_reductions"),  # Adasum needs 2^k ranks
        (2, "mpi", ALL, "check_join.py", "without_quantization"),
        (2, "gloo", ONE_HALF, "", f"{MEETING} or {EVERY_SCHEME}"),
        (3, "mpi", OTHER_HALF, "", f"{MEETING} or {CHUNKS}"),
        (3, "gloo", ALL, "", METRIC),
        (4, "mpi", ONE_HALF, "", f"check_exchange.py or {METRIC}"),
        (4, "gloo", ALL, "", f"(check_exchange.py and sub_groups) or {METRIC}"),
        (8, "mpi", OTHER_HALF, "check_exchange.py", PROMISES),
    ],
)
def test_checks_on_every_rank(ranks, controller, share, checks, selection):
    run_checks(ranks, controller, f"torch/{checks}", selection, TEST_SHARE=share)


@pytest.mark.parametrize(
    ("controller", "selection"),
    [
        ("mpi", f"{BY_HOSTS} or check_promises or error_feedback or check_moments"),
        ("gloo", f"check_exchange.py and (non_finite or come_and_go or same_seed) or {METRIC}"),
    ],
)
def test_exchange_by_hosts(controller, selection):
    """On ranks that believe to be on two hosts, taking turns; tests/hosts has real hosts."""
    hosts = {"TEST_HOSTS": "2", "TEST_EXCHANGES": "hierarchical"}
    run_checks(4, controller, "torch", selection, **hosts)


@pytest.mark.parametrize(
    ("fault", "exchange", "controller"),
    [
        ("dies", "allgather", "mpi"),
        ("dies", "scatter_allgather", "gloo"),
        ("joins", "allgather", "mpi"),
        ("slow", "scatter_allgather", "gloo"),
    ],
)
def test_faults_end_the_job_and_nothing_hangs(fault, exchange, controller):
    faults, patience = TESTS / "ranks" / "torch" / "faults.py", {"HOROVOD_STALL_CHECK_TIME_SECONDS": "1"}
    done = horovodrun(3, controller, *python("torch"), faults, fault, exchange, **patience)
    if fault == "slow":
        assert done.returncode == 0, done.stdout[-8000:]
        assert done.stdout.count("has finished") == 3
        waited = [f"rank {rank} of 3 has waited 1 s for other ranks" in done.stdout for rank in range(3)]
        assert waited == [True, True, False], done.stdout[-8000:]
        return
    assert done.returncode != 0
    assert "has finished" not in done.stdout
    if fault == "joins":
        assert "hvd.join() cannot be used" in done.stdout, done.stdout[-8000:]


def test_horovod_starts_again():
    """Only with Gloo: MPI starts once."""
    faults = TESTS / "ranks" / "torch" / "faults.py"
    for _ in range(4):
        done = horovodrun(3, "gloo", *python("torch"), faults, "restarts", "scatter_allgather")
        # Horovod's server of addresses drops those of the first start only if the ranks came at nearly the
        # same time (it forgets who is done with one scope when another is done); old ones lead nowhere.
        if "gloo::IoException" not in done.stdout or "Connection refused" not in done.stdout:
            break
    assert done.returncode == 0, done.stdout[-8000:]
    assert done.stdout.count("has finished") == 3
