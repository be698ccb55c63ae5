"""Several hosts: training by every launcher and controller, and what `hvd-quant doctor` says of them.

The hosts are those of the network lab, so that these tests need root.
"""

import json
import os
import re
import subprocess
import sys

import odd
import pytest
from elastic_job import check, hosts_from
from launch import TESTS, hangs_fail, horovodrun, need, python, sleeping

from benchmarks import netlab

PYTHON = sys.executable
DOCTOR = [PYTHON, "-m", "hvd_quant.cli", "doctor"]
HANG = 300  # seconds; far above what anything here takes
reason = netlab.missing()
needs_lab = pytest.mark.skipif(reason is not None, reason=reason or "")
FLOAT32 = {}  # bytes that hosts have received with each controller, once measured
LAUNCHES = ["horovodrun --mpi", "horovodrun --gloo", "mpirun --hostfile"]


@pytest.fixture(scope="module")
def lab():
    with netlab.Lab(hosts=2) as running:
        yield running


def launch(lab, how, command, slots, tmp_path, **options):
    launcher, _, option = how.partition(" --")
    if option == "gloo":
        options["env"] = {**sleeping(), **options.get("env", {})}
    with hangs_fail():
        if launcher == "mpirun":
            return lab.mpirun(command, slots=slots, hostfile=tmp_path / "hosts", timeout=HANG, **options)
        return lab.horovodrun(command, slots=slots, controller=option, timeout=HANG, **options)


@needs_lab
@pytest.mark.parametrize("how", LAUNCHES)
def test_two_hosts_train_over_the_bridge(lab, how, tmp_path):
    """The example, on 2 x 2 ranks; at 4 bits the hosts receive a sixth of float32's bytes at most.

    With a bandwidth stated for which the hosts exchange means: the model is so small that latency counts.
    """
    need("torch")
    controller = "gloo" if "gloo" in how else "mpi"
    moved = {"none": FLOAT32[controller]} if controller in FLOAT32 else {}
    kinds = ["none", "qsgd"][len(moved) :]
    command = [PYTHON, TESTS / "support" / "bytes_of_training.py", *kinds]
    done = launch(lab, how, command, 2, tmp_path, env={"HVD_QUANT_BANDWIDTH": "0.1"})
    assert done.returncode == 0, done.stdout[-8000:]
    assert done.stdout.count("parameters are bit-identical on all 4 ranks") == len(kinds), done.stdout[-8000:]
    for gradients in kinds:
        counts = re.findall(rf"<{gradients} (\d+)>", done.stdout)
        assert len(counts) == 2, done.stdout[-8000:]
        moved[gradients] = sum(map(int, counts))
    FLOAT32[controller] = moved["none"]
    print(f"{how}: {moved['none'] / 1e6:.1f} MB received as float32, {moved['qsgd'] / 1e6:.1f} at 4 bits")
    assert moved["none"] >= 6 * moved["qsgd"], moved


@needs_lab
def test_an_elastic_job_grows_from_two_hosts_to_four(tmp_path):
    """And shrinks to three as a host dies; the exchange fits the hosts that there are."""
    need("torch")
    plan = [
        {"at": 3, "hosts": [f"node{i}:1" for i in range(4)]},
        {"at": 9, "kill": [3], "when": "in"},
    ]
    worker = [PYTHON, TESTS / "ranks" / "torch" / "elastic.py", tmp_path, "QSGD", "auto", json.dumps(plan)]
    environment = {
        "HOROVOD_GLOO_TIMEOUT_SECONDS": "10",
        "HVD_QUANT_BANDWIDTH": "0.1",
        "PYTHONPATH": str(TESTS / "support"),
    }
    with netlab.Lab(hosts=4) as four, hangs_fail():
        hosts = hosts_from(tmp_path, ["node0:1", "node1:1"])
        done = four.horovodrun(worker, controller="gloo", elastic=hosts, env=environment, timeout=90)
    assert [report["hosts"] for report in check(done, tmp_path, [[2, 4, 3]])] == [3, 3, 3]


