"""The client: one connection, one namespace, all services."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from google.protobuf.empty_pb2 import Empty

from serpentine.containerd._proto import version_pb2
from serpentine.containerd.channel import Channel, unreachable
from serpentine.containerd.content import Content
from serpentine.containerd.diff import Diff
from serpentine.containerd.endpoint import Endpoint
from serpentine.containerd.images import Images
from serpentine.containerd.introspection import Introspection
from serpentine.containerd.leases import Leases
from serpentine.containerd.namespaces import Namespaces
from serpentine.containerd.snapshots import Snapshots
from serpentine.containerd.types import VersionInfo
from serpentine.errors import ContainerdError

__all__ = ["Containerd"]

_VERSION = "/containerd.services.version.v1.Version/Version"
CHECK_TIMEOUT = 10.0


class Containerd:
    """A containerd, seen from one namespace.

    Safe for concurrent tasks of one event loop; close it in the loop that used it.  It
    connects when first used.
    """

    def __init__(self, endpoint: Endpoint, *, namespace: str = "serpentine") -> None:
        self.endpoint = endpoint
        self.namespace = namespace
        self._channel = Channel(endpoint, namespace)
        self.content = Content(self._channel)
        self.diff = Diff(self._channel)
        self.leases = Leases(self._channel)
        self.images = Images(self._channel)
        self.namespaces = Namespaces(self._channel)
        self.introspection = Introspection(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; calls under way are cancelled."""
        await self._channel.close()

    def snapshots(self, snapshotter: str) -> Snapshots:
        """Return the snapshots of one snapshotter."""
        return Snapshots(self._channel, snapshotter)

    async def version(self, *, timeout: float = CHECK_TIMEOUT) -> VersionInfo:
        """Return the daemon's version."""
        answer = await self._channel.unary(
            _VERSION, Empty(), version_pb2.VersionResponse, timeout=timeout
        )
        return VersionInfo(answer.version, answer.revision)

    async def check(self, *, timeout: float = CHECK_TIMEOUT) -> VersionInfo:
        """Make sure that a containerd answers, and return its version.

        Raises DaemonPermission if this user may not open the socket, DaemonUnreachable if
        there is none, or if what answers is no containerd.
        """
        self._channel.probe_socket()
        try:
            return await self.version(timeout=timeout)
        except ContainerdError as error:
            raise unreachable(
                self.endpoint, f"what answers there is no containerd ({error.code.lower()})"
            ) from error

    async def wait_ready(self, timeout: float) -> VersionInfo:
        """Wait until it answers, for ``timeout`` seconds; raises DaemonUnreachable."""
        await self._channel.wait_connected(timeout)
        return await self.check(timeout=timeout)

    def __repr__(self) -> str:
        return f"<Containerd {self.endpoint} namespace={self.namespace}>"
