"""Our look into layers beside the kernel's own: random layers, mounted as an overlay."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import stat
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from serpentine.run.layers import Layers, look
from serpentine.run.site import Found

NAMES = st.sampled_from(["a", "b", "c"])
PATHS = st.lists(NAMES, min_size=1, max_size=3).map("/".join)
TARGETS = st.tuples(
    st.sampled_from(["", "/", "../", "../../", "./"]),
    st.lists(st.sampled_from(["a", "b", "c", "..", "."]), max_size=3).map("/".join),
    st.sampled_from(["", "/"]),
).map(lambda parts: "".join(parts) or ".")
NODES = st.one_of(
    st.sampled_from(["file", "directory", "opaque", "whiteout"]),
    TARGETS.map(lambda target: f"-> {target}"),
)
LAYERS = st.lists(
    st.lists(st.tuples(PATHS, NODES), max_size=6, unique_by=lambda entry: entry[0]),
    min_size=2,
    max_size=4,
)
ASKED = st.lists(
    st.tuples(
        st.lists(st.sampled_from(["a", "b", "c", "..", "."]), min_size=1, max_size=4).map("/".join),
        st.sampled_from(["", "/"]),
    ).map("".join),
    min_size=3,
    max_size=6,
    unique=True,
)


def build(layer: Path, number: int, entries) -> None:
    for path, node in entries:
        place = layer / path
        above = [layer / parent for parent in list(Path(path).parents)[-2::-1]]
        if any(os.path.lexists(p) and not stat.S_ISDIR(p.lstat().st_mode) for p in above):
            continue  # a file or link of this layer stands in the way
        place.parent.mkdir(parents=True, exist_ok=True)
        if node in ("directory", "opaque") and not os.path.lexists(place):
            place.mkdir()
        if node == "opaque" and place.is_dir() and not place.is_symlink():
            os.setxattr(place, "trusted.overlay.opaque", b"y")
        elif os.path.lexists(place):
            continue
        elif node == "file":
            place.write_text(f"{number} {path}")
        elif node == "whiteout":
            os.mknod(place, 0o600 | stat.S_IFCHR, os.makedev(0, 0))
        else:
            place.symlink_to(node.removeprefix("-> "))


@contextmanager
def mounted(layers: list[Path], target: Path):
    lower = ":".join(map(str, layers))
    target.mkdir()
    # At least two of them: one alone is no overlay.
    command = ["mount", "-t", "overlay", "overlay", "-o", f"lowerdir={lower}", target]
    subprocess.run(command, check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", target], check=True)


class How(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("flags", "mode", "resolve")]


OPENAT2 = 437  # the same on every architecture
IN_ROOT = 0x10
LIBC = ctypes.CDLL(None, use_errno=True)


def kernel_opens(root: int, path: str, *, follow: bool = True) -> int:
    """Open a path as if the directory were the root; as with chroot, links stay inside."""
    how = How(os.O_PATH | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW), 0, IN_ROOT)
    while True:
        number = LIBC.syscall(OPENAT2, root, path.encode(), ctypes.byref(how), ctypes.sizeof(how))
        if number >= 0:
            return number
        # Something was renamed or mounted on this machine while it resolved a "..".
        if ctypes.get_errno() != errno.EAGAIN:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def kernel_finds(root: int, path: str) -> Found:
    try:
        opened = kernel_opens(root, path)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return Found("absent")
        if error.errno not in (errno.ELOOP, errno.ENOTDIR):
            raise
        return Found("other")
    try:
        mode = os.fstat(opened).st_mode
        if stat.S_ISDIR(mode):
            return Found("directory")
        return Found("file", Path(f"/proc/self/fd/{opened}").read_bytes())
    finally:
        os.close(opened)


@pytest.fixture(scope="module", autouse=True)
def as_root():
    if os.geteuid() != 0:
        pytest.fail("mounting needs root: run 'make test' as root")


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(LAYERS, ASKED)
@example([[("a", "directory")], [("a", "file")], [("a/b", "file")]], ["a/b"])
@example([[("a", "opaque")], [("a/b/c", "file")]], ["a/b", "a/b/c"])
@example([[("a", "-> b/..")], [("b", "-> c/c")], [("c/c/c", "file")]], ["a/c", "b/c/.."])
def test_sees_what_the_kernel_sees(entries, asked):
    folder = Path(tempfile.mkdtemp(prefix="spt-"))
    try:
        layers = [folder / str(number) for number in range(len(entries))]
        for number, layer in enumerate(layers):
            layer.mkdir()
            build(layer, number, entries[number])
        with mounted(layers, folder / "mounted"):
            root = os.open(folder / "mounted", os.O_PATH)
            try:
                for path in asked:
                    ours = look(Layers(layers), path, read=True)
                    kernels = kernel_finds(root, path)
                    assert (ours.kind, ours.data) == (kernels.kind, kernels.data), path
                    if ours.kind == "absent":
                        check_missing(root, ours.missing)
            finally:
                os.close(root)
    finally:
        shutil.rmtree(folder)


def check_missing(root: int, missing: str) -> None:
    """It is not there, and what it would lie in is."""
    with pytest.raises(FileNotFoundError):
        kernel_opens(root, missing, follow=False)
    assert kernel_finds(root, missing.rpartition("/")[0] or "/").kind == "directory"
