"""Snapshots of one snapshotter."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Mapping, Sequence
from typing import TypeVar

from google.protobuf.empty_pb2 import Empty
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message

from serpentine.containerd._convert import label_mask, mounts_from, time_from
from serpentine.containerd._proto import snapshots_pb2 as pb
from serpentine.containerd.channel import Channel
from serpentine.containerd.types import Mount, SnapshotInfo, SnapshotKind, SnapshotUsage
from serpentine.errors import ContainerdError

__all__ = ["Snapshots"]

_SERVICE = "/containerd.services.snapshots.v1.Snapshots/"
_LEFT_BEHIND = re.compile(r"failed to rename: .*: file exists")
# In seconds; containerd's collector runs 0.1 after the start, or when a machine is slow, later.
LEFT_BEHIND_PATIENCE = 10.0
LEFT_BEHIND_DELAY = 0.1

_M = TypeVar("_M", bound=Message)


class Snapshots:
    """The snapshots of one snapshotter in one namespace; ``name`` is the snapshotter's."""

    def __init__(self, channel: Channel, name: str) -> None:
        self._channel = channel
        self.name = name

    async def prepare(
        self,
        key: str,
        parent: str = "",
        *,
        labels: Mapping[str, str] | None = None,
        lease: str | None = None,
    ) -> list[Mount]:
        """Make an active snapshot on a committed parent, or on nothing, and return its mounts.

        Raises AlreadyExists when the key is taken, or when the target that the label
        ``containerd.io/snapshot.ref`` names is there (trap 19), NotFound for the parent.
        """
        request = pb.PrepareSnapshotRequest(
            snapshotter=self.name, key=key, parent=parent, labels=labels or {}
        )
        answer = await self._make("Prepare", request, pb.PrepareSnapshotResponse, lease)
        return mounts_from(answer.mounts)

    async def view(
        self,
        key: str,
        parent: str,
        *,
        labels: Mapping[str, str] | None = None,
        lease: str | None = None,
    ) -> list[Mount]:
        """Make a read-only snapshot of a committed one, and return its mounts.

        Raises AlreadyExists when the key is taken, NotFound for the parent.
        """
        request = pb.ViewSnapshotRequest(
            snapshotter=self.name, key=key, parent=parent, labels=labels or {}
        )
        answer = await self._make("View", request, pb.ViewSnapshotResponse, lease)
        return mounts_from(answer.mounts)

    async def _make(self, method: str, request: Message, answer: type[_M], lease: str | None) -> _M:
        """Make a snapshot, waiting for the collector if a killed containerd left its directory.

        One that is killed between making a snapshot's directory and noting it gives the same
        number away when it runs again.  Its collector takes the directory away, but only a few
        tenths of a second after the start.
        """
        deadline = time.monotonic() + LEFT_BEHIND_PATIENCE
        while True:
            try:
                return await self._channel.unary(_SERVICE + method, request, answer, lease=lease)
            except ContainerdError as error:
                if not _LEFT_BEHIND.search(str(error)) or time.monotonic() > deadline:
                    raise
            await asyncio.sleep(LEFT_BEHIND_DELAY)

    async def mounts(self, key: str) -> list[Mount]:
        """Return the mounts of an active snapshot or a view; raises NotFound."""
        request = pb.MountsRequest(snapshotter=self.name, key=key)
        answer = await self._channel.unary(_SERVICE + "Mounts", request, pb.MountsResponse)
        return mounts_from(answer.mounts)

    async def commit(
        self,
        name: str,
        key: str,
        *,
        parent: str = "",
        labels: Mapping[str, str] | None = None,
        lease: str | None = None,
    ) -> None:
        """Turn an active snapshot into a committed one.

        Raises AlreadyExists when the name is taken; the active one stays then (trap 20).
        ``parent`` gives one to a snapshot that was prepared without, from containerd 2.2 on;
        older ones ignore it, and all do for a snapshot that has a parent (trap 21).
        """
        request = pb.CommitSnapshotRequest(
            snapshotter=self.name, name=name, key=key, labels=labels or {}, parent=parent
        )
        await self._channel.unary(_SERVICE + "Commit", request, Empty, lease=lease)

    async def remove(self, key: str) -> None:
        """Remove a snapshot; raises NotFound, FailedPrecondition while it has children."""
        request = pb.RemoveSnapshotRequest(snapshotter=self.name, key=key)
        await self._channel.unary(_SERVICE + "Remove", request, Empty)

    async def stat(self, key: str) -> SnapshotInfo:
        """Return what is known of a snapshot; raises NotFound."""
        request = pb.StatSnapshotRequest(snapshotter=self.name, key=key)
        answer = await self._channel.unary(_SERVICE + "Stat", request, pb.StatSnapshotResponse)
        return _info(answer.info)

    async def update_labels(self, key: str, labels: Mapping[str, str | None]) -> SnapshotInfo:
        """Set labels, remove those whose value is None, leave the others alone.

        Raises NotFound.
        """
        if not labels:
            return await self.stat(key)  # an empty mask would replace them all (trap 15)
        info = pb.Info(name=key, labels={k: v or "" for k, v in labels.items()})
        request = pb.UpdateSnapshotRequest(
            snapshotter=self.name, info=info, update_mask=FieldMask(paths=label_mask(labels))
        )
        answer = await self._channel.unary(_SERVICE + "Update", request, pb.UpdateSnapshotResponse)
        return _info(answer.info)

    async def all(self, filters: Sequence[str] = ()) -> list[SnapshotInfo]:
        """Return all snapshots that match one of the filters, or all."""
        request = pb.ListSnapshotsRequest(snapshotter=self.name, filters=filters)
        answers = self._channel.stream(_SERVICE + "List", request, pb.ListSnapshotsResponse)
        return [_info(info) async for answer in answers for info in answer.info]

    async def usage(self, key: str) -> SnapshotUsage:
        """Return what a snapshot takes on disk, without its parents."""
        request = pb.UsageRequest(snapshotter=self.name, key=key)
        answer = await self._channel.unary(_SERVICE + "Usage", request, pb.UsageResponse)
        return SnapshotUsage(answer.size, answer.inodes)


def _info(info: pb.Info) -> SnapshotInfo:
    return SnapshotInfo(
        name=info.name,
        parent=info.parent,
        kind=SnapshotKind(info.kind),
        labels=dict(info.labels),
        created_at=time_from(info.created_at),
        updated_at=time_from(info.updated_at),
    )
