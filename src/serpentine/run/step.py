"""One process on a snapshot: prepared, started, watched, committed or thrown away.

Whatever way it ends, what it needed is gone afterwards: task, container record, pipes, active
snapshot, lease.  A step of a client that was killed is cleaned up by the next one (``sweep``).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import posixpath
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from serpentine._concurrency import shielded, task_group, unbroken
from serpentine.containerd import Containerd, Snapshots
from serpentine.errors import (
    AlreadyExists,
    CommandNotExecutable,
    CommandNotFound,
    ContainerdError,
    FailedPrecondition,
    NoSpace,
    NotFound,
    StepError,
    StepFailed,
    StepTimeout,
    Unavailable,
)
from serpentine.events import OnEvent, StepFinished, StepOutput, StepStarted
from serpentine.model.platform import Platform
from serpentine.model.state import ContainerState
from serpentine.run.network import Network
from serpentine.run.options import RunOptions, signal_name, signal_number
from serpentine.run.site import STDERR, STDOUT, Folder, Found, Site
from serpentine.run.spec import runtime_spec
from serpentine.run.users import User, resolve_user

if TYPE_CHECKING:
    from serpentine.run.services import ServiceResult

__all__ = [
    "RunResult",
    "Step",
    "StepContext",
    "check_snapshotter",
    "commit",
    "discard",
    "open_step",
    "prepare",
    "run_step",
    "tail",
]

LEASE_EXPIRES = timedelta(hours=24)
CLEANUP_TIMEOUT = 60.0
# After a process has ended, its output is there at once; a child that left its process
# namespace could hold the pipe for ever (trap 46).
DRAIN_TIMEOUT = 5.0
END_TIMEOUT = 15.0
SIGKILL = 9
_SMALL = 1 << 12
# Lines of an output that are told with an error.
TAIL = 5
# What runc prints in place of a program that the kernel does not take, and its status then.
_EXEC = re.compile(rb"exec (/[^\n]*): (exec format error|no such file or directory)\r?\n")
_EXEC_CODES = (1, 255)

LABEL_STEP = "io.serpentine/step"
LABEL_SESSION = "io.serpentine/session"
_PASSWD, _GROUP = "/etc/passwd", "/etc/group"
# Directories that the runtime mounts on, in every container.
_MOUNT_POINTS = ("/proc", "/dev", "/sys")


@dataclass(frozen=True, slots=True)
class StepContext:
    """What the steps of one engine share."""

    containerd: Containerd
    snapshots: Snapshots
    site: Site
    network: Network
    platform: Platform
    session: str
    on_event: OnEvent


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a step ended.

    exit_code: its status; 128 and the signal's number when a signal ended it.
    state: the new state; None unless it ended with 0 and was to be committed.
    chunks: what it printed, in the order in which it arrived: the number of the stream and
        the bytes.  Only the last bytes are kept; ``dropped`` counts those before.
    seconds: from its start to its end.
    out_of_memory: the kernel killed a process of it, because its limit was reached.
    services: how those that ran beside it were at the end, by their names.
    """

    exit_code: int
    state: ContainerState | None
    chunks: tuple[tuple[int, bytes], ...] = field(default=(), repr=False)
    dropped: int = 0
    seconds: float = 0.0
    out_of_memory: bool = False
    services: Mapping[str, ServiceResult] = field(default_factory=dict)

    @property
    def output(self) -> bytes:
        """Both streams, in the order of arrival."""
        return b"".join(data for _, data in self.chunks)

    @property
    def stdout(self) -> bytes:
        """What it printed on stdout."""
        return b"".join(data for stream, data in self.chunks if stream == STDOUT)

    @property
    def stderr(self) -> bytes:
        """What it printed on stderr."""
        return b"".join(data for stream, data in self.chunks if stream == STDERR)


class Output:
    """The last bytes of an output, in order; memory does not grow with it."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._chunks: list[tuple[int, bytes | bytearray]] = []
        self._size = 0
        self.dropped = 0

    def add(self, stream: int, data: bytes) -> None:
        """Append; forget what is over the limit, not at once but before it is twice that."""
        last = self._chunks[-1] if self._chunks else (0, b"")
        # A step may write byte by byte, and an object for each costs a hundred times as much.
        if last[0] == stream and isinstance(last[1], bytearray) and len(last[1]) < _SMALL:
            last[1].extend(data)
        else:
            self._chunks.append((stream, bytearray(data) if len(data) < _SMALL else data))
        self._size += len(data)
        excess = self._size - self._limit
        # Cutting a list costs its length, so not for every chunk.
        if excess > self._limit:
            self._trim()

    def _trim(self) -> None:
        excess = self._size - self._limit
        place = 0
        while excess > 0 and place < len(self._chunks):
            stream, data = self._chunks[place]
            cut = min(excess, len(data))
            if cut < len(data):
                self._chunks[place] = (stream, data[cut:])
            else:
                place += 1
            excess -= cut
            self._size -= cut
            self.dropped += cut
        del self._chunks[:place]

    def chunks(self) -> tuple[tuple[int, bytes], ...]:
        """Return what was kept."""
        self._trim()
        return tuple((stream, bytes(data)) for stream, data in self._chunks)


class Step:
    """A process that runs.  ``open_step`` makes it and ends it."""

    def __init__(self, context: StepContext, step_id: str, options: RunOptions) -> None:
        self.id = step_id
        self.options = options
        self.pid = 0
        self.args: tuple[str, ...] = ()
        # How its first process is run, as the runtime is told.
        self.process: dict[str, Any] = {}
        self.tasks = context.containerd.tasks
        self._context = context
        self._folder: Folder | None = None
        self._exited: asyncio.Task[int] | None = None
        self._output = Output(options.max_output)
        # What arrives before the answer that it has started: that comes first.
        self._early: list[StepOutput] | None = []
        self._began = time.monotonic()
        self.seconds = 0.0
        # By us, because its time was over.
        self.timed_out = False
        # By the kernel, because it wanted more memory than its limit.
        self.out_of_memory = False

    def _on_output(self, stream: int, data: bytes) -> None:
        self._output.add(stream, data)
        event = StepOutput(step=self.id, stream=stream, data=data)
        if self._early is None:
            self._context.on_event(event)
        else:
            self._early.append(event)

    def _tell_started(self) -> None:
        self._context.on_event(StepStarted(step=self.id, args=self.args))
        early, self._early = self._early or [], None
        for event in early:
            self._context.on_event(event)

    @property
    def folder(self) -> Folder:
        """Its folder on the daemon's machine."""
        assert self._folder is not None
        return self._folder

    @property
    def ended(self) -> bool:
        """Tell whether its first process has ended."""
        return self._exited is not None and self._exited.done()

    async def wait(self) -> int:
        """Wait until it has ended and all of its output is here; return its status."""
        assert self._exited is not None
        assert self._folder is not None
        status = await asyncio.shield(self._exited)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_TIMEOUT):
                await self._folder.stdio.wait()
        return status

    async def kill(self, signal: str | int, *, everything: bool = False) -> None:
        """Send a signal to its first process, or to all; does nothing once it has ended."""
        with contextlib.suppress(NotFound, FailedPrecondition):
            await self.tasks.kill(self.id, signal_number(signal), all_processes=everything)

    async def stop(self, stop_signal: str | int, grace: float) -> None:
        """End it: the stop signal, ``grace`` seconds, then the whole cgroup."""
        assert self._exited is not None
        await self.kill(stop_signal)
        done, _ = await asyncio.wait([self._exited], timeout=grace)
        if not done:
            await self.kill(SIGKILL, everything=True)

    async def write(self, data: bytes) -> None:
        """Write to its stdin; raises BrokenPipeError once that is closed."""
        assert self._folder is not None
        if not self.options.stdin:
            raise BrokenPipeError("the step has no stdin: run it with stdin=True")
        await self._folder.stdio.write(data)

    async def close_stdin(self) -> None:
        """Let it see the end of its input."""
        assert self._folder is not None
        await self._folder.stdio.close_stdin()
        with contextlib.suppress(NotFound, FailedPrecondition):
            await self.tasks.close_io(self.id)

    async def resize(self, width: int, height: int) -> None:
        """Tell its terminal a size in characters."""
        with contextlib.suppress(NotFound, FailedPrecondition):
            await self.tasks.resize_pty(self.id, width=width, height=height)

    def result(self, state: ContainerState | None, exit_code: int) -> RunResult:
        """Return what is known at its end."""
        chunks = self._output.chunks()
        return RunResult(
            exit_code, state, chunks, self._output.dropped, self.seconds, self.out_of_memory
        )


