"""Facts about a machine, as plain JSON values. `gather` never raises: a failure is recorded as an error."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

Facts = dict[str, Any]
Result = TypeVar("Result")

PACKAGES = (
    "hvd_quant",
    "numpy",
    "torch",
    "tensorflow",
    "keras",
    "tf_keras",
    "horovod",
    "mpi4py",
)
PROBE_SECONDS = 90.0  # a framework's first import from a slow disk takes long
MPIRUN_SECONDS = 30.0  # as above
RESOLVE_SECONDS, NVIDIA_SMI_SECONDS = 5.0, 5.0
VARIABLES = (
    "HOROVOD_",
    "HVD_QUANT_",
    "OMP_",
    "NCCL_",
    "OMPI_MCA_",
    "OMPI_ALLOW",
)  # prefixes of names to report


def gather() -> Facts:
    """Gather facts about this machine; takes as long as its frameworks take to import."""
    sections: dict[str, Callable[[], Facts]] = {
        "host": host,
        "network": network,
        "python": python,
        "packages": packages,
        "gpus": gpus,
        "mpi": mpi,
        "torch": lambda: framework("torch"),
        "tensorflow": lambda: framework("tensorflow"),
        "environment": environment,
    }
    try:
        with ThreadPoolExecutor(len(sections)) as pool:
            facts = dict(zip(sections, pool.map(guarded, sections.values()), strict=True))
    except RuntimeError:  # no more threads are available
        facts = {name: guarded(section) for name, section in sections.items()}
    return facts | {"codec": guarded(codec)}  # not beside the others, because it measures a speed


def guarded(section: Callable[[], Facts]) -> Facts:
    """Return a section's facts, or the error that it ended with."""
    try:
        return section()
    except Exception as error:
        return {"error": describe(error)}


def describe(error: BaseException) -> str:
    """Describe an exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def host() -> Facts:
    """Describe the machine itself; None for what cannot be found out."""
    facts: dict[str, Callable[[], Any]] = {
        "name": own_name,
        "resolves_to": lambda: _resolve(own_name()),
        "system": _system,
        "cpu": _cpu,
        "cores": os.cpu_count,
        "usable_cores": usable_cores,
        "shm_bytes": _shared_memory,
        "root": lambda: os.geteuid() == 0,
        "reads_other_processes": _reads_other_processes,
    }
    return {name: _attempt(read) for name, read in facts.items()}


def _attempt(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Exception:
        return None


def own_name() -> str:
    """Return the machine's name."""
    try:
        return socket.gethostname()
    except Exception:
        return "this machine"


def _shared_memory() -> int:
    """Return the free bytes in /dev/shm; 0 where it does not exist."""
    if not os.path.isdir("/dev/shm"):
        return 0
    shm = os.statvfs("/dev/shm")
    return shm.f_frsize * shm.f_bavail


def _resolve(name: str) -> list[str] | None:
    """Resolve a name to addresses; None if there is no answer in time."""

    def resolve() -> list[str]:
        try:
            return sorted({str(info[4][0]) for info in socket.getaddrinfo(name, None)})
        except Exception:  # OSError, or UnicodeError for an odd name
            return []

    try:
        return _within(RESOLVE_SECONDS, resolve)
    except TimeoutError:
        return None


def _within(seconds: float, action: Callable[[], Result]) -> Result:
    """Return what an action returns, or raise what it raises.

    Raises:
        TimeoutError: it is not done in time. It is left running: a call that hangs in a resolver or a driver
            cannot be ended.
    """
    future: Future[Result] = Future()

    def act() -> None:
        try:
            future.set_result(action())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=act, daemon=True).start()
    if not wait([future], seconds).done:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return future.result()


def _system() -> str:
    name = platform.system()
    if sys.platform == "linux":
        name = platform.freedesktop_os_release().get("PRETTY_NAME", name)
    return f"{name}, {platform.machine()}"


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _reads_other_processes() -> bool:
    """Return whether processes may read each other's memory, as MPI does; containers may forbid it."""
    libc = ctypes.CDLL(None, use_errno=True)
    here, there = ctypes.create_string_buffer(b"x", 1), ctypes.create_string_buffer(1)
    # Two iovec structures: an address and a size each.
    local, remote = ((ctypes.c_size_t * 2)(ctypes.addressof(one), 1) for one in (there, here))
    unsigned = ctypes.c_ulong
    read = libc.process_vm_readv(os.getpid(), local, unsigned(1), remote, unsigned(1), unsigned(0))
    return read == 1 or ctypes.get_errno() != errno.EPERM


