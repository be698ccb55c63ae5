"""Several hosts on one Linux machine, to run `horovodrun` and `mpirun` over links of a chosen rate.

    with Lab(hosts=2, rate="1gbit") as lab:
        done = lab.horovodrun([sys.executable, "train.py"], slots=1, timeout=600)
        print(done.returncode, done.stdout)

A host is a set of Linux namespaces: its own network with the NIC eth0, hostname, /etc/hosts, processes,
shared memory (System V and /dev/shm), /run and directory for temporary files. Its eth0 is one end of a cable
whose other end is plugged into a bridge, the switch. The switch has a network namespace of its own, where the
machine's firewall rules, such as those of Docker, do not apply. A launch starts an sshd in every host, with a
key made for the lab.

Nothing needs removing afterwards. The first process of a host or of the switch waits for the end of its
standard input, a pipe from this process. However this process ends, the pipe closes, the first process exits,
and the kernel kills every other process of these namespaces; and with the last process go the network and the
mounts. All files of a lab lie in file systems in memory that are mounted in its hosts alone.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["Lab", "LabError", "missing", "parse_delay", "parse_rate"]

Command = Sequence[str | os.PathLike[str]]

_PACKAGES = {  # the Debian package of each program
    **dict.fromkeys(("ip", "tc"), "iproute2"),
    **dict.fromkeys(("unshare", "nsenter", "setpriv"), "util-linux"),
    "mount": "mount",
    "mpirun": "openmpi-bin",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "sshd": "openssh-server",
}
_PATH = f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"

# The caller's environment has precedence over these.
_DEFAULTS = {
    # A lab has as a rule more ranks than the machine has cores: waiting must not keep others from working.
    "OMP_NUM_THREADS": "1",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "OMPI_MCA_hwloc_base_binding_policy": "none",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_pml": "ob1",
    "OMPI_MCA_btl": "self,vader,tcp",
    "OMPI_MCA_btl_tcp_if_include": "eth0",
    "OMPI_MCA_oob_tcp_if_include": "eth0",
}

# Run by the first process of each host. sshd wants a directory in /run, and the lab keeps its files there.
_BOOT_HOST = """
echo "$1" >/proc/sys/kernel/hostname
mount -t tmpfs -o mode=755 netlab /run
mkdir -p /run/sshd /run/netlab/bin
mkdir -m 1777 /run/netlab/tmp
mount -t tmpfs -o mode=1777 netlab /dev/shm
printf '%s\\n' "$2" >/run/netlab/hosts
mount --bind /run/netlab/hosts /etc/hosts
# sshd lets nobody in whose account is locked, as root's is on some distributions.
(umask 077 && printf 'root:*:19000:0:99999:7:::\\nsshd:*:19000:0:99999:7:::\\n' >/run/netlab/shadow)
mount --bind /run/netlab/shadow /etc/shadow
ip link set lo up
"""
_BOOT_SWITCH = "ip link add name bridge type bridge; ip link set bridge up"

_TREE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]  # dies with its first process
_UNSHARE = [*_TREE, "--net", "--uts", "--ipc"]

_SSH = """#!/bin/sh
exec {ssh} -F /run/netlab/ssh_config "$@"
"""
_SSH_CONFIG = """
IdentityFile /run/netlab/key
IdentitiesOnly yes
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
BatchMode yes
LogLevel ERROR
"""
_SSHD_CONFIG = """
Port {port}
PidFile /run/netlab/sshd-{port}.pid
HostKey /run/netlab/key
AuthorizedKeysFile /run/netlab/key.pub
StrictModes no
PermitRootLogin prohibit-password
PermitUserRC no
UsePAM no
UseDNS no
MaxStartups 1000
SetEnv {environment}
"""


class LabError(RuntimeError):
    """A lab, or a part of it, cannot be made here; says why and what to do."""


def missing() -> str | None:
    """Why no lab can be made here, for the reader, or None if one can."""
    if sys.platform != "linux":
        return "netlab needs Linux: its hosts are Linux namespaces"
    if os.geteuid() != 0:
        return "netlab needs root, to make namespaces: use sudo, or a container made with --privileged"
    absent = [program for program in _PACKAGES if not shutil.which(program, path=_PATH)]
    if absent:
        packages = " ".join(sorted({_PACKAGES[program] for program in absent}))
        return f"netlab needs {', '.join(absent)}. On Debian or Ubuntu: apt-get install {packages}"
    trial = f"{_BOOT_SWITCH}; ip link add name a0 type veth peer name a1; mount -t tmpfs netlab /run"
    done = _run([*_UNSHARE, "sh", "-ec", trial], check=False)
    if done.returncode:
        why = done.stdout.strip()
        return f"netlab cannot make hosts here (a container needs --privileged, say): {why}"
    return None


def parse_rate(text: str | None) -> int | None:
    """Bits a second of a rate such as "100mbit" or "2.5gbit" (k, m, g are powers of 1000); None stays None.

    Raises:
        ValueError: the text is no rate.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d*)?)([kmg]?)bit", text.strip().lower())
    rate = int(float(match[1]) * 1000 ** " kmg".index(match[2] or " ")) if match else 0
    if rate < 1000:
        raise ValueError(f"{text!r} is no rate: write it as 100mbit, 2.5gbit or 800kbit")
    return rate


