"""Whether a pull fits onto the disk: decided in plain functions, before its first byte."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from serpentine.model.digest import Digest
from serpentine.model.documents import Descriptor, Layer

__all__ = ["Free", "Need", "Verdict", "judge", "need_of", "size"]

# A layer takes at least its compressed size again once it is unpacked; of usual images, it is
# two to three times that (981 MB of Debian's packages in gzip were 2.6 GB).
LIKELY = 2.7


@dataclass(frozen=True, slots=True)
class Need:
    """What a pull will write, in bytes: blobs, and what they unpack to at least and likely."""

    download: int
    least: int
    likely: int


@dataclass(frozen=True, slots=True)
class Free:
    """What is free where containerd keeps blobs and snapshots; ``same`` if that is one disk."""

    blobs: int
    snapshots: int
    same: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """fits: not surely too little.  likely: and most likely enough.  text: the figures."""

    fits: bool
    likely: bool
    text: str


def need_of(
    fetch: Iterable[Descriptor], unpack: Iterable[Layer], there: Mapping[Digest, int]
) -> Need:
    """Return what is needed; ``there`` is how much of a blob containerd has."""
    least = sum(layer.descriptor.size for layer in unpack)
    download = sum(max(0, blob.size - there.get(blob.digest, 0)) for blob in fetch)
    return Need(download=download, least=least, likely=int(least * LIKELY))


def judge(need: Need, free: Free) -> Verdict:
    """Compare what is needed with what is free."""
    if free.same:
        fits = need.download + need.least <= free.blobs
        likely = need.download + need.likely <= free.blobs
        room = f"{size(free.blobs)} are free"
    else:
        fits = need.download <= free.blobs and need.least <= free.snapshots
        likely = fits and need.likely <= free.snapshots
        room = f"{size(free.blobs)} are free for blobs and {size(free.snapshots)} for snapshots"
    text = (
        f"it needs {size(need.download)} for what is to be downloaded and about"
        f" {size(need.likely)} for what that unpacks to, and {room} where containerd keeps them"
    )
    return Verdict(fits, likely, text)


def size(count: int) -> str:
    """Write a number of bytes for people."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
