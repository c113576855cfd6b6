"""What a prune removes, decided in plain functions: no I/O, no awaiting."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum

from serpentine.errors import InvalidSetting
from serpentine.upkeep.inventory import ROOT, Inventory, Node, Snapshot, reach

__all__ = ["Candidate", "Plan", "PruneOptions", "PruneResult", "Pruned", "PrunedKind", "make_plan"]

STATE_PREFIX = "state-"
_OLDEST = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class PruneOptions:
    """What may go.

    unused: also images and states that nothing uses, and not only what nobody holds.
    older_than: only what has not changed for so long.
    keep_size: bytes that may stay: the oldest goes first, and no more of it than it takes.
    """

    unused: bool = False
    older_than: timedelta | None = None
    keep_size: int | None = None

    def __post_init__(self) -> None:
        if self.older_than is not None and self.older_than < timedelta(0):
            raise InvalidSetting("an age is not negative", hint="give one like 7d")
        if self.keep_size is not None and self.keep_size < 0:
            raise InvalidSetting("a size is not negative", hint="give one like 10GB")


class PrunedKind(StrEnum):
    """What was removed.

    STEP: what the step of a client that is gone left running.  PULL: what any other client that
    is gone still held.  INGEST: a blob that was never finished and that nobody holds.  UNHELD:
    blobs and snapshots that nothing held before, which containerd would collect some time.
    """

    UNHELD = "unheld"
    INGEST = "partial"
    PULL = "lease"
    STEP = "step"
    STATE = "state"
    IMAGE = "image"


@dataclass(frozen=True, slots=True)
class Pruned:
    """Something that goes: the ``size`` in bytes is what goes with it, after those before it.

    since: when it last changed; None where containerd does not tell.
    """

    kind: PrunedKind
    name: str
    size: int
    since: datetime | None = None


@dataclass(frozen=True, slots=True)
class PruneResult:
    """What a prune removed, or would; ``freed`` and ``left`` are bytes of this namespace.

    left: what blobs, snapshots and partial blobs take afterwards.
    skipped: what was to go and was changed meanwhile, and so it stayed.
    """

    removed: tuple[Pruned, ...]
    freed: int
    left: int
    blobs: int
    snapshots: int
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Candidate:
    """Something that may go, with the roots that end with it.

    turn: an image goes with its turn, which is that of the youngest state on it.
    """

    kind: PrunedKind
    name: str
    since: datetime | None
    nodes: tuple[Node, ...]
    turn: datetime | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """Candidates that are to go, in this order, and what that frees."""

    inventory: Inventory
    chosen: tuple[Candidate, ...]

    @property
    def has_steps(self) -> bool:
        """Whether steps are to be ended first."""
        return any(candidate.kind is PrunedKind.STEP for candidate in self.chosen)

    def without(self, skipped: Iterable[Candidate]) -> Plan:
        """Return the plan as it is when some of them stay."""
        stay = set(skipped)
        return Plan(self.inventory, tuple(c for c in self.chosen if c not in stay))

    def result(self, skipped: Sequence[str] = ()) -> PruneResult:
        """Return what this removes."""
        gone, left = _attribute(self.inventory, self.chosen)
        removed = [
            Pruned(c.kind, c.name, sum(map(self.inventory.size, nodes)), c.since)
            for c, nodes in zip(self.chosen, gone[:-1], strict=True)
        ]
        if gone[-1]:
            size = sum(map(self.inventory.size, gone[-1]))
            removed.insert(0, Pruned(PrunedKind.UNHELD, "", size))
        everything = [node for nodes in gone for node in nodes]
        return PruneResult(
            removed=tuple(removed),
            freed=sum(map(self.inventory.size, everything)),
            left=left,
            blobs=sum(kind == "content" for kind, _ in everything),
            snapshots=sum(kind.startswith("snapshots/") for kind, _ in everything),
            skipped=tuple(skipped),
        )


def make_plan(inventory: Inventory, options: PruneOptions) -> Plan:
    """Decide what is to go, the oldest first."""
    found = list(_left_over(inventory))
    going = {node for candidate in found for node in candidate.nodes}
    if options.unused:
        found += _unused(inventory, going, options.older_than)
    if options.older_than is not None:
        found = [c for c in found if _is_old(inventory, c.since, options.older_than)]
    found.sort(key=lambda c: (c.turn or c.since or _OLDEST, c.kind == PrunedKind.IMAGE, c.name))
    if options.keep_size is not None:
        found = _to_fit(inventory, found, options.keep_size)
    return Plan(inventory, tuple(found))


def _is_old(inventory: Inventory, since: datetime | None, age: timedelta | None) -> bool:
    return age is None or since is None or inventory.now - since >= age


def _to_fit(inventory: Inventory, found: list[Candidate], size: int) -> list[Candidate]:
    """Return as many, from the first on, as must go for the rest to fit."""
    gone, left = _attribute(inventory, found)
    chosen = len(found)
    while chosen and left + (more := sum(map(inventory.size, gone[chosen - 1]))) <= size:
        left += more
        chosen -= 1
    return found[:chosen]


def _attribute(inventory: Inventory, chosen: Sequence[Candidate]) -> tuple[list[list[Node]], int]:
    """Return what goes with each candidate, and last what nothing held; and the bytes left.

    What several of them hold goes with the last of these.
    """
    going = {node for candidate in chosen for node in candidate.nodes}
    seen: set[Node] = set()
    stays = reach(inventory, (node for node in inventory.roots() if node not in going), seen)
    left = sum(map(inventory.size, stays))
    gone = [_real(inventory, reach(inventory, c.nodes, seen)) for c in reversed(chosen)]
    gone.reverse()
    return [*gone, [node for node in inventory.nodes if node not in seen]], left


def _real(inventory: Inventory, nodes: Iterable[Node]) -> list[Node]:
    """Leave out names of what is not there: a manifest labels layers whose blob nobody needed."""
    return [
        node
        for node in nodes
        if node in inventory.snapshots
        or (node[0] == "content" and node[1] in inventory.blobs)
        or (node[0] == "ingests" and node[1] in inventory.ingests)
    ]


def _left_over(inventory: Inventory) -> Iterator[Candidate]:
    """Yield what clients left that are gone: nobody will come back for it."""
    steps = set()
    for name, container in inventory.containers.items():
        if inventory.is_abandoned(container.labels):
            steps.add(name)
            nodes = [("containers", name)]
            if name in inventory.leases:
                nodes.append(("leases", name))
            yield Candidate(PrunedKind.STEP, name, container.created_at, tuple(nodes))
    for name, lease in inventory.leases.items():
        if name not in steps and inventory.is_abandoned(lease.labels):
            yield Candidate(PrunedKind.PULL, name, lease.created_at, (("leases", name),))
    for node in inventory.loose_ingests():
        ingest = inventory.ingests[node[1]]
        since = ingest.updated_at or ingest.started_at
        yield Candidate(PrunedKind.INGEST, node[1], since, (node,))


def _unused(
    inventory: Inventory, going: set[Node], older_than: timedelta | None
) -> Iterator[Candidate]:
    """Yield images and states that no container, no living client and no younger state needs."""
    tops = image_snapshots(inventory)
    states = {node for node, one in inventory.snapshots.items() if is_state(one)}
    used: set[Node] = set()
    in_use: set[str] = set()
    for node in inventory.roots():
        if node[0] in ("containers", "leases") and node not in going:
            if node[0] == "containers":
                in_use.add(inventory.containers[node[1]].image)
            for held in inventory.references(node):
                used |= _way(inventory, held, tops)
    ages = {node: inventory.snapshots[node].info.created_at for node in states - used}
    for node, since in ages.items():
        if not _is_old(inventory, since, older_than):
            used |= _way(inventory, node, tops)
    youngest: dict[str, datetime] = {}
    for node, since in ages.items():
        if node not in used:
            yield Candidate(PrunedKind.STATE, node[1], since, (node,))
            for name in _names(_way(inventory, node, tops), tops):
                youngest[name] = max(youngest.get(name, _OLDEST), since or _OLDEST)
    in_use |= _names(used, tops)
    for name, record in inventory.images.items():
        if name not in in_use:
            since = record.updated_at or record.created_at
            turn = max(since or _OLDEST, youngest.get(name, _OLDEST))
            yield Candidate(PrunedKind.IMAGE, name, since, (("images", name),), turn)


def _names(nodes: Iterable[Node], tops: dict[Node, set[str]]) -> set[str]:
    return {name for node in nodes for name in tops.get(node, ())}


def is_state(snapshot: Snapshot) -> bool:
    """Tell whether it is a state that somebody keeps."""
    return snapshot.info.name.startswith(STATE_PREFIX) and ROOT in snapshot.info.labels


def image_snapshots(inventory: Inventory) -> dict[Node, set[str]]:
    """Return the topmost snapshots of images, each with the names of the images."""
    tops: dict[Node, set[str]] = {}
    for name in inventory.images:
        seen: set[Node] = set()
        # Only from documents: what is below a top has it as its child.
        waiting: list[Node] = [("images", name)]
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            if node[0].startswith("snapshots/"):
                tops.setdefault(node, set()).add(name)
            else:
                waiting.extend(inventory.references(node))
    return tops


def _way(inventory: Inventory, node: Node, tops: dict[Node, set[str]]) -> set[Node]:
    """Return the snapshots from one down to the image that it is made from."""
    way: set[Node] = set()
    while node in inventory.snapshots and node not in way:
        way.add(node)
        if node in tops:
            break
        node = (node[0], inventory.snapshots[node].info.parent)
    return way
