"""A step on this terminal: its output written, its input read, signals and sizes passed on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

import click

from serpentine.errors import InvalidSetting, StepError
from serpentine.events import Event, StepOutput

if TYPE_CHECKING:
    from serpentine.run.step import Step

__all__ = ["Console"]

EXIT_FAILED, EXIT_BROKEN_PIPE = 125, 141
CHUNK = 1 << 16
GRACE = 10.0
# Passed on as they are; Ctrl-C has a way of its own.
_PASSED_ON = ("SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGCONT")


class Console:
    """Where a step's output goes and its input comes from."""

    def __init__(self, *, interactive: bool, terminal: bool, stdout_to_stderr: bool) -> None:
        """stdout_to_stderr: stdout belongs to a result of ours.

        Raises InvalidSetting for a terminal where there is none.
        """
        if interactive and terminal and not sys.stdin.isatty():
            raise InvalidSetting(
                "stdin is not a terminal",
                hint="run it in a terminal, or use 'serpentine run -i' without -t",
            )
        self.interactive, self.terminal = interactive, terminal
        self._fds = {1: 2 if stdout_to_stderr else 1, 2: 2}
        self._interrupts = 0
        self._failure: OSError | None = None
        self._failed = asyncio.Event()

    def show(self, event: Event) -> None:
        """Write what a step printed; once that fails, nobody needs any more of it."""
        if not isinstance(event, StepOutput) or self._failure is not None:
            return
        try:
            view = memoryview(event.data)
            while view:
                view = view[os.write(self._fds[event.stream], view) :]
        except OSError as error:
            self._failure = error
            self._failed.set()

    def check(self) -> None:
        """End with what a shell says of a writer whom nobody read, or raise StepError."""
        if isinstance(self._failure, BrokenPipeError):
            raise click.exceptions.Exit(EXIT_BROKEN_PIPE)
        if self._failure is not None:
            raise StepError(
                f"cannot write the output: {self._failure.strerror}",
                hint="the step was ended; make room, or write it elsewhere",
                exit_code=EXIT_FAILED,
            )

    async def attach(self, step: Step) -> None:
        """Pass input, signals and the terminal's size on until cancelled."""
        with _raw(self.interactive and self.terminal):
            async with self._signals(step), asyncio.TaskGroup() as group:
                if self.terminal:
                    group.create_task(self._follow_size(step))
                if self.interactive:
                    group.create_task(_feed(step))
                await self._failed.wait()
                await step.kill("SIGKILL", everything=True)
                await asyncio.Event().wait()

    async def _follow_size(self, step: Step) -> None:
        changed = asyncio.Event()
        changed.set()
        if sys.platform != "win32":
            asyncio.get_running_loop().add_signal_handler(signal.SIGWINCH, changed.set)
        while True:
            await changed.wait()
            changed.clear()
            columns, lines = shutil.get_terminal_size()
            await step.resize(columns, lines)

    @asynccontextmanager
    async def _signals(self, step: Step) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        owner = asyncio.current_task()
        assert owner is not None
        # add_signal_handler() replaces what was there; asyncio's own comes back at the end.
        before = signal.getsignal(signal.SIGINT)
        async with asyncio.TaskGroup() as group:

            def interrupted() -> None:
                self._interrupts += 1
                if self._interrupts == 1:
                    group.create_task(_stop(step))
                else:
                    group.create_task(step.kill("SIGKILL", everything=True))

            def pass_on(name: str) -> None:
                group.create_task(step.kill(name))

            handled = []
            try:
                with contextlib.suppress(NotImplementedError, RuntimeError):
                    loop.add_signal_handler(signal.SIGINT, interrupted)
                    handled.append(signal.SIGINT)
                    for name in _PASSED_ON:
                        number = getattr(signal, name)
                        loop.add_signal_handler(number, pass_on, name)
                        handled.append(number)
                yield
            finally:
                for number in handled:
                    loop.remove_signal_handler(number)
                signal.signal(signal.SIGINT, before)


async def _stop(step: Step) -> None:
    click.echo("serpentine: stopping; Ctrl-C once more ends it at once", err=True)
    await step.stop("SIGINT", GRACE)


async def _feed(step: Step) -> None:
    """Copy our stdin into the step's."""
    with contextlib.suppress(BrokenPipeError):
        async for data in _stdin():
            await step.write(data)
    await step.close_stdin()


async def _stdin() -> AsyncIterator[bytes]:
    loop = asyncio.get_running_loop()
    fd = sys.stdin.fileno()
    while True:
        ready = asyncio.Event()
        try:
            loop.add_reader(fd, ready.set)
        except (PermissionError, NotImplementedError):
            pass  # a file: it is always ready.  (Windows: nothing can be waited for.)
        else:
            try:
                await ready.wait()
            finally:
                # At once: told a second time of what was read by then, we would block.
                loop.remove_reader(fd)
        data = os.read(fd, CHUNK)
        if not data:
            return
        yield data


@contextmanager
def _raw(wanted: bool) -> Iterator[None]:
    """Let every key go to the step, Ctrl-C too."""
    if sys.platform != "win32" and wanted:
        import termios
        import tty

        fd = sys.stdin.fileno()
        before = termios.tcgetattr(fd)
        # Not TCSAFLUSH, which is the default: what was typed ahead is the step's.
        tty.setraw(fd, termios.TCSADRAIN)
        try:
            yield
        finally:
            termios.tcsetattr(fd, termios.TCSADRAIN, before)
    else:
        yield