@asynccontextmanager
async def open_step(
    context: StepContext,
    state: ContainerState,
    options: RunOptions,
    *,
    snapshot: str,
    keep: bool = True,
) -> AsyncIterator[Step]:
    """Start a process in an active snapshot of a state; leaving the context ends it.

    What it needed is removed then; the snapshot is the caller's, and clean if they may keep it.
    Raises CommandNotFound, CommandNotExecutable, UserNotFound, StepError.
    """
    if options.binds and not context.site.shares_files:
        # There may be one of that name, and it would be the wrong one.
        raise StepError(
            f"cannot mount {options.binds[0].source}: the daemon runs in a container, where the"
            " directories of this machine are not",
            hint="copy the files in, or use a containerd of this machine",
        )
    for bind in options.binds:
        if not await asyncio.to_thread(os.path.lexists, bind.source):
            raise StepError(
                f"cannot mount {bind.source}: there is no such file or directory",
                hint="make it, or check its path",
            )
    step_id = f"step-{secrets.token_hex(8)}"
    step = Step(context, step_id, options)
    hostname = options.hostname or step_id.removeprefix("step-")[:12]
    mounts = await context.snapshots.mounts(snapshot)
    targets = _mounted_over(options)
    asked = {**dict.fromkeys(targets, False), _PASSWD: True, _GROUP: True}
    found = await context.site.look(mounts, asked)
    user = _user(state, options, found)
    files = context.network.files(options, hostname)
    async with context.site.folder(
        step_id, files, step._on_output, stdin=options.stdin, terminal=options.terminal
    ) as folder:
        step._folder = folder
        mounted = context.network.mounted(options, folder.files)
        spec = runtime_spec(
            state,
            options,
            step=step_id,
            architecture=context.platform.architecture,
            user=user,
            hostname=hostname,
            files=mounted,
            hooks=context.network.hooks(options, step_id, hostname, folder.files["hosts"]),
            cgroups=context.site.has_cgroups,
            rootless=context.site.is_rootless,
        )
        step.process = spec["process"]
        step.args = tuple(step.process["args"])
        try:
            async with task_group() as group:
                try:
                    await _create(step, context, state, spec, snapshot, mounts)
                    # Asked before the start: a process may end at once (trap 29).
                    step._exited = group.create_task(_exit_status(step))
                    await _start(step, spec)
                    step._tell_started()
                    yield step
                finally:
                    await shielded(_end(step), timeout=CLEANUP_TIMEOUT)
        finally:
            if found is not None and keep:
                left = _left_behind(found, targets)
                await shielded(context.site.forget(mounts, left), timeout=CLEANUP_TIMEOUT)


async def prepare(context: StepContext, state: ContainerState, key: str) -> None:
    """Make an active snapshot on a state's, held by a lease of the same name."""
    _check(state, context)
    labels = {LABEL_STEP: key, LABEL_SESSION: context.session}
    await unbroken(
        context.containerd.leases.create(key, expires=LEASE_EXPIRES, labels=labels),
        patience=CLEANUP_TIMEOUT,
    )
    try:
        await unbroken(
            context.snapshots.prepare(key, state.snapshot_key, labels=labels, lease=key),
            patience=CLEANUP_TIMEOUT,
        )
    except NotFound as error:
        raise StepError(
            f"the snapshot of this state is not there: {state.snapshot_key}",
            hint="pull its image again, or run the steps again that made it",
        ) from error


