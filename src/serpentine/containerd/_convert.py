"""Between protobuf's values and ours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp

from serpentine.containerd._proto import types_pb2
from serpentine.containerd.types import Mount
from serpentine.model.digest import Digest
from serpentine.model.documents import Descriptor

__all__ = [
    "descriptor_from",
    "descriptor_to",
    "label_mask",
    "mounts_from",
    "mounts_to",
    "time_from",
    "varint",
]


# Go's zero time, the first of January of the year 1.  Tasks have it where nothing has happened yet.
_GO_ZERO = -62135596800


def time_from(value: Timestamp) -> datetime | None:
    """Return a moment in UTC; None where none was set."""
    if value.seconds in (0, _GO_ZERO) and not value.nanos:
        return None
    return value.ToDatetime(tzinfo=UTC)


def varint(number: int) -> bytes:
    """Return a number in groups of seven bits, the lowest first, as protobuf and HPACK have it."""
    groups = bytearray()
    while number > 0x7F:
        groups.append(number & 0x7F | 0x80)
        number >>= 7
    groups.append(number)
    return bytes(groups)


def descriptor_to(value: Descriptor) -> types_pb2.Descriptor:
    """Return a descriptor for the wire."""
    return types_pb2.Descriptor(
        media_type=value.media_type,
        digest=str(value.digest),
        size=value.size,
        annotations=value.annotations or {},
    )


def descriptor_from(value: types_pb2.Descriptor) -> Descriptor:
    """Return a descriptor from the wire."""
    return Descriptor(
        media_type=value.media_type,
        digest=Digest.parse(value.digest),
        size=value.size,
        annotations=dict(value.annotations) or None,
    )


def mounts_to(mounts: Iterable[Mount]) -> list[types_pb2.Mount]:
    """Return mounts for the wire."""
    return [
        types_pb2.Mount(type=m.type, source=m.source, target=m.target, options=m.options)
        for m in mounts
    ]


def mounts_from(mounts: Iterable[types_pb2.Mount]) -> list[Mount]:
    """Return mounts from the wire."""
    return [Mount(m.type, m.source, m.target, tuple(m.options)) for m in mounts]


def label_mask(labels: Mapping[str, str | None]) -> list[str]:
    """Return the paths that change just these labels and leave the others alone (trap 15)."""
    return [f"labels.{name}" for name in labels]
