"""Tasks for tests: descriptions of small ones, and what is left of them on this machine."""

from __future__ import annotations

import json
import os
import select
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from serpentine.containerd import Containerd
from serpentine.errors import AlreadyExists, FailedPrecondition, NotFound

SIGKILL = 9
END_TIMEOUT = 10.0
RUNC = Path("/run/containerd/runc")


def process(*args: str, **more: Any) -> dict[str, Any]:
    """Describe a process; ``more`` are fields of it."""
    user = {"uid": 0, "gid": 0}
    return {"args": args, "cwd": "/", "env": ["PATH=/bin"], "user": user, **more}


def spec(*args: str, mounts: Sequence[dict[str, Any]] = (), **more: Any) -> bytes:
    """Describe a container of one process; ``more`` are fields of that."""
    value = {
        "ociVersion": "1.0.2",
        "process": process(*args, **more),
        "root": {"path": "rootfs"},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts"},
            *mounts,
        ],
        "linux": {
            # Named after the container by default: the same for two tests at once.
            "cgroupsPath": f"/test-{uuid.uuid4().hex[:12]}",
            "namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount")],
        },
    }
    return json.dumps(value).encode()


async def end_task(client: Containerd, container_id: str) -> None:
    """Remove a task and its container, whatever of them is there and in whatever state."""
    with suppress(AlreadyExists):
        await client.containers.create(container_id, b"{}")  # without one, nothing can be asked
    with suppress(NotFound, FailedPrecondition):
        await client.tasks.kill(container_id, SIGKILL, all_processes=True)
    with suppress(NotFound):
        await client.tasks.wait(container_id)
        await client.tasks.delete(container_id)
    await client.containers.delete(container_id)


def shims(namespace: str) -> list[int]:
    """Return the pids of the shims of a namespace."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if "containerd-shim" in words[0] and namespace in words:
                found.append(int(entry.name))
    return found


def ended(pid: int, timeout: float = END_TIMEOUT) -> bool:
    """Wait until a process has ended; False when it has not in time."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([fd], [], [], timeout)[0])
    finally:
        os.close(fd)


def mounted(namespace: str) -> list[str]:
    """Return the mounts of the tasks of a namespace."""
    lines = Path("/proc/mounts").read_text().splitlines()
    return [line.split()[1] for line in lines if f".task/{namespace}/" in line]


def runtime_states(namespace: str) -> list[str]:
    """Return the containers of a namespace that the runtime remembers."""
    folder = RUNC / namespace
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []
