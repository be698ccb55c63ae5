"""Elastic jobs: workers come, go and die, and training goes on as if nothing had happened."""

import json
import os
import stat
import sys
from pathlib import Path

import pytest
from launch import TESTS, launch, need

SECONDS = 90


def elastic(tmp_path, program, hosts, *arguments, **environment):
    """Run a program as an elastic job on these hosts, to begin with; returns its workers' reports by rank."""
    (tmp_path / "hosts").write_text("\n".join(hosts) + "\n")
    discover = tmp_path / "discover.sh"
    discover.write_text(f"#!/bin/sh\ncat {tmp_path}/hosts\n")
    discover.chmod(discover.stat().st_mode | stat.S_IXUSR)
    programs = Path(sys.executable).parent
    slots = sum(int(host.partition(":")[2]) for host in hosts)
    command = [sys.executable, TESTS / "support" / "horovodrun_at_once.py", "--gloo", "-np", str(slots)]
    command += ["--min-np", "1", "--max-np", "4", "--host-discovery-script", discover]
    command += ["--network-interface", "lo", sys.executable, program, tmp_path, *arguments]
    environment = {
        "HOROVOD_GLOO_TIMEOUT_SECONDS": "10",  # after which ranks notice that another has died
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(TESTS / "support"),
        **environment,
    }
    done = launch(command, SECONDS, **environment)
    assert done.returncode == 0, done.stdout[-8000:]
    files = sorted(tmp_path.glob("report.*.json"))
    assert files, done.stdout[-8000:]
    return [json.loads(file.read_text()) for file in files]


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


def check(reports, sizes):
    assert max((report["sizes"] for report in reports), key=len) in sizes, reports
    for report in reports:
        assert report["identical"], reports
        assert report["exact"], reports
        assert report["uses"] == 24, reports


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
    program = TESTS / "ranks" / "torch" / "elastic.py"
    check(elastic(tmp_path, program, hosts, kind, exchange, json.dumps(PLANS[plan])), SIZES[plan])


@cases
def test_tensorflow_goes_on_when_workers(plan, hosts, kind, exchange, tmp_path):
    """With our loop and state, and with Horovod's loop, which must know our errors."""
    need("tensorflow")
    program = TESTS / "ranks" / "tensorflow" / "elastic.py"
    whose = "ours" if plan == "come and go" else "Horovod's"
    check(elastic(tmp_path, program, hosts, kind, exchange, json.dumps(PLANS[plan]), whose), SIZES[plan])


def test_keras_goes_on_when_workers_come_and_die(tmp_path):
    """Between two epochs of a ``fit``, each of 12 batches, and in the second one."""
    need("tensorflow")
    program = TESTS / "ranks" / "tensorflow" / "elastic_keras.py"
    plan = [{"at": 12, "hosts": ["localhost:2", "127.0.0.1:1"]}, {"at": 15, "kill": [2], "when": "after"}]
    check(elastic(tmp_path, program, ["localhost:2"], "QSGD", "auto", json.dumps(plan)), [[2, 3, 2]])
