"""The facade: one object that knows a containerd and the registries, and does what users ask."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from serpentine._concurrency import KeyedLock
from serpentine._version import __version__
from serpentine.containerd import Containerd, Snapshots, VersionInfo
from serpentine.daemon.discovery import Daemon, find
from serpentine.errors import DaemonError, InvalidSetting
from serpentine.events import OnEvent, ignore
from serpentine.model.platform import Platform
from serpentine.model.reference import Reference
from serpentine.model.state import ContainerState
from serpentine.pull.local import LocalImage, find_record, list_images, read_image
from serpentine.pull.pull import PullOptions, pull, state_of
from serpentine.settings import Settings, load

if TYPE_CHECKING:
    from serpentine.registry import RegistryClient

__all__ = ["Engine", "connect"]

_SNAPSHOTTER_LABEL = "containerd.io/defaults/snapshotter"


def connect(
    address: str | None = None,
    *,
    namespace: str | None = None,
    snapshotter: str | None = None,
    insecure_registries: Sequence[str] = (),
    settings: Settings | None = None,
    on_event: OnEvent | None = None,
) -> Engine:
    """Return an engine, to be opened with ``async with``.

    address: the socket of a containerd to use, as a path or ``unix://`` URL.  None means
        ``CONTAINERD_ADDRESS``, else the configuration file, else our own containerd, which
        is started if it does not run (that needs root, and containerd and runc on the PATH).
    namespace: in containerd; ``serpentine`` by default.
    snapshotter: to unpack with; by default the namespace's, else ``overlayfs``, else ``native``.
    insecure_registries: ``HOST`` or ``HOST:PORT`` that may be reached over plain HTTP or
        with a certificate that nobody vouches for.  Loopback needs no mention for plain HTTP.
    settings: all of the above and more, complete; nothing else is read then.
    on_event: receives every event of this engine; see ``serpentine.events``.

    Raises InvalidSetting at once; entering the context raises the DaemonError family.
    """
    if settings is None:
        settings = load(
            {
                "address": address,
                "namespace": namespace,
                "snapshotter": snapshotter,
                "insecure_registries": tuple(insecure_registries),
            }
        )
    return Engine(settings, on_event=on_event or ignore)


class Engine:
    """A containerd in use, and the registries' client.  Safe for concurrent tasks of one loop."""

    def __init__(self, settings: Settings, *, on_event: OnEvent = ignore) -> None:
        self.settings = settings
        self._on_event = on_event
        self._daemon: Daemon | None = None
        self._containerd: Containerd | None = None
        self._registry: RegistryClient | None = None
        self._snapshotter: str | None = None
        self._platform: Platform | None = None
        self._locks = KeyedLock()

    async def __aenter__(self) -> Self:
        self._daemon = await find(self.settings, on_event=self._on_event)
        assert self._daemon is not None  # start=True: found, or DaemonError was raised
        client = Containerd(self._daemon.endpoint, namespace=self.settings.namespace)
        try:
            await client.check()
        except BaseException:
            await client.close()
            raise
        self._containerd = client
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Let go of all connections; our own containerd goes on running."""
        registry, self._registry = self._registry, None
        containerd, self._containerd = self._containerd, None
        try:
            if registry is not None:
                await registry.close()
        finally:
            if containerd is not None:
                await containerd.close()

    @property
    def containerd(self) -> Containerd:
        """The client of the containerd in use."""
        if self._containerd is None:
            raise _not_open()
        return self._containerd

    @property
    def daemon(self) -> Daemon:
        """The containerd in use: its kind, its endpoint, and why it was chosen."""
        if self._daemon is None:
            raise _not_open()
        return self._daemon

    async def pull_image(
        self,
        image: str | Reference,
        *,
        platform: str | Platform | None = None,
        on_event: OnEvent | None = None,
    ) -> ContainerState:
        """Pull an image into containerd, unpack it, and return its state.

        image: a reference, short (``alpine``) or full (``ghcr.io/a/b:1@sha256:…``).
        platform: ``os/arch[/variant]``; by default the one of containerd's machine.
        on_event: receives the events of this pull, instead of the engine's.

        What is there already is neither downloaded nor unpacked; an unchanged tag costs one
        request.  Several pulls may run at once, here and in other processes: what they share
        is fetched once.  On failure or cancellation nothing is left behind.

        Raises InvalidReference, InvalidPlatform, and the RegistryError, ImageError,
        ContainerdError families.
        """
        reference = image if isinstance(image, Reference) else Reference.parse(image)
        wanted = Platform.parse(platform) if isinstance(platform, str) else platform
        tell = on_event or self._on_event
        snapshots = await self._snapshots()
        options = PullOptions(
            platform=wanted or await self.platform(),
            max_concurrent_downloads=self.settings.max_concurrent_downloads,
        )
        repository = self._registry_client().repository(reference, on_event=tell)
        return await pull(
            repository, self.containerd, snapshots, options, locks=self._locks, on_event=tell
        )

    async def images(self) -> list[LocalImage]:
        """Return the images of the namespace, by name."""
        return await list_images(self.containerd)

    async def inspect(
        self, image: str, *, platform: str | Platform | None = None
    ) -> ContainerState:
        """Return the state of an image that is there, without asking a registry.

        Raises NotFound if there is no such image, or not for the platform, or not unpacked.
        """
        wanted = Platform.parse(platform) if isinstance(platform, str) else platform
        record = await find_record(self.containerd, image)
        found = await read_image(self.containerd, record, wanted or await self.platform())
        snapshots = await self._snapshots()
        state = state_of(found, _repository_name(record.name), snapshots.name)
        if state.snapshot_key:
            await snapshots.stat(state.snapshot_key)
        return state

    async def remove_image(self, image: str) -> str:
        """Remove an image record, let containerd collect what only it held; return its name.

        Layers that other images share stay.  Raises NotFound.
        """
        record = await find_record(self.containerd, image)
        await self.containerd.images.delete(record.name, sync=True)
        return record.name

    async def version(self) -> VersionInfo:
        """Return containerd's version."""
        return await self.containerd.version()

    async def platform(self) -> Platform:
        """Return the platform of containerd's machine, which may not be this one's."""
        if self._platform is None:
            self._platform = await self.containerd.introspection.host_platform()
        return self._platform

    async def snapshotter(self) -> str:
        """Return the name of the snapshotter in use."""
        return (await self._snapshots()).name

    async def _snapshots(self) -> Snapshots:
        if self._snapshotter is None:
            self._snapshotter = await self._find_snapshotter()
        return self.containerd.snapshots(self._snapshotter)

    async def _find_snapshotter(self) -> str:
        wanted = self.settings.snapshotter
        if wanted is None:
            labels = await self.containerd.namespaces.labels()
            wanted = labels.get(_SNAPSHOTTER_LABEL)
        there = sorted(p.id for p in await self.containerd.introspection.snapshotters())
        if wanted is None:
            return "overlayfs" if "overlayfs" in there else "native"
        if wanted not in there:
            raise InvalidSetting(
                f"this containerd has no snapshotter {wanted!r} that works",
                hint=f"choose one of: {', '.join(there)}",
            )
        return wanted

    def _registry_client(self) -> RegistryClient:
        if self._registry is None:
            # Here and not above: what needs no registry does not pay for an HTTP client.
            from serpentine.registry import CredentialStore, RegistryClient

            self._registry = RegistryClient(
                credentials=CredentialStore.from_environment(),
                insecure=self.settings.insecure_registries,
                user_agent=f"serpentine/{__version__}",
            )
        return self._registry

    def __repr__(self) -> str:
        where = self._daemon.endpoint.address if self._containerd and self._daemon else "closed"
        return f"<Engine {where} namespace={self.settings.namespace}>"


def _not_open() -> DaemonError:
    return DaemonError(
        "this engine is not open", hint="use it inside 'async with serpentine.connect()'"
    )


def _repository_name(record_name: str) -> str:
    return Reference.parse(record_name).name
