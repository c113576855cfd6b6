"""Commands as another user of this machine, who can reach this Python wherever it lies."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path


def closed_ancestor(path: Path) -> Path | None:
    """Return the topmost directory on the way to a path that others may not enter."""
    for folder in reversed(path.parents):
        if not folder.stat().st_mode & 0o001:
            return folder
    return None


def as_user(
    uid: int,
    gid: int,
    *command: str,
    groups: tuple[int, ...] = (),
    environ: dict[str, str],
    timeout: float = 120,
) -> subprocess.CompletedProcess[str]:
    """Run a command as a user, in a mount namespace where this Python is open to all.

    The test machine's Python may lie in root's home.  Its mode is nobody's business, so the way
    is opened for this command alone: an empty directory is laid over the closed one, with
    nothing in it but what the command needs.
    """
    needed = {
        Path(sys.base_prefix).resolve(),
        Path(sys.prefix).resolve(),
        Path(__file__).resolve().parents[2],
    }
    script = ["set -e"]
    held = {}
    for number, path in enumerate(sorted(needed)):
        closed = closed_ancestor(path)
        if closed is not None:
            held[path] = (closed, f"/tmp/.held-{os.getpid()}-{number}")
    for path, (_, aside) in held.items():
        script += [f"mkdir -p {aside}", f"mount --bind {shlex.quote(str(path))} {aside}"]
    for closed in sorted({closed for closed, _ in held.values()}):
        script.append(f"mount -t tmpfs -o mode=755 tmpfs {shlex.quote(str(closed))}")
    for path, (_, aside) in held.items():
        target = shlex.quote(str(path))
        script += [f"mkdir -p {target}", f"mount --bind {aside} {target}"]
    everyone = ",".join(map(str, groups))
    drop = ["setpriv", f"--reuid={uid}", f"--regid={gid}"]
    drop.append(f"--groups={everyone}" if groups else "--clear-groups")
    script.append(f"cd / && exec {shlex.join([*drop, *command])}")
    try:
        return subprocess.run(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", "\n".join(script)],
            capture_output=True,
            text=True,
            timeout=timeout,
            env=environ,
        )
    finally:
        for _, aside in held.values():
            Path(aside).rmdir()