async def discard(context: StepContext, key: str, *, sync: bool = False) -> None:
    """Remove an active snapshot and its lease, whatever of them is there.

    A commit that was cancelled may have been carried out: what it made goes, too.  With ``sync``,
    also the blobs that only the lease held.
    """
    # Unavailable: the daemon was killed.  Its next start finds the lease, and sweep() that.
    with contextlib.suppress(ContainerdError):
        for name in (key, _state_key(key)):
            with contextlib.suppress(ContainerdError):
                await context.snapshots.remove(name)
        await context.containerd.leases.delete(key, sync=sync)


async def _create(
    step: Step,
    context: StepContext,
    state: ContainerState,
    spec: dict[str, Any],
    snapshot: str,
    mounts: Any,
) -> None:
    containers, tasks = context.containerd.containers, context.containerd.tasks
    assert step._folder is not None
    stdio = step._folder.stdio
    # Whatever containerd has begun it may still do after we are gone.  A task that is half made
    # when its request is cancelled would leave its shim, cgroup and address behind.
    await unbroken(
        containers.create(
            step.id,
            spec=json.dumps(spec).encode(),
            snapshotter=context.snapshots.name,
            snapshot_key=snapshot,
            image=state.image or "",
            labels={LABEL_STEP: step.id, LABEL_SESSION: context.session},
        ),
        patience=CLEANUP_TIMEOUT,
    )
    try:
        step.pid = await unbroken(
            tasks.create(
                step.id,
                mounts,
                stdin=stdio.stdin,
                stdout=stdio.stdout,
                stderr=stdio.stderr,
                terminal=step.options.terminal,
            ),
            patience=CLEANUP_TIMEOUT,
        )
    except ContainerdError as error:
        raise _explained(error, spec) from error


async def _start(step: Step, spec: dict[str, Any]) -> None:
    step._began = time.monotonic()
    try:
        await unbroken(step.tasks.start(step.id), patience=CLEANUP_TIMEOUT)
    except ContainerdError as error:
        raise _explained(error, spec) from error


async def _exit_status(step: Step) -> int:
    ended = await step.tasks.wait(step.id)
    step.seconds = time.monotonic() - step._began
    return ended.status


async def _end(step: Step) -> None:
    ended = step._exited is not None and step._exited.done()
    if ended and step.options.memory is not None:
        with contextlib.suppress(ContainerdError):
            step.out_of_memory = await step.tasks.oom_kills(step.id) > 0
    if step._exited is not None:
        # Before its shim goes, which would be an error of this call.
        step._exited.cancel()
    await end_container(step._context, step.id, ended=ended)


async def end_container(context: StepContext, container_id: str, *, ended: bool = False) -> None:
    """End a task if it runs, and delete task and container; says nothing of what is gone.

    ended: the task is known to have ended.  One that was never started could be deleted as it
        is, but its shim waits many seconds for the end of its output first, so it is killed, too.
    A container whose task cannot be deleted stays: by its record, ``sweep`` finds both.
    """
    tasks = context.containerd.tasks
    with contextlib.suppress(ContainerdError):
        with contextlib.suppress(NotFound):
            if not ended:
                with contextlib.suppress(NotFound, FailedPrecondition):
                    await tasks.kill(container_id, SIGKILL, all_processes=True)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(END_TIMEOUT):
                        await tasks.wait(container_id)
            await tasks.delete(container_id)
        await context.containerd.containers.delete(container_id)


