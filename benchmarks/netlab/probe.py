"""Bandwidth and round-trip time between two hosts of a lab. As a script, one of the two ends."""

from __future__ import annotations

import contextlib
import socket
import statistics
import subprocess
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import Lab

PORT = 7000


def measure(lab: Lab, source: int, target: int, seconds: float = 2.0) -> tuple[float, float]:
    """Payload bits a second of one TCP stream, and seconds of a one-byte message and its answer (median)."""
    command = [sys.executable, __file__]
    server = lab.popen_on(
        target, [*command, "serve"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    with server, contextlib.ExitStack() as stack:
        stack.callback(server.kill)
        if (line := server.stdout.readline()) != "ready\n":
            raise RuntimeError(f"the probe failed: {line}{server.stdout.read()}")
        done = lab.run_on(source, [*command, lab.addresses[target], str(seconds)], timeout=seconds + 60)
    if done.returncode:
        raise RuntimeError(f"the probe failed: {done.stdout}")
    bandwidth, round_trip = map(float, done.stdout.split())
    return bandwidth, round_trip


def serve() -> None:
    """Answer one connection byte by byte, then count what a second one sends after its first quarter."""
    with socket.create_server(("", PORT)) as listener:
        print("ready", flush=True)
        echo, _ = listener.accept()
        with echo:
            echo.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while byte := echo.recv(1):
                echo.sendall(byte)
        bulk, _ = listener.accept()
        with bulk:
            seconds = float(bulk.recv(64))
            bulk.sendall(b"!")
            buffer = bytearray(1 << 20)
            begin, start, count = time.perf_counter(), 0.0, 0
            while size := bulk.recv_into(buffer):
                now = time.perf_counter()
                # TCP's slow start is not the link's rate.
                if start:
                    count += size
                    end = now
                elif now - begin > seconds / 4:
                    start = end = now
            echoed = 8 * count / (end - start)
        answer, _ = listener.accept()
        with answer:
            answer.sendall(str(echoed).encode())


def probe(address: str, seconds: float) -> None:
    times = []
    with socket.create_connection((address, PORT)) as echo:
        echo.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(100):
            begin = time.perf_counter()
            echo.sendall(b".")
            echo.recv(1)
            times.append(time.perf_counter() - begin)
    with socket.create_connection((address, PORT)) as bulk:
        bulk.sendall(str(seconds).encode())
        bulk.recv(1)
        block = bytes(1 << 20)
        begin = time.perf_counter()
        while time.perf_counter() - begin < seconds:
            bulk.sendall(block)
    with socket.create_connection((address, PORT)) as answer:
        print(answer.recv(64).decode(), statistics.median(times))


if __name__ == "__main__":
    serve() if sys.argv[1] == "serve" else probe(sys.argv[1], float(sys.argv[2]))
