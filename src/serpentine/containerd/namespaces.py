"""Namespaces."""

from __future__ import annotations

from collections.abc import Mapping

from google.protobuf.empty_pb2 import Empty

from serpentine.containerd._proto import namespaces_pb2 as pb
from serpentine.containerd.channel import Channel
from serpentine.errors import NotFound

__all__ = ["Namespaces"]

_SERVICE = "/containerd.services.namespaces.v1.Namespaces/"


class Namespaces:
    """All namespaces of a daemon.  containerd makes one when something is first put into it."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    async def labels(self, name: str | None = None) -> dict[str, str]:
        """Return a namespace's labels (by default our own's); none if it is not there yet."""
        request = pb.GetNamespaceRequest(name=name or self._channel.namespace)
        try:
            answer = await self._channel.unary(_SERVICE + "Get", request, pb.GetNamespaceResponse)
        except NotFound:
            return {}
        return dict(answer.namespace.labels)

    async def all(self) -> list[str]:
        """Return the names of all namespaces."""
        request = pb.ListNamespacesRequest()
        answer = await self._channel.unary(_SERVICE + "List", request, pb.ListNamespacesResponse)
        return [namespace.name for namespace in answer.namespaces]

    async def create(self, name: str, labels: Mapping[str, str] | None = None) -> None:
        """Make a namespace, to give it labels from the start; raises AlreadyExists."""
        namespace = pb.Namespace(name=name, labels=labels or {})
        request = pb.CreateNamespaceRequest(namespace=namespace)
        await self._channel.unary(_SERVICE + "Create", request, pb.CreateNamespaceResponse)

    async def delete(self, name: str) -> None:
        """Delete a namespace; raises NotFound, FailedPrecondition unless it is empty."""
        request = pb.DeleteNamespaceRequest(name=name)
        await self._channel.unary(_SERVICE + "Delete", request, Empty)
