"""What to do, decided in plain functions: no I/O, no awaiting."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from serpentine.events import LayerPlan, LayerStatus
from serpentine.model.digest import ChainID, Digest
from serpentine.model.documents import Descriptor, Layer
from serpentine.model.platform import Platform

__all__ = [
    "Plan",
    "Ready",
    "apply_next",
    "beside_downloads",
    "can_rebase",
    "candidates",
    "child_labels",
    "download_order",
    "list_platforms",
    "make_plan",
    "unpacks_for",
    "worth_a_look",
]

# At once: there is one disk, and others use the daemon, too.
MOST_UNPACKS = 8
# Forty layers of 1 MB took 1.15 times as long when several were unpacked at once.
SMALL = 4 << 20

_GC_CONTENT = "containerd.io/gc.ref.content"


def candidates(entries: Sequence[Descriptor], platform: Platform) -> tuple[Descriptor, ...]:
    """Return the entries of an index that may serve the platform, the best first.

    Those that name a platform come first, by how well it suits; those that name none follow in
    their order, for their config (or, for an index, its entries) to decide.  Attestations are
    never among them.
    """
    ranked: list[tuple[int, int, Descriptor]] = []
    unknown: list[Descriptor] = []
    for position, entry in enumerate(entries):
        if entry.is_attestation or not (entry.is_manifest or entry.is_index):
            continue
        if entry.platform is None or not entry.platform.architecture:
            unknown.append(entry)
            continue
        rank = platform.rank(entry.platform.to_platform())
        if rank is not None:
            ranked.append((rank, position, entry))
    ranked.sort(key=lambda item: item[:2])
    return (*(entry for _, _, entry in ranked), *unknown)


def list_platforms(entries: Sequence[Descriptor]) -> tuple[str, ...]:
    """Return the platforms that an index names, each once, in its order."""
    names = (
        str(entry.platform.to_platform().normalized())
        for entry in entries
        if entry.platform is not None and not entry.is_attestation
    )
    return tuple(dict.fromkeys(names))


@dataclass(frozen=True, slots=True)
class Plan:
    """What a pull has to do.

    ``unpack`` are the layers above the highest snapshot that is there, bottom first;
    ``fetch`` the blobs that they need, each once, in the order in which they will be applied.
    """

    layers: tuple[Layer, ...]
    unpack: tuple[Layer, ...]
    fetch: tuple[Descriptor, ...]

    @property
    def top(self) -> ChainID | None:
        """The chain ID of the whole image; None for an image without layers."""
        return self.layers[-1].chain_id if self.layers else None

    @property
    def base(self) -> ChainID | None:
        """The highest snapshot that is there already, or None."""
        done = len(self.layers) - len(self.unpack)
        return self.layers[done - 1].chain_id if done else None

    def places(self, digest: Digest) -> tuple[int, ...]:
        """Return the places of the layers to unpack from this blob."""
        first = len(self.layers) - len(self.unpack)
        return tuple(
            place
            for place, layer in enumerate(self.unpack, first)
            if layer.descriptor.digest == digest
        )

    def in_order(self, places: Iterable[int]) -> tuple[Descriptor, ...]:
        """Return the blobs to fetch, each once, in the order of their places in ``unpack``."""
        blobs = {blob.digest: blob for blob in self.fetch}
        digests = (self.unpack[place].descriptor.digest for place in places)
        return tuple(blobs[digest] for digest in dict.fromkeys(digests))

    def for_display(self) -> tuple[LayerPlan, ...]:
        """Return the plan as the event stream tells it."""
        first = len(self.layers) - len(self.unpack)
        return tuple(
            LayerPlan(
                digest=str(layer.descriptor.digest),
                size=layer.descriptor.size,
                status=LayerStatus.EXISTS if place < first else LayerStatus.WAITING,
            )
            for place, layer in enumerate(self.layers)
        )


def make_plan(layers: Sequence[Layer], present: Collection[ChainID]) -> Plan:
    """Decide what to unpack and to fetch, given the chain IDs that are committed snapshots.

    A snapshot that is there implies the ones below it: containerd keeps a parent as long as
    it has a child.
    """
    done = max((i + 1 for i, layer in enumerate(layers) if layer.chain_id in present), default=0)
    unpack = tuple(layers[done:])
    fetch = {layer.descriptor.digest: layer.descriptor for layer in reversed(unpack)}
    ordered = dict.fromkeys(layer.descriptor.digest for layer in unpack)
    return Plan(tuple(layers), unpack, tuple(fetch[digest] for digest in ordered))


def can_rebase(snapshotter: str, capabilities: Collection[str]) -> bool:
    """Tell whether layers can be applied without the one below, and get it on the commit.

    EROFS says so, too, but what it wants to be applied to is no directory of an overlay.
    """
    return snapshotter == "overlayfs" and "rebase" in capabilities


def unpacks_for(sizes: Sequence[int], processors: int) -> int:
    """Return how many layers to unpack at once, where nobody has said it.

    sizes: of the layers to unpack, compressed.  More than there are processors, since an unpack
    waits for the disk, too.  With one processor, one after the other: the look at them would cost
    what is gained.  So, too, where all above the lowest are small: containerd's work on them is
    mostly on its database, which has one writer.
    """
    if processors < 2 or max(sizes[1:], default=0) < SMALL:
        return 1
    return min(2 * processors, MOST_UNPACKS, len(sizes))


def beside_downloads(unpacks: int, processors: int) -> int:
    """Return how many of so many unpacks at once to do while blobs are still coming.

    One keeps more than one processor busy: it decompresses, hashes and writes.  Where all of them
    are, containerd takes what we send late, and the link stands idle: 20 MB/s came of 50.
    """
    return max(1, min(unpacks, processors // 2))


def worth_a_look(sizes: Sequence[int], at_once: int) -> tuple[int, ...]:
    """Return which of the layers, from the lowest, are to be looked at so that they may go alone.

    A look costs time of a processor.  The lowest ones go one after the other without it, beside
    those that go alone, and keep one of the ``at_once`` busy: so they may be that part of all.
    """
    most = sum(sizes) / at_once
    below = 0
    for place, size in enumerate(sizes):
        below += size
        if place and below > most:
            return tuple(range(place, len(sizes)))
    return ()


def download_order(sizes: Sequence[int], alone: Collection[int]) -> tuple[int, ...]:
    """Return the places of the layers in the order in which their downloads are to begin.

    alone: those that may be applied before what is below them.

    From both ends: the lowest one, which can be applied at once and which all wait for, and the
    largest of those that may go alone, which would take longest after the last byte; and so on.
    Without any that may, the order of the chain: what is above can only wait.
    """
    lowest = iter(range(len(sizes)))
    largest = iter(sorted(alone, key=lambda place: (-sizes[place], place)))
    order: dict[int, None] = {}
    while len(order) < len(sizes):
        for end in (lowest, largest):
            chosen = next((place for place in end if place not in order), None)
            if chosen is not None:
                order[chosen] = None
    return tuple(order)


@dataclass(frozen=True, slots=True)
class Ready:
    """A layer whose blob is there; ``alone`` if it can be applied without the one below it."""

    place: int
    alone: bool


def apply_next(
    waiting: Collection[Ready], committed: Collection[int], free: int
) -> tuple[int, ...]:
    """Return the places of the layers that may be applied now, when so many more may be.

    The lowest first: the ones above can be committed no sooner than those.
    """
    able = (one.place for one in waiting if one.alone or one.place - 1 in committed)
    return tuple(sorted(able)[: max(0, free)])


def child_labels(
    *,
    config: Digest | None = None,
    layers: Sequence[Digest] = (),
    manifest: Digest | None = None,
    position: int = 0,
) -> dict[str, str]:
    """Return the labels by which containerd's garbage collector finds a document's children.

    A manifest in an index is numbered by its ``position`` there, so that a second platform's
    pull adds its label and does not replace the first one's.
    """
    labels: dict[str, str] = {}
    if config is not None:
        labels[f"{_GC_CONTENT}.config"] = str(config)
    for number, digest in enumerate(layers):
        labels[f"{_GC_CONTENT}.l.{number}"] = str(digest)
    if manifest is not None:
        labels[f"{_GC_CONTENT}.m.{position}"] = str(manifest)
    return labels