def usable_cores() -> float:
    """Return the cores that this process may use, by its affinity and by its container's quota."""
    cores = float(len(os.sched_getaffinity(0)))
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        allowed, period = quota.read_text().split()
        if allowed != "max":
            cores = min(cores, int(allowed) / int(period))
    return cores


def network() -> Facts:
    """Return network interfaces by name, with their IPv4 addresses."""
    import psutil

    states = psutil.net_if_stats()
    return {
        name: {
            "addresses": [one.address for one in addresses if one.family == socket.AF_INET],
            "up": states[name].isup,
            "mtu": states[name].mtu,
            "mbit_s": states[name].speed or None,
        }
        for name, addresses in sorted(psutil.net_if_addrs().items())
        if name in states
    }


def python() -> Facts:
    """Describe the interpreter."""
    return {
        "version": platform.python_version(),
        "executable": sys.executable,
        "virtual_environment": sys.prefix != sys.base_prefix,
    }


def packages() -> Facts:
    """Return versions of installed packages, None where one is not installed."""
    versions: Facts = {}
    for one in metadata.distributions():  # in the order in which Python would import them
        name = one.metadata["Name"]
        if name:  # pip leaves nameless ones behind
            versions.setdefault(name.lower().replace("-", "_"), one.version)
    versions.setdefault("tensorflow", versions.get("tensorflow_cpu"))
    return {name: versions.get(name) for name in PACKAGES}


def gpus() -> Facts:
    """Return the GPUs that NVIDIA's driver lists."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {"names": []}
    status, output = _run([program, "--query-gpu=name", "--format=csv,noheader"], NVIDIA_SMI_SECONDS)
    if status:
        return {"names": [], "error": output or f"exit status {status}"}
    return {"names": output.splitlines()}


def mpi() -> Facts:
    """Describe the MPI whose launcher comes first in PATH."""
    launcher = shutil.which("mpirun")
    if launcher is None:
        return {"launcher": None, "version": None}
    status, output = _run([launcher, "--version"], MPIRUN_SECONDS)
    first = (output.splitlines() or [""])[0]
    if status:
        return {"launcher": launcher, "version": None, "error": first or f"exit status {status}"}
    return {"launcher": launcher, "version": first}


def _run(command: list[str], seconds: float) -> tuple[int, str]:
    """Return the status and output of a program that must end in time."""
    try:
        done = _execute(command, seconds, stderr=subprocess.STDOUT)
    except OSError as error:
        return 1, str(error)
    return done.returncode, done.stdout.strip()


def _execute(command: list[str], seconds: float, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program to its end.

    Raises:
        OSError: it cannot be started; `TimeoutError`, it takes too long.
    """

    def run() -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                text=True,
                errors="replace",
                timeout=seconds,
                **options,
            )
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"no answer within {seconds:g} s") from None

    # A process that waits for a driver or a disk cannot be killed, and subprocess.run waits until it ends.
    return _within(seconds + 1, run)


def codec() -> Facts:
    """Check that the native codec works, and how fast; in a process of its own, which it may crash."""
    return _probe("codec")


def framework(name: str) -> Facts:
    """Describe a framework and how Horovod is built for it; see `hvd_quant.cli.probe`."""
    try:
        installed = _find(name)
    except (ImportError, ValueError) as error:
        return {"installed": True, "error": describe(error)}
    return {"installed": installed, **(_probe(name) if installed else {})}


def _find(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None


def _probe(name: str) -> Facts:
    command = [sys.executable, "-m", "hvd_quant.cli.probe", name]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    try:
        done = _execute(command, PROBE_SECONDS, stderr=subprocess.PIPE, env=environment)
    except TimeoutError:
        return {"error": f"takes more than {PROBE_SECONDS:g} s"}
    last = (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode == 0 and last.startswith("{"):
        return json.loads(last)
    if done.returncode < 0:
        return {"error": f"died of {signal.Signals(-done.returncode).name}"}
    return {"error": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}


def environment() -> Facts:
    """Return environment variables that change how jobs run."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)} | {
        name: os.environ[name]
        for name in ("TF_USE_LEGACY_KERAS", "CUDA_VISIBLE_DEVICES")
        if name in os.environ
    }
