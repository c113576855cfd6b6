"""The client: one connection, one namespace, all services."""

from __future__ import annotations

import asyncio
import re
import time
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Self

from google.protobuf.empty_pb2 import Empty

from serpentine.containerd._proto import version_pb2
from serpentine.containerd.channel import Channel, unreachable
from serpentine.containerd.content import Content
from serpentine.containerd.endpoint import Endpoint
from serpentine.containerd.images import Images
from serpentine.containerd.introspection import Introspection
from serpentine.containerd.leases import Leases
from serpentine.containerd.namespaces import Namespaces
from serpentine.containerd.snapshots import Snapshots
from serpentine.containerd.types import VersionInfo
from serpentine.errors import (
    ContainerdError,
    DaemonError,
    DaemonPermission,
    DeadlineExceeded,
    InvalidSetting,
    PermissionDenied,
    Unavailable,
)

if TYPE_CHECKING:
    from serpentine.containerd.containers import Containers
    from serpentine.containerd.diff import Diff
    from serpentine.containerd.tasks import Tasks

__all__ = ["PROXY_ALONE", "Containerd"]

_VERSION = "/containerd.services.version.v1.Version/Version"
CHECK_TIMEOUT = 10.0

# What Envoy answers, as we configure it, when it cannot reach containerd.
PROXY_ALONE = "the proxy answers, the containerd behind it does not"

# How long to wait before asking a daemon again that is not ready, in seconds.
READY_DELAY = 0.05

# containerd's own rule for identifiers.
_NAMESPACE = re.compile(r"[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*")
_NAMESPACE_LENGTH = 76


class Containerd:
    """A containerd, seen from one namespace.

    Safe for concurrent tasks of one event loop; close it in the loop that used it.  It
    connects when first used.  Raises InvalidSetting for what containerd does not take as a
    namespace.
    """

    def __init__(self, endpoint: Endpoint, *, namespace: str = "serpentine") -> None:
        if not _NAMESPACE.fullmatch(namespace) or len(namespace) > _NAMESPACE_LENGTH:
            raise InvalidSetting(
                f"{namespace!r} is not a containerd namespace",
                hint=f"use letters and digits, with single '.', '_' or '-' between them,"
                f" {_NAMESPACE_LENGTH} characters at most",
            )
        self.endpoint = endpoint
        self.namespace = namespace
        self._channel = Channel(endpoint, namespace)
        self.content = Content(self._channel)
        self.leases = Leases(self._channel)
        self.images = Images(self._channel)
        self.namespaces = Namespaces(self._channel)
        self.introspection = Introspection(self._channel)

    # Not needed to find that all is there: their messages are imported when they are.
    @cached_property
    def diff(self) -> Diff:
        """The service that unpacks and compares."""
        from serpentine.containerd.diff import Diff

        return Diff(self._channel)

    @cached_property
    def containers(self) -> Containers:
        """The records of containers."""
        from serpentine.containerd.containers import Containers

        return Containers(self._channel)

    @cached_property
    def tasks(self) -> Tasks:
        """The processes of containers."""
        from serpentine.containerd.tasks import Tasks

        return Tasks(self._channel)

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
        """Close the connection for good; calls under way raise Unavailable."""
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

        Does not wait for one that is starting.  Raises DaemonPermission if this user may not
        open the socket or is refused, DaemonUnreachable if nothing answers within ``timeout``
        seconds, or if what answers is no containerd.
        """
        self._channel.probe_socket()
        try:
            return await self.version(timeout=timeout)
        except ContainerdError as error:
            raise self._unusable(error) from error

    async def wait_ready(self, timeout: float) -> VersionInfo:
        """Wait until a containerd answers, for ``timeout`` seconds at most.

        Raises what ``check`` raises.
        """
        deadline = time.monotonic() + timeout
        while True:
            await self._channel.wait_connected(max(deadline - time.monotonic(), 0.0))
            try:
                return await self.version(timeout=max(deadline - time.monotonic(), READY_DELAY))
            except Unavailable as error:
                # A proxy may listen before the daemon behind it does.
                if time.monotonic() + READY_DELAY >= deadline:
                    raise self._unusable(error) from error
            except ContainerdError as error:
                raise self._unusable(error) from error
            await asyncio.sleep(READY_DELAY)

    def _unusable(self, error: ContainerdError) -> DaemonError:
        if isinstance(error, PermissionDenied):
            return DaemonPermission(
                f"containerd at {self.endpoint} refuses this caller",
                address=str(self.endpoint),
                hint=error.hint,
            )
        if isinstance(error, Unavailable | DeadlineExceeded):
            # A proxy of ours says it in its own words.
            proxy = PROXY_ALONE in str(error)
            why = PROXY_ALONE if proxy else "no containerd answers there"
            return unreachable(self.endpoint, why)
        return unreachable(
            self.endpoint, f"what answers there is no containerd ({error.code.lower()})"
        )

    def __repr__(self) -> str:
        return f"<Containerd {self.endpoint} namespace={self.namespace}>"
