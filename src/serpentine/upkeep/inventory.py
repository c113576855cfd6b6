"""Everything that a namespace holds, and what keeps what: one list of each kind, no file read."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from serpentine._concurrency import task_group
from serpentine._session import is_dead
from serpentine.containerd import (
    BlobInfo,
    Containerd,
    ContainerRecord,
    ImageRecord,
    IngestStatus,
    Lease,
    SnapshotInfo,
    Snapshots,
)
from serpentine.errors import NotFound, Unimplemented
from serpentine.pull.leases import LABEL_SESSION

__all__ = ["ROOT", "Inventory", "Node", "Snapshot", "reach", "references", "take_inventory"]

ROOT = "containerd.io/gc.root"
_EXPIRES = "containerd.io/gc.expire"
_REF_CONTENT = "containerd.io/gc.ref.content"
_REF_SNAPSHOT = "containerd.io/gc.ref.snapshot."
_REF_IMAGE = "containerd.io/gc.ref.image"

# Questions about snapshots that are on their way at once: containerd answers one in less than a
# millisecond, but for an active one it walks its directory.
AT_ONCE = 16

Node = tuple[str, str]
"""An object by its kind, in the words of a lease's resources, and its name.

``content``, ``ingests``, ``snapshots/NAME``, ``images``; and ``leases``, ``containers``.
"""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A snapshot, and the bytes that it takes without its parents."""

    info: SnapshotInfo
    snapshotter: str
    size: int

    @property
    def node(self) -> Node:
        """What the collector calls it."""
        return (f"snapshots/{self.snapshotter}", self.info.name)


@dataclass(frozen=True, slots=True)
class Inventory:
    """What a namespace held at one time, more or less: containerd gives no common picture.

    Nothing may be removed on its word alone without another look, or by containerd's collector.

    dead: the sessions whose process is known to be gone.
    """

    now: datetime
    images: Mapping[str, ImageRecord] = field(default_factory=dict)
    blobs: Mapping[str, BlobInfo] = field(default_factory=dict)
    ingests: Mapping[str, IngestStatus] = field(default_factory=dict)
    snapshots: Mapping[Node, Snapshot] = field(default_factory=dict)
    leases: Mapping[str, Lease] = field(default_factory=dict)
    resources: Mapping[str, tuple[Node, ...]] = field(default_factory=dict)
    containers: Mapping[str, ContainerRecord] = field(default_factory=dict)
    dead: frozenset[str] = frozenset()

    def has_expired(self, lease: Lease) -> bool:
        """Tell whether the collector looks at a lease no more."""
        until = lease.labels.get(_EXPIRES)
        if until is None:
            return False
        try:
            moment = datetime.fromisoformat(until)
        except ValueError:
            return False  # nor does containerd understand it
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)) < self.now

    def is_abandoned(self, labels: Mapping[str, str]) -> bool:
        """Tell whether these are the labels of a client of ours that is gone."""
        return labels.get(LABEL_SESSION, "") in self.dead

    @property
    def nodes(self) -> Iterator[Node]:
        """Yield everything that takes room."""
        yield from (("content", digest) for digest in self.blobs)
        yield from self.snapshots
        yield from (("ingests", ref) for ref in self.ingests)

    def size(self, node: Node) -> int:
        """Return the bytes that an object takes; 0 for what only points at others."""
        kind, name = node
        if kind == "content":
            return self.blobs[name].size if name in self.blobs else 0
        if kind == "ingests":
            return self.ingests[name].offset if name in self.ingests else 0
        return self.snapshots[node].size if node in self.snapshots else 0

    def roots(self) -> Iterator[Node]:
        """Yield what the collector begins with."""
        yield from (("images", name) for name in self.images)
        yield from (("containers", name) for name in self.containers)
        yield from (
            ("leases", name) for name, lease in self.leases.items() if not self.has_expired(lease)
        )
        yield from (("content", d) for d, blob in self.blobs.items() if ROOT in blob.labels)
        yield from (node for node, one in self.snapshots.items() if ROOT in one.info.labels)
        yield from self.loose_ingests()

    def loose_ingests(self) -> Iterator[Node]:
        """Yield ingests that no lease holds: containerd keeps them for a day."""
        held = {node for nodes in self.resources.values() for node in nodes}
        for ref in self.ingests:
            if ("ingests", ref) not in held:
                yield ("ingests", ref)

    def references(self, node: Node) -> Iterator[Node]:
        """Yield what an object keeps from the collector, by containerd's rules."""
        kind, name = node
        if kind == "images" and name in self.images:
            yield ("content", str(self.images[name].target.digest))
            yield from references(self.images[name].labels)
        elif kind == "leases":
            yield from self.resources.get(name, ())
        elif kind == "containers" and name in self.containers:
            container = self.containers[name]
            if container.snapshot_key:
                yield (f"snapshots/{container.snapshotter}", container.snapshot_key)
            yield from references(container.labels)
        elif kind == "content" and name in self.blobs:
            yield from references(self.blobs[name].labels)
        elif node in self.snapshots:
            info = self.snapshots[node].info
            if info.parent:
                yield (kind, info.parent)
            yield from references(info.labels)


