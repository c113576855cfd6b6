"""Services: processes that run beside a step, ready before it starts, reachable by name."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from serpentine._concurrency import shielded, task_group
from serpentine.containerd import TaskStatus
from serpentine.errors import (
    ContainerdError,
    DaemonFailed,
    FailedPrecondition,
    InvalidSetting,
    NotFound,
    ServiceFailed,
    StepError,
    Unavailable,
)
from serpentine.events import (
    Event,
    OnEvent,
    ServiceOutput,
    ServiceReady,
    StepOutput,
    StepStarted,
)
from serpentine.model.state import ContainerState, HealthCheck
from serpentine.run.options import RunOptions
from serpentine.run.step import (
    CLEANUP_TIMEOUT,
    SIGKILL,
    RunResult,
    Step,
    StepContext,
    commit,
    discard,
    fate,
    open_step,
    prepare,
    run_step,
    tail,
)

__all__ = ["Service", "ServiceResult", "run_with_services"]

# While we wait, however seldom it would be asked later.
MAX_PAUSE = 1.0
MIN_PAUSE = 0.1
# Between the end of a service's output and the news that it has ended.
GONE = 10.0
# With none at all, the shim gives it a /dev/null that cannot be written.
_NOWHERE = "file:///dev/null"
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
# What ends in a number is an address to every resolver, also "1" and "0x7f.1".
_NUMBER = re.compile(r"(.*\.)?([0-9]+|0[xX][0-9A-Fa-f]*)")
# In every list of hosts before ours, and the first one counts.
_TAKEN = re.compile(r"localhost|ip6-[a-z]+")


@dataclass(frozen=True, slots=True)
class Service:
    """A state, how to run it, and how to know that it is ready.

    options: as for a step; its ``args`` are the state's command by default.  ``network`` is the
        bridge, and ``timeout``, ``commit`` and ``check`` do not count: it runs as long as the
        step.
    health: in place of the state's own check; without any it is ready once it runs.
    keep: whether its file system at the end becomes a new state, for the next step to go on with.
    """

    state: ContainerState
    options: RunOptions = field(default_factory=RunOptions)
    health: HealthCheck | None = None
    keep: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be meant; raises InvalidSetting."""
        if not isinstance(self.options, RunOptions):
            raise InvalidSetting(
                "the options of a service are RunOptions",
                hint='write Service(state, RunOptions(args=["httpd", "-f"]))',
            )


@dataclass(frozen=True, slots=True)
class ServiceResult:
    """How a service was when the step had ended.

    died: its status, if it had ended by itself; None if it ran until it was stopped.
    service: the same service on its new state, with ``keep``; else as it was.
    output: the end of what it printed.
    """

    died: int | None
    service: Service
    output: bytes = field(default=b"", repr=False)


class _Running:
    def __init__(self, name: str, service: Service, step: Step, address: str | None) -> None:
        self.name, self.service = name, service
        self.step, self.address = step, address
        self.died: int | None = None
        # Whether its file system is wanted, and what became of it.
        self.wanted = False
        self.after: ContainerState | None = None

    @property
    def output(self) -> bytes:
        return self.step.result(None, 0).output

    def result(self) -> ServiceResult:
        service = replace(self.service, state=self.after) if self.after else self.service
        return ServiceResult(self.died, service, self.output)


async def run_with_services(
    context: StepContext,
    state: ContainerState,
    options: RunOptions,
    services: Mapping[str, Service],
    *,
    use: Callable[[Step], Any] | None = None,
) -> RunResult:
    """Run a step with services beside it, which it reaches by their names.

    They start one after the other, so that each knows those before it, and get ready side by
    side.  After the step they are stopped side by side.  One that ends with another status than
    0 while the step runs ends the step, too: it could wait for ever.

    Raises InvalidSetting for a name that no host can have, and for networks that are not the
    bridge, before anything starts; ServiceFailed, with the service's output, for one that does
    not start, ends before it is ready or is not ready in time, and for one that failed while
    the step ran, unless the step ended with 0; else what the step raises.
    """
    _check(options, services)
    context = replace(context, network=context.network.of_their_own())
    running: list[_Running] = []
    result: RunResult | None = None
    failure: StepError | None = None
    made: list[ContainerState] = []
    complete = False
    try:
        async with AsyncExitStack() as stack:
            for name, service in services.items():
                others = {one.name: one.address for one in running if one.address}
                running.append(await _enter(stack, context, name, service, others))
            async with task_group() as group:
                for one in running:
                    group.create_task(_ready(context, one))
            hosts = {one.name: one.address for one in running if one.address}
            beside = replace(options, extra_hosts={**hosts, **options.extra_hosts})
            try:
                result = await _run_beside(context, state, beside, running, made, use)
            except ServiceFailed:
                raise
            except StepError as error:
                failure = error
            # On any other way out, cancellation too, nobody waits: leaving the stack kills them.
            async with task_group() as group:
                for one in running:
                    group.create_task(_stop(one))
            for one in running:
                one.wanted = one.service.keep and failure is None
        if failure is not None or (result is not None and result.exit_code):
            for one in running:
                _blame(one, failure)
        complete = failure is None
    finally:
        if not complete:
            made += [one.after for one in running if one.after is not None]
            await shielded(_forget(context, made), timeout=CLEANUP_TIMEOUT)
    if failure is not None:
        raise failure
    assert result is not None
    return replace(result, services={one.name: one.result() for one in running})


