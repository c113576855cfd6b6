"""What the parts of one verification share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from serpentine._concurrency import KeyedLock
from serpentine.containerd import Containerd, Snapshots
from serpentine.errors import NotFound
from serpentine.events import OnEvent
from serpentine.model.reference import Reference
from serpentine.pull.job import Job
from serpentine.upkeep.found import Finding

if TYPE_CHECKING:
    from serpentine.registry import Repository

__all__ = ["Work"]


@dataclass(slots=True)
class Work:
    """One image that is verified: where it is, under which lease, and what was found.

    image: the name of its record.
    repositories: how to get at the registry for a reference.
    """

    image: str
    containerd: Containerd
    snapshots: Snapshots
    lease: str
    repair: bool
    locks: KeyedLock
    on_event: OnEvent
    repositories: Callable[[Reference], Repository]
    findings: list[Finding] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    def repository(self) -> Repository:
        """Return where the image comes from; raises NotFound, InvalidReference."""
        reference = Reference.parse(self.image)
        if str(reference) != self.image:
            raise NotFound(f"{self.image} is no name of a registry's", hint="make the image anew")
        return self.repositories(reference)

    def job(self) -> Job:
        """Return a pull of this image, for its parts that do one thing each."""
        return Job(
            reference=Reference.parse(self.image),
            repository=self.repository(),
            containerd=self.containerd,
            snapshots=self.snapshots,
            lease=self.lease,
            locks=self.locks,
            on_event=self.on_event,
            sync_fs=True,
        )
