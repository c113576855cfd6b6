"""The one stream of typed events that everything which takes time reports to.

The progress display, the JSON lines and the statistics all read this stream, so they cannot
disagree.  An event is an immutable value; ``name`` is its kind in JSON lines.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Any, ClassVar

import msgspec

__all__ = [
    "CopyFinished",
    "CopyNotice",
    "DaemonBuilding",
    "DaemonNotice",
    "DaemonStarted",
    "DaemonStarting",
    "Event",
    "LayerPlan",
    "LayerProgress",
    "LayerStatus",
    "OnEvent",
    "PullFailed",
    "PullFinished",
    "PullNotice",
    "PullPlanned",
    "PullResolved",
    "PullStarted",
    "RateLimit",
    "Received",
    "ReleaseInstalled",
    "ReleaseProgress",
    "ReleaseWaiting",
    "Retrying",
    "ServiceOutput",
    "ServiceReady",
    "StepFinished",
    "StepOutput",
    "StepStarted",
    "VerifyFound",
    "VerifyProgress",
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


class Event(msgspec.Struct, frozen=True):
    """The root of all events."""

    name: ClassVar[str] = "event"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, with the kind under ``event``."""
        return {"event": self.name, **msgspec.structs.asdict(self)}


class DaemonStarting(Event, frozen=True):
    """A containerd of ours is being started; ``kind`` says which sort."""

    name: ClassVar[str] = "daemon_starting"
    kind: str


class DaemonNotice(Event, frozen=True):
    """Something about the daemon that its user should know: it had crashed, it is replaced."""

    name: ClassVar[str] = "daemon_notice"
    text: str


class DaemonBuilding(Event, frozen=True):
    """The image of the daemon is built or pulled; ``line`` is what the engine printed."""

    name: ClassVar[str] = "daemon_building"
    image: str
    line: str


class DaemonStarted(Event, frozen=True):
    """The containerd answers; ``seconds`` is how long that took."""

    name: ClassVar[str] = "daemon_started"
    kind: str
    endpoint: str
    version: str
    seconds: float


class ReleaseWaiting(Event, frozen=True):
    """Another process is installing releases; ``lock`` is the file that it holds."""

    name: ClassVar[str] = "release_waiting"
    lock: str


class ReleaseProgress(Event, frozen=True):
    """``offset`` of ``size`` bytes of a release are here; None if the server did not say."""

    name: ClassVar[str] = "release_progress"
    program: str
    version: str
    url: str
    offset: int
    size: int | None


class ReleaseInstalled(Event, frozen=True):
    """The programs are there, downloaded now or before (then ``bytes_downloaded`` is 0)."""

    name: ClassVar[str] = "release_installed"
    directory: str
    bytes_downloaded: int
    seconds: float


class PullStarted(Event, frozen=True):
    """A pull begins: the registry is asked what the reference means."""

    name: ClassVar[str] = "pull_started"
    image: str


class PullResolved(Event, frozen=True):
    """The reference means this manifest, for this platform."""

    name: ClassVar[str] = "pull_resolved"
    image: str
    platform: str
    manifest_digest: str
    index_digest: str | None


class LayerPlan(msgspec.Struct, frozen=True):
    """One layer of a plan; ``size`` is its compressed size in bytes."""

    digest: str
    size: int
    status: LayerStatus