# --- the doctor -------------------------------------------------------------------------------------------


def diagnose(lab, tmp_path, how="mpirun --hostfile", before="", **options):
    """What ranks of both hosts find out together; `before` is shell, run by each rank first."""
    found = tmp_path / "found.json"
    script = f'{before}\nexec "$@"'
    done = launch(lab, how, ["sh", "-c", script, "sh", *DOCTOR, "--json", found], 1, tmp_path, **options)
    diagnosis = json.loads(found.read_text())
    assert done.returncode == (0 if diagnosis["healthy"] else 1), done.stdout[-8000:]
    return diagnosis


@needs_lab
@pytest.mark.parametrize("how", LAUNCHES[1:])
def test_the_doctor_on_two_healthy_hosts(lab, how, tmp_path):
    diagnosis = diagnose(lab, tmp_path, how)
    assert set(diagnosis["hosts"]) == set(lab.names)
    assert not odd.names(diagnosis, "error")
    assert not odd.names(diagnosis) & {"versions-differ", "clocks-differ", "mtu-differs", "hostname-loopback"}
    collectives = diagnosis["measured"]["collectives"]
    assert set(collectives) == {"allreduce", "allgather", "alltoall"}
    assert all(speed["latency"] > 0 and speed["rate"] > 0 for speed in collectives.values())


@needs_lab
def test_the_doctor_on_hosts_that_differ(lab, tmp_path):
    """Clock, versions, MTU, and an address that both have; told on the right hosts."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "sitecustomize.py").write_text(
        "import importlib.metadata, time\n"
        "_time, _list = time.time, importlib.metadata.distributions\n"
        "time.time = lambda: _time() + 100\n"
        "importlib.metadata.distributions = lambda: (o for o in _list() if o.name != 'mpi4py')\n"
    )
    node1 = lab._spaces[1]
    node1.net("ip", "link set eth0 mtu 1400")
    for space in lab._spaces:
        space.net("ip", "link add name docker0 type bridge")
        space.net("ip", "address add 172.17.0.1/16 dev docker0")
        space.net("ip", "link set docker0 up")
    try:
        before = f'[ "$(hostname)" = node0 ] || export PYTHONPATH={other}'
        diagnosis = diagnose(lab, tmp_path, before=before)
    finally:
        node1.net("ip", "link set eth0 mtu 1500")
        for space in lab._spaces:
            space.net("ip", "link delete docker0")
    told = {one["name"]: one["what"] for one in diagnosis["findings"]}
    assert "clock of node1 is 100." in told["clocks-differ"]
    assert "mpi4py" in told["versions-differ"]
    assert "1500 on node0; 1400 on node1" in told["mtu-differs"]
    assert "172.17.0.1 (docker0)" in told["same-address"]


@needs_lab
def test_the_doctor_on_hosts_whose_interfaces_have_other_names(lab, tmp_path):
    node1 = lab._spaces[1]

    def rename(old, new):
        node1.net("ip", f"link set {old} down")
        node1.net("ip", f"link set {old} name {new}")
        node1.net("ip", f"link set {new} up")

    rename("eth0", "ens3")
    by_address = {f"OMPI_MCA_{layer}_tcp_if_include": "10.77.0.0/24" for layer in ("btl", "oob")}
    try:
        diagnosis = diagnose(lab, tmp_path, "mpirun --hostfile", env=by_address)
    finally:
        rename("ens3", "eth0")
    assert "interfaces-differ" in odd.names(diagnosis, "error")


@needs_lab
def test_the_doctor_names_a_hostname_that_leads_to_itself(lab, tmp_path):
    table = lab._spaces[1].files / "hosts"
    before = table.read_text()
    table.write_text("127.0.1.1 node1\n" + before.replace(" node1", " other"))
    try:
        diagnosis = diagnose(lab, tmp_path)
    finally:
        table.write_text(before)
    where = {one["where"] for one in diagnosis["findings"] if one["name"] == "hostname-loopback"}
    assert where == {"node1"}


def test_the_doctor_on_too_many_threads(tmp_path):
    """Ranks of one host, each of which would start as many threads of torch's as there are cores."""
    need("torch")
    found = tmp_path / "found.json"
    done = horovodrun(3, "mpi", *python("torch"), *DOCTOR[1:], "--json", str(found), OMP_NUM_THREADS="1024")
    diagnosis = json.loads(found.read_text())
    assert done.returncode == 0, done.stdout[-8000:]
    assert "oversubscription" in odd.names(diagnosis, "warning")
    assert list(diagnosis["ranks"].values()) == [3]
    assert diagnosis["measured"]["step_seconds"]["float32"] > 0