async def run_step(
    context: StepContext,
    state: ContainerState,
    options: RunOptions,
    *,
    use: Callable[[Step], Any] | None = None,
) -> RunResult:
    """Run a process to its end; commit its file system if that is wanted and it ended with 0.

    use: a coroutine function that gets the step while it runs (input, signals); it is cancelled
        when the step has ended, and at its own end stdin is closed.
    """
    key = f"step-{secrets.token_hex(8)}"
    began = time.monotonic()
    kept = False
    try:
        await prepare(context, state, key)
        async with open_step(context, state, options, snapshot=key, keep=options.commit) as step:
            exit_code = await _until_end(step, state, use)
        after: ContainerState | None = None
        if options.commit and exit_code == 0 and not step.timed_out:
            after = await commit(context, state, key)
            kept = True
    finally:
        if not kept:
            await shielded(discard(context, key), timeout=CLEANUP_TIMEOUT)
    result = step.result(after, exit_code)
    seconds = time.monotonic() - began
    context.on_event(StepFinished(step=step.id, exit_code=exit_code, seconds=seconds))
    _refused(step, result)
    if step.timed_out:
        raise StepTimeout(
            f"the step did not end within {options.timeout:g} seconds",
            hint="give it more time, or look at its output",
            exit_code=exit_code or 137,
            output=result.output,
        )
    if options.check and exit_code:
        raise StepFailed(
            f"the step {fate(result, options.memory)}; it printed: {tail(result.output)}",
            hint="look at its output: the error has it as .output",
            exit_code=exit_code,
            output=result.output,
        )
    return result


def _refused(step: Step, result: RunResult) -> None:
    """Raise what the kernel said when it was to run the program.

    The runtime asks it last of all: what it says is all of the output then.
    """
    said = _EXEC.fullmatch(result.output) if result.exit_code in _EXEC_CODES else None
    command = step.args[0]
    if said is None or posixpath.basename(os.fsencode(command)) != posixpath.basename(said[1]):
        return
    if said[2].startswith(b"no such"):
        raise CommandNotFound(
            f"the image has no program {command!r}, or not the one that it needs to run",
            hint="check its first line, or its loader",
        )
    raise CommandNotExecutable(
        f"cannot run {command!r}: it is not a program for this platform",
        hint="check its first line and its platform",
    )


def fate(result: RunResult, memory: int | None) -> str:
    """Say in words how a step ended that did not end well."""
    if result.out_of_memory:
        return f"ran out of memory (its limit is {(memory or 0) >> 20} MiB)"
    if result.exit_code > 128:
        return f"was ended by {signal_name(result.exit_code - 128)}"
    return f"ended with status {result.exit_code}"


def tail(output: bytes) -> str:
    """Return the last lines of an output, in one."""
    lines = [line.strip() for line in output.decode(errors="replace").split("\n")]
    return " | ".join([line for line in lines if line][-TAIL:]) or "nothing"


async def _until_end(step: Step, state: ContainerState, use: Callable[[Step], Any] | None) -> int:
    options = step.options
    stop_signal = options.stop_signal or state.stop_signal
    async with task_group() as group:
        helper = group.create_task(_help(step, use))
        # Now it begins, however soon the process may end.
        await asyncio.sleep(0)
        try:
            async with asyncio.timeout(options.timeout):
                return await step.wait()
        except TimeoutError:
            step.timed_out = True
            await step.stop(stop_signal, options.grace)
            return await step.wait()
        finally:
            helper.cancel()
    raise AssertionError("unreachable")


async def _help(step: Step, use: Callable[[Step], Any] | None) -> None:
    if use is not None:
        await use(step)
    # A terminal has no end: that is a key there.
    if step.options.stdin and not step.options.terminal:
        # Nobody else writes any more, and a program that reads to the end would wait for ever.
        await step.close_stdin()


def _state_key(key: str) -> str:
    return key.replace("step-", "state-")


