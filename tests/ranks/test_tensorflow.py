"""Runs the checks in tensorflow/ on several ranks, under both controllers, through horovodrun itself."""

import sys

import pytest
from launch import ROOT, horovodrun, need, run_checks

need("tensorflow")


# How ranks meet is tested under both controllers; the mathematics, memory and the stand-in for GPUs with MPI.
MEETING = "check_tf_errors.py or check_fit or check_tape"


@pytest.mark.parametrize(
    ("ranks", "controller", "checks"),
    [
        (2, "mpi", "check_tf_keras or check_tf_errors"),
        (2, "mpi", "not check_tf_keras and not check_tf_errors"),
        (2, "gloo", MEETING),
        (3, "mpi", "(mean_and_sum and NUQSGD) or process_sets or different_shapes"),
    ],
)
def test_checks_on_every_rank(ranks, controller, checks):
    run_checks(ranks, controller, "tensorflow", checks)


def test_exchange_by_hosts():
    hosts = {"TEST_HOSTS": "2", "TEST_EXCHANGES": "hierarchical"}
    run_checks(4, "mpi", "tensorflow/check_tf_promises.py", "every_run", **hosts)


def test_legacy_keras():
    """Which Keras it is, TensorFlow decides when it is imported."""
    interpreter, legacy = [sys.executable], {"TF_USE_LEGACY_KERAS": "1"}
    run_checks(2, "mpi", "tensorflow/check_legacy_keras.py", interpreter=interpreter, **legacy)


@pytest.mark.parametrize(
    ("example", "controller"), [("tf2_fashion_mnist.py", "mpi"), ("keras_fashion_mnist.py", "gloo")]
)
def test_examples(example, controller):
    """On a small part of the data, or as much as the folder has."""
    path = ROOT / "examples" / example
    options = ("--epochs", "1", "--limit", "1280")
    done = horovodrun(2, controller, sys.executable, path, *options, at_once=False)
    if "Fashion-MNIST not found" in done.stdout:
        pytest.skip("needs Fashion-MNIST")
    assert done.returncode == 0, done.stdout[-8000:]
    assert "parameters are bit-identical on all 2 ranks" in done.stdout
