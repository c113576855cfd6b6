"""The one stream of typed events that everything which takes time reports to.

The progress display, the JSON lines and the statistics all read this stream, so they cannot
disagree.  An event is an immutable value; ``name`` is its kind in JSON lines.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, ClassVar

__all__ = [
    "DaemonStarted",
    "DaemonStarting",
    "Event",
    "LayerPlan",
    "LayerProgress",
    "LayerStatus",
    "OnEvent",
    "PullFinished",
    "PullPlanned",
    "PullResolved",
    "PullStarted",
    "Retrying",
    "ignore",
]


class LayerStatus(StrEnum):
    """Where a layer is on its way; in this order, though steps may be left out."""

    WAITING = "waiting"
    DOWNLOADING = "downloading"
    DOWNLOADED = "downloaded"
    APPLYING = "applying"
    DONE = "done"
    EXISTS = "exists"


@dataclass(frozen=True, slots=True)
class Event:
    """The root of all events."""

    name: ClassVar[str] = "event"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, with the kind under ``event``."""
        return {"event": self.name, **asdict(self)}


@dataclass(frozen=True, slots=True)
class DaemonStarting(Event):
    """A containerd of ours is being started; ``kind`` says which sort."""

    name: ClassVar[str] = "daemon_starting"
    kind: str


@dataclass(frozen=True, slots=True)
class DaemonStarted(Event):
    """The containerd answers; ``seconds`` is how long that took."""

    name: ClassVar[str] = "daemon_started"
    kind: str
    endpoint: str
    version: str
    seconds: float


@dataclass(frozen=True, slots=True)
class PullStarted(Event):
    """A pull begins: the registry is asked what the reference means."""

    name: ClassVar[str] = "pull_started"
    image: str


@dataclass(frozen=True, slots=True)
class PullResolved(Event):
    """The reference means this manifest, for this platform."""

    name: ClassVar[str] = "pull_resolved"
    image: str
    platform: str
    manifest_digest: str
    index_digest: str | None


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One layer of a plan; ``size`` is its compressed size in bytes."""

    digest: str
    size: int
    status: LayerStatus


@dataclass(frozen=True, slots=True)
class PullPlanned(Event):
    """What the pull will do, bottom layer first."""

    name: ClassVar[str] = "pull_planned"
    image: str
    layers: tuple[LayerPlan, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class LayerProgress(Event):
    """A layer moved on; ``offset`` of ``size`` bytes are in containerd.

    ``index`` is the layer's place in the manifest: the same blob may stand there twice.
    """

    name: ClassVar[str] = "layer_progress"
    image: str
    index: int
    digest: str
    status: LayerStatus
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Retrying(Event):
    """Something failed and is tried again after ``delay`` seconds."""

    name: ClassVar[str] = "retrying"
    what: str
    reason: str
    delay: float


@dataclass(frozen=True, slots=True)
class PullFinished(Event):
    """The image is there, unpacked; ``seconds`` counts from the start of the pull."""

    name: ClassVar[str] = "pull_finished"
    image: str
    snapshot_key: str
    bytes_downloaded: int
    layers_total: int
    layers_reused: int
    registry_requests: int
    seconds: float


OnEvent = Callable[[Event], None]
"""What receives events: a plain function, called in the event loop; it must not block."""


def ignore(event: Event) -> None:
    """Receive events and do nothing."""
    del event
