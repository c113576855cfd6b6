"""Container records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from google.protobuf.any_pb2 import Any
from google.protobuf.empty_pb2 import Empty

from serpentine.containerd._convert import time_from
from serpentine.containerd._proto import containers_pb2 as pb
from serpentine.containerd.channel import Channel
from serpentine.containerd.types import ContainerRecord

__all__ = ["RUNTIME", "Containers"]

RUNTIME = "io.containerd.runc.v2"

_SERVICE = "/containerd.services.containers.v1.Containers/"
_SPEC = "types.containerd.io/opencontainers/runtime-spec/1/Spec"


class Containers:
    """The container records of one namespace.  A record runs nothing: that is its task."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    async def create(
        self,
        container_id: str,
        spec: bytes,
        *,
        snapshotter: str = "",
        snapshot_key: str = "",
        runtime: str = RUNTIME,
        image: str = "",
        labels: Mapping[str, str] | None = None,
        lease: str | None = None,
    ) -> ContainerRecord:
        """Make a record; ``spec`` is the OCI runtime's configuration, as JSON.

        The record holds its snapshot against the collector until it is deleted (trap 45);
        neither snapshot nor image need exist.  A lease changes nothing (1.6, 2.3): records are
        not collected.  Raises AlreadyExists, InvalidArgument for an id
        that containerd does not take.
        """
        container = pb.Container(
            id=container_id,
            labels=labels or {},
            image=image,
            runtime=pb.Container.Runtime(name=runtime),
            spec=Any(type_url=_SPEC, value=spec),
            snapshotter=snapshotter,
            snapshot_key=snapshot_key,
        )
        request = pb.CreateContainerRequest(container=container)
        answer = await self._channel.unary(
            _SERVICE + "Create", request, pb.CreateContainerResponse, lease=lease
        )
        return _record(answer.container)

    async def get(self, container_id: str) -> ContainerRecord:
        """Return a record; raises NotFound."""
        request = pb.GetContainerRequest(id=container_id)
        answer = await self._channel.unary(_SERVICE + "Get", request, pb.GetContainerResponse)
        return _record(answer.container)

    async def all(self, filters: Sequence[str] = ()) -> list[ContainerRecord]:
        """Return all records that match one of the filters, or all."""
        request = pb.ListContainersRequest(filters=filters)
        answer = await self._channel.unary(_SERVICE + "List", request, pb.ListContainersResponse)
        return [_record(container) for container in answer.containers]

    async def delete(self, container_id: str) -> None:
        """Delete a record; raises NotFound.

        Delete its task first: containerd does not look, and a task without a record is listed
        but can neither be asked nor ended until there is a record of that name again.
        """
        request = pb.DeleteContainerRequest(id=container_id)
        await self._channel.unary(_SERVICE + "Delete", request, Empty)


def _record(container: pb.Container) -> ContainerRecord:
    return ContainerRecord(
        id=container.id,
        spec=container.spec.value,
        snapshotter=container.snapshotter,
        snapshot_key=container.snapshot_key,
        runtime=container.runtime.name,
        image=container.image,
        labels=dict(container.labels),
        created_at=time_from(container.created_at),
        updated_at=time_from(container.updated_at),
    )
