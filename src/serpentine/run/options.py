"""What a step is asked to be: immutable, checked where it is made, understood by plain code."""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from serpentine.errors import InvalidSetting

__all__ = ["NETWORKS", "Bind", "RunOptions", "Tmpfs", "parse_size", "signal_number"]

NETWORKS = ("bridge", "none", "host")
# Less, and runc itself does not start.
MIN_MEMORY = 6 << 20
MAX_OUTPUT = 1 << 20
GRACE = 10.0

_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
# Also with '_', which is no hostname and yet common in lists of hosts.
_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?")
_HOSTNAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,61}[A-Za-z0-9])?")
# Linux's own numbers: the caller's system may count otherwise, or lack some.
_SIGNALS = {
    "HUP": 1,
    "INT": 2,
    "QUIT": 3,
    "ILL": 4,
    "TRAP": 5,
    "ABRT": 6,
    "BUS": 7,
    "FPE": 8,
    "KILL": 9,
    "USR1": 10,
    "SEGV": 11,
    "USR2": 12,
    "PIPE": 13,
    "ALRM": 14,
    "TERM": 15,
    "STKFLT": 16,
    "CHLD": 17,
    "CONT": 18,
    "STOP": 19,
    "TSTP": 20,
    "TTIN": 21,
    "TTOU": 22,
    "URG": 23,
    "XCPU": 24,
    "XFSZ": 25,
    "VTALRM": 26,
    "PROF": 27,
    "WINCH": 28,
    "IO": 29,
    "PWR": 30,
    "SYS": 31,
}
_LAST_SIGNAL = 64
_ULIMITS = (
    *("as", "core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue", "nice", "nofile"),
    *("nproc", "rss", "rtprio", "rttime", "sigpending", "stack"),
)


