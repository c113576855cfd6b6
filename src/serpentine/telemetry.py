"""The event stream for others: for Python's ``logging``, and as OpenTelemetry's spans.

Both are off until somebody asks: the logger ``serpentine`` has no handler but one that does
nothing, and spans need a tracer.
"""

from __future__ import annotations

import json
import logging
import time
from typing import TYPE_CHECKING

import msgspec

from serpentine.errors import InvalidSetting
from serpentine.events import (
    CopyFinished,
    CopyNotice,
    DaemonNotice,
    DaemonStarted,
    DaemonStarting,
    Event,
    LayerProgress,
    LayerStatus,
    OnEvent,
    PullFailed,
    PullFinished,
    PullNotice,
    PullPlanned,
    PullResolved,
    PullStarted,
    Received,
    ReleaseInstalled,
    ReleaseProgress,
    Retrying,
    ServiceOutput,
    ServiceReady,
    StepFinished,
    StepOutput,
    StepStarted,
    VerifyFound,
    VerifyProgress,
)
from serpentine.history import without_urls

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

__all__ = ["LOGGER", "Logs", "Spans", "default_tracer", "watched"]

LOGGER = logging.getLogger("serpentine")
# As libraries do: what the application does not ask for is not printed.
LOGGER.addHandler(logging.NullHandler())

# What happens a few times in a command; all else is for whoever looks into one.
_INFO = (
    CopyFinished,
    CopyNotice,
    DaemonNotice,
    DaemonStarted,
    DaemonStarting,
    PullFailed,
    PullFinished,
    PullNotice,
    PullResolved,
    PullStarted,
    ReleaseInstalled,
    Retrying,
    ServiceReady,
    StepFinished,
    StepStarted,
    VerifyFound,
)


def watched(listener: OnEvent, tracer: Tracer | None = None) -> OnEvent:
    """Return what tells ``logging`` of each event, the tracer if there is one, and the listener.

    One for each pull: images and layers are told apart in it by their place.
    """
    logs = Logs()
    spans = Spans(tracer) if tracer is not None else None

    def tell(event: Event) -> None:
        logs(event)
        if spans is not None:
            spans(event)
        listener(event)

    return tell


def default_tracer() -> Tracer:
    """Return a tracer of the provider that the application has set up.

    Raises InvalidSetting if OpenTelemetry is not installed.
    """
    try:
        from opentelemetry import trace
    except ImportError:
        raise InvalidSetting(
            "spans need OpenTelemetry, which is not installed",
            hint="pip install 'serpentine[otel]', or unset SERPENTINE_TRACES",
        ) from None
    from serpentine._version import __version__

    return trace.get_tracer("serpentine", __version__)


class Logs:
    """Writes events to the logger ``serpentine``, at INFO or DEBUG.

    A line is the event's name and its parts; the event itself is the record's ``event``.  What
    steps and services print is theirs and not logged, nor are the arguments of a step.
    """

    def __init__(self) -> None:
        self._last: dict[tuple[str, int], LayerStatus] = {}

    def __call__(self, event: Event) -> None:
        """Take an event in."""
        level = logging.INFO if isinstance(event, _INFO) else logging.DEBUG
        if LOGGER.isEnabledFor(level) and self._is_worth_a_line(event):
            LOGGER.log(level, "%s", _line(event), extra={"event": event})

    def _is_worth_a_line(self, event: Event) -> bool:
        match event:
            case StepOutput() | ServiceOutput() | ReleaseProgress():
                return False
            case VerifyProgress():
                return event.offset == event.size
            case LayerProgress():
                key = (event.image, event.index)
                if self._last.get(key) is event.status:
                    return False
                self._last[key] = event.status
        return True


def _line(event: Event) -> str:
    values = msgspec.structs.asdict(event)
    if isinstance(event, PullPlanned):
        there = sum(layer.status is LayerStatus.EXISTS for layer in event.layers)
        values["layers"] = f"{there}/{len(event.layers)}"
    elif isinstance(event, StepStarted):
        values["args"] = event.args[0] if event.args else ""
    parts = [f"{name}={_word(value)}" for name, value in values.items() if value is not None]
    return " ".join([event.name, *parts])