@pytest.mark.parametrize("controller", ["mpi", "gloo"])
def test_the_doctor_does_not_wait_for_ever(controller, tmp_path):
    """For a rank that does something else; then it says what it knows."""
    need("torch")
    found = tmp_path / "found.json"
    # Ends when the other has written: before that, its end would be the job's.
    other = f"timeout 120 sh -c 'until [ -s {found} ]; do sleep 0.1; done; sleep 1'"
    script = f'case "${{HOROVOD_RANK:-$OMPI_COMM_WORLD_RANK}}" in 1) {other};; *) exec "$@";; esac'
    doctor = [*python("torch"), *DOCTOR[1:]]
    command = ["sh", "-c", script, "sh", *doctor, "--patience", "3", "--json", str(found)]
    done = horovodrun(2, controller, *command)
    assert done.returncode != 0
    diagnosis = json.loads(found.read_text())
    assert "no-meeting" in odd.names(diagnosis, "error"), done.stdout[-8000:]
    assert len(diagnosis["hosts"]) == 1


def test_the_doctor_notices_that_large_messages_vanish(tmp_path):
    need("torch")
    found = tmp_path / "found.json"
    script = (
        "import time, hvd_quant.cli as cli, hvd_quant.cli.measure as measure\n"
        "measure.measure = lambda meeting: time.sleep(100)\n"
        f"cli.main(['doctor', '--patience', '3', '--json', {str(found)!r}])"
    )
    program = tmp_path / "stuck.py"
    program.write_text(script)
    done = horovodrun(2, "mpi", *python("torch"), program)
    assert done.returncode != 0
    assert "stuck" in odd.names(json.loads(found.read_text()), "error"), done.stdout[-8000:]


def test_the_doctor_notices_ranks_that_each_believe_to_be_alone(tmp_path):
    """As where mpirun starts what goes by Gloo."""
    need("torch")
    found = tmp_path / "found.json"
    other = {"HOROVOD_CONTROLLER": "gloo", "HOROVOD_CPU_OPERATIONS": "gloo"}
    handed = [option for name in other for option in ("-x", name)]
    command = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", "2", *handed]
    done = subprocess.run(
        [*command, *python("torch"), *DOCTOR[1:], "--json", found],
        env={**os.environ, **other},
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    (finding,) = [one for one in json.loads(found.read_text())["findings"] if one["level"] == "error"]
    assert "it is one of 1" in finding["what"]


def test_the_doctor_meets_by_mpi4py(tmp_path):
    """Where Horovod is not there."""
    pytest.importorskip("mpi4py")
    (tmp_path / "sitecustomize.py").write_text(odd.HIDE.format(names=("torch", "tensorflow", "horovod")))
    found = tmp_path / "found.json"
    command = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", "2", "-x", "PYTHONPATH"]
    done = subprocess.run(
        [*command, *DOCTOR, "--json", found],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    diagnosis = json.loads(found.read_text())
    assert diagnosis["by"].startswith("mpi4py")
    assert set(diagnosis["measured"]["collectives"]) == {"allreduce", "allgather", "alltoall"}
