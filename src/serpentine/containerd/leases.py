"""Leases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta

from google.protobuf.empty_pb2 import Empty

from serpentine.containerd._convert import time_from
from serpentine.containerd._proto import leases_pb2 as pb
from serpentine.containerd.channel import UNARY_TIMEOUT, Channel
from serpentine.containerd.types import Lease, Resource
from serpentine.errors import NotFound

__all__ = ["Leases"]

_SERVICE = "/containerd.services.leases.v1.Leases/"
EXPIRES = "containerd.io/gc.expire"


class Leases:
    """What keeps the collector away."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    async def create(
        self, lease_id: str, *, expires: timedelta, labels: Mapping[str, str] | None = None
    ) -> Lease:
        """Make a lease that ends by itself after ``expires``; raises AlreadyExists."""
        until = (datetime.now(UTC) + expires).strftime("%Y-%m-%dT%H:%M:%SZ")
        request = pb.CreateRequest(id=lease_id, labels={**(labels or {}), EXPIRES: until})
        answer = await self._channel.unary(_SERVICE + "Create", request, pb.CreateResponse)
        return _lease(answer.lease)

    async def delete(self, lease_id: str, *, sync: bool = False) -> None:
        """End a lease; it need not be there.  With ``sync``, return after the collector ran."""
        request = pb.DeleteRequest(id=lease_id, sync=sync)
        try:
            # The collector may have gigabytes to remove.
            timeout = None if sync else UNARY_TIMEOUT
            await self._channel.unary(_SERVICE + "Delete", request, Empty, timeout=timeout)
        except NotFound:
            return

    async def all(self, filters: Sequence[str] = ()) -> list[Lease]:
        """Return all leases that match one of the filters, or all."""
        request = pb.ListRequest(filters=filters)
        answer = await self._channel.unary(_SERVICE + "List", request, pb.ListResponse)
        return [_lease(lease) for lease in answer.leases]

    async def add_resource(self, lease_id: str, resource: Resource) -> None:
        """Let a lease hold an object, whether or not that exists yet; raises NotFound."""
        held = pb.Resource(id=resource.id, type=resource.type)
        request = pb.AddResourceRequest(id=lease_id, resource=held)
        await self._channel.unary(_SERVICE + "AddResource", request, Empty)

    async def delete_resource(self, lease_id: str, resource: Resource) -> None:
        """Let go of an object; it need not be held.  Raises NotFound for the lease."""
        held = pb.Resource(id=resource.id, type=resource.type)
        request = pb.DeleteResourceRequest(id=lease_id, resource=held)
        await self._channel.unary(_SERVICE + "DeleteResource", request, Empty)

    async def list_resources(self, lease_id: str) -> list[Resource]:
        """Return what a lease holds; raises NotFound."""
        request = pb.ListResourcesRequest(id=lease_id)
        answer = await self._channel.unary(
            _SERVICE + "ListResources", request, pb.ListResourcesResponse
        )
        return [Resource(id=r.id, type=r.type) for r in answer.resources]


def _lease(lease: pb.Lease) -> Lease:
    return Lease(id=lease.id, created_at=time_from(lease.created_at), labels=dict(lease.labels))