def _check(options: RunOptions, services: Mapping[str, Service]) -> None:
    """Refuse what cannot work before anything runs."""
    seen: set[str] = set()
    for name, service in services.items():
        if not _NAME.fullmatch(name):
            raise InvalidSetting(
                f"{name!r} is not a name for a service",
                hint="use letters, digits, '-', '_' and '.'",
            )
        if _NUMBER.fullmatch(name) or _TAKEN.fullmatch(name.lower()):
            raise InvalidSetting(
                f"{name!r} is not a name for a service: it means something else already",
                hint="choose another one",
            )
        if name.lower() in seen:
            raise InvalidSetting(
                f"two services are called {name!r}: hosts' names are the same in capitals",
                hint="choose another name",
            )
        seen.add(name.lower())
        if service.options.network != "bridge":
            raise InvalidSetting(
                f"the service {name!r} cannot be reached in the network"
                f" {service.options.network!r}",
                hint="use the network 'bridge'",
            )
    if options.network != "bridge":
        raise InvalidSetting(
            f"a step of the network {options.network!r} does not reach services",
            hint="use the network 'bridge'",
        )


async def _run_beside(
    context: StepContext,
    state: ContainerState,
    options: RunOptions,
    running: list[_Running],
    made: list[ContainerState],
    use: Callable[[Step], Any] | None,
) -> RunResult:
    """Run the step; raises ServiceFailed as soon as a service fails.

    The step's new state is put into ``made``, for whatever happens to the result.
    """

    async def run() -> RunResult:
        result = await run_step(context, state, options, use=use)
        if result.state is not None:
            made.append(result.state)
        return result

    async with task_group() as group:
        step = group.create_task(run())
        watching = {group.create_task(one.step.wait()): one for one in running}
        while not step.done():
            done, _ = await asyncio.wait([step, *watching], return_when=asyncio.FIRST_COMPLETED)
            for task in [task for task in watching if task in done]:
                one, status = watching.pop(task), task.result()
                error = await _died(one, status) if status else None
                # What the step did to its end counts.
                if error is not None and not step.done():
                    raise error
        for task in watching:
            task.cancel()
    return step.result()


async def _forget(context: StepContext, states: list[ContainerState]) -> None:
    """Remove states that nobody will hear of."""
    for state in states:
        with contextlib.suppress(ContainerdError):
            await context.snapshots.remove(state.snapshot_key)


async def _enter(
    stack: AsyncExitStack,
    context: StepContext,
    name: str,
    service: Service,
    others: Mapping[str, str],
) -> _Running:
    try:
        return await stack.enter_async_context(_started(context, name, service, others))
    except StepError as error:
        # Without its name, it would be read as the step's.
        raise ServiceFailed(
            f"the service {name!r} did not start: {error}", hint=error.hint, output=error.output
        ) from error


@asynccontextmanager
async def _started(
    context: StepContext, name: str, service: Service, others: Mapping[str, str]
) -> AsyncIterator[_Running]:
    own = replace(context, on_event=_renamed(name, context.on_event))
    options = replace(
        service.options,
        # Common in names of services, and in no hostname.
        hostname=service.options.hostname or name.replace("_", "-"),
        extra_hosts={**others, **service.options.extra_hosts},
    )
    key = f"step-{secrets.token_hex(8)}"
    one: _Running | None = None
    try:
        await prepare(own, service.state, key)
        async with open_step(own, service.state, options, snapshot=key) as step:
            one = _Running(name, service, step, await _address(own, step))
            yield one
        if one.wanted:
            one.after = await commit(own, service.state, key)
    finally:
        if one is None or one.after is None:
            await shielded(discard(own, key), timeout=CLEANUP_TIMEOUT)


async def _address(context: StepContext, step: Step) -> str | None:
    """Return the address that the network's hook has noted in the file of hosts.

    None for a service that has ended by now: behind Envoy its folder goes with its output.
    """
    try:
        data = await context.site.read_file(step.folder.files["hosts"])
    except (DaemonFailed, OSError):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GONE):
                await step.wait()
                return None
        raise
    return data.decode().splitlines()[-1].split()[0]