@dataclass(frozen=True, slots=True)
class Bind:
    """A directory or file of the daemon's machine, mounted into the step."""

    source: str
    target: str
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class Tmpfs:
    """An empty file system in memory; ``size`` in bytes, None for half of the memory."""

    target: str
    size: int | None = None
    mode: int = 0o1777


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How to run a process, beyond what its state says.  The defaults are Docker's.

    args: appended to the entry point; a string is run by ``/bin/sh -c`` in its place; None
        means the state's own command.
    entrypoint: in place of the state's, whose command counts no more then.
    env: added to the state's; a value of None takes a variable away.
    working_dir, user: in place of the state's; user is ``USER[:GROUP]``, names or numbers.
    hostname: its own; by default one that is made up.
    network: ``bridge`` (outbound through the daemon's), ``none`` (loopback only), ``host``.
    extra_hosts: names to addresses, for its ``/etc/hosts``.
    binds, tmpfs: what is mounted into it.
    memory, shm_size: in bytes.  cpus: how many at once, also in part.  pids: how many processes.
    ulimits: name (``nofile``) to soft and hard limit; -1 is none.
    read_only: its root file system cannot be written.
    no_new_privileges: set-user-ID programs gain nothing.
    cap_add, cap_drop: capabilities (``NET_ADMIN``, ``ALL``), beyond Docker's default set.
    stop_signal: name or number, in place of the state's; sent when the time is over.
    timeout: seconds until it is stopped; None means no limit.  grace: seconds between the stop
        signal and the end of the whole cgroup.
    terminal: a terminal in place of pipes; stdout and stderr are one then.
    stdin: whether it gets any input.
    commit: whether its file system becomes a new state.
    check: whether a status other than 0 raises StepFailed.
    max_output: bytes of output that are kept, the last ones; all of it is streamed.
    """

    args: Sequence[str] | str | None = None
    entrypoint: Sequence[str] | None = None
    env: Mapping[str, str | None] = field(default_factory=dict)
    working_dir: str | None = None
    user: str | None = None
    hostname: str | None = None
    network: str = "bridge"
    extra_hosts: Mapping[str, str] = field(default_factory=dict)
    binds: Sequence[Bind] = ()
    tmpfs: Sequence[Tmpfs] = ()
    memory: int | None = None
    shm_size: int = 64 << 20
    cpus: float | None = None
    pids: int | None = None
    ulimits: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    read_only: bool = False
    no_new_privileges: bool = False
    cap_add: Sequence[str] = ()
    cap_drop: Sequence[str] = ()
    stop_signal: str | int | None = None
    timeout: float | None = None
    grace: float = GRACE
    terminal: bool = False
    stdin: bool = False
    commit: bool = True
    check: bool = False
    max_output: int = MAX_OUTPUT

    def __post_init__(self) -> None:
        """Refuse what cannot be meant; raises InvalidSetting."""
        if self.network not in NETWORKS:
            raise _bad("network", self.network, f"choose one of: {', '.join(NETWORKS)}")
        if self.working_dir is not None and not _is_path(self.working_dir):
            raise _bad("working directory", self.working_dir, "give an absolute path")
        if self.hostname is not None and not _HOSTNAME.fullmatch(self.hostname):
            raise _bad("hostname", self.hostname, "use letters, digits, '.' and '-'")
        if self.stop_signal is not None:
            signal_number(self.stop_signal)
        self._check_numbers()
        self._check_hosts()
        self._check_mounts()
        self._check_words()

    def _check_numbers(self) -> None:
        for name in ("memory", "shm_size", "pids", "max_output"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise _bad(f"number ({name})", value, "give a whole number, of bytes for a size")
        if self.memory is not None and self.memory < MIN_MEMORY:
            raise _bad("memory limit", self.memory, "give at least 6m")
        if self.shm_size < 1:
            raise _bad("size of /dev/shm (shm_size)", self.shm_size, "give more than 0 bytes")
        if self.cpus is not None and not 0 < self.cpus < math.inf:
            raise _bad("number of cpus", self.cpus, "give more than 0")
        if self.pids is not None and self.pids < 1:
            raise _bad("limit of processes", self.pids, "give at least 1")
        if self.timeout is not None and not self.timeout > 0:
            raise _bad("time limit", self.timeout, "give more than 0 seconds")
        if not self.grace >= 0:
            raise _bad("time to stop in (grace)", self.grace, "give 0 or more seconds")
        if self.max_output < 0:
            raise _bad("limit of kept output", self.max_output, "give 0 or more bytes")
        for name, (soft, hard) in self.ulimits.items():
            if name.lower() not in _ULIMITS:
                raise _bad("ulimit", name, f"choose one of: {', '.join(_ULIMITS)}")
            low, high = (math.inf if value == -1 else value for value in (soft, hard))
            if not 0 <= low <= high:
                raise _bad(f"ulimit of {name}", (soft, hard), "soft must not be more than hard")

    def _check_hosts(self) -> None:
        for name, address in self.extra_hosts.items():
            if not _HOST.fullmatch(name):
                raise _bad("host", name, "use letters, digits, '.' and '-'")
            try:
                ipaddress.ip_address(address)
            except ValueError:
                raise _bad("address", address, "give one as in 10.0.0.1 or fe80::1") from None

    def _check_mounts(self) -> None:
        for bind in self.binds:
            if not _is_path(bind.source):
                raise _bad("directory to mount", bind.source, "give an absolute path")
        for tmpfs in self.tmpfs:
            if tmpfs.size is not None and tmpfs.size < 1:
                raise _bad("size of a tmpfs", tmpfs.size, "give more than 0 bytes")
        taken: set[str] = set()
        for target in (*(b.target for b in self.binds), *(t.target for t in self.tmpfs)):
            parts = PurePosixPath(target).parts[1:]
            if not _is_path(target) or ".." in parts or not parts:
                raise _bad("place to mount at", target, "give an absolute path below /")
            if "/".join(parts) in taken:
                raise _bad("place to mount at", target, "something else is mounted there already")
            taken.add("/".join(parts))

    def _check_words(self) -> None:
        for name, value in self.env.items():
            if not name or "=" in name or "\x00" in name or "\x00" in (value or ""):
                raise _bad("environment variable", name, "write NAME=VALUE")
        words = [*([self.args] if isinstance(self.args, str) else self.args or ())]
        if any("\x00" in word for word in [*words, *(self.entrypoint or ())]):
            raise _bad("command", " ".join(words), "it must not hold a NUL character")


def _is_path(text: str) -> bool:
    return PurePosixPath(text).is_absolute() and "\x00" not in text


def parse_size(text: str) -> int:
    """Read a number of bytes as Docker writes it: ``512m``, ``1.5g``; raises InvalidSetting."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([bkmgt]?)(?:i?b)?", text.strip().lower())
    if match is None:
        raise _bad("size", text, "write a number with b, k, m or g, as in 512m")
    return int(float(match[1]) * _UNITS[match[2]])


def signal_number(value: str | int) -> int:
    """Return Linux's number of a signal given as ``SIGTERM``, ``term`` or ``15``."""
    text = str(value).strip().upper().removeprefix("SIG")
    number = int(text) if text.isascii() and text.isdigit() else _SIGNALS.get(text, 0)
    if match := re.fullmatch(r"RTMIN(?:\+(\d+))?|RTMAX(?:-(\d+))?", text):
        number = 34 + int(match[1] or 0) if text.startswith("RTMIN") else 64 - int(match[2] or 0)
    if not 1 <= number <= _LAST_SIGNAL:
        raise _bad("signal", value, "give a name such as SIGTERM, or a number from 1 to 64")
    return number


def signal_name(number: int) -> str:
    """Return what people call a signal of Linux."""
    return next((f"SIG{n}" for n, v in _SIGNALS.items() if v == number), f"signal {number}")


def _bad(what: str, value: object, remedy: str) -> InvalidSetting:
    return InvalidSetting(f"{value!r} is not a valid {what}", hint=remedy)
