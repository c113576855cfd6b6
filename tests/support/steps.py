"""What steps need: an image to run, and a look at all that a step may leave behind."""

from __future__ import annotations

import ipaddress
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serpentine.containerd import Containerd
from serpentine.run.network import BRIDGE_PREFIX, STATE, SUBNET
from tests.support.images import (
    BUSYBOX,
    Image,
    Layer,
    busybox_layer,
    file,
    folder,
    image,
    layer,
    symlink,
)

PASSWD = """\
root:x:0:0:root:/root:/bin/sh
daemon:x:1:1:daemon:/usr/sbin:/bin/false
app:x:1000:100:App:/home/app:/bin/sh
homeless:x:1001:101
12:x:1002:102::/home/twelve:/bin/sh
"""
GROUP = """\
root:x:0:
daemon:x:1:
users:x:100:
wheel:x:10:root,app
audio:x:29:app
staff:x:50:daemon
"""
# A program for x86-64 of two system calls: exit(geteuid()).  Busybox would give up what it gains.
_CODE = bytes.fromhex("b86b0000000f0589c7b83c0000000f05")
_EUID = (
    b"\x7fELF\2\1\1"
    + bytes(9)
    + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, 0x400078, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    + struct.pack("<IIQQQQQQ", 1, 5, 0, 0x400000, 0, 120 + len(_CODE), 120 + len(_CODE), 4096)
    + _CODE
)
# How /proc shows this process, and with it the file system and network of this machine.  What is
# in a container is looked at through one of its processes.
HERE = Path("/proc/self")
# Where a test starts them without a shell.
PROGRAMS = ("dd", "env", "head", "hostname", "nc", "pwd", "sleep", "sort", "wc", "yes")


def step_layers(*, docker: bool = False) -> list[Layer]:
    """Return the layers of an image with a shell, users, and some odd files."""
    kind = {"compression": "none", "docker": docker}
    return [
        busybox_layer(**kind),
        layer(
            [
                *(symlink(f"bin/{name}", "busybox") for name in PROGRAMS),
                file("etc/passwd", PASSWD),
                file("etc/group", GROUP),
                folder("home/app", 0o750, uid=1000, gid=100),
                folder("data", 0o755),
                file("data/old", "old"),
                # As anybody can start it: ends with the last byte of its effective user's number.
                file("data/suid", _EUID, mode=0o4755),
                file("bin/unexecutable", "#!/bin/sh\necho never\n", mode=0o644),
                file("bin/garbage", bytes(64), mode=0o755),
                file("bin/no-interpreter", "#!/bin/none\n", mode=0o755),
                file("bin/script", "#!/bin/sh\necho script $#\n", mode=0o755),
            ],
            **kind,
        ),
    ]


def step_image(**config: Any) -> Image:
    return image(step_layers(), config=config or None)


def scratch_image() -> Image:
    """An image with one program and nothing else: no /etc, no /dev, no /proc, no shell."""
    program = file("busybox", BUSYBOX.read_bytes(), mode=0o755)
    return image([layer([program], compression="none")], config={})


@dataclass(frozen=True)
class Left:
    """What a namespace of a containerd holds for steps, by kind; equal when nothing was left."""

    containers: list[str] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    leases: list[str] = field(default_factory=list)
    snapshots: list[str] = field(default_factory=list)
    shims: list[str] = field(default_factory=list)
    mounts: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)


async def left(client: Containerd, run_dir: Path | None = None, process: Path = HERE) -> Left:
    """Look at everything that belongs to the client's namespace.

    process: as /proc shows it, one that has containerd's file system.
    """
    steps = run_dir / "steps" if run_dir is not None else None
    return Left(
        containers=sorted(x.id for x in await client.containers.all()),
        tasks=sorted(x.id for x in await client.tasks.all()),
        leases=sorted(x.id for x in await client.leases.all()),
        snapshots=sorted(x.name for x in await client.snapshots("overlayfs").all()),
        shims=_shims(client.namespace),
        mounts=[
            line.split()[1]
            for line in (process / "mounts").read_text().splitlines()
            if f"/{client.namespace}/" in line
        ],
        folders=sorted(p.name for p in steps.iterdir()) if steps and steps.exists() else [],
    )


def _shims(namespace: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if "containerd-shim" in words[0] and namespace in words:
            found.append(path.parent.name)
    return found


def addresses(steps: Iterable[str], process: Path = HERE) -> list[str]:
    """Return the addresses of the bridge that are given to these steps."""
    wanted = set(steps)
    found = []
    for path in _given(process):
        try:
            words = set(re.split(r"\s+", path.read_text()))
        except FileNotFoundError:
            continue  # another step's, given back meanwhile
        if words & wanted:
            found.append(path.name)
    return found


def _given(process: Path) -> list[Path]:
    return list((process / "root" / STATE.lstrip("/")).glob("*/[0-9]*"))


def cgroups(steps: Iterable[str], process: Path = HERE) -> list[str]:
    """Return the cgroups of these steps that are still there."""
    wanted = set(steps)
    root = process / "root/sys/fs/cgroup"
    return [str(p) for p in [*root.glob("*/serpentine/*"), *root.glob("serpentine/*")]
            if p.name in wanted]  # fmt: skip


def interfaces_without_address(process: Path = HERE) -> int:
    """Return how many more interfaces steps have than addresses are given to them.

    Other steps of this machine come and go meanwhile: the difference is theirs for moments only.
    """
    # The kernel's table has addresses as words of this machine, the last byte first.
    rows = [line.split() for line in (process / "net/route").read_text().splitlines()[1:]]
    links = [int(row[1], 16).to_bytes(4, "little") for row in rows if row[7] == "FFFFFFFF"]
    subnet = ipaddress.ip_network(SUBNET)
    outer = sum(ipaddress.ip_address(link) in subnet for link in links)
    inner = len(list((process / "root/sys/class/net").glob(f"{BRIDGE_PREFIX}*/brif/*")))
    return outer + inner - len(_given(process))


def bridges(process: Path = HERE) -> list[str]:
    """Return the bridges between steps and their services that are there, or are noted."""
    root = process / "root"
    found = [root / "sys/class/net", root / STATE.lstrip("/")]
    return sorted({p.name for f in found for p in f.glob(f"{BRIDGE_PREFIX}*")})


def status_of(text: str) -> dict[str, str]:
    """Read /proc/PID/status."""
    return {k: v.strip() for k, _, v in (line.partition(":") for line in text.splitlines())}