class PullPlanned(Event, frozen=True):
    """What the pull will do, bottom layer first."""

    name: ClassVar[str] = "pull_planned"
    image: str
    layers: tuple[LayerPlan, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, those of the layers, too."""
        layers = [msgspec.structs.asdict(layer) for layer in self.layers]
        return {**super().to_dict(), "layers": layers}


class LayerProgress(Event, frozen=True):
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


class Retrying(Event, frozen=True):
    """Something failed and is tried again after ``delay`` seconds."""

    name: ClassVar[str] = "retrying"
    what: str
    reason: str
    delay: float


class PullNotice(Event, frozen=True):
    """Something that a user should know and that is no failure: the disk may become full."""

    name: ClassVar[str] = "pull_notice"
    image: str
    text: str


class Received(Event, frozen=True):
    """One request has brought bytes of a layer: ``size`` of them from ``offset`` on, from ``host``.

    seconds: until its end, whatever ended it; waiting for containerd is part of it.
    """

    name: ClassVar[str] = "received"
    image: str
    digest: str
    host: str
    offset: int
    size: int
    seconds: float


class RateLimit(Event, frozen=True):
    """A registry told how many requests it lets us make.

    remaining: are left; limit: in ``window`` seconds.  None for what it did not say.
    """

    name: ClassVar[str] = "rate_limit"
    host: str
    remaining: int
    limit: int | None
    window: int | None


class PullFailed(Event, frozen=True):
    """A pull has ended without the image: by an error, or (``cancelled``) because it was to end.

    error: the name of the exception's class; reason: its text.
    seconds: from the start of the pull.
    """

    name: ClassVar[str] = "pull_failed"
    image: str
    error: str
    reason: str
    cancelled: bool
    seconds: float


class PullFinished(Event, frozen=True):
    """The image is there, unpacked; ``seconds`` counts from the start of the pull."""

    name: ClassVar[str] = "pull_finished"
    image: str
    snapshot_key: str
    bytes_downloaded: int
    layers_total: int
    layers_reused: int
    registry_requests: int
    seconds: float


class StepStarted(Event, frozen=True):
    """The first process of a step runs."""

    name: ClassVar[str] = "step_started"
    step: str
    args: tuple[str, ...]


class StepOutput(Event, frozen=True):
    """A step printed something; ``stream`` is 1 for stdout, 2 for stderr."""

    name: ClassVar[str] = "step_output"
    step: str
    stream: int
    data: bytes

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; bytes that are not UTF-8 are replaced."""
        return {
            "event": self.name,
            "step": self.step,
            "stream": self.stream,
            "data": self.data.decode(errors="replace"),
        }


class StepFinished(Event, frozen=True):
    """A step has ended, and what it needed is gone."""

    name: ClassVar[str] = "step_finished"
    step: str
    exit_code: int
    seconds: float


class CopyNotice(Event, frozen=True):
    """Something was left out of a copy, or is not in it as it was: a socket, an attribute."""

    name: ClassVar[str] = "copy_notice"
    text: str


class CopyFinished(Event, frozen=True):
    """A copy has ended; with ``complete`` false, it failed or was cancelled.

    size: the bytes of the archive that went over, until then; of the files, where none was needed.
    count: files, directories and all else that are on our disk now; 0 for a copy into a state.
    """

    name: ClassVar[str] = "copy_finished"
    size: int
    count: int
    seconds: float
    complete: bool


class ServiceOutput(Event, frozen=True):
    """A service printed something; ``stream`` is 1 for stdout, 2 for stderr."""

    name: ClassVar[str] = "service_output"
    service: str
    stream: int
    data: bytes

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; bytes that are not UTF-8 are replaced."""
        return {
            "event": self.name,
            "service": self.service,
            "stream": self.stream,
            "data": self.data.decode(errors="replace"),
        }


class ServiceReady(Event, frozen=True):
    """A service is ready, after ``seconds``."""

    name: ClassVar[str] = "service_ready"
    service: str
    seconds: float


class VerifyProgress(Event, frozen=True):
    """Something is checked or repaired; it is done when ``offset`` is ``size``, in bytes.

    what: ``blob``, ``tree`` or ``repair``; ``digest`` is the blob's, or the chain ID of a tree.
    Of a tree only the beginning and the end are told; its ``size`` is that of its blob.
    """

    name: ClassVar[str] = "verify_progress"
    what: str
    digest: str
    offset: int
    size: int


class VerifyFound(Event, frozen=True):
    """Something is not as it should be, or (``repaired``) no longer."""

    name: ClassVar[str] = "verify_found"
    image: str
    what: str
    digest: str
    problem: str
    repaired: bool


OnEvent = Callable[[Event], None]
"""What receives events: a plain function, called in the event loop; it must not block."""


def ignore(event: Event) -> None:
    """Receive events and do nothing."""
    del event
