"""The network lab: benchmarks/netlab. Makes hosts on this machine, so it needs root and skips without."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from launch import need

ROOT = Path(__file__).parents[2]

from benchmarks import netlab  # noqa: E402
from benchmarks.netlab.probe import measure  # noqa: E402

HANG = 120  # seconds; far above what anything here takes
WHY_NOT = netlab.missing()
needs_lab = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))

ALLREDUCE = """
import socket, sys, torch
import horovod.torch as hvd
hvd.init()
total = hvd.allreduce(torch.full((1000,), float(2 ** hvd.rank())), op=hvd.Sum)
sys.stdout.write(f"<{hvd.rank()} {socket.gethostname()} {total.unique().tolist()}>\\n")
"""


@pytest.fixture(scope="module")
def lab():
    with netlab.Lab(hosts=2) as running:
        yield running


def network_of(process):
    try:
        return os.readlink(f"/proc/{process}/ns/net")
    except OSError:
        return None  # it has ended


def networks_of(process):
    """The network namespaces of a process's labs: those of its children."""
    children = " ".join(path.read_text() for path in Path(f"/proc/{process}/task").glob("*/children")).split()
    return {network_of(child) for child in children} - {network_of("self"), None}


def commands_in(networks):
    """Command lines of the processes that are in one of the network namespaces."""
    processes = [path for path in Path("/proc").glob("[0-9]*") if network_of(path.name) in networks]
    found = []
    for path in processes:
        with contextlib.suppress(OSError):  # it has ended
            found.append((path / "cmdline").read_text().replace("\0", " ").strip())
    return found


def wait_for(condition):
    deadline = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def assert_clean(networks):
    wait_for(lambda: not commands_in(networks))
    assert not {"node0", "node1", "bridge"} & set(os.listdir("/sys/class/net"))
    assert "netlab" not in Path("/proc/self/mounts").read_text()
    assert not Path("/run/netlab").exists()
    assert not list(Path(tempfile.gettempdir()).glob("ompi.node*"))


def test_rates_and_delays():
    assert netlab.parse_rate("2.5gbit") == 2_500_000_000
    assert netlab.parse_rate("100Mbit") == 100_000_000
    assert netlab.parse_rate(None) is None
    assert netlab.parse_delay("50us") == pytest.approx(50e-6)
    for rate in ("", "fast", "100", "1gb", "0mbit", "-1mbit"):
        with pytest.raises(ValueError, match="is no rate"):
            netlab.parse_rate(rate)
    with pytest.raises(ValueError, match="is no delay"):
        netlab.parse_delay("5")
    with pytest.raises(ValueError, match="1 to 250 hosts"):
        netlab.Lab(hosts=0)


def test_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda program, path: None if program == "sshd" else program)
    assert "apt-get install openssh-server" in netlab.missing()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "root" in netlab.missing()
    with pytest.raises(netlab.LabError, match="root"), netlab.Lab():
        pass


@needs_lab
@pytest.mark.parametrize(
    ("launcher", "slots"), [("horovodrun mpi", 2), ("horovodrun gloo", 2), ("mpirun", 1)]
)
def test_allreduce_over_all_ranks(lab, launcher, slots):
    need("torch")
    name, *controller = launcher.split()
    options = {"controller": controller[0]} if controller else {}
    done = getattr(lab, name)([sys.executable, "-c", ALLREDUCE], slots=slots, timeout=HANG, **options)
    assert done.returncode == 0, done.stdout
    ranks = 2 * slots
    expected = [(str(rank), f"node{rank // slots}", str(2.0**ranks - 1)) for rank in range(ranks)]
    assert sorted(re.findall(r"<(\d) (node\d) \[(.*?)\]>", done.stdout)) == expected, done.stdout


