"""Elastic jobs: workers come, go and die, and training goes on as if nothing had happened."""

import json
import os
import sys
from pathlib import Path

import pytest
from elastic_job import check, hosts_from
from launch import AT_ONCE, TESTS, launch, need, python

SECONDS = 90


def run(tmp_path, framework, program, hosts, *arguments):
    """Run a framework's program as an elastic job, on these hosts to begin with; returns its process."""
    command = [*AT_ONCE, "--gloo", "--network-interface", "lo", *hosts_from(tmp_path, hosts)]
    command += [*python(framework), TESTS / "ranks" / framework / program, tmp_path, *arguments]
    environment = {
        "HOROVOD_GLOO_TIMEOUT_SECONDS": "10",  # after which ranks notice that another has died
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(TESTS / "support"),
    }
    return launch(command, SECONDS, **environment)


# Names of this machine, which Horovod takes for hosts of their own.
HOSTS = ["localhost", "Localhost", "LOCALHOST", "127.0.0.1", "LocalHost"]
PLANS = {
    "come and go": [
        {"at": 3, "hosts": ["localhost:2", "127.0.0.1:1"]},
        {"at": 7, "kill": [2], "when": "in"},
        {"at": 10, "hosts": ["localhost:1"]},
        {"at": 15, "hosts": ["localhost:2"]},
    ],
    "die": [
        {"at": 3, "kill": [0, 2], "when": "in"},
        # Before the ranks that are left agree; and another host comes.
        {"at": 3, "hosts": [f"{host}:1" for host in HOSTS], "kill": [1], "when": "in"},
        {"at": 4, "size": 2},
        {"at": 9, "kill": [1], "when": "step"},
    ],
}
SIZES = {"come and go": [[2, 3, 2, 1, 2]], "die": [[4, 2, 2, 1], [4, 2, 1, 2, 1]]}


# Each plan with its hosts at the beginning, and what there is to agree on.
cases = pytest.mark.parametrize(
    ("plan", "hosts", "kind", "exchange"),
    [
        ("come and go", ["localhost:2"], "QSGD", "auto"),
        ("die", [f"{host}:1" for host in HOSTS[:4]], "error feedback, DQ-SGD", "scatter_allgather"),
    ],
    ids=["come and go", "die"],
)


@cases
def test_torch_goes_on_when_workers(plan, hosts, kind, exchange, tmp_path):
    need("torch")
    arguments = kind, exchange, json.dumps(PLANS[plan])
    check(run(tmp_path, "torch", "elastic.py", hosts, *arguments), tmp_path, SIZES[plan])


@cases
def test_tensorflow_goes_on_when_workers(plan, hosts, kind, exchange, tmp_path):
    """With our loop and state, and with Horovod's loop, which must know our errors."""
    need("tensorflow")
    whose = "ours" if plan == "come and go" else "Horovod's"
    arguments = kind, exchange, json.dumps(PLANS[plan]), whose
    check(run(tmp_path, "tensorflow", "elastic.py", hosts, *arguments), tmp_path, SIZES[plan])


def test_keras_goes_on_when_workers_come_and_die(tmp_path):
    """Between two epochs of a ``fit``, each of 12 batches, and in the second one."""
    need("tensorflow")
    plan = [{"at": 12, "hosts": ["localhost:2", "127.0.0.1:1"]}, {"at": 15, "kill": [2], "when": "after"}]
    arguments = "QSGD", "auto", json.dumps(plan)
    done = run(tmp_path, "tensorflow", "elastic_keras.py", ["localhost:2"], *arguments)
    check(done, tmp_path, [[2, 3, 2]])