def parse_delay(text: str) -> float:
    """Seconds of a delay such as "0ms", "0.2ms", "50us" or "1s".

    Raises:
        ValueError: the text is no delay.
    """
    match = re.fullmatch(r"(\d+(?:\.\d*)?)(us|ms|s)", text.strip().lower())
    if not match:
        raise ValueError(f"{text!r} is no delay: write it as 0.2ms, 50us or 1s")
    return float(match[1]) * {"us": 1e-6, "ms": 1e-3, "s": 1.0}[match[2]]


class Lab:
    """Hosts node0, node1, ... that share a switch; a context manager.

    Args:
        hosts: how many.
        rate: of each host's link, in each direction (see `parse_rate`); None: as fast as the machine goes.
        delay: of each message from one host to another, one way (see `parse_delay`); needs sch_netem.

    Raises:
        ValueError: an argument is out of range.
        LabError: on entry, where a lab cannot be made.
    """

    def __init__(self, hosts: int = 2, rate: str | None = None, delay: str = "0ms") -> None:
        if not 1 <= hosts <= 250:
            raise ValueError(f"a lab has 1 to 250 hosts, not {hosts}")
        self.names = [f"node{i}" for i in range(hosts)]
        self.addresses = [f"10.77.0.{i + 1}" for i in range(hosts)]
        self._shape = parse_rate(rate), parse_delay(delay)
        self._ports = itertools.count(2200)  # a new one a launch: the last one's sshd may still be dying
        self._spaces: list[_Namespaces] = []

    def __enter__(self) -> Lab:
        if reason := missing():
            raise LabError(reason)
        with contextlib.ExitStack() as stack:
            self._switch = stack.enter_context(_Namespaces(_BOOT_SWITCH))
            pairs = map(" ".join, zip(self.addresses, self.names, strict=True))
            table = "\n".join(["127.0.0.1 localhost", *pairs])
            self._spaces = [stack.enter_context(_Namespaces(_BOOT_HOST, name, table)) for name in self.names]
            for name, address, space in zip(self.names, self.addresses, self._spaces, strict=True):
                # Both ends are made where they belong: the machine's own network never sees them.
                cable = f"eth0 netns {space.pid} type veth peer name {name} netns {self._switch.pid}"
                self._switch.net("ip", f"link add name {cable}")
                self._switch.net("ip", f"link set {name} master bridge up")
                space.net("ip", f"address add {address}/24 dev eth0")
                space.net("ip", "link set eth0 up")
            self._configure_ssh()
            self._apply(*self._shape)
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()
        self._spaces = []

    def reshape(self, rate: str | None = None, delay: str = "0ms") -> None:
        """Give all links this rate and delay in place of what they had; arguments and defaults are the lab's.

        Raises:
            ValueError: an argument is out of range.
            LabError: the kernel cannot do it.
        """
        self._apply(parse_rate(rate), parse_delay(delay))

    def popen_on(
        self, host: int, command: Command, *, env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[Any]:
        """Start a command in a host, in the current directory, with this Python's folder first in PATH.

        Args:
            host: number of the host.
            command: program and arguments.
            env: variables in addition to this process's own.
            options: of `subprocess.Popen`. Standard input is empty if not given.

        Returns:
            The process. Its end, and thereby `terminate` and `kill`, kills all processes that it has started.
            A command killed by signal n has the return code 128 + n.
        """
        if not self._spaces:
            raise LabError("the lab is not running: use it in a with statement")
        options = {"stdin": subprocess.DEVNULL, "start_new_session": True, **options}
        return subprocess.Popen(
            [*self._spaces[host].enter(), *map(os.fspath, command)], env=_environment(env), **options
        )

    def run_on(
        self,
        host: int,
        command: Command,
        *,
        env: Mapping[str, str] | None = None,
        timeout: float | None = None,
        stream: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in a host and wait for it.

        Args:
            host: number of the host.
            command: program and arguments.
            env: variables in addition to this process's own.
            timeout: seconds after which it is killed with all that it has started.
            stream: let it write to this process's outputs instead of keeping what it writes.

        Returns:
            Return code and, unless streamed, standard output and error together as `stdout`.

        Raises:
            subprocess.TimeoutExpired: with the `output` so far.
        """
        pipes: dict[str, Any] = {} if stream else {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        with self.popen_on(host, command, env=env, text=True, errors="replace", **pipes) as process:
            try:
                output, _ = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired as error:
                process.kill()
                output, _ = process.communicate()
                raise subprocess.TimeoutExpired(list(command), error.timeout, output) from None
            except BaseException:
                process.kill()
                raise
        return subprocess.CompletedProcess(list(command), process.returncode, output)

    def horovodrun(
        self,
        command: Command,
        *,
        slots: int = 1,
        controller: str = "mpi",
        elastic: Sequence[str] | None = None,
        **options: Any,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command through horovodrun, started in host 0.

        Args:
            command: program and arguments.
            slots: ranks in each host.
            controller: "mpi" or "gloo".
            elastic: options of horovodrun's for an elastic job, in place of slots and hosts; needs "gloo".
            **options: `env`, `timeout` and `stream` of `run_on`.

        Returns:
            As `run_on`. The status is the command's under MPI; under Gloo, horovodrun makes 1 of any failure.

        Raises:
            subprocess.TimeoutExpired: as `run_on`; nothing is left running in any host.
            ValueError: an argument is out of range.
            LabError: horovodrun is missing, or sshd does not start.
        """
        if controller not in ("mpi", "gloo"):
            raise ValueError(f"Horovod has the controllers mpi and gloo, not {controller!r}")
        if elastic is not None and controller != "gloo":
            raise ValueError("elastic jobs need the controller gloo")
        launcher = Path(sys.executable).with_name("horovodrun")
        if not launcher.exists():
            raise LabError(f"no horovodrun beside {sys.executable}: run scripts/setup.sh, and use .venv")
        launch = [launcher, "--disable-cache", f"--{controller}", "--network-interface", "eth0", "--ssh-port"]
        ranks = self._ranks(slots) if elastic is None else elastic
        with self._sshd(options.get("env")) as port:
            return self.run_on(0, [*launch, port, *ranks, *command], **options)

    def mpirun(
        self,
        command: Command,
        *,
        slots: int = 1,
        hostfile: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command through mpirun, started in host 0; arguments and errors as `horovodrun`.

        Args:
            command: program and arguments.
            slots: ranks in each host.
            hostfile: a file to which hosts and slots are written, for mpirun to read; None: it is told -H.
            **options: as of `horovodrun`.

        Returns:
            As `run_on`. The status is the command's, of the first rank that failed.
        """
        ranks = self._ranks(slots)
        if hostfile is not None:
            Path(hostfile).write_text("".join(f"{name} slots={slots}\n" for name in self.names))
            ranks = ["--hostfile", os.fspath(hostfile)]
        with self._sshd(options.get("env")) as port:
            launch = ["mpirun", "--mca", "plm_rsh_args", f"-p {port}", *ranks]
            return self.run_on(0, [*launch, *command], **options)

    def _ranks(self, slots: int) -> list[str]:
        if slots < 1:
            raise ValueError(f"a host needs 1 slot or more, not {slots}")
        return ["-np", str(slots * len(self.names)), "-H", ",".join(f"{name}:{slots}" for name in self.names)]

    def _apply(self, rate: int | None, delay: float) -> None:
        for name, space in zip(self.names, self._spaces, strict=True):
            for where, device in ((space, "eth0"), (self._switch, name)):
                where.net("tc", f"qdisc del dev {device} root", check=False)
                parent = "root"
                if delay and where is self._switch:  # on one side only: once a message, twice a round trip
                    # netem drops what is beyond its limit of packets: this holds 1 GB/s for 0.3 s.
                    netem = f"netem delay {delay * 1e6:.0f}us limit 200000"
                    where.net("tc", f"qdisc add dev {device} root handle 1: {netem}")
                    parent = "parent 1:1"
                if rate:
                    # A burst passes unshaped after a pause. Training sends after pauses, so it is small (1 ms
                    # at this rate), but enough for one stream to reach it. The limit is a queue of 20 ms.
                    burst = max(16 * 1024, min(rate // 8 // 1000, 256 * 1024))
                    limit = burst + max(256 * 1024, rate // 8 // 50)
                    shape = f"tbf rate {rate}bit burst {burst} limit {limit}"
                    where.net("tc", f"qdisc add dev {device} {parent} handle 10: {shape}")

    def _configure_ssh(self) -> None:
        """Give all hosts the same new key, as host key and as root's, and an ssh that uses it."""
        keygen = "ssh-keygen -q -t ed25519 -N '' -C netlab -f /run/netlab/key"
        done = self.run_on(0, ["sh", "-c", keygen])
        if done.returncode:
            raise LabError(f"ssh-keygen failed: {done.stdout}")
        keys = {name: (self._spaces[0].files / name).read_text() for name in ("key", "key.pub")}
        for space in self._spaces:
            for name, text in {**keys, "ssh_config": _SSH_CONFIG}.items():
                (space.files / name).write_text(text)
                (space.files / name).chmod(0o600)
            (space.files / "bin/ssh").write_text(_SSH.format(ssh=shutil.which("ssh", path=_PATH)))
            (space.files / "bin/ssh").chmod(0o755)

    @contextlib.contextmanager
    def _sshd(self, env: Mapping[str, str] | None) -> Iterator[str]:
        """An sshd in every host, whose sessions have the environment of a command here; gives the port."""
        port = str(next(self._ports))
        # One that holds a line break cannot be told to sshd.
        variables = [f"{name}={value}" for name, value in _environment(env).items() if "\n" not in value]
        quoted = ['"' + text.replace("\\", r"\\").replace('"', r"\"") + '"' for text in variables]
        config = _SSHD_CONFIG.format(port=port, environment=" ".join(quoted))
        sshd = shutil.which("sshd", path=_PATH) or "sshd"  # which insists on an absolute path
        with contextlib.ExitStack() as stack:
            waiting = []
            for host, space in enumerate(self._spaces):
                (space.files / f"sshd-{port}").write_text(config)
                log = stack.enter_context(open(space.files / f"sshd-{port}.log", "w+"))
                command = [sshd, "-D", "-e", "-f", f"/run/netlab/sshd-{port}"]
                process = self.popen_on(host, command, stdout=log, stderr=log)
                stack.enter_context(process)
                stack.callback(process.kill)
                waiting.append((process, log, space.files / f"sshd-{port}.pid"))
            for process, log, pid_file in waiting:
                while not pid_file.exists():  # sshd writes it when it listens
                    if process.poll() is not None:
                        log.seek(0)
                        raise LabError(f"sshd failed: {log.read()}")
                    time.sleep(0.005)
            yield port


class _Namespaces:
    """New namespaces, which end with the context or this process; `boot` is a script run in them first."""

    def __init__(self, boot: str, *arguments: str) -> None:
        script = f"{boot}\necho up\nread -r _"  # until a line comes, or this process has died
        self._process = subprocess.Popen(
            [*_UNSHARE, "sh", "-ec", script, "netlab", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PATH": _PATH},
            start_new_session=True,  # a Ctrl-C is for this process alone
        )
        self.pid = self._process.pid
        self.files = Path(f"/proc/{self.pid}/root/run/netlab")

    def __enter__(self) -> _Namespaces:
        if (line := self._process.stdout.readline()) != "up\n":
            raise LabError(f"a host's namespaces could not be made: {line}{self._process.communicate()[0]}")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate("down\n")

    def enter(self) -> list[str]:
        """What to put before a command to run it in here, as a process tree that dies as a whole.

        When nsenter is killed, setpriv has had unshare killed, which has had the tree's first process killed,
        and the kernel kills the others. The shell is that first process, instead of the command: the kernel
        ignores many signals to such a process.
        """
        spaces = ["--net", "--uts", "--ipc", "--mount", f"--pid=/proc/{self.pid}/ns/pid_for_children"]
        tree = [*_TREE, f"--wd={os.getcwd()}", "sh", "-c", '"$@"; exit $?', "sh"]
        return ["nsenter", f"--target={self.pid}", *spaces, "setpriv", "--pdeathsig", "KILL", *tree]

    def net(self, program: str, arguments: str, check: bool = True) -> str:
        """The output of ip or tc in this network; raises LabError if it fails and `check` is true."""
        return _run(["nsenter", f"--target={self.pid}", "--net", program, *arguments.split()], check).stdout


def _environment(env: Mapping[str, str] | None) -> dict[str, str]:
    """The environment of commands in a lab: this process's own, with defaults below it and `env` above."""
    # As the first shell below sshd, bash would read ~/.bashrc, which may change PATH.
    own = {"PATH": _PATH, "TMPDIR": "/run/netlab/tmp", "SHLVL": "1"}
    merged = {**_DEFAULTS, **os.environ, **own, **(env or {})}
    return {**merged, "PATH": f"/run/netlab/bin:{merged['PATH']}"}


def _run(command: Sequence[str], check: bool) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PATH": _PATH},
    )
    if check and done.returncode:
        shown = " ".join(command[3:])
        hint = " (has this kernel the module sch_netem?)" if "netem" in shown else ""
        raise LabError(f"{shown} failed{hint}: {done.stdout.strip()}")
    return done
