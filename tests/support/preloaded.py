"""Python processes that start with a framework imported: forked from one that has imported it.

Importing torch or TensorFlow takes each rank seconds of a core, and ranks share the cores. `python` starts a
server that imports the modules once, and returns the beginning of a command that takes the place of
``python``. That command is a small process: it hands its arguments, environment, folder and open files to the
server, passes signals on, and ends as the forked process does.

What Python and the modules read from the environment when they start is the server's. Where that matters,
take ``sys.executable``. Ranks with odd numbers have another server, whose Python hashes strings with another
seed: an order that depends on hashes must not be the same on all ranks by chance. The seeds differ from run
to run, unless ``TEST_HASH_SEED`` says which: the report's header has it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys

SEED = int(os.environ.get("TEST_HASH_SEED") or int.from_bytes(os.urandom(2), "big"))
os.environ["TEST_HASH_SEED"] = str(SEED)  # for processes that start servers of their own
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def python(*modules, environment):
    """The beginning of a command that goes on with ``-m`` and a module, or with a file, and arguments."""
    folder, servers = _started.get(modules, (None, []))
    if not servers or any(server.poll() is not None for server in servers):
        folder, _ = _started[modules] = _start(modules, environment)
    return [sys.executable, "-I", "-S", __file__, folder]


_started = {}


def _start(modules, environment):
    """Start two servers; they end with this process, which holds their standard inputs."""
    import subprocess
    import tempfile

    folder, servers = tempfile.mkdtemp(prefix="preloaded-"), []
    where = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "start_new_session": True}
    for parity in (0, 1):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(f"{folder}/{parity}")
            listener.listen(64)
            descriptor = listener.fileno()
            command = [sys.executable, __file__, "--serve", str(descriptor), *modules]
            seeded = {**environment, "PYTHONHASHSEED": str(2 * SEED + parity)}
            servers.append(subprocess.Popen(command, env=seeded, pass_fds=[descriptor], **where))
    return folder, servers


def ask(folder, arguments):
    """Have a server run Python with these arguments, and end as it ends."""
    rank = os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ.get("HOROVOD_RANK") or os.getpid()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.connect(f"{folder}/{int(rank) % 2}")
        request = {
            "arguments": arguments,
            "environment": dict(os.environ),
            "folder": os.getcwd(),
            "cores": sorted(os.sched_getaffinity(0)),
        }
        with open(os.memfd_create("request"), "w+") as file:  # it may be too long for a message
            json.dump(request, file)
            file.seek(0)
            socket.send_fds(server, [b"run"], [0, 1, 2, file.fileno()])
        for number in FORWARDED:
            signal.signal(number, lambda number, frame: forward(server, number))
        answer = server.recv(100)
    if not answer:
        sys.exit(f"{__file__}: the server has ended")
    status = int(answer)
    if status < 0:
        for number in FORWARDED:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def forward(server, number):
    with contextlib.suppress(OSError):  # the process has ended, and its status is on the way
        server.send(str(number).encode())


def serve(listener, modules):
    """Import the modules, then fork for every request; returns what `keep` does, in the forked process.

    Ends when standard input does, and removes the folder of its socket.
    """
    import gc
    import importlib
    import select
    import shutil

    for module in modules:
        importlib.import_module(module)
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the keepers
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            shutil.rmtree(os.path.dirname(listener.getsockname()), ignore_errors=True)
            sys.exit()
        client, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return keep(client, select)
        client.close()


def keep(client, select):
    """Fork once more: this process hands on signals and the status, that one returns the request."""
    _, files, _, _ = socket.recv_fds(client, 100, 4)
    process = os.fork()
    if process == 0:
        client.close()
        os.setpgid(0, 0)
        with open(files.pop()) as file:
            return json.load(file), files
    try:
        os.setpgid(process, process)  # here, too: whoever comes first
        end = os.pidfd_open(process)
        while end not in select.select([client, end], [], [])[0]:
            number = client.recv(100)
            if not number:  # who asked has been killed
                os.killpg(process, signal.SIGKILL)
                break
            os.killpg(process, int(number))  # its children are no descendants of who asked
        else:
            client.send(str(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])).encode())
    finally:
        os._exit(0)


def become(request, files):
    """Turn this process into what Python would be with the request's arguments, and run their program."""
    import random
    import runpy

    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    os.sched_setaffinity(0, request["cores"])
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    first, *rest = request["arguments"]
    path = [path for path in os.environ.get("PYTHONPATH", "").split(":") if path]
    if first == "-m":
        sys.argv[:] = rest
        sys.path[:1] = [request["folder"], *path]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = request["arguments"]
        sys.path[:1] = [os.path.dirname(os.path.abspath(first)), *path]
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        with socket.socket(fileno=int(sys.argv[2])) as listener:
            request, files = serve(listener, sys.argv[3:])
        become(request, files)
    else:
        ask(sys.argv[1], sys.argv[2:])