@needs_lab
def test_hosts_are_hosts(lab, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    value = """ "a\\b" ; $HOME 'c' # d"""
    script = 'printf "%s\\n" "$(hostname) $PWD $(command -v python) $VALUE"'
    for host, name in enumerate(lab.names):
        done = lab.run_on(host, ["sh", "-c", script], env={"VALUE": value})
        python = Path(sys.executable).with_name("python")
        assert done.stdout == f"{name} {tmp_path} {python} {value}\n"
        assert lab.run_on(host, ["getent", "hosts", "node1"]).stdout.split() == [lab.addresses[1], "node1"]
    everywhere = lab.mpirun(["sh", "-c", script], env={"VALUE": value}, timeout=HANG).stdout.splitlines()
    assert sorted(everywhere) == [f"{name} {tmp_path} {python} {value}" for name in lab.names]
    assert not {"node0", "node1", "bridge"} & set(os.listdir("/sys/class/net"))


@needs_lab
def test_links_are_shaped_in_both_directions(lab):
    def disciplines():
        for space, device in zip(
            [*lab._spaces, lab._switch, lab._switch], ["eth0", "eth0", *lab.names], strict=True
        ):
            yield space.net("tc", f"qdisc show dev {device}")

    lab.reshape(rate="100mbit")
    assert all("tbf" in line and "rate 100Mbit" in line for line in disciplines())
    assert all(figure > 0 for figure in measure(lab, 0, 1, seconds=0.1))
    try:
        lab.reshape(rate="1gbit", delay="2ms")
    except netlab.LabError as error:
        assert "netem" in str(error)  # noqa: PT017  a kernel without it
    else:
        assert all("rate 1Gbit" in line for line in disciplines())
        assert sum("delay 2ms" in line for line in disciplines()) == 2
        assert measure(lab, 0, 1, seconds=0.1)[1] > 4e-3
    lab.reshape()
    assert not any("tbf" in line or "netem" in line for line in disciplines())


@needs_lab
def test_status_passes_through(lab):
    fails = ["sh", "-c", "echo out; exit 7"]
    done = lab.run_on(1, fails)
    assert (done.returncode, done.stdout) == (7, "out\n")
    assert lab.run_on(0, ["sh", "-c", "kill -SEGV $$"]).returncode == 128 + signal.SIGSEGV
    command = [sys.executable, "-m", "benchmarks.netlab", "--quiet", "--launcher", "mpirun", "--", *fails]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=HANG)
    assert (done.returncode, done.stdout) == (7, "out\nout\n")


@needs_lab
def test_timeout_kills_the_whole_tree(lab):
    # The second process leaves its session, and its output open elsewhere, as daemons do.
    script = "setsid sleep 1001 >/dev/null 2>&1 & echo begun; sleep 1002"
    for seconds in (3, 10, 30):  # on a busy machine the ranks may not have begun by the first
        with pytest.raises(subprocess.TimeoutExpired) as caught:
            lab.mpirun(["sh", "-c", script], slots=2, timeout=seconds)
        if caught.value.output.count("begun") == 4:
            break
    else:
        pytest.fail(f"the ranks did not begin:\n{caught.value.output}")
    networks = networks_of(os.getpid())
    # What remains are the lab's own: for each host and the switch, unshare and its first process.
    own = 3 * ["sh"] + 3 * ["unshare"]
    wait_for(lambda: sorted(line.partition(" ")[0] for line in commands_in(networks)) == own)
    assert lab.mpirun(["true"], timeout=HANG).returncode == 0


@needs_lab
def test_nothing_is_left_after_an_exception():
    before = networks_of(os.getpid())
    with pytest.raises(ZeroDivisionError), netlab.Lab(hosts=3) as lab:  # noqa: PT012
        running = lab.popen_on(2, ["sh", "-c", "sleep 1003 & sleep 1003"])
        networks = networks_of(os.getpid()) - before
        assert len(networks) == 4
        wait_for(lambda: len([line for line in commands_in(networks) if line == "sleep 1003"]) == 2)
        1 / 0  # noqa: B018
    assert_clean(networks)
    assert running.wait(HANG) != 0
    with pytest.raises(netlab.LabError, match="not running"):
        lab.run_on(0, ["true"])


@needs_lab
@pytest.mark.parametrize("signal_sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_after_a_signal(signal_sent):
    options = ["--quiet", "--launcher", "mpirun", "--rate", "1gbit"]
    command = [sys.executable, "-m", "benchmarks.netlab", *options, "--", "sleep", "1004"]
    # Jobs in the background of a shell ignore Ctrl-C, and so would the lab in tests that are run there.
    heed = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, **heed) as process:
        wait_for(
            lambda: len([line for line in commands_in(networks_of(process.pid)) if line == "sleep 1004"]) == 2
        )
        networks = networks_of(process.pid)
        process.send_signal(signal_sent)
        status = process.wait(HANG)
    assert status == (-signal_sent if signal_sent == signal.SIGKILL else 128 + signal_sent)
    assert_clean(networks)
