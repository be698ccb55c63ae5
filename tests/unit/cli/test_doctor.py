"""`hvd-quant doctor` on one machine: what it says of a healthy one, and each oddity provoked."""

import json
import os
import pty
import shutil
import subprocess
import sys
import time

import odd
import pytest

from hvd_quant.cli import compare, facts, main, meeting, rules
from hvd_quant.cli import doctor as doctor_module
from hvd_quant.cli.bench import BENCHMARKS, ROOT


@pytest.fixture
def machine(tmp_path):
    return odd.Machine(tmp_path)


def test_a_healthy_machine(machine):
    status, diagnosis = machine.doctor()
    assert status == 0
    assert diagnosis["healthy"]
    assert not odd.names(diagnosis, "error"), diagnosis["findings"]
    # What else there is depends on where the tests run.
    here = "hostname-loopback hostname-unresolved mpirun-as-root no-network no-mpirun small-shm bound "
    here += "no-single-copy"
    assert odd.names(diagnosis) <= set(here.split())
    (facts,) = diagnosis["hosts"].values()
    assert facts["codec"]["isa"]
    assert not any("error" in section for section in facts.values() if isinstance(section, dict))


def without_torch(machine):
    machine.write("horovod/torch/__init__.py", odd.NOT_BUILT["torch"])


def without_tensorflow(machine):
    keras_3(machine)
    machine.write("horovod/tensorflow/__init__.py", odd.NOT_BUILT["tensorflow"])


def keras_3(machine):
    machine.hide("mpi4py")
    machine.write("tensorflow/__init__.py", odd.TENSORFLOW.format(keras="3.15.1"))
    machine.horovod("tensorflow")


def loopback(machine):
    machine.patch("import socket; socket.getaddrinfo = lambda *_: [(2, 1, 6, '', ('127.0.1.1', 0))]")


def unresolved(machine):
    machine.patch("""
        import socket
        def getaddrinfo(*_): raise socket.gaierror("Name or service not known")
        socket.getaddrinfo = getaddrinfo
    """)


def cuda_on_cpu(machine):
    machine.write("torch/__init__.py", odd.TORCH.format(cuda="13.0", gpus=0))


def program(machine, name, script, interpreter="/bin/sh"):
    machine.write(f"bin/{name}", f"#!{interpreter}\n{script}\n")
    (machine.folder / "bin" / name).chmod(0o755)
    machine.environment["PATH"] = f"{machine.folder / 'bin'}:{os.environ['PATH']}"


def gpu_unused(machine):
    program(machine, "nvidia-smi", "echo NVIDIA H100")


def gpu_without_operations(machine):
    program(machine, "nvidia-smi", "echo NVIDIA H100")
    machine.write("torch/__init__.py", odd.TORCH.format(cuda="13.0", gpus=1))


def gpu_driver(machine):
    program(machine, "nvidia-smi", "echo 'Failed to initialize NVML'; exit 9")


def no_horovod(machine):
    shutil.rmtree(machine.folder / "horovod")
    machine.hide("tensorflow", "mpi4py", "horovod")


def no_framework(machine):
    shutil.rmtree(machine.folder / "torch")
    machine.hide("torch", "tensorflow", "mpi4py")


