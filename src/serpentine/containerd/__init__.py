"""A typed, asynchronous client of containerd's gRPC API (v1; containerd 1.6 and newer)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

# Imported when first used: of containerd's services, few are needed at a time.
_HOMES = {
    "BlobInfo": "serpentine.containerd.types",
    "ContainerRecord": "serpentine.containerd.types",
    "Containerd": "serpentine.containerd.client",
    "Containers": "serpentine.containerd.containers",
    "Content": "serpentine.containerd.content",
    "ContentWriter": "serpentine.containerd.content",
    "Diff": "serpentine.containerd.diff",
    "Endpoint": "serpentine.containerd.endpoint",
    "ImageRecord": "serpentine.containerd.types",
    "Images": "serpentine.containerd.images",
    "IngestStatus": "serpentine.containerd.types",
    "Introspection": "serpentine.containerd.introspection",
    "Lease": "serpentine.containerd.types",
    "Leases": "serpentine.containerd.leases",
    "Mount": "serpentine.containerd.types",
    "Namespaces": "serpentine.containerd.namespaces",
    "PATIENCE": "serpentine.containerd.content",
    "PluginInfo": "serpentine.containerd.types",
    "RUNTIME": "serpentine.containerd.containers",
    "Resource": "serpentine.containerd.types",
    "SnapshotInfo": "serpentine.containerd.types",
    "SnapshotKind": "serpentine.containerd.types",
    "SnapshotUsage": "serpentine.containerd.types",
    "Snapshots": "serpentine.containerd.snapshots",
    "TaskExit": "serpentine.containerd.types",
    "TaskInfo": "serpentine.containerd.types",
    "TaskMetrics": "serpentine.containerd.types",
    "TaskStatus": "serpentine.containerd.types",
    "Tasks": "serpentine.containerd.tasks",
    "VersionInfo": "serpentine.containerd.types",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(home), name)
    return value
