"""How much is free where a containerd keeps its data, as far as that can be known from here."""

from __future__ import annotations

import shutil
import socket
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from serpentine.containerd import Endpoint
from serpentine.errors import DaemonFailed

if TYPE_CHECKING:
    from serpentine.daemon.shell import ContainerShell

__all__ = ["free_inside", "free_there"]

# Who listens on a socket: process, user, group; and Linux's number for the question.
_UCRED, _PEERCRED = struct.Struct("3i"), 17
# For each directory, its device, free blocks and their size; what is kept for root counts.
_ASK = 'for d in "$@"; do stat -c %d "$d" && stat -f -c "%f %S" "$d" || exit 1; done'


def free_there(endpoint: Endpoint, paths: Sequence[str]) -> list[tuple[int, int]] | None:
    """Return the device and the free bytes for each of a containerd's own paths.

    None where we cannot look: another machine, another system, or a process that is not ours to
    look into.  A path alone would not do: the containerd that listens on a socket may be in a
    container, where the same path is another directory.  So it is looked up from that process,
    unless it only passes on what it hears (ssh, socat, a proxy): to where, is not known.
    To be called in a thread.
    """
    try:
        process = Path(f"/proc/{_listener(endpoint.socket_path or '')}")
        if (process / "comm").read_text().strip() != "containerd":
            return None
        root = process / "root"
        found = []
        for path in paths:
            place = root / path.lstrip("/")
            usage = shutil.disk_usage(place)
            # What is kept for root counts: containerd is root.
            found.append((place.stat().st_dev, usage.total - usage.used))
    except OSError:
        return None
    return found


def _listener(path: str) -> int:
    """Return the process that listens on a socket; elsewhere than on Linux, anything or OSError."""
    family = getattr(socket, "AF_UNIX", None)  # Python has none on Windows
    if family is None:
        raise OSError("no sockets of this kind")
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.settimeout(5)
        probe.connect(path)
        return int(_UCRED.unpack(probe.getsockopt(socket.SOL_SOCKET, _PEERCRED, _UCRED.size))[0])


async def free_inside(shell: ContainerShell, paths: Sequence[str]) -> list[tuple[int, int]] | None:
    """Ask in the container of our containerd, as ``free_there`` does from outside of it."""
    try:
        words = (await shell.run(_ASK, *paths)).split()
        numbers = [int(word) for word in words]
    except (DaemonFailed, ValueError):
        return None
    return [
        (device, blocks * size)
        for device, blocks, size in zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True)
    ]