def torch_crashes(machine):
    machine.write("torch/__init__.py", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")


def torch_raises(machine):
    machine.write("torch/__init__.py", "raise OSError('libc10.so: cannot open shared object file')")


def no_mpirun(machine):
    machine.environment["PATH"] = str(machine.folder)


def no_mpi(machine):
    machine.horovod(mpi=False)


def no_controller(machine):
    machine.horovod(mpi=False, gloo=False)


def small_shm(machine):
    machine.patch("""
        import os, types
        os.statvfs = lambda path: types.SimpleNamespace(f_frsize=1 << 20, f_bavail=60)
    """)


def no_shm(machine):
    machine.patch("""
        import os
        _isdir = os.path.isdir
        os.path.isdir = lambda path: path != "/dev/shm" and _isdir(path)
    """)


def nvidia_smi_hangs(machine):
    program(machine, "nvidia-smi", "sleep 60")
    machine.patch("import hvd_quant.cli.facts; hvd_quant.cli.facts.NVIDIA_SMI_SECONDS = 0.5")


def nvidia_smi_is_silent(machine):
    program(machine, "nvidia-smi", "exit 9")


def nvidia_smi_cannot_start(machine):
    program(machine, "nvidia-smi", "", interpreter="/no/such/interpreter")


def mpirun_cannot_start(machine):
    keras_3(machine)
    program(machine, "mpirun", "", interpreter="/no/such/interpreter")


def mpirun_lacks_a_library(machine):
    machine.horovod(gloo=False)
    program(machine, "mpirun", "echo 'libopen-rte.so.40: cannot open shared object file'; exit 127")


def unknown_isa(machine):
    machine.environment["HVD_QUANT_ISA"] = "mmx"


def bad_bandwidth(machine):
    machine.environment["HVD_QUANT_BANDWIDTH"] = "fast"


def slow_names(machine):
    machine.patch("""
        import socket, time
        import hvd_quant.cli.facts
        hvd_quant.cli.facts.RESOLVE_SECONDS = 0.5
        socket.getaddrinfo = lambda *_: time.sleep(60)
    """)


def codec(machine):
    machine.hide("tensorflow", "mpi4py")
    machine.patch("import sys; sys.modules['hvd_quant.codec._native'] = None")


def portable(machine):
    machine.environment["HVD_QUANT_ISA"] = "portable"


def no_network(machine):
    machine.patch("import psutil; psutil.net_if_addrs = dict")


def no_single_copy(machine):
    machine.patch("""
        import ctypes
        class libc:
            def __init__(self, *_, **__): pass
            def process_vm_readv(self, *_):
                ctypes.set_errno(1)
                return -1
        ctypes.CDLL = libc
    """)
    machine.environment["OMPI_MCA_btl_vader_single_copy_mechanism"] = ""  # our images set it
    program(machine, "mpirun", "echo 'mpirun (Open MPI) 4.1.4'")


def root(machine):
    machine.patch("import os; os.geteuid = lambda: 0")
    machine.environment["OMPI_ALLOW_RUN_AS_ROOT"] = ""
    program(machine, "mpirun", "echo 'mpirun (Open MPI) 4.1.4'")


@pytest.mark.parametrize(
    ("provoke", "name", "level"),
    [
        (without_torch, "horovod-without-torch", "error"),
        (without_tensorflow, "horovod-without-tensorflow", "error"),
        (keras_3, "keras-3", "note"),
        (loopback, "hostname-loopback", "note"),
        (unresolved, "hostname-unresolved", "warning"),
        pytest.param(
            cuda_on_cpu,
            "torch-cuda-on-cpu",
            "note",
            marks=pytest.mark.skipif(bool(shutil.which("nvidia-smi")), reason="this machine has a GPU"),
        ),
        (gpu_unused, "gpu-unused", "warning"),
        (gpu_without_operations, "no-gpu-operations", "warning"),
        (gpu_driver, "gpu-driver", "warning"),
        (no_horovod, "no-horovod", "error"),
        (no_framework, "no-framework", "warning"),
        (torch_crashes, "torch-broken", "error"),
        (torch_raises, "torch-broken", "error"),
        (no_mpirun, "no-mpirun", "warning"),
        (no_mpi, "no-mpi", "note"),
        (no_controller, "no-controller", "error"),
        (small_shm, "small-shm", "warning"),
        (no_shm, "small-shm", "warning"),
        (nvidia_smi_hangs, "gpu-driver", "warning"),
        (nvidia_smi_is_silent, "gpu-driver", "warning"),
        (nvidia_smi_cannot_start, "gpu-driver", "warning"),
        (mpirun_cannot_start, "mpirun-broken", "warning"),
        (mpirun_lacks_a_library, "mpirun-broken", "error"),
        (unknown_isa, "codec", "error"),
        (bad_bandwidth, "bandwidth", "error"),
        (slow_names, "hostname-unresolved", "warning"),
        (codec, "codec", "error"),
        (portable, "codec-portable", "note"),
        (no_network, "no-network", "note"),
        (root, "mpirun-as-root", "note"),
        (no_single_copy, "no-single-copy", "warning"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_odd_is_named(machine, provoke, name, level):
    provoke(machine)
    status, diagnosis = machine.doctor()
    assert name in odd.names(diagnosis, level), diagnosis["findings"]
    assert [one["name"] for one in diagnosis["findings"]].count(name) == 1
    assert status == (1 if level == "error" else 0)


def test_a_process_that_may_use_one_core(machine):
    if shutil.which("taskset") is None or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs taskset and two cores")
    core = min(os.sched_getaffinity(0))
    assert "bound" in odd.names(machine.doctor(before=["taskset", "-c", str(core)])[1], "warning")


def test_a_framework_that_hangs_and_cannot_be_ended(monkeypatch):
    monkeypatch.setattr(facts, "PROBE_SECONDS", 0.1)
    monkeypatch.setattr(facts.subprocess, "run", lambda *_, **__: time.sleep(60))
    assert facts.codec() == {"error": "takes more than 0.1 s"}


@pytest.mark.parametrize("missing", ["psutil", "numpy", "rich"])
def test_it_never_raises(machine, missing):
    machine.hide("tensorflow", "mpi4py", missing)
    status, diagnosis = machine.doctor()
    assert status == (1 if missing == "numpy" else 0)
    assert len(diagnosis["hosts"]) == 1


ODD_SYSTEMS = {
    "no os-release": "import platform; platform.freedesktop_os_release = lambda: 1 / 0",
    "no cpuinfo": "import pathlib; pathlib.Path.read_text = lambda *_, **__: 1 / 0",
    "no affinity": "import os; os.sched_getaffinity = lambda _: 1 / 0",
    "an odd name": "import socket; socket.gethostname = lambda: 'x' * 70",
    "a package without a name": "import importlib.metadata as m, types; _d = m.distributions; "
    "m.distributions = lambda: [types.SimpleNamespace(metadata={'Name': None}, version='1'), *_d()]",
    "no threads": "import concurrent.futures as c; c.ThreadPoolExecutor = lambda _: (_ for _ in ()).throw("
    'RuntimeError("can\'t start new thread"))',
}


@pytest.mark.parametrize("odd_system", ODD_SYSTEMS)
def test_a_fact_that_is_missing_costs_no_other(machine, odd_system):
    machine.patch(ODD_SYSTEMS[odd_system])
    status, diagnosis = machine.doctor()
    assert status == 0, diagnosis["findings"]
    (facts,) = diagnosis["hosts"].values()
    assert facts["host"]["root"] is not None
    assert facts["torch"]["horovod"]["built"]


@pytest.mark.parametrize("arguments", [[], ["--json"]])
@pytest.mark.parametrize("where", [">&-", ">/dev/full", "| true"])
def test_nobody_to_tell(machine, arguments, where):
    """Standard output is closed, full, or nobody reads it."""
    command = f'set -o pipefail; "$@" {where}'
    doctor = [sys.executable, "-m", "hvd_quant.cli", "doctor", *arguments]
    done = subprocess.run(
        ["bash", "-c", command, "bash", *doctor],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(machine.folder)},
    )
    assert "Traceback" not in done.stderr
    assert done.returncode in ((0, 1) if where == "| true" else (1,))


@pytest.mark.parametrize("seconds", ["nan", "inf", "-1", "0", "1e9", "soon"])
def test_bad_patience(seconds):
    done = run("doctor", "--patience", seconds)
    assert done.returncode == 2
    assert "must be a number of seconds" in done.stderr


def test_the_cores_of_ranks_on_one_host():
    """Bound to a core each, they are not too many for these; but each has one."""
    bound = doctor_module._with_cores({"usable_cores": 1.0, "cores": 4}, [{0}, {1}])
    assert (bound["usable_cores"], bound["cores_a_rank"]) == (2, 1)
    quota = doctor_module._with_cores({"usable_cores": 1.5, "cores": 4}, [{0, 1, 2}, {0, 1, 2}])
    assert (quota["usable_cores"], quota["cores_a_rank"]) == (1.5, 1.5)


def test_a_rule_that_fails_is_a_finding():
    found = rules.examine({section: {} for section in ("host", "network", "python", "packages")})
    assert "doctor" in {finding.name for finding in found}


def run(*arguments, **options):
    command = [sys.executable, "-m", "hvd_quant.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def test_the_report(machine):
    """Plain where there is no terminal, in colours on one; and the verdict comes last."""
    environment = {**os.environ, "PYTHONPATH": str(machine.folder)}
    done = run("doctor", env=environment)
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    assert done.stdout.strip().splitlines()[-1].startswith("This machine is ")
    assert "codec        " in done.stdout
    assert "could not be found out" not in done.stdout
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "hvd_quant.cli", "doctor"]
    with subprocess.Popen(command, stdout=theirs, env={**environment, "TERM": "xterm-256color"}):
        os.close(theirs)
        seen = b""
        try:
            while block := os.read(ours, 65536):
                seen += block
        except OSError:
            pass  # how Linux says that the other end is closed
    assert b"\x1b[1m" in seen


def test_json_to_a_file(machine, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(machine.folder)}
    done = run("doctor", "--json", tmp_path / "found.json", env=environment)
    assert (done.returncode, done.stdout) == (0, "")
    assert json.loads((tmp_path / "found.json").read_text())["healthy"]
    done = run("doctor", "--json", tmp_path / "no folder" / "found.json", env=environment)
    assert "cannot write" in done.stderr


def test_who_has_launched():
    assert meeting.launch({}) is None
    assert meeting.launch({"HOROVOD_RANK": "1", "HOROVOD_SIZE": "x"}) is None
    mine = {"RANK": "1", "SIZE": "4", "LOCAL_RANK": "0", "LOCAL_SIZE": "2"}
    expected = meeting.Launch(1, 4, 0, 2)
    assert meeting.launch({f"HOROVOD_{name}": value for name, value in mine.items()}) == expected
    assert meeting.launch({f"OMPI_COMM_WORLD_{name}": value for name, value in mine.items()}) == expected


def host(**changes):
    """Facts of a host, as far as they are compared."""
    facts = {
        "host": {"name": "node0"},
        "network": {"eth0": {"addresses": ["10.0.0.1"], "up": True, "mtu": 1500}},
        "python": {"version": "3.11.7"},
        "packages": {"torch": "2.13.0", "horovod": "0.28.1"},
        "gpus": {"names": []},
        "mpi": {"version": "mpirun (Open MPI) 4.1.4"},
        "torch": {"horovod": {"mpi": True, "gloo": True}},
        "tensorflow": {},
        "environment": {},
        "clock": 100.0,
    }
    return {**facts, **changes}


def other(**changes):
    nic = {"eth0": {"addresses": ["10.0.0.2"], "up": True, "mtu": 1500}}
    return host(**{"host": {"name": "node1"}, "network": nic, **changes})


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, None),
        ({"python": {"version": "3.11.9"}}, None),
        ({"python": {"version": "3.12.1"}}, "versions-differ"),
        ({"packages": {"torch": "2.12.0", "horovod": "0.28.1"}}, "versions-differ"),
        ({"mpi": {"version": None}}, "versions-differ"),
        ({"torch": {"horovod": {"mpi": False, "gloo": True}}}, "builds-differ"),
        ({"gpus": {"names": ["H100"]}}, "gpus-differ"),
        ({"network": {"ens3": {"addresses": ["10.0.0.2"], "up": True, "mtu": 1500}}}, "interfaces-differ"),
        ({"network": {"eth0": {"addresses": ["10.0.0.1"], "up": True, "mtu": 1500}}}, "same-address"),
        ({"network": {"eth0": {"addresses": ["10.0.0.2"], "up": True, "mtu": 9000}}}, "mtu-differs"),
        ({"environment": {"HVD_QUANT_BANDWIDTH": "10"}}, "variables-differ"),
        ({"mpi": {"error": "no answer"}, "torch": {"error": "died"}, "gpus": {"error": "hangs"}}, None),
        ({"clock": 100.5}, None),
        ({"clock": 102.0}, "clocks-differ"),
        ({"network": {"error": "no psutil"}}, None),
    ],
)
def test_hosts_are_compared(changes, name):
    found = compare.compare({"node0": host(), "node1": other(**changes)})
    assert {finding.name for finding in found} == ({name} if name else set())


def test_hosts_of_the_same_name():
    assert not compare.same_names([("a", host()), ("b", other())])
    (finding,) = compare.same_names([("a", host()), ("a", other())])
    assert finding.name == "same-hostname"


def test_bench_lists_and_runs_what_exists(capfd):
    assert main(["bench"]) == 0
    listed = [line.split()[0] for line in capfd.readouterr().out.splitlines()]
    assert listed == list(BENCHMARKS)
    for module, _ in BENCHMARKS.values():
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists()
    assert main(["bench", "accuracy", "--help"]) == 0
    assert "--markdown" in capfd.readouterr().out
    assert main(["bench", "speed"]) == 2
    assert "there is no 'speed'" in capfd.readouterr().err
