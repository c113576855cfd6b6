"""File trees as values that can be compared, and snapshots as trees."""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

from serpentine.containerd import Containerd

# What mounting or a security module adds, and no layer holds.
_IGNORED_XATTRS = (
    "security.selinux",
    "trusted.overlay.",
    "user.overlay.",
    "user.rootlesscontainers",
)


def walk(root: Path) -> dict[str, dict[str, object]]:
    """Describe everything below a directory, and the directory itself as ``.``."""
    entries: dict[str, dict[str, object]] = {}
    inodes: dict[tuple[int, int], str] = {}
    paths = [root]
    for folder, folders, files in os.walk(root):
        folders.sort()
        paths += [Path(folder) / name for name in sorted([*folders, *files])]
    for path in paths:
        name = str(path.relative_to(root))
        try:
            status = path.lstat()
        except FileNotFoundError:
            # In a directory that one layer alone has, the kernel lists a whiteout, and has nothing.
            entries[name] = {"type": "whiteout"}
            continue
        entry: dict[str, object] = {
            "type": stat.filemode(status.st_mode)[0],
            "mode": oct(stat.S_IMODE(status.st_mode)),
            "owner": (status.st_uid, status.st_gid),
            "xattrs": _xattrs(path),
        }
        if stat.S_ISLNK(status.st_mode):
            entry["target"] = str(path.readlink())
            del entry["mode"]  # has no meaning, and tools differ
        elif stat.S_ISREG(status.st_mode):
            entry["content"] = hashlib.sha256(path.read_bytes()).hexdigest()
            entry["mtime"] = int(status.st_mtime)
            if status.st_nlink > 1:
                entry["linked to"] = inodes.setdefault((status.st_dev, status.st_ino), name)
        elif stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
            entry["device"] = (os.major(status.st_rdev), os.minor(status.st_rdev))
        entries[name] = entry
    return entries


def _xattrs(path: Path) -> dict[str, bytes]:
    return {
        name: os.getxattr(path, name, follow_symlinks=False)
        for name in os.listxattr(path, follow_symlinks=False)
        if not name.startswith(_IGNORED_XATTRS)
    }


def differences(ours: dict, theirs: dict) -> list[str]:
    """Return what differs, a line each; the root directory itself does not count."""
    lines = []
    for name in sorted({*ours, *theirs} - {"."}):
        if name not in theirs:
            lines.append(f"only in ours: {name} {ours[name]}")
        elif name not in ours:
            lines.append(f"only in theirs: {name} {theirs[name]}")
        elif ours[name] != theirs[name]:
            lines.append(f"{name}: ours {ours[name]}, theirs {theirs[name]}")
    return lines


@asynccontextmanager
async def mounted(
    client: Containerd, snapshotter: str, key: str, here: Callable[[str], str] = str
) -> AsyncIterator[Path]:
    """Mount a committed snapshot read-only, as containerd says.

    ``here`` translates containerd's paths into this machine's.
    """
    snapshots = client.snapshots(snapshotter)
    view = f"view-{secrets.token_hex(4)}"
    # Without a lease the view would go with the next collection (trap 3).
    await client.leases.create(view, expires=timedelta(minutes=5))
    mounts = await snapshots.view(view, key, lease=view)
    target = Path(tempfile.mkdtemp(prefix="spt-"))
    try:
        for mount in mounts:
            options = ",".join([*mount.options, "ro"])
            kind = ["--bind"] if mount.type == "bind" else ["-t", mount.type]
            options = options.replace("rbind,", "")
            options, source = here(options), here(mount.source)
            command = ["mount", *kind, "-o", options, source, str(target)]
            subprocess.run(command, check=True, capture_output=True)
        try:
            yield target
        finally:
            subprocess.run(["umount", target], check=True)
    finally:
        target.rmdir()
        await client.leases.delete(view, sync=True)


async def snapshot_tree(
    client: Containerd, snapshotter: str, key: str, here: Callable[[str], str] = str
) -> dict:
    """Return the tree of a committed snapshot."""
    async with mounted(client, snapshotter, key, here) as root:
        return walk(root)


async def layer_folders(client: Containerd, snapshotter: str, key: str) -> list[Path]:
    """Return the overlay's directories that a committed snapshot is made of, the lowest first.

    They are what containerd wrote itself: whiteouts and opaque marks are seen there.
    """
    view = f"view-{secrets.token_hex(4)}"
    await client.leases.create(view, expires=timedelta(minutes=5))
    try:
        (mount,) = await client.snapshots(snapshotter).view(view, key, lease=view)
    finally:
        await client.leases.delete(view)
    if mount.type == "bind":
        return [Path(mount.source)]
    (lower,) = (o.partition("=")[2] for o in mount.options if o.startswith("lowerdir="))
    return [Path(folder) for folder in reversed(lower.split(":"))]


def raw_walk(root: Path, before: float) -> dict[str, tuple[object, ...]]:
    """Describe a directory of an overlay by all that its file system knows.

    before: times that are later were not given by anybody, and count as "now".
    """
    entries: dict[str, tuple[object, ...]] = {}
    inodes: dict[int, str] = {}
    for folder, folders, files in os.walk(root):
        folders.sort()
        names = ["."] if Path(folder) == root else []
        for name in [*names, *folders, *sorted(files)]:
            path = Path(folder) / name
            status = path.lstat()
            relative = str(path.relative_to(root))
            kind = stat.S_IFMT(status.st_mode)
            what: object = None
            if kind == stat.S_IFREG:
                what = path.read_bytes()
            elif kind == stat.S_IFLNK:
                what = str(path.readlink())
            elif kind in (stat.S_IFCHR, stat.S_IFBLK):
                what = (os.major(status.st_rdev), os.minor(status.st_rdev))
            attributes = {
                attribute: os.getxattr(path, attribute, follow_symlinks=False)
                for attribute in os.listxattr(path, follow_symlinks=False)
            }
            first = "" if kind == stat.S_IFDIR else inodes.setdefault(status.st_ino, relative)
            entries[relative] = (
                oct(status.st_mode),
                (status.st_uid, status.st_gid),
                "now" if status.st_mtime >= before else status.st_mtime_ns,
                what,
                attributes,
                first,
            )
    return entries
