"""Trees on this machine's disk that hold everything a file system can."""

from __future__ import annotations

import os
import stat
from pathlib import Path

# A time with nanoseconds, one far away, and a whole one.
TIMES = (1_700_000_000_123_456_789, 5_000_000_000_000_000_001, 1_600_000_000_000_000_000)


def put(path: Path, data: bytes | str = b"", *, mode: int = 0o644, time: int = TIMES[2]) -> Path:
    """Write a file with a mode and a time, and the directories above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    path.chmod(mode)
    os.utime(path, ns=(time, time))
    return path


def everything(root: Path) -> Path:
    """Make a directory with one of each: needs root."""
    put(root / "plain", "plain", time=TIMES[0])
    put(root / "future", "2128", time=TIMES[1])
    put(root / "setuid", "x", mode=0o4755)
    put(root / "secret", "x", mode=0o600)
    os.chown(root / "secret", 1234, 5678)
    put(root / "many" / "names", "n")
    os.link(root / "many" / "names", root / "many" / "other")
    os.link(root / "many" / "names", root / "and-another")
    (root / "empty").mkdir(mode=0o700)
    (root / "sticky").mkdir()
    (root / "sticky").chmod(0o1777)
    os.chown(root / "sticky", 12, 34)
    (root / "dangling").symlink_to("/nowhere/at/all")
    (root / "loop").symlink_to("loop")
    (root / "to-root").symlink_to("/")
    (root / "up").symlink_to("../../..")
    os.chown(root / "up", 77, 88, follow_symlinks=False)
    os.mkfifo(root / "fifo", 0o640)
    os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(root / "disk", stat.S_IFBLK | 0o600, os.makedev(7, 0))
    put(root / os.fsdecode(b"caf\xe9-\xff"), "not UTF-8")
    put(root / "grün \u4f60\u597d \U0001f600", "UTF-8")
    put(root / "with\nnewline and = and \\", "odd")
    put(root / ("n" * 255), "long")
    put(root / ("d" * 120) / ("e" * 120) / ("f" * 120) / "deep", "deep")
    put(root / "marked", "x")
    os.setxattr(root / "marked", "user.binary", b"\0\xff=\n\x80")
    os.setxattr(root / "marked", "user.text", b"value")
    os.setxattr(root / "sticky", "user.on-a-directory", b"1")
    # cap_net_raw, permitted and effective
    capability = bytes.fromhex("0100000200200000000000000000000000000000")
    put(root / "capable", "x", mode=0o755)
    os.setxattr(root / "capable", "security.capability", capability)
    with (root / "sparse").open("wb") as file:
        file.write(b"begin")
        file.seek(5 << 20)
        file.write(b"middle")
        file.truncate(9 << 20)
    for folder, folders, _ in os.walk(root):
        for name in folders:
            os.utime(Path(folder) / name, ns=(TIMES[0], TIMES[0]), follow_symlinks=False)
    return root


def times(root: Path) -> dict[str, int]:
    """Return the time of everything below a directory, links included, in nanoseconds."""
    return {
        str(path.relative_to(root)): path.lstat().st_mtime_ns for path in sorted(root.rglob("*"))
    }