async def commit(
    context: StepContext, state: ContainerState, key: str, *, sync: bool = False
) -> ContainerState:
    """Make an active snapshot the new state and end its lease (``sync`` as for ``discard``).

    If it fails or is cancelled, ``discard`` removes whatever is there by then.
    """
    name = _state_key(key)
    # A root of its own until somebody removes it: no image record holds it.
    labels = {LABEL_STEP: key, "containerd.io/gc.root": time.strftime("%Y-%m-%dT%H:%M:%SZ")}
    await context.snapshots.commit(name, key, labels=labels, lease=key)
    await shielded(context.containerd.leases.delete(key, sync=sync), timeout=CLEANUP_TIMEOUT)
    return ContainerState(
        snapshot_key=name,
        snapshotter=state.snapshotter,
        platform=state.platform,
        env=state.env,
        working_dir=state.working_dir,
        user=state.user,
        entrypoint=state.entrypoint,
        cmd=state.cmd,
        labels=state.labels,
        stop_signal=state.stop_signal,
        healthcheck=state.healthcheck,
    )


def check_snapshotter(state: ContainerState, context: StepContext) -> None:
    """Raise StepError for a state of another snapshotter than ours."""
    if state.snapshotter != context.snapshots.name:
        raise StepError(
            f"this state is a snapshot of {state.snapshotter!r}, and this engine uses"
            f" {context.snapshots.name!r}",
            hint=f"connect with snapshotter={state.snapshotter!r}",
        )


def _check(state: ContainerState, context: StepContext) -> None:
    check_snapshotter(state, context)
    if context.platform.rank(Platform.parse(state.platform)) is None:
        raise StepError(
            f"this state is for {state.platform}, and containerd's machine is {context.platform}",
            hint=f"pull the image for {context.platform}, or use a daemon on such a machine",
        )


def _user(state: ContainerState, options: RunOptions, found: dict[str, Found] | None) -> User:
    wanted = options.user if options.user is not None else state.user
    if found is None:
        name, _, group = wanted.partition(":")
        if not all(part.isdigit() for part in (name or "0", group or "0")):
            raise StepError(
                f"cannot look up the user {wanted!r}: this containerd's files are not ours to read",
                hint="give user and group as numbers, or run as root",
            )
        return resolve_user(wanted, None, None)
    return resolve_user(wanted, found[_PASSWD].data, found[_GROUP].data)


def _mounted_over(options: RunOptions) -> list[str]:
    return [
        *_MOUNT_POINTS,
        *Network.targets(options),
        *(t.target for t in options.tmpfs),
        *(b.target for b in options.binds),
    ]


def _left_behind(found: dict[str, Found], targets: list[str]) -> list[str]:
    """Return what the runtime made to mount on, the deepest first."""
    made: set[str] = set()
    for target in targets:
        here = found[target]
        if here.kind != "absent":
            continue
        # A link on the way may have led elsewhere.
        path = target if target.startswith(f"{here.missing}/") else here.missing
        if here.rest:
            path = f"{here.missing}/{here.rest}"
        while path.startswith(here.missing) and path != "/":
            made.add(path)
            path = path.rpartition("/")[0] or "/"
    return sorted(made, key=lambda p: p.count("/"), reverse=True)


def _explained(error: ContainerdError, spec: dict[str, Any]) -> StepError | ContainerdError:
    """Say what a runtime's error means; it reports all of them as text (trap 25)."""
    text = str(error)
    command = spec["process"]["args"][0]
    if isinstance(error, NoSpace | Unavailable | AlreadyExists):
        return error
    low = text.lower()
    if "executable file not found" in low or (f'exec: "{command}"' in text and "no such" in low):
        return CommandNotFound(
            f"the image has no program {command!r}",
            hint="check the command, and the entry point of the image",
        )
    if f'exec: "{command}"' in text or "exec format error" in low:
        if "is a directory" in low:
            why = "it is a directory"
        elif "exec format error" in low:
            why = "it is not a program for this platform"
        else:
            why = "permission denied; its mode forbids it, or it is a directory"
        return CommandNotExecutable(
            f"cannot run {command!r}: {why}", hint="check its mode and its platform"
        )
    return StepError(f"the step could not be started: {text}", hint="")
