"""A typed, asynchronous client of containerd's gRPC API (v1; containerd 1.6 and newer)."""

from serpentine.containerd.client import Containerd
from serpentine.containerd.containers import RUNTIME, Containers
from serpentine.containerd.content import PATIENCE, Content, ContentWriter
from serpentine.containerd.diff import Diff
from serpentine.containerd.endpoint import Endpoint
from serpentine.containerd.images import Images
from serpentine.containerd.introspection import Introspection
from serpentine.containerd.leases import Leases
from serpentine.containerd.namespaces import Namespaces
from serpentine.containerd.snapshots import Snapshots
from serpentine.containerd.tasks import Tasks
from serpentine.containerd.types import (
    BlobInfo,
    ContainerRecord,
    ImageRecord,
    IngestStatus,
    Lease,
    Mount,
    PluginInfo,
    Resource,
    SnapshotInfo,
    SnapshotKind,
    SnapshotUsage,
    TaskExit,
    TaskInfo,
    TaskMetrics,
    TaskStatus,
    VersionInfo,
)

__all__ = [
    "PATIENCE",
    "RUNTIME",
    "BlobInfo",
    "ContainerRecord",
    "Containerd",
    "Containers",
    "Content",
    "ContentWriter",
    "Diff",
    "Endpoint",
    "ImageRecord",
    "Images",
    "IngestStatus",
    "Introspection",
    "Lease",
    "Leases",
    "Mount",
    "Namespaces",
    "PluginInfo",
    "Resource",
    "SnapshotInfo",
    "SnapshotKind",
    "SnapshotUsage",
    "Snapshots",
    "TaskExit",
    "TaskInfo",
    "TaskMetrics",
    "TaskStatus",
    "Tasks",
    "VersionInfo",
]
