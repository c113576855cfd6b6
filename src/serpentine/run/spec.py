"""The OCI runtime specification of a step: a plain function from what is wanted to JSON.

Follows the runtime specification 1.0.2 (config.md, config-linux.md), which every runc of the
supported containerds reads; the defaults are Docker's, so that images behave as they do there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from serpentine.errors import InvalidSetting, StepError
from serpentine.model.state import ContainerState
from serpentine.run.options import RunOptions
from serpentine.run.seccomp import seccomp
from serpentine.run.users import User

__all__ = ["DEFAULT_CAPABILITIES", "arguments", "capabilities", "environment", "runtime_spec"]

VERSION = "1.0.2"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

DEFAULT_CAPABILITIES = (
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
)
ALL_CAPABILITIES = (
    *DEFAULT_CAPABILITIES,
    "CAP_AUDIT_CONTROL",
    "CAP_AUDIT_READ",
    "CAP_BLOCK_SUSPEND",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
    "CAP_DAC_READ_SEARCH",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_LEASE",
    "CAP_LINUX_IMMUTABLE",
    "CAP_MAC_ADMIN",
    "CAP_MAC_OVERRIDE",
    "CAP_NET_ADMIN",
    "CAP_NET_BROADCAST",
    "CAP_PERFMON",
    "CAP_SYSLOG",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_MODULE",
    "CAP_SYS_NICE",
    "CAP_SYS_PACCT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_WAKE_ALARM",
)
_MASKED = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
)
_READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
# What a process of its own network may do without privileges, as in Docker.
_SYSCTLS = {
    "net.ipv4.ip_unprivileged_port_start": "0",
    "net.ipv4.ping_group_range": "0 2147483647",
}
_SHM = "/dev/shm"  # noqa: S108 - the step's own
_CPU_PERIOD = 100_000


def arguments(state: ContainerState, options: RunOptions) -> list[str]:
    """Return the command: entry point and arguments.  Raises StepError if there is none."""
    if isinstance(options.args, str):
        return ["/bin/sh", "-c", options.args]
    if options.entrypoint is not None:
        command = [*options.entrypoint, *(options.args or ())]
    else:
        command = [*state.entrypoint, *(state.cmd if options.args is None else options.args)]
    if not command:
        raise StepError("there is no command to run: the image names none", hint="give one")
    return command


def environment(
    state: ContainerState, options: RunOptions, *, hostname: str, home: str
) -> list[str]:
    """Return the environment: the state's and what was asked for over a few defaults."""
    values = {"PATH": PATH, "HOSTNAME": hostname}
    if options.terminal:
        values["TERM"] = "xterm"
    for line in state.env:
        name, _, value = line.partition("=")
        values[name] = value
    for name, given in options.env.items():
        if given is None:
            values.pop(name, None)
        else:
            values[name] = given
    if "HOME" not in options.env:
        values.setdefault("HOME", home)
    return [f"{name}={value}" for name, value in values.items()]


def capabilities(options: RunOptions) -> list[str]:
    """Return the capabilities: the default set, and what was added and dropped."""

    def names(given: Sequence[str]) -> set[str]:
        found: set[str] = set()
        for text in given:
            name = text.upper()
            if name == "ALL":
                return set(ALL_CAPABILITIES)
            name = name if name.startswith("CAP_") else f"CAP_{name}"
            if name not in ALL_CAPABILITIES:
                raise InvalidSetting(
                    f"{text!r} is not a capability", hint="write one as in NET_ADMIN, or ALL"
                )
            found.add(name)
        return found

    dropped, added = names(options.cap_drop), names(options.cap_add)
    if any(text.upper() == "ALL" for text in options.cap_drop):
        return sorted(added)
    return sorted((set(DEFAULT_CAPABILITIES) | added) - dropped)


