"""Layers onto mounts, and mounts into layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from serpentine.containerd._convert import descriptor_from, descriptor_to, mounts_to
from serpentine.containerd._proto import diff_pb2 as pb
from serpentine.containerd.channel import Channel
from serpentine.containerd.types import Mount
from serpentine.model.documents import Descriptor

__all__ = ["Diff"]

_SERVICE = "/containerd.services.diff.v1.Diff/"


class Diff:
    """containerd's diff service.  Neither call has a time limit: a large layer takes minutes."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    async def apply(
        self,
        layer: Descriptor,
        mounts: Iterable[Mount],
        *,
        sync_fs: bool = False,
        lease: str | None = None,
    ) -> Descriptor:
        """Unpack a blob of the content store onto mounts.

        Returns the descriptor of the uncompressed tar, whose digest is the diff ID: the caller
        must compare it, containerd does not (trap 24).  ``sync_fs`` writes everything to disk
        before the answer, from containerd 2.0 on.  Cancelled, it leaves the mounts half-written
        (trap 26).  Most failures are plain ContainerdError (trap 25).
        """
        request = pb.ApplyRequest(
            diff=descriptor_to(layer), mounts=mounts_to(mounts), sync_fs=sync_fs
        )
        answer = await self._channel.unary(
            _SERVICE + "Apply", request, pb.ApplyResponse, lease=lease, timeout=None
        )
        return descriptor_from(answer.applied)

    async def diff(
        self,
        lower: Iterable[Mount],
        upper: Iterable[Mount],
        *,
        media_type: str,
        ref: str,
        labels: Mapping[str, str] | None = None,
        lease: str | None = None,
    ) -> Descriptor:
        """Write what ``upper`` changes in ``lower`` into the content store as a layer."""
        request = pb.DiffRequest(
            left=mounts_to(lower),
            right=mounts_to(upper),
            media_type=media_type,
            ref=ref,
            labels=labels or {},
        )
        answer = await self._channel.unary(
            _SERVICE + "Diff", request, pb.DiffResponse, lease=lease, timeout=None
        )
        return descriptor_from(answer.diff)
