"""The profile in a real runc, for a process that has the capabilities: the filter decides."""

from __future__ import annotations

import errno
import json
import os
import platform
import shutil
import sys
import uuid
from pathlib import Path

import pytest

from serpentine.run.seccomp import seccomp
from tests.support.foreign import tool

MACHINES = {"x86_64": "amd64", "aarch64": "arm64", "ppc64le": "ppc64le", "s390x": "s390x"}

# Tries each call with arguments that do no harm, and prints the errno of each: {call: errno}.
# Calls by number have the same number on every architecture.
PROBE = """
import ctypes, json, os
libc = ctypes.CDLL(None, use_errno=True)
def errno_of(function, *arguments):
    ctypes.set_errno(0)
    return ctypes.get_errno() if function(*arguments) == -1 else 0
def number(n, *arguments):
    return errno_of(libc.syscall, *(ctypes.c_long(a) for a in (n, *arguments)))
def socket(family, kind):
    return errno_of(libc.socket, family, kind, 0)
print(json.dumps({
    "io_uring_setup": number(425, 0, 0),
    "open_tree": number(428, -1, 0, 0),
    "clone3": number(435, 0, 0),
    "mount": errno_of(libc.mount, b"none", b"/nowhere", b"tmpfs", ctypes.c_ulong(0), None),
    "unshare": errno_of(libc.unshare, 0),
    "chroot": errno_of(libc.chroot, b"/nowhere"),
    "personality": errno_of(libc.personality, ctypes.c_ulong(0xFFFFFFFF)),
    "personality of no randomization": errno_of(libc.personality, ctypes.c_ulong(0x40000)),
    "AF_INET": socket(2, 1),
    "AF_ALG": socket(38, 5),
    "AF_VSOCK": socket(40, 1),
    "fork": errno_of(lambda: os.waitpid(os.spawnv(os.P_NOWAIT, "/bin/true", ["true"]), 0)[1]),
}))
"""


@pytest.fixture
def probe(tmp_path):
    """Return a function that runs the probe under a profile; this Python is its file system."""
    if os.geteuid() != 0 or shutil.which("runc") is None:
        pytest.fail("this test needs root and runc: run 'make test' as root")
    root = tmp_path / "bundle/rootfs"
    root.mkdir(parents=True)
    python = Path(sys._base_executable).resolve()
    binds = [p for p in map(Path, ("/usr", "/etc", sys.base_prefix)) if not p.is_relative_to(root)]
    for name in ("bin", "lib", "lib64"):
        # Links on a merged /usr, directories elsewhere.
        path = Path("/", name)
        if path.is_symlink():
            (root / name).symlink_to(path.readlink())
        elif path.exists():
            binds.append(path)

    def run(capabilities, profile):
        held = dict.fromkeys(("bounding", "effective", "permitted"), capabilities)
        spec = {
            "ociVersion": "1.0.2",
            "root": {"path": "rootfs", "readonly": False},
            "process": {
                "args": [str(python), "-I", "-c", PROBE],
                "cwd": "/",
                "env": ["PATH=/usr/bin:/bin"],
                "user": {"uid": 0, "gid": 0},
                "capabilities": held,
            },
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                *(
                    {
                        "destination": str(path),
                        "type": "bind",
                        "source": str(path),
                        "options": ["rbind", "ro"],
                    }
                    for path in dict.fromkeys(binds)
                ),
            ],
            "linux": {
                "namespaces": [{"type": t} for t in ("pid", "mount", "ipc", "uts")],
                "seccomp": profile,
            },
        }
        (tmp_path / "bundle/config.json").write_text(json.dumps(spec))
        out = tool(
            *("runc", "--root", tmp_path / "state", "run", "--bundle", tmp_path / "bundle"),
            f"serpentine-{uuid.uuid4().hex[:12]}",
        )
        return {name: errno.errorcode.get(n, "ok") for name, n in json.loads(out).items()}

    return run


# It has the capabilities either way, so that a refusal is the filter's.
HELD = ["CAP_SYS_ADMIN", "CAP_SYS_CHROOT"]
ARCHITECTURE = MACHINES.get(platform.machine(), platform.machine())


def test_refuses_what_it_does_not_name(probe):
    assert probe(HELD, seccomp([], ARCHITECTURE)) == {
        "io_uring_setup": "EPERM",
        "open_tree": "EPERM",
        "clone3": "ENOSYS",
        "mount": "EPERM",
        "unshare": "EPERM",
        "chroot": "EPERM",
        "personality": "ok",
        "personality of no randomization": "EPERM",
        "AF_INET": "ok",
        "AF_ALG": "EPERM",
        "AF_VSOCK": "EPERM",
        "fork": "ok",
    }


def test_capabilities_open_what_is_theirs(probe):
    found = probe(HELD, seccomp(HELD, ARCHITECTURE))
    # Past the filter, the kernel finds fault with the arguments.
    assert found["clone3"] == "EINVAL"
    assert found["mount"] == found["chroot"] == "ENOENT"
    assert found["open_tree"] not in ("EPERM", "ENOSYS")
    assert found["unshare"] == "ok"
    for still in ("io_uring_setup", "personality of no randomization", "AF_ALG", "AF_VSOCK"):
        assert found[still] == "EPERM"
