"""containerd's values, as plain immutable ones of ours: no protobuf leaves this room."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from enum import Enum

import msgspec

from serpentine.model.digest import Digest
from serpentine.model.documents import Descriptor
from serpentine.model.platform import Platform

__all__ = [
    "BlobInfo",
    "ContainerRecord",
    "ImageRecord",
    "IngestStatus",
    "Lease",
    "Mount",
    "PluginInfo",
    "Resource",
    "SnapshotInfo",
    "SnapshotKind",
    "SnapshotUsage",
    "TaskExit",
    "TaskInfo",
    "TaskMetrics",
    "TaskStatus",
    "VersionInfo",
]


class VersionInfo(msgspec.Struct, frozen=True):
    """A daemon's version and source revision."""

    version: str
    revision: str


class BlobInfo(msgspec.Struct, frozen=True):
    """A blob in the content store; ``size`` in bytes."""

    digest: Digest
    size: int
    labels: Mapping[str, str]
    created_at: datetime | None
    updated_at: datetime | None


class IngestStatus(msgspec.Struct, frozen=True):
    """A blob that is being written, or was left half-written: ``offset`` bytes are there."""

    ref: str
    offset: int
    total: int
    started_at: datetime | None
    updated_at: datetime | None


class SnapshotKind(Enum):
    """What may be done with a snapshot."""

    UNKNOWN = 0
    VIEW = 1
    ACTIVE = 2
    COMMITTED = 3


class SnapshotInfo(msgspec.Struct, frozen=True):
    """A snapshot; ``parent`` is empty for the lowest."""

    name: str
    parent: str
    kind: SnapshotKind
    labels: Mapping[str, str]
    created_at: datetime | None
    updated_at: datetime | None


class SnapshotUsage(msgspec.Struct, frozen=True):
    """What a snapshot itself takes, without its parents: bytes and inodes."""

    size: int
    inodes: int


class Mount(msgspec.Struct, frozen=True):
    """A mount that makes up a snapshot; the paths are those of containerd's machine."""

    type: str
    source: str
    target: str = ""
    options: tuple[str, ...] = ()


class Lease(msgspec.Struct, frozen=True):
    """What keeps the collector away from the objects that were written under it."""

    id: str
    created_at: datetime | None
    labels: Mapping[str, str]


class Resource(msgspec.Struct, frozen=True):
    """An object that a lease holds: ``type`` is ``content``, ``ingests``, ``snapshots/NAME``."""

    id: str
    type: str


class ImageRecord(msgspec.Struct, frozen=True):
    """A name in containerd, and the document that it stands for."""

    name: str
    target: Descriptor
    labels: Mapping[str, str] = msgspec.field(default_factory=dict)
    created_at: datetime | None = None
    updated_at: datetime | None = None


class PluginInfo(msgspec.Struct, frozen=True):
    """A part of a daemon; ``init_error`` is None when it works."""

    type: str
    id: str
    platforms: tuple[Platform, ...]
    capabilities: tuple[str, ...]
    exports: Mapping[str, str]
    init_error: str | None


class ContainerRecord(msgspec.Struct, frozen=True):
    """What may run: an OCI runtime configuration (``spec``, as JSON) and its snapshot."""

    id: str
    spec: bytes
    snapshotter: str
    snapshot_key: str
    runtime: str
    image: str
    labels: Mapping[str, str]
    created_at: datetime | None
    updated_at: datetime | None


class TaskStatus(Enum):
    """What a process does."""

    UNKNOWN = 0
    CREATED = 1
    RUNNING = 2
    STOPPED = 3
    PAUSED = 4
    PAUSING = 5


class TaskInfo(msgspec.Struct, frozen=True):
    """A process of a container; ``exit_status`` counts once it is STOPPED.

    ``id`` is the container's, or that of a process which was added.  ``pid`` is containerd's
    machine's.
    """

    id: str
    pid: int
    status: TaskStatus
    exit_status: int
    exited_at: datetime | None
    stdin: str
    stdout: str
    stderr: str
    terminal: bool


class TaskExit(msgspec.Struct, frozen=True):
    """How a process ended: its own status, or 128 and the number of the signal."""

    status: int
    exited_at: datetime | None


class TaskMetrics(msgspec.Struct, frozen=True):
    """What the kernel counted for a container: a protobuf message, whose kind ``type_url`` says."""

    type_url: str
    value: bytes
    taken_at: datetime | None