def reach(inventory: Inventory, starts: Iterable[Node], seen: set[Node]) -> list[Node]:
    """Return what these lead to and is not in ``seen``, themselves included; adds it there."""
    found: list[Node] = []
    waiting = list(starts)
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        found.append(node)
        waiting.extend(inventory.references(node))
    return found


def references(labels: Mapping[str, str]) -> Iterator[Node]:
    """Yield what labels keep from the collector, by containerd's rules."""
    for key, value in labels.items():
        if _is_ref(key, _REF_CONTENT):
            yield ("content", value)
        elif key.startswith(_REF_SNAPSHOT):
            snapshotter = key.removeprefix(_REF_SNAPSHOT).partition("/")[0]
            yield (f"snapshots/{snapshotter}", value)
        elif _is_ref(key, _REF_IMAGE):
            yield ("images", value)


def _is_ref(key: str, prefix: str) -> bool:
    return key.startswith(prefix) and key[len(prefix) : len(prefix) + 1] in ("", ".", "/")


async def take_inventory(containerd: Containerd) -> Inventory:
    """Ask containerd for everything in the namespace: a call per kind, lease and snapshot."""
    # Ingests before leases: one that is opened meanwhile would look as if no lease held it.
    ingests = await containerd.content.list_statuses()
    containers = await containerd.containers.all()
    leases = await containerd.leases.all()
    resources: dict[str, tuple[Node, ...]] = {}
    for lease in leases:
        try:
            held = await containerd.leases.list_resources(lease.id)
        except NotFound:
            continue  # it ended meanwhile
        resources[lease.id] = tuple((one.type, one.id) for one in held)
    images = await containerd.images.all()
    blobs = await containerd.content.all()
    snapshots: list[Snapshot] = []
    for plugin in await containerd.introspection.snapshotters():
        snapshots += await _snapshots(containerd.snapshots(plugin.id))
    sessions = {labels.get(LABEL_SESSION, "") for labels in _labels(leases, containers)}
    dead = await asyncio.to_thread(lambda: frozenset(s for s in sessions if is_dead(s)))
    return Inventory(
        now=datetime.now(UTC),
        images={image.name: image for image in images},
        blobs={str(blob.digest): blob for blob in blobs},
        ingests={ingest.ref: ingest for ingest in ingests},
        snapshots={one.node: one for one in snapshots},
        leases={lease.id: lease for lease in leases if lease.id in resources},
        resources=resources,
        containers={container.id: container for container in containers},
        dead=dead,
    )


def _labels(*groups: Sequence[Lease] | Sequence[ContainerRecord]) -> Iterator[Mapping[str, str]]:
    for group in groups:
        for one in group:
            yield one.labels


async def _snapshots(snapshots: Snapshots) -> list[Snapshot]:
    found: list[Snapshot] = []
    slots = asyncio.Semaphore(AT_ONCE)

    async def add(info: SnapshotInfo) -> None:
        async with slots:
            try:
                size = (await snapshots.usage(info.name)).size
            except NotFound:
                return  # it went meanwhile
            except Unimplemented:
                size = 0  # a snapshotter that does not count
        found.append(Snapshot(info, snapshots.name, size))

    async with task_group() as group:
        for info in await snapshots.all():
            group.create_task(add(info))
    return found
