"""How much there is, who shares it, and what a prune could free: plain functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import datetime

from serpentine.upkeep.inventory import Inventory, Node, reach
from serpentine.upkeep.plan import PruneOptions, is_state, make_plan

__all__ = ["Amount", "ImageUsage", "StateUsage", "Usage", "summarise"]


@dataclass(frozen=True, slots=True)
class Amount:
    """A number of things, and the bytes that they take together."""

    count: int
    size: int


@dataclass(frozen=True, slots=True)
class ImageUsage:
    """What an image leads to, blobs and snapshots, in bytes; ``shared`` with other images."""

    name: str
    size: int
    shared: int
    updated_at: datetime | None


@dataclass(frozen=True, slots=True)
class StateUsage:
    """A state of a step: ``size`` is its own snapshot's, in bytes, without what is below."""

    key: str
    snapshotter: str
    size: int
    created_at: datetime | None


@dataclass(frozen=True, slots=True)
class Usage:
    """What a namespace holds; bytes as containerd counts them.

    ingests: blobs that are being written, or were never finished.
    total: the bytes of blobs, snapshots and ingests.
    shared: the bytes of what more than one image record leads to, each counted once.
    leases: what running clients hold, and what clients left that are gone.
    prunable: what ``prune`` could free, in bytes; ``prunable_all`` with everything unused.
    """

    blobs: Amount
    snapshots: Amount
    ingests: Amount
    total: int
    images: tuple[ImageUsage, ...]
    states: tuple[StateUsage, ...]
    shared: int
    leases: int
    prunable: int
    prunable_all: int


def summarise(inventory: Inventory) -> Usage:
    """Count what there is."""
    users: Counter[Node] = Counter()
    held: dict[str, list[Node]] = {}
    for name in inventory.images:
        held[name] = reach(inventory, [("images", name)], set())
        users.update(held[name])

    def total(nodes: Iterable[Node]) -> int:
        return sum(map(inventory.size, nodes))

    def amount(nodes: Collection[Node]) -> Amount:
        return Amount(len(nodes), total(nodes))

    return Usage(
        blobs=amount([("content", digest) for digest in inventory.blobs]),
        snapshots=amount(inventory.snapshots),
        ingests=amount([("ingests", ref) for ref in inventory.ingests]),
        total=total(inventory.nodes),
        images=tuple(
            ImageUsage(
                name=name,
                size=total(held[name]),
                shared=total(node for node in held[name] if users[node] > 1),
                updated_at=record.updated_at,
            )
            for name, record in sorted(inventory.images.items())
        ),
        states=tuple(
            StateUsage(one.info.name, one.snapshotter, one.size, one.info.created_at)
            for _, one in sorted(inventory.snapshots.items())
            if is_state(one)
        ),
        shared=total(node for node, count in users.items() if count > 1),
        leases=len(inventory.leases),
        prunable=make_plan(inventory, PruneOptions()).result().freed,
        prunable_all=make_plan(inventory, PruneOptions(unused=True)).result().freed,
    )
