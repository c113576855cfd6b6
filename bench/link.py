"""A link between a registry and its clients: so many bytes a second, and a round trip of so long.

A process of its own, which forwards connections on loopback; the kernels of some machines cannot
shape.  What it does not have is loss, the slow start of a real connection, and a round trip that
the client's kernel could measure: to it, the registry is near.

    python -m bench.link PORT --each 50e6 --total 200e6 --delay 0.02
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

PIECE = 128 * 1024


@dataclass(frozen=True)
class Link:
    """each, total: bytes a second of a connection and of all; delay: seconds of a round trip."""

    name: str
    each: float
    total: float
    delay: float


class Pace:
    """Lets bytes pass at a rate, whoever asks."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._free = 0.0
        self._lock = threading.Lock()

    def wait(self, size: int) -> None:
        with self._lock:
            now = time.monotonic()
            # What was not used is gone, but for the little that sleeping too long costs.
            self._free = max(self._free, now - 0.01) + size / self._rate
            left = self._free - now
        if left > 0:
            time.sleep(left)


def forward(source: socket.socket, target: socket.socket, paces: list[Pace], delay: float) -> None:
    with contextlib.suppress(OSError):
        while piece := source.recv(PIECE):
            time.sleep(delay)
            for pace in paces:
                pace.wait(len(piece))
            target.sendall(piece)
    for one in (source, target):
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)


def serve(port: int, each: float, total: float, delay: float) -> None:
    everything = Pace(total)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        print(listening.getsockname()[1], flush=True)
        while True:
            client, _ = listening.accept()
            registry = socket.create_connection(("127.0.0.1", port))
            # A request waits for the whole round trip, its answer for the bandwidth.
            for arguments in (
                (client, registry, [], delay),
                (registry, client, [Pace(each), everything], 0.0),
            ):
                threading.Thread(target=forward, args=arguments, daemon=True).start()


@contextmanager
def shaped(port: int, link: Link) -> Iterator[str]:
    """Put a link before a port of this machine; give the address at its other end."""
    figures = [f"--each={link.each}", f"--total={link.total}", f"--delay={link.delay}"]
    command = [sys.executable, "-m", "bench.link", str(port), *figures]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    try:
        yield f"127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.link", description=__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("--each", type=float, required=True)
    parser.add_argument("--total", type=float, required=True)
    parser.add_argument("--delay", type=float, required=True)
    arguments = parser.parse_args()
    # A real one does not wait for a processor of its client's.
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, -15)
    serve(arguments.port, arguments.each, arguments.total, arguments.delay)


if __name__ == "__main__":
    main()
