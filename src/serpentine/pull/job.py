"""What the parts of one pull share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from serpentine._concurrency import KeyedLock
from serpentine.containerd import Containerd, Snapshots
from serpentine.events import LayerProgress, LayerStatus, OnEvent
from serpentine.model.digest import Digest
from serpentine.model.documents import Descriptor
from serpentine.model.reference import Reference
from serpentine.pull.lines import Lines
from serpentine.pull.speed import Speeds

if TYPE_CHECKING:
    from serpentine.registry import Repository

__all__ = ["Job", "Statistics"]


@dataclass(slots=True)
class Statistics:
    """Counts of one pull; bytes are compressed bytes from the registry, layers and documents.

    bytes_resumed: of layers, as containerd had them from an attempt before.
    """

    bytes_downloaded: int = 0
    bytes_resumed: int = 0
    layers_total: int = 0
    layers_reused: int = 0


@dataclass(frozen=True, slots=True)
class Job:
    """One pull: where from, where to, under which lease.

    ``repository`` is None for an image that was made here: nothing of it is fetched.

    ``locks`` are shared by all pulls of one engine, so that two of them which want the same
    blob or snapshot do the work once.
    """

    reference: Reference
    repository: Repository | None
    containerd: Containerd
    snapshots: Snapshots
    lease: str
    locks: KeyedLock
    on_event: OnEvent
    sync_fs: bool
    stall_timeout: float = 8.0
    statistics: Statistics = field(default_factory=Statistics)
    speeds: Speeds = field(default_factory=Speeds)
    lines: Lines = field(default_factory=Lines)
    # The blobs of which this pull has given containerd anything that counts.
    begun: set[Digest] = field(default_factory=set)
    # The blobs whose headers are looked at on their way, and those of them that name all they need.
    looked_at: set[Digest] = field(default_factory=set)
    standalone: set[Digest] = field(default_factory=set)

    @property
    def image(self) -> str:
        """The reference as text, for events and errors."""
        return str(self.reference)

    def report(
        self, places: tuple[int, ...], blob: Descriptor, status: LayerStatus, offset: int
    ) -> None:
        """Tell where a blob is, for each place in the image that it has."""
        for place in places:
            self.on_event(
                LayerProgress(
                    image=self.image,
                    index=place,
                    digest=str(blob.digest),
                    status=status,
                    offset=offset,
                    size=blob.size,
                )
            )