def _word(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    text = without_urls(str(value))
    plain = text.isprintable() and text and not any(c in text for c in " \"'=")
    return text if plain else json.dumps(text, ensure_ascii=False)


class Spans:
    """One pull as spans: ``serpentine.pull``, below it each download and each unpacking.

    A download ends with the blob, over however many requests; retries are events of it.  The
    pull's parent is the span that is current when it begins.
    """

    def __init__(self, tracer: Tracer) -> None:
        # Whoever has a tracer has the package.
        from opentelemetry import trace

        self._trace = trace
        self._tracer = tracer
        self._pull: Span | None = None
        self._downloads: dict[str, Span] = {}
        self._received: dict[str, dict[str, int]] = {}
        self._unpacking: dict[int, Span] = {}

    def __call__(self, event: Event) -> None:
        """Take an event in."""
        match event:
            case PullStarted():
                if self._pull is not None:
                    # Our containerd went away, and the pull begins once more.
                    self._end_children("containerd went away")
                self._begin(event.image)
            case PullResolved():
                self._set("oci.manifest.digest", event.manifest_digest)
                self._set("serpentine.platform", event.platform)
            case LayerProgress():
                self._layer(event)
            case Received():
                hosts = self._received.setdefault(event.digest, {})
                hosts[event.host] = hosts.get(event.host, 0) + event.size
            case Retrying():
                self._retried(event)
            case PullFinished():
                # Without a start, nobody was asked and nothing done.
                if self._pull is not None:
                    self._set("serpentine.bytes_downloaded", event.bytes_downloaded)
                    self._set("serpentine.layers.total", event.layers_total)
                    self._set("serpentine.layers.reused", event.layers_reused)
                    self._set("serpentine.registry_requests", event.registry_requests)
                    self._end("")
            case PullFailed():
                self._begin(event.image, event.seconds)
                self._set("error.type", event.error)
                self._end(without_urls(event.reason) or event.error)

    def _begin(self, image: str, ago: float = 0.0) -> Span:
        if self._pull is None:
            self._pull = self._tracer.start_span(
                "serpentine.pull",
                attributes={"container.image.name": image},
                start_time=time.time_ns() - round(ago * 1e9),
            )
        return self._pull

    def _set(self, name: str, value: str | int) -> None:
        if self._pull is not None:
            self._pull.set_attribute(name, value)

    def _layer(self, event: LayerProgress) -> None:
        match event.status:
            case LayerStatus.DOWNLOADING if event.digest not in self._downloads:
                span = self._child("serpentine.download", event)
                span.set_attribute("serpentine.layer.resumed_at", event.offset)
                self._downloads[event.digest] = span
            case LayerStatus.DOWNLOADED:
                if (ended := self._downloads.pop(event.digest, None)) is not None:
                    self._end_download(event.digest, ended)
            case LayerStatus.APPLYING if event.index not in self._unpacking:
                self._unpacking[event.index] = self._child("serpentine.unpack", event)
            case LayerStatus.DONE:
                if (ended := self._unpacking.pop(event.index, None)) is not None:
                    ended.end()

    def _child(self, name: str, event: LayerProgress) -> Span:
        # Named: it is made in a task that has no current span of ours.
        context = self._trace.set_span_in_context(self._begin(event.image))
        attributes: dict[str, str | int] = {
            "serpentine.layer.digest": event.digest,
            "serpentine.layer.size": event.size,
        }
        return self._tracer.start_span(name, context=context, attributes=attributes)

    def _retried(self, event: Retrying) -> None:
        digest = event.what.removeprefix("layer ")
        span = self._downloads.get(digest, self._pull)
        if span is not None:
            span.add_event(
                "retry",
                {
                    "what": without_urls(event.what),
                    "reason": without_urls(event.reason),
                    "delay": event.delay,
                },
            )

    def _end_download(self, digest: str, span: Span) -> None:
        hosts = self._received.pop(digest, {})
        span.set_attribute("serpentine.hosts", sorted(hosts))
        span.set_attribute("serpentine.bytes_downloaded", sum(hosts.values()))
        span.end()

    def _end_children(self, why: str) -> None:
        status = self._trace.Status(self._trace.StatusCode.ERROR, why)
        for digest, span in self._downloads.items():
            span.set_status(status)
            self._end_download(digest, span)
        for span in self._unpacking.values():
            span.set_status(status)
            span.end()
        self._downloads.clear()
        self._unpacking.clear()

    def _end(self, why: str) -> None:
        self._end_children(why)
        if self._pull is not None:
            if why:
                status = self._trace.Status(self._trace.StatusCode.ERROR, why)
                self._pull.set_status(status)
            self._pull.end()
            self._pull = None
