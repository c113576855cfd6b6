"""What a namespace holds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Contents:
    """Everything that a namespace holds, by name."""

    images: list[str]
    blobs: list[str]
    ingests: list[str]
    snapshots: list[str]
    leases: list[str]


NOTHING = Contents([], [], [], [], [])
