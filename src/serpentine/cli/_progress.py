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
    DaemonStarted,
    DaemonStarting,
    Event,
    LayerProgress,
    LayerStatus,
    OnEvent,
    PullFinished,
    PullPlanned,
    PullResolved,
    PullStarted,
    Retrying,
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
            return "starting containerd"
        case DaemonStarted():
            return f"containerd {event.version} answers after {event.seconds:.1f} s"
        case PullStarted():
            return f"{event.image}: asking the registry"
        case PullResolved():
            return f"{event.image}: {event.manifest_digest} for {event.platform}"
        case PullPlanned():
            there = sum(layer.status is LayerStatus.EXISTS for layer in event.layers)
            return f"{event.image}: {len(event.layers)} layers, {there} already unpacked"
        case Retrying():
            return f"retrying {event.what} in {event.delay:.1f} s: {event.reason}"
        case PullFinished():
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

    def __call__(self, event: Event) -> None:
        """Print what is worth a line."""
        line = self._layer(event) if isinstance(event, LayerProgress) else describe(event)
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
        elif (line := describe(event)) is not None:
            self._progress.console.print(line, highlight=False, markup=False)

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
