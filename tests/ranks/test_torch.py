"""Runs tests/ranks/torch on several ranks, under both of Horovod's controllers, through horovodrun itself."""

import sys

import pytest
from launch import TESTS, horovodrun, need, run_checks

need("torch")

EXCHANGES = ["allgather", "scatter_allgather"]
# What depends on who comes when takes long, for ranks wait on purpose: with 2 ranks under one controller, and
# with 3 under the other; what needs 3 ranks runs with 3 under both. With more ranks than cores, Gloo takes
# seconds for what takes MPI a tenth of one.
MEETING = "check_errors.py or a_rank_that_is or a_late_rank"
METRIC = "a_metric_between_backward_and_step"
BY_HOSTS = "mean_on_every_rank or non_finite or come_and_go or same_seed or one_by_one or left_and_finished"
PROMISES = "mean_on_every_rank or same_seed or non_finite or different_exchange or sub_groups"


@pytest.mark.parametrize("controller", ["mpi", "gloo"])
def test_a_first_job(controller):
    """What `scripts/test.sh --quick` runs on several ranks."""
    run_checks(2, controller, "torch/check_exchange.py", "mean_on_every_rank or same_seed or non_finite")


@pytest.mark.parametrize(
    ("ranks", "controller", "checks", "selection"),
    [
        (2, "mpi", "", f"not ({MEETING}) or unsupported_reductions"),  # Adasum needs MPI and 2^k ranks
        (2, "gloo", "", ""),
        (3, "mpi", "", ""),
        (3, "gloo", "", f"process_set or {METRIC}"),
        (4, "mpi", "", f"check_exchange.py or {METRIC}"),
        (4, "gloo", "", f"(check_exchange.py and sub_groups) or {METRIC}"),
        (8, "mpi", "check_exchange.py", PROMISES),
    ],
)
def test_checks_on_every_rank(ranks, controller, checks, selection):
    run_checks(ranks, controller, f"torch/{checks}", selection)


@pytest.mark.parametrize(
    ("controller", "checks", "selection"),
    [
        ("mpi", "", f"{BY_HOSTS} or check_promises or error_feedback or check_moments"),
        ("gloo", "", f"check_exchange.py and (non_finite or come_and_go or same_seed) or {METRIC}"),
    ],
)
def test_exchange_by_hosts(controller, checks, selection):
    """On ranks that believe to be on two hosts, taking turns; tests/hosts has real hosts."""
    hosts = {"TEST_HOSTS": "2", "TEST_EXCHANGES": "hierarchical"}
    run_checks(4, controller, f"torch/{checks}", selection, **hosts)


@pytest.mark.parametrize(("exchange", "controller"), [("allgather", "mpi"), ("scatter_allgather", "gloo")])
@pytest.mark.parametrize("fault", ["dies", "joins", "slow"])
def test_faults_end_the_job_and_nothing_hangs(fault, exchange, controller):
    faults, patience = TESTS / "ranks" / "torch" / "faults.py", {"HOROVOD_STALL_CHECK_TIME_SECONDS": "1"}
    done = horovodrun(3, controller, sys.executable, faults, fault, exchange, **patience)
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


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_horovod_starts_again(exchange):
    """Only with Gloo: MPI starts once."""
    faults = TESTS / "ranks" / "torch" / "faults.py"
    for _ in range(4):
        done = horovodrun(3, "gloo", sys.executable, faults, "restarts", exchange)
        # Horovod's server of addresses drops those of the first start only if the ranks came at nearly the
        # same time (it forgets who is done with one scope when another is done); old ones lead nowhere.
        if "gloo::IoException" not in done.stdout or "Connection refused" not in done.stdout:
            break
    assert done.returncode == 0, done.stdout[-8000:]
    assert done.stdout.count("has finished") == 3