def _renamed(name: str, on_event: OnEvent) -> OnEvent:
    def show(event: Event) -> None:
        if isinstance(event, StepOutput):
            event = ServiceOutput(service=name, stream=event.stream, data=event.data)
        # There is one step, and a service is none: who counts starts and ends gets one of each.
        if not isinstance(event, StepStarted):
            on_event(event)

    return show


async def _ready(context: StepContext, one: _Running) -> None:
    """Wait until a service is ready; raises ServiceFailed if it ends or takes too long."""
    began = time.monotonic()
    check = one.service.health or one.service.state.healthcheck
    if check is not None:
        async with task_group() as group:
            ended = group.create_task(one.step.wait())
            checked = group.create_task(_checked(one.step, check))
            done, _ = await asyncio.wait([ended, checked], return_when=asyncio.FIRST_COMPLETED)
            ended.cancel()
            checked.cancel()
        if checked not in done:
            raise await _died(one, ended.result())
        if why := checked.result():
            seconds = time.monotonic() - began
            raise _failed(one, f"was not ready after {seconds:.1f} seconds: {why}")
    context.on_event(ServiceReady(service=one.name, seconds=time.monotonic() - began))


async def _died(one: _Running, status: int) -> ServiceFailed:
    memory = one.step.options.memory
    killed = 0
    if memory is not None:
        with contextlib.suppress(ContainerdError):
            killed = await one.step.tasks.oom_kills(one.step.id)
    one.died = status
    return _failed(one, fate(RunResult(status, None, out_of_memory=killed > 0), memory))


def _failed(one: _Running, why: str) -> ServiceFailed:
    return ServiceFailed(
        f"the service {one.name!r} {why}; it printed: {tail(one.output)}",
        hint="look at its output, and at its health check",
        output=one.output,
    )


def _blame(one: _Running, failure: StepError | None) -> None:
    """Raise for a service that failed before the step did: that is why, most likely."""
    if not one.died:
        return
    raise ServiceFailed(
        f"the service {one.name!r} ended with status {one.died} while the step ran;"
        f" it printed: {tail(one.output)}",
        hint="look at its output",
        output=one.output,
    ) from failure


async def _checked(step: Step, check: HealthCheck) -> str:
    """Ask until it is ready; return what the last try said if it never was."""
    deadline = time.monotonic() + check.start_period + check.interval * check.retries
    pause = MIN_PAUSE
    while why := await _ask(step, check):
        left = deadline - time.monotonic()
        if left <= 0:
            return why
        await asyncio.sleep(min(pause, left))
        pause = min(pause * 1.5, max(MIN_PAUSE, min(check.interval, MAX_PAUSE)))
    return ""


async def _ask(step: Step, check: HealthCheck) -> str:
    """Run the check once; return why it is not ready, nothing if it is."""
    words = ["/bin/sh", "-c", check.command] if isinstance(check.command, str) else check.command
    process = {**step.process, "args": list(words), "terminal": False}
    exec_id = f"check-{secrets.token_hex(4)}"
    tasks = step.tasks
    try:
        await tasks.exec(
            step.id, exec_id, json.dumps(process).encode(), stdout=_NOWHERE, stderr=_NOWHERE
        )
        try:
            await tasks.start(step.id, exec_id)
            async with asyncio.timeout(check.timeout):
                status = (await tasks.wait(step.id, exec_id)).status
        finally:
            await shielded(_end_check(step, exec_id), timeout=CLEANUP_TIMEOUT)
    except TimeoutError:
        return f"its check took longer than {check.timeout:g} seconds"
    except Unavailable:
        raise
    except ContainerdError as error:
        return f"its check could not be run: {error}"  # no such program, or the service ended
    return f"its check {fate(RunResult(status, None), None)}" if status else ""


async def _end_check(step: Step, exec_id: str) -> None:
    with contextlib.suppress(ContainerdError):
        try:
            await step.tasks.delete_process(step.id, exec_id)
        except FailedPrecondition:
            await step.tasks.kill(step.id, SIGKILL, exec_id=exec_id)
            await step.tasks.wait(step.id, exec_id)
            await step.tasks.delete_process(step.id, exec_id)


async def _stop(one: _Running) -> None:
    """Stop a service, wait for the last of its output, and note if it had ended by itself."""
    signal = one.service.options.stop_signal or one.service.state.stop_signal
    if one.step.ended or await _has_ended(one.step):
        one.died = await one.step.wait()
        return
    await one.step.stop(signal, one.service.options.grace)
    await one.step.wait()


async def _has_ended(step: Step) -> bool:
    """Ask containerd: its word may be on the way to us, and the step failed for that reason."""
    try:
        return (await step.tasks.get(step.id)).status is TaskStatus.STOPPED
    except NotFound:
        return True
