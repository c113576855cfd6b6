"""Docker's default seccomp profile, as the runtime spec takes it.

What the profile says is Docker's, so that an image behaves here as it does there; the names are in
``seccomp.txt``, grouped by what they depend on.
"""

from __future__ import annotations

from collections.abc import Collection
from importlib.resources import files
from typing import Any

__all__ = ["seccomp"]

# What a kernel of an architecture can run, its own first.  Docker gives no list for 386, arm and
# ppc64le, which the runtimes take as the same: the native one.
_ARCHITECTURES = {
    "386": ("X86",),
    "amd64": ("X86_64", "X86", "X32"),
    "arm": ("ARM",),
    "arm64": ("AARCH64", "ARM"),
    "ppc64le": ("PPC64LE",),
    "riscv64": ("RISCV64",),
    "s390x": ("S390X", "S390"),
}

# Linux's numbers, not those of the machine that we run on: it may be a Mac.
_EPERM, _ENOSYS = 1, 38

# Everything that clone could unshare: mounts, cgroup, UTS, IPC, users, processes, network.
_NAMESPACES = 0x7E02_0000

# PER_LINUX and PER_LINUX32, each with and without UNAME26, and the question which one it is.
_PERSONALITIES = (0x0, 0x8, 0x2_0000, 0x2_0008, 0xFFFF_FFFF)

# Every family of sockets but AF_ALG (38: a large part of the kernel that nobody in a container
# needs, and had the holes to show for it) and AF_VSOCK (40: reaches virtual machines whatever the
# network namespace).  One condition per rule: runc makes alternatives of several conditions on
# one argument, and "not 38 or not 40" is always true.
_FAMILIES = (("LT", 38), ("EQ", 39), ("GT", 40))


def seccomp(capabilities: Collection[str], architecture: str) -> dict[str, Any]:
    """Return the ``linux.seccomp`` of the runtime spec for a process.

    ``capabilities`` is the process's bounding set, spelled as the runtime spec spells it:
    "CAP_SYS_ADMIN".  What is spelled otherwise, or unknown, opens nothing.  ``architecture`` is the
    daemon's, as OCI platforms name it: a kernel for amd64 needs "amd64" for a 386 image too.  On an
    architecture that the profile does not know, only the native system calls are let through.

    The result is the caller's to change.
    """
    admin = "CAP_SYS_ADMIN" in capabilities
    # An architecture may come from an image, so it must not be able to name another kind of group.
    groups = {"always", *({architecture} & _ARCHITECTURES.keys())}
    groups.update(name for name in capabilities if name.startswith("CAP_"))
    # One sorted list without repetition: several capabilities open the same call.
    allowed = sorted({name for group in groups for name in _GROUPS.get(group, ())})
    calls = [
        {"names": allowed, "action": "SCMP_ACT_ALLOW"},
        *(_allow_if("socket", 0, op, family) for op, family in _FAMILIES),
        *(_allow_if("personality", 0, "EQ", value) for value in _PERSONALITIES),
    ]
    if not admin:
        # On s390x, the stack comes first.
        position = 1 if architecture == "s390x" else 0
        calls.append(_allow_if("clone", position, "MASKED_EQ", _NAMESPACES, 0))
        # Its flags are behind a pointer, where no filter sees them.  "No such system call" makes
        # the C libraries take clone instead; "not permitted" would make them give up.
        calls.append({"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": _ENOSYS})
    profile: dict[str, Any] = {"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": _EPERM}
    if architecture in _ARCHITECTURES:
        profile["architectures"] = [f"SCMP_ARCH_{a}" for a in _ARCHITECTURES[architecture]]
    profile["syscalls"] = calls
    return profile


def _allow_if(
    name: str, index: int, op: str, value: int, value_two: int | None = None
) -> dict[str, Any]:
    argument: dict[str, Any] = {"index": index, "value": value, "op": f"SCMP_CMP_{op}"}
    if value_two is not None:
        argument["valueTwo"] = value_two
    return {"names": [name], "action": "SCMP_ACT_ALLOW", "args": [argument]}


def _read() -> dict[str, tuple[str, ...]]:
    groups: dict[str, tuple[str, ...]] = {}
    group = ""
    text = (files("serpentine.run") / "seccomp.txt").read_text(encoding="utf-8")
    for line in text.splitlines():
        if line.startswith("["):
            group = line.strip("[]")
            groups[group] = ()
        elif line and not line.startswith("#"):
            groups[group] += tuple(line.split())
    return groups


# Read with the module, so that the function never blocks an event loop.
#
# Docker lets ptrace and its kin through from Linux 4.8 (2016) on: before, a tracer could change a
# system call after the filter had seen it.  They are in [always] here: no kernel that old is
# supported by anybody, and the one that counts is the daemon's, which need not be ours to ask.
_GROUPS = _read()
