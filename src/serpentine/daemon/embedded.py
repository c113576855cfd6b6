"""Our own containerd as a child process: started on demand, found again, stopped by its owner.

Linux, with root.  Everything of it lies in two directories of ours; nothing of a containerd
that the system may run is touched.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from serpentine._concurrency import shielded
from serpentine.containerd import Containerd, Endpoint, VersionInfo
from serpentine.daemon._lock import locked
from serpentine.daemon.releases import search_path
from serpentine.errors import (
    ContainerdError,
    DaemonError,
    DaemonFailed,
    DaemonPermission,
    DaemonUnreachable,
)
from serpentine.events import DaemonStarted, DaemonStarting, OnEvent
from serpentine.settings import Settings

__all__ = ["Embedded", "Process", "render_config"]

START_TIMEOUT = 30.0
STOP_TIMEOUT = 10.0
LOCK_TIMEOUT = START_TIMEOUT + STOP_TIMEOUT
MAX_LOG = 10 * 1024 * 1024
LOG_TAIL = 5
# A line of containerd's log is rarely longer; enough bytes for a tail of so many lines.
LOG_LINE = 2048

# What another containerd or a service manager left in the environment is not meant for ours.
_NOT_INHERITED = ("CONTAINERD_", "LISTEN_", "NOTIFY_SOCKET", "WATCHDOG_", "GRPC_", "OTEL_")


@dataclass(frozen=True, slots=True)
class Process:
    """A process, safe against its number being given to another one.

    ``started`` is the kernel's start time in clock ticks since boot.
    """

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """Return the process that has this number now; None if there is none, or a zombie."""
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return None
        state, *rest = stat.rpartition(")")[2].split()
        return None if state == "Z" else cls(pid, int(rest[18]))

    def is_alive(self) -> bool:
        """Tell whether exactly this process still runs."""
        return Process.of(self.pid) == self


@dataclass(frozen=True, slots=True)
class Embedded:
    """Our own containerd: where its files are, and how to start and stop it."""

    data_dir: Path
    run_dir: Path

    @classmethod
    def from_settings(cls, settings: Settings) -> Embedded:
        """Return the one that these settings describe."""
        return cls(settings.data_dir, settings.run_dir)

    @property
    def root(self) -> Path:
        """Where containerd keeps content and snapshots; survives a reboot."""
        return self.data_dir / "containerd"

    @property
    def log(self) -> Path:
        """What containerd prints."""
        return self.data_dir / "containerd.log"

    @property
    def socket(self) -> Path:
        """Where it listens."""
        return self.run_dir / "containerd.sock"

    @property
    def endpoint(self) -> Endpoint:
        """How to reach it."""
        return Endpoint.parse(str(self.socket))

    @property
    def _pid_file(self) -> Path:
        return self.run_dir / "containerd.pid"

    def search_path(self) -> str:
        """Return where containerd, its shim and runc are looked for."""
        return search_path(self.data_dir)

    def exists(self) -> bool:
        """Tell whether there is anything of it: a process, a socket, data."""
        return any(path.exists() for path in (self._pid_file, self.socket, self.root))

    async def running(self) -> VersionInfo | None:
        """Return the version of the containerd that answers, or None if none does."""
        async with Containerd(self.endpoint) as client:
            try:
                await client.check()
                return await client.version()
            except DaemonPermission:
                raise
            except (DaemonError, ContainerdError):
                return None

    def process(self) -> Process | None:
        """Return the process that we started last, if it still runs."""
        try:
            noted = json.loads(self._pid_file.read_text())
            process = Process(int(noted["pid"]), int(noted["started"]))
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        return process if process.is_alive() else None

    def program(self) -> Path | None:
        """Return the program that the process runs which we started last; None without one."""
        process = self.process()
        # PermissionError: root's, and we are not.
        with contextlib.suppress(OSError):
            return Path(f"/proc/{process.pid}/exe").readlink() if process else None
        return None

    async def start(self, *, on_event: OnEvent) -> VersionInfo:
        """Make sure that it runs, and return its version; quick when it does.

        Safe when several processes start it at once: one does, the others find it.
        Raises DaemonFailed with the last lines of its log.
        """
        began = time.monotonic()
        async with self._locked():
            if (version := await self.running()) is not None:
                return version
            on_event(DaemonStarting(kind="embedded"))
            if (old := self.process()) is not None:
                # It runs and does not answer: starting up for a command that was killed, or
                # stuck.  Give it the time that a start may take before it is replaced.
                with contextlib.suppress(DaemonFailed):
                    return self._told(await self._wait_ready(old), began, on_event)
                await _end(old)
            process = await self._spawn()
            try:
                version = await self._wait_ready(process)
            except BaseException:
                await shielded(_end(process), timeout=STOP_TIMEOUT * 2)
                self._pid_file.unlink(missing_ok=True)
                raise
            return self._told(version, began, on_event)

    async def stop(self) -> bool:
        """End it, and tell whether it ran.  Its data stays."""
        if not self.run_dir.exists():
            return False
        async with self._locked():
            return await self._stop()

    async def _stop(self) -> bool:
        process = self.process()
        if process is not None:
            await _end(process)
        elif await self.running() is not None:
            raise DaemonFailed(
                f"a containerd answers at {self.socket}, but it is not the one that we started",
                address=str(self.socket),
                hint="end it by hand",
            )
        for leftover in (self._pid_file, self.socket, Path(f"{self.socket}.ttrpc")):
            leftover.unlink(missing_ok=True)
        return process is not None

    async def remove(self, *, data: bool) -> bool:
        """Stop it and remove its socket and state, with ``data`` its content and log, too.

        Tells whether there was anything.  Raises DaemonFailed, before anything is removed,
        while something is mounted there: a container that still runs.
        """
        removed = [self.run_dir / name for name in ("state", "containerd.toml")]
        if data:
            removed += [self.root, self.log, self.log.with_suffix(".log.1")]
        if not any(path.exists() for path in (*removed, self.socket)):
            return False
        async with self._locked():
            mounts = Path("/proc/mounts").read_text()  # noqa: ASYNC240 - not a disk
            busy = mounts_below(mounts, (self.run_dir, self.data_dir))
            if busy:
                raise DaemonFailed(
                    f"containers still run on our own containerd ({busy[0]} is mounted)",
                    address=str(self.socket),
                    hint="end them first",
                )
            await self._stop()
            for path in removed:
                if path.is_dir():
                    await asyncio.to_thread(shutil.rmtree, path)
                else:
                    path.unlink(missing_ok=True)
        return True

    async def log_tail(self, lines: int) -> list[str]:
        """Return the last lines of its log."""
        return await asyncio.to_thread(self._log_tail, lines)

    def _log_tail(self, lines: int = LOG_TAIL) -> list[str]:
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - lines * LOG_LINE))
                text = file.read().decode(errors="replace")
        except OSError:
            return []
        return text.splitlines()[-lines:]

    def _told(self, version: VersionInfo, began: float, on_event: OnEvent) -> VersionInfo:
        seconds = time.monotonic() - began
        on_event(
            DaemonStarted(
                kind="embedded",
                endpoint=self.endpoint.address,
                version=version.version,
                seconds=seconds,
            )
        )
        return version

    @asynccontextmanager
    async def _locked(self) -> AsyncIterator[None]:
        self._make_directories()
        async with locked(self.run_dir / "lock", timeout=LOCK_TIMEOUT):
            yield

    def _make_directories(self) -> None:
        try:
            for directory in (self.data_dir, self.run_dir):
                # 0711, as containerd's own: processes of containers with a user namespace
                # must get through to their root file system, and nobody needs to list.
                directory.mkdir(mode=0o711, parents=True, exist_ok=True)
        except PermissionError as error:
            raise DaemonPermission(
                f"cannot make {error.filename}: permission denied",
                hint="run as root, or choose directories with SERPENTINE_DATA_DIR and"
                " SERPENTINE_RUN_DIR",
            ) from None
        except OSError as error:
            raise DaemonFailed(
                f"cannot make {error.filename}: {error.strerror}",
                hint="choose directories with SERPENTINE_DATA_DIR and SERPENTINE_RUN_DIR",
            ) from None

    async def _spawn(self) -> Process:
        path = self.search_path()
        binary = shutil.which("containerd", path=path)
        if binary is None:
            raise DaemonFailed(
                "containerd is not on the PATH",
                hint="run 'serpentine daemon install', or install containerd and runc",
            )
        config = self.run_dir / "containerd.toml"
        config.write_text(render_config(self.root, self.run_dir / "state", self.socket))
        with contextlib.suppress(FileNotFoundError):
            if self.log.stat().st_size > MAX_LOG:
                self.log.replace(self.log.with_suffix(".log.1"))
        self.socket.unlink(missing_ok=True)
        environment = {k: v for k, v in os.environ.items() if not k.startswith(_NOT_INHERITED)}
        # Through a shell that ends at once: the daemon then belongs to init and not to us, so
        # it neither dies with this command (nor of its Ctrl-C: a session of its own) nor
        # stays as a zombie of a long-lived program.
        script = 'umask 022; setsid "$@" </dev/null >>"$LOG" 2>&1 & echo $!'
        shell = await asyncio.create_subprocess_exec(
            "/bin/sh",
            "-c",
            script,
            "sh",
            binary,
            "--config",
            str(config),
            # containerd finds the shim and runc on its PATH.
            env={**environment, "PATH": path, "LOG": str(self.log)},
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        out, _ = await shell.communicate()
        process = Process.of(int(out))
        if process is None:
            raise self._died()
        note = self._pid_file.with_suffix(".new")
        note.write_text(json.dumps({"pid": process.pid, "started": process.started}))
        note.replace(self._pid_file)
        return process

    async def _wait_ready(self, process: Process) -> VersionInfo:
        """Wait until it answers; raises DaemonFailed when it dies or takes too long."""
        deadline = time.monotonic() + START_TIMEOUT
        async with Containerd(self.endpoint) as client:
            while time.monotonic() < deadline:
                try:
                    await client.wait_ready(timeout=0.25)
                    return await client.version()
                except (DaemonUnreachable, ContainerdError):
                    if not process.is_alive():
                        raise self._died() from None
        raise DaemonFailed(
            f"containerd (pid {process.pid}) does not answer after {START_TIMEOUT:.0f} seconds",
            address=str(self.socket),
            hint=f"its log is {self.log}",
        )

    def _died(self) -> DaemonFailed:
        tail = " | ".join(self._log_tail())
        return DaemonFailed(
            f"containerd ended while it was starting: {tail or 'it printed nothing'}",
            address=str(self.socket),
            hint=f"its log is {self.log}",
        )


def render_config(root: Path, state: Path, socket: Path) -> str:
    """Return our containerd's configuration: what we leave out, and where its files are.

    Trap 59: what we never use only makes the start slower and the surface larger.
    """
    without = (files("serpentine.daemon") / "image" / "containerd.toml").read_text()
    # A JSON string is a TOML basic string, too.  Keys of the top level come before tables.
    return f"""\
# Written by serpentine at each start; changes are lost.
root = {json.dumps(str(root))}
state = {json.dumps(str(state))}

{without}
[grpc]
  address = {json.dumps(str(socket))}

[debug]
  level = "info"
"""


def mounts_below(mounts: str, folders: tuple[Path, ...]) -> list[str]:
    """Return the mount points of a ``/proc/mounts`` that lie inside some folders."""
    prefixes = tuple(f"{folder}/" for folder in folders)
    targets = [line.split()[1] for line in mounts.splitlines()]
    return [target for target in targets if target.startswith(prefixes)]


async def _end(process: Process) -> None:
    """End a process and wait until it is gone: kindly first, then for sure."""
    for number, patience in ((signal.SIGTERM, STOP_TIMEOUT), (9, STOP_TIMEOUT)):
        if not process.is_alive():
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)
        await _gone(process, patience)


async def _gone(process: Process, patience: float) -> None:
    """Wait until a process that may not be our child has ended, for some seconds at most."""
    deadline = time.monotonic() + patience
    while process.is_alive() and time.monotonic() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
