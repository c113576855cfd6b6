"""The event stream, shown: a live table on a terminal, plain lines, or JSON lines; on stderr."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from serpentine.cli._format import size
from serpentine.events import (
    DaemonBuilding,
    DaemonNotice,
    DaemonStarted,
    DaemonStarting,
    Event,
    LayerProgress,
    LayerStatus,
    OnEvent,
    PullFinished,
    PullNotice,
    PullPlanned,
    PullResolved,
    PullStarted,
    ReleaseInstalled,
    ReleaseProgress,
    ReleaseWaiting,
    Retrying,
    VerifyFound,
    VerifyProgress,
    ignore,
)

__all__ = ["MODES", "PlainProgress", "progress"]

MODES = ("auto", "tty", "plain", "json")
PLAIN_EVERY = 5.0

_WORDS = {
    LayerStatus.WAITING: "waiting",
    LayerStatus.DOWNLOADING: "downloading",
    LayerStatus.DOWNLOADED: "downloaded",
    LayerStatus.APPLYING: "applying",
    LayerStatus.DONE: "done",
    LayerStatus.EXISTS: "already there",
}

_CHECKS = {
    "blob": "reading",
    "tree": "unpacking it anew, to compare",
    "repair": "mending the file tree",
}


@contextmanager
def progress(mode: str) -> Iterator[OnEvent]:
    """Give the function that shows events; ``auto`` means ``tty`` on a terminal, else ``plain``.

    ``quiet`` shows nothing.
    """
    if mode == "auto":
        capable = sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        mode = "tty" if capable else "plain"
    if mode == "tty":
        display = _LiveProgress()
        with display.shown():
            yield display
    elif mode == "plain":
        yield PlainProgress()
    elif mode == "json":
        yield _print_json_line
    else:
        yield ignore


def _print_json_line(event: Event) -> None:
    print(json.dumps(event.to_dict()), file=sys.stderr, flush=True)  # noqa: T201


def _short(digest: str) -> str:
    return digest.partition(":")[2][:12]


def describe(event: Event) -> str | None:
    """Return an event in one line of words; None for those that only move a bar."""
    match event:
        case DaemonStarting():
            where = "" if event.kind == "embedded" else f" in {event.kind.capitalize()}"
            return f"starting containerd{where}"
        case DaemonNotice() | PullNotice():
            return event.text
        case DaemonBuilding():
            return f"  {event.line}"
        case DaemonStarted():
            return f"containerd {event.version} answers after {event.seconds:.1f} s"
        case ReleaseWaiting():
            return f"another process is installing; waiting until it gives {event.lock} back"
        case ReleaseInstalled():
            if not event.bytes_downloaded:
                return f"already there: {event.directory}"
            return f"{size(event.bytes_downloaded)} downloaded, {event.seconds:.1f} s"
        case PullStarted():
            return f"pulling {event.image}"
        case PullResolved():
            return f"{event.image}: {event.manifest_digest} for {event.platform}"
        case PullPlanned():
            there = sum(layer.status is LayerStatus.EXISTS for layer in event.layers)
            return f"{event.image}: {len(event.layers)} layers, {there} already unpacked"
        case Retrying():
            return f"retrying {event.what} in {event.delay:.1f} s: {event.reason}"
        case VerifyProgress(what="tree" | "repair") if event.offset < event.size:
            return f"{_short(event.digest)}: {_CHECKS[event.what]}"
        case VerifyFound():
            word = "repaired" if event.repaired else "damaged"
            return f"{event.image}: {event.what} {_short(event.digest)} {word}: {event.problem}"
        # What was here, and nobody was asked: not worth a line.
        case PullFinished() if event.registry_requests or event.bytes_downloaded:
            return (
                f"{event.image}: {size(event.bytes_downloaded)} downloaded,"
                f" {event.layers_reused} of {event.layers_total} layers were there,"
                f" {event.seconds:.1f} s"
            )
    return None


class PlainProgress:
    """Lines for logs: one per change of a layer, and one every five seconds while it moves."""

    def __init__(self) -> None:
        self._last: dict[int, tuple[LayerStatus, float, int]] = {}
        self._releases: dict[str, tuple[float, int]] = {}
        self._checks: dict[str, float] = {}

    def __call__(self, event: Event) -> None:
        """Print what is worth a line."""
        match event:
            case LayerProgress():
                line = self._layer(event)
            case ReleaseProgress():
                line = self._release(event)
            case VerifyProgress(what="blob"):
                line = self._check(event)
            case _:
                line = describe(event)
        if line is not None:
            print(line, file=sys.stderr, flush=True)  # noqa: T201

    def _layer(self, event: LayerProgress) -> str | None:
        now = time.monotonic()
        status, told, offset = self._last.get(event.index, (None, now, 0))
        if status is event.status and now - told < PLAIN_EVERY:
            return None
        self._last[event.index] = (event.status, now, event.offset)
        line = f"{_short(event.digest)}: {_WORDS[event.status]}"
        if event.status is LayerStatus.DOWNLOADING:
            begun = f" {size(event.offset)} of" if event.offset else ""
            line += f"{begun} {size(event.size)}"
            if status is event.status:
                line += f", {size((event.offset - offset) / (now - told))}/s"
        return line

    def _check(self, event: VerifyProgress) -> str | None:
        """Return a line for a blob that takes long, once it does."""
        now = time.monotonic()
        told = self._checks.setdefault(event.digest, now)
        if event.offset == event.size or now - told < PLAIN_EVERY:
            return None
        self._checks[event.digest] = now
        return f"{_short(event.digest)}: read {size(event.offset)} of {size(event.size)}"

    def _release(self, event: ReleaseProgress) -> str | None:
        now = time.monotonic()
        told, offset = self._releases.get(event.url, (now, 0))
        if event.url not in self._releases:
            line = f"{event.program} {event.version}: downloading {event.url}"
        elif now - told >= PLAIN_EVERY:
            line = f"{event.program} {event.version}: {size(event.offset)}"
            line += f" of {size(event.size)}" if event.size is not None else ""
            line += f", {size(max(0, event.offset - offset) / (now - told))}/s"
        else:
            return None
        self._releases[event.url] = (now, event.offset)
        return line


class _LiveProgress:
    """A table with a line per layer, redrawn a few times a second by rich."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskID, TextColumn

        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.fields[name]}"),
            TextColumn("{task.fields[word]:<13}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[amount]:>22}"),
            TextColumn("{task.fields[speed]}"),
            console=self._console,
            transient=False,
            refresh_per_second=8,
        )
        self._tasks: dict[int, TaskID] = {}
        self._rates: dict[int, _Rate] = {}
        self._checking: TaskID | None = None

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Draw until the context ends; the last picture stays."""
        with self._progress:
            yield

    def __call__(self, event: Event) -> None:
        """Take an event in."""
        if isinstance(event, PullPlanned):
            for index, layer in enumerate(event.layers):
                self._tasks[index] = self._progress.add_task(
                    "",
                    total=max(layer.size, 1),
                    completed=max(layer.size, 1) if layer.status is LayerStatus.EXISTS else 0,
                    name=_short(layer.digest),
                    word=_WORDS[layer.status],
                    amount=size(layer.size),
                    speed="",
                )
        if isinstance(event, LayerProgress):
            self._move(event)
        elif isinstance(event, VerifyProgress):
            self._check(event)
        elif (line := describe(event)) is not None:
            self._progress.console.print(line, highlight=False, markup=False)

    def _check(self, event: VerifyProgress) -> None:
        """One line for whatever is checked at the moment: there may be hundreds."""
        if self._checking is None:
            self._checking = self._progress.add_task("", name="", word="", amount="", speed="")
        self._progress.update(
            self._checking,
            total=max(event.size, 1),
            completed=event.offset if event.size else 1,
            name=_short(event.digest),
            word=_CHECKS[event.what].partition(" ")[0],
            amount=f"{size(event.offset)} / {size(event.size)}",
        )

    def _move(self, event: LayerProgress) -> None:
        downloading = event.status is LayerStatus.DOWNLOADING
        rate = self._rates.setdefault(event.index, _Rate())
        speed = rate.update(event.offset) if downloading else 0.0
        amount = f"{size(event.offset)} / {size(event.size)}" if downloading else size(event.size)
        self._progress.update(
            self._tasks[event.index],
            completed=event.offset if event.size else 1,
            word=_WORDS[event.status],
            amount=amount,
            speed=f"{size(speed)}/s" if speed else "",
        )


class _Rate:
    """Bytes per second over the last few seconds."""

    def __init__(self, window: float = 3.0) -> None:
        self._window = window
        self._points: list[tuple[float, int]] = []

    def update(self, offset: int) -> float:
        now = time.monotonic()
        self._points.append((now, offset))
        while len(self._points) > 2 and now - self._points[0][0] > self._window:
            self._points.pop(0)
        (then, before), *_ = self._points
        return (offset - before) / (now - then) if now > then else 0.0