def runtime_spec(
    state: ContainerState,
    options: RunOptions,
    *,
    step: str,
    architecture: str,
    user: User,
    hostname: str,
    files: Mapping[str, str],
    hooks: Mapping[str, Any] | None = None,
    cgroups: bool = True,
    rootless: bool = False,
) -> dict[str, Any]:
    """Return the runtime specification of a step.

    step: its identity, which names its cgroup.
    architecture: of the daemon's machine, in Go's words: its kernel filters the calls.
    files: paths in the step to files of the daemon's machine that are mounted there.
    hooks: what the runtime runs on the daemon's machine, by its names for them.
    cgroups: whether it may have one; if not, StepError is raised where a limit was asked for.
    rootless: whether root on the daemon's machine is another user outside.
    """
    held = capabilities(options)
    working_dir = options.working_dir or state.working_dir or "/"
    spec: dict[str, Any] = {
        "ociVersion": VERSION,
        "root": {"path": "rootfs", "readonly": options.read_only},
        "hostname": hostname,
        "process": {
            "terminal": options.terminal,
            "user": {"uid": user.uid, "gid": user.gid, "additionalGids": list(user.groups)},
            "args": arguments(state, options),
            "env": environment(state, options, hostname=hostname, home=user.home),
            "cwd": working_dir,
            # None inheritable: a program with file capabilities would get them (CVE-2022-24769).
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), held),
            "rlimits": [
                # -1, which is no limit, as the kernel has it.
                {"type": f"RLIMIT_{name.upper()}", "soft": soft % 2**64, "hard": hard % 2**64}
                for name, (soft, hard) in options.ulimits.items()
            ],
            "noNewPrivileges": options.no_new_privileges,
        },
        "mounts": _mounts(options, files),
        "linux": {
            "cgroupsPath": f"/serpentine/{step}",
            "resources": _resources(options),
            "namespaces": [
                {"type": kind}
                for kind in ("pid", "ipc", "uts", "mount", "cgroup")
                + (() if options.network == "host" else ("network",))
            ],
            "maskedPaths": list(_MASKED),
            "readonlyPaths": list(_READ_ONLY),
            "seccomp": seccomp(held, architecture),
        },
    }
    if not cgroups:
        _leave_out_cgroup(spec)
    if options.network != "host":
        spec["linux"]["sysctl"] = dict(_SYSCTLS)
        if rootless:
            # Its range has to be one of users that there are.
            del spec["linux"]["sysctl"]["net.ipv4.ping_group_range"]
    if hooks:
        spec["hooks"] = dict(hooks)
    return spec


def _leave_out_cgroup(spec: dict[str, Any]) -> None:
    limits = [name for name in ("memory", "cpu", "pids") if name in spec["linux"]["resources"]]
    if limits:
        raise StepError(
            f"this daemon cannot limit steps ({', '.join(limits)}): it may not make cgroups",
            hint="leave the limit out, or use a container engine that runs as root",
        )
    # The runtime may fail to make one only where it was not told which.
    del spec["linux"]["cgroupsPath"]


def _mounts(options: RunOptions, files: Mapping[str, str]) -> list[dict[str, Any]]:
    quiet = ["nosuid", "noexec", "nodev"]
    sys = ["ro", *quiet]
    mounts: list[dict[str, Any]] = [
        _mount("/proc", "proc", "proc", quiet),
        _mount("/dev", "tmpfs", "tmpfs", ["nosuid", "strictatime", "mode=755", "size=65536k"]),
        _mount(
            "/dev/pts",
            "devpts",
            "devpts",
            ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        ),
        _mount("/dev/mqueue", "mqueue", "mqueue", quiet),
        _mount(_SHM, "tmpfs", "shm", [*quiet, "mode=1777", f"size={options.shm_size}"]),
    ]
    if options.network == "host":
        # The kernel lets only who owns the network's namespace mount its sysfs.
        mounts.append(_mount("/sys", "bind", "/sys", ["rbind", *sys]))
    else:
        mounts.append(_mount("/sys", "sysfs", "sysfs", sys))
        mounts.append(_mount("/sys/fs/cgroup", "cgroup", "cgroup", ["relatime", *sys]))
    # As in Docker: where nothing can be written, its hosts and resolvers cannot, either.
    ours = ["rbind", "rprivate", *(["ro"] if options.read_only else [])]
    extra = [
        *(_mount(p, "bind", source, ours) for p, source in files.items()),
        *(
            _mount(
                t.target,
                "tmpfs",
                "tmpfs",
                ["nosuid", "nodev", f"mode={t.mode:o}", *([f"size={t.size}"] if t.size else [])],
            )
            for t in options.tmpfs
        ),
        *(
            _mount(b.target, "bind", b.source, ["rbind", "rprivate", "ro" if b.read_only else "rw"])
            for b in options.binds
        ),
    ]
    # Parents first: what is mounted below must not be hidden by what is mounted above.
    extra.sort(key=lambda m: len(PurePosixPath(m["destination"]).parts))
    return [*mounts, *extra]


def _mount(target: str, kind: str, source: str, options: list[str]) -> dict[str, Any]:
    return {"destination": target, "type": kind, "source": source, "options": options}


def _resources(options: RunOptions) -> dict[str, Any]:
    # Everything is refused; the runtime itself adds the few devices of every container.
    resources: dict[str, Any] = {"devices": [{"allow": False, "access": "rwm"}]}
    if options.memory is not None:
        # Without more swap than memory: the limit would be none.
        resources["memory"] = {"limit": options.memory, "swap": options.memory}
    if options.cpus is not None:
        quota = int(options.cpus * _CPU_PERIOD)
        resources["cpu"] = {"period": _CPU_PERIOD, "quota": max(quota, 1000)}
    if options.pids is not None:
        resources["pids"] = {"limit": options.pids}
    return resources
