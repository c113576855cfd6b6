"""The facade: one object that knows a containerd and the registries, and does what users ask."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Self, cast

import msgspec

from serpentine._concurrency import KeyedLock, shielded
from serpentine._version import __version__
from serpentine.containerd import Containerd, Snapshots, VersionInfo
from serpentine.daemon.named import Daemon, find
from serpentine.errors import (
    DaemonError,
    DaemonUnreachable,
    FailedPrecondition,
    InvalidReference,
    InvalidSetting,
    NoSpace,
    NotFound,
    NotPinned,
    PlatformNotFound,
    StepError,
    Unavailable,
)
from serpentine.events import (
    Event,
    OnEvent,
    PullFailed,
    PullFinished,
    PullNotice,
    PullResolved,
    Retrying,
    ignore,
)
from serpentine.history import PullRecord, Recorder, save
from serpentine.history import find_record as find_pull
from serpentine.model.digest import Digest
from serpentine.model.platform import Platform
from serpentine.model.reference import Reference
from serpentine.model.state import ContainerState
from serpentine.pull.plan import can_rebase
from serpentine.pull.pull import PullOptions, pull, state_of
from serpentine.settings import Settings, hosts_folders, load

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

    from serpentine.daemon.container import ContainerDaemon
    from serpentine.model.documents import Descriptor
    from serpentine.pull.local import LocalImage
    from serpentine.pull.lockfile import Lock
    from serpentine.pull.resolve import ResolvedImage
    from serpentine.pull.space import Need
    from serpentine.registry import Endpoints, RegistryClient, Repository
    from serpentine.run.network import Network
    from serpentine.run.options import RunOptions
    from serpentine.run.services import Service
    from serpentine.run.site import Site
    from serpentine.run.step import RunResult, Step, StepContext
    from serpentine.run.unpacking import Copied
    from serpentine.upkeep.found import VerifyResult
    from serpentine.upkeep.plan import PruneResult
    from serpentine.upkeep.usage import Usage

__all__ = ["Engine", "connect"]

# To ask in a container takes a tenth of a second or two: not for less than this.
WORTH_ASKING = 16 << 20
# How often one pull waits for our own containerd to come back.
MAX_RESTARTS = 5
# When a pull may ask the registry.
POLICIES = ("always", "missing", "never")
# Seconds for writing the record of a pull.
RECORD_TIMEOUT = 2.0
_PULLS = "pulls"
_USER_AGENT = f"serpentine/{__version__}"
# See telemetry.py, which is imported when somebody wants to know.
_LOGGER = logging.getLogger("serpentine")
_SNAPSHOTTER_LABEL = "containerd.io/defaults/snapshotter"


def connect(
    address: str | None = None,
    *,
    namespace: str | None = None,
    snapshotter: str | None = None,
    insecure_registries: Sequence[str] = (),
    offline: bool | None = None,
    settings: Settings | None = None,
    on_event: OnEvent | None = None,
    tracer: Tracer | None = None,
) -> Engine:
    """Return an engine, to be opened with ``async with``.

    address: the socket of a containerd to use, as a path or ``unix://`` URL.  None means
        ``CONTAINERD_ADDRESS``, else the configuration file, else our own containerd, which
        is brought up if it does not run: in Docker or Podman, or with root as a child process.
    namespace: in containerd; ``serpentine`` by default.
    snapshotter: to unpack with; by default the namespace's, else ``overlayfs``, else ``native``.
    insecure_registries: ``HOST`` or ``HOST:PORT`` that may be reached over plain HTTP or
        with a certificate that nobody vouches for.  Loopback needs no mention for plain HTTP.
    offline: ask no registry, and download nothing; False by default.
    settings: all of the above and more, complete; nothing else is read then.
    on_event: receives every event of this engine; see ``serpentine.events``.
    tracer: of OpenTelemetry; pulls are spans of it.  By default, if the settings ask for
        ``traces``, one of the provider that is set up.

    Events are also logged, by the logger ``serpentine``.

    Raises InvalidSetting at once; entering the context raises the DaemonError family.
    """
    if settings is None:
        settings = load(
            {
                "address": address,
                "namespace": namespace,
                "snapshotter": snapshotter,
                "insecure_registries": tuple(insecure_registries),
                "offline": offline,
            }
        )
    return Engine(settings, on_event=on_event or ignore, tracer=tracer)


class Engine:
    """A containerd in use, and the registries' client.  Safe for concurrent tasks of one loop."""

    def __init__(
        self, settings: Settings, *, on_event: OnEvent = ignore, tracer: Tracer | None = None
    ) -> None:
        self.settings = settings
        self._on_event = on_event
        self._tracer = tracer
        if tracer is None and settings.traces:
            from serpentine.telemetry import default_tracer

            self._tracer = default_tracer()
        self._daemon: Daemon | None = None
        self._containerd: Containerd | None = None
        self._retired: list[Containerd] = []
        self._registry: RegistryClient | None = None
        self._snapshotter: str | None = None
        self._rebases: bool | None = None
        self._platform: Platform | None = None
        self._site: Site | None = None
        self._network: Network | None = None
        self._locks = KeyedLock()

    async def __aenter__(self) -> Self:
        self._daemon = await find(self.settings, on_event=self._listener())
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
        site, self._site = self._site, None
        containerd, self._containerd = self._containerd, None
        try:
            if registry is not None:
                await registry.close()
            if site is not None:
                await site.close()
        finally:
            retired, self._retired = self._retired, []
            for client in [containerd, *retired]:
                if client is not None:
                    await client.close()

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
        pull: str = "always",
        lock: Lock | None = None,
        on_event: OnEvent | None = None,
    ) -> ContainerState:
        """Pull an image into containerd, unpack it, and return its state.

        image: a reference, short (``alpine``) or full (``ghcr.io/a/b:1@sha256:…``).
        platform: ``os/arch[/variant]``; by default the one of containerd's machine.
        pull: when to ask the registry: ``always``, to find a tag that moved; ``missing``, only
            if the image is not here for the platform; ``never``.  What is here but not unpacked
            is unpacked in any case.
        lock: allow only what is pinned, in this lock or by a digest in the reference.  It is
            recorded under its tag, wherever the registry's tag has moved, and the registry
            is asked only for what is not here.  By default the one of the settings, if they say
            ``frozen``.
        on_event: receives the events of this pull, instead of the engine's.

        What is there already is neither downloaded nor unpacked; an unchanged tag costs one
        request.  Several pulls may run at once, here and in other processes: what they share
        is fetched once.  What had come before a failure or a cancellation is kept for a day, and
        the next pull of the image goes on from there.  If our own containerd goes away, it is
        brought up again and the pull goes on.

        Raises InvalidReference, InvalidPlatform, InvalidSetting; NotPinned for what the lock does
        not have; NotFound for what is not here, when no registry may be asked; and the
        RegistryError, ImageError, ContainerdError families.
        """
        if pull not in POLICIES:
            raise InvalidSetting(
                f"{pull!r} says not when to pull", hint=f"choose one of: {', '.join(POLICIES)}"
            )
        reference = image if isinstance(image, Reference) else Reference.parse(image)
        wanted = Platform.parse(platform) if isinstance(platform, str) else platform
        wanted = wanted or await self.platform()
        listener = self._listener(on_event, self._tracer)
        began = time.monotonic()
        recorder = Recorder(
            str(reference),
            platform=str(wanted.normalized()),
            namespace=self.settings.namespace,
            pull=pull,
            offline=self.settings.offline,
            frozen=lock is not None or self.settings.frozen,
        )

        def tell(event: Event) -> None:
            recorder(event)
            listener(event)

        try:
            pinned = await self._pinned(reference, wanted, lock)
            if pinned is None and (pull != "always" or self.settings.offline):
                with suppress(NotFound, PlatformNotFound):
                    found, state = await self._read(str(image), wanted)
                    # No pull, so there will be no record of one.
                    listener(_nothing_to_do(found, state, time.monotonic() - began))
                    return state
            return await self._pull(reference, wanted, pull, pinned, tell)
        except BaseException as error:
            tell(_failure(reference, error, time.monotonic() - began))
            raise
        finally:
            if (record := recorder.record()) is not None:
                await self._remember(record)

    async def _remember(self, record: PullRecord) -> None:
        """Keep the record of a pull, however it ended; but wait for no disk."""
        with suppress(TimeoutError):
            await shielded(
                asyncio.to_thread(save, self.settings.data_dir / _PULLS, record),
                timeout=RECORD_TIMEOUT,
            )

    async def explain(self, what: str = "last") -> PullRecord:
        """Return the record of the newest pull of what is meant; the engine need not be open.

        what: ``last``; an image, as it is pulled; or a digest of an index, a manifest or a layer,
            of which the first six digits suffice.

        A pull of any process with the same data directory leaves one, however it ended; the newest
        hundred are kept.  Raises NotFound, InvalidReference.
        """
        return await asyncio.to_thread(find_pull, self.settings.data_dir / _PULLS, what)

    async def _pull(
        self,
        reference: Reference,
        platform: Platform,
        policy: str,
        pinned: tuple[Digest, str] | None,
        tell: OnEvent,
    ) -> ContainerState:
        options = PullOptions(
            platform=platform,
            max_concurrent_downloads=self.settings.max_concurrent_downloads,
            max_concurrent_unpacks=self.settings.max_concurrent_unpacks,
            can_rebase=self._can_rebase,
            stall_timeout=self.settings.stall_timeout,
        )
        repository = await self._source(reference, platform, policy, pinned, tell)
        if pinned is not None and pinned[1]:
            tell = _only(pinned[1], tell)
        return await self._pull_from(repository, options, tell)

    def _listener(self, on_event: OnEvent | None = None, tracer: Tracer | None = None) -> OnEvent:
        """Return what gets the events: the caller's, or ours; logs and spans if they are wanted."""
        chosen = on_event or self._on_event
        if tracer is None and not _LOGGER.isEnabledFor(logging.INFO):
            return chosen
        from serpentine.telemetry import watched

        return watched(chosen, tracer)

    async def _pinned(
        self, reference: Reference, platform: Platform, lock: Lock | None
    ) -> tuple[Digest, str] | None:
        """Return the digest that is pinned, and its manifest's; None if anything may be pulled."""
        if lock is None and not self.settings.frozen:
            return None
        if reference.digest is not None:
            return reference.digest, ""
        if lock is not None:
            return lock.pinned(reference, platform)
        from serpentine.pull.lockfile import Lock

        file = self.settings.lock_file
        try:
            lock = await asyncio.to_thread(Lock.load, file)
        except FileNotFoundError:
            raise NotPinned(
                f"{reference} is not pinned: there is no lock file {file}",
                hint=f"make it: serpentine lock {reference} --file {file}",
            ) from None
        return lock.pinned(reference, platform, file=str(file))

    async def _source(
        self,
        reference: Reference,
        platform: Platform,
        policy: str,
        pinned: tuple[Digest, str] | None,
        on_event: OnEvent,
    ) -> Repository:
        """Return what a pull gets the image from: the registry, or nothing but what is here."""

        def registry() -> Repository:
            return self._repository(reference, on_event)

        may_ask = policy != "never" and not self.settings.offline
        if may_ask and policy == "always" and pinned is None:
            return self._asked(reference, registry)
        from serpentine.pull.source import Pinned, descriptor_of, root_here, what_is_missing

        root = descriptor_of(pinned[0]) if pinned is not None else None
        if may_ask and root is not None:
            return cast("Repository", Pinned(reference, root, registry))
        missing = await what_is_missing(
            self.containerd, await self._snapshots(), reference, root, platform
        )
        if not missing:
            root = root or await root_here(self.containerd, reference)
            return cast("Repository", Pinned(reference, root, None))
        if may_ask:
            return registry()
        why = "offline" if self.settings.offline else "pull: never"
        raise NotFound(
            f"{missing}; no registry is asked ({why})",
            hint=f"when one may be: serpentine pull {reference} --platform {platform.normalized()}",
        )

    def _asked(self, reference: Reference, registry: Callable[[], Repository]) -> Repository:
        """Return the registry's repository; one that may do without its client if it is near."""
        if self._registry is not None:
            return registry()
        from serpentine.registry.look import is_near

        if not is_near(reference.registry):
            return registry()
        from serpentine.pull.source import LookedAt

        async def try_look() -> Descriptor | None:
            from serpentine.registry.look import look
            from serpentine.registry.memory import HostMemory

            try:
                await self.containerd.images.get(str(reference))
            except NotFound:
                return None  # there will be more to ask for
            memory = HostMemory(self._memory_folder)
            return await look(reference, self._endpoints(), memory, user_agent=_USER_AGENT)

        return cast("Repository", LookedAt(reference, try_look, registry))

    def _repository(self, reference: Reference, on_event: OnEvent) -> Repository:
        """Return the registry's repository; offline, one that has nothing."""
        if self.settings.offline:
            from serpentine.pull.source import Pinned

            return cast("Repository", Pinned(reference, None, None))
        return self._registry_client().repository(reference, on_event=on_event)

    async def _pull_from(
        self, repository: Repository, options: PullOptions, tell: OnEvent
    ) -> ContainerState:
        reference = repository.reference
        restarts = 0
        options = msgspec.structs.replace(options, sync_fs=self.settings.sync)
        if self.settings.check_space:

            async def check(need: Need) -> None:
                await self._check_space(need, reference, tell)

            options = msgspec.structs.replace(options, check_space=check)
        gone: Containerd | None = None
        while True:
            client = self.containerd
            try:
                if client is gone:
                    await self._bring_back(client, tell)
                    client = self.containerd
                return await pull(
                    repository,
                    client,
                    await self._snapshots(),
                    options,
                    locks=self._locks,
                    on_event=tell,
                )
            # The second, when it goes away again while it is brought back.
            except (Unavailable, DaemonUnreachable) as error:
                if self.daemon.kind == "address":
                    raise Unavailable(
                        f"{reference}: containerd at {self.daemon.endpoint} went away: {error}",
                        hint="start it, then pull again: it goes on from there",
                    ) from error
                restarts += 1
                if restarts > MAX_RESTARTS or self._containerd is None:
                    raise
                tell(Retrying(what=f"pull of {reference}", reason=str(error), delay=0.0))
                gone = client

    async def _check_space(self, need: Need, image: Reference, on_event: OnEvent) -> None:
        """Raise NoSpace for what cannot fit onto containerd's disk; tell what may not."""
        from serpentine.daemon.disk import free_inside, free_there
        from serpentine.pull.space import Free, judge, size

        roots = await self.containerd.introspection.roots(await self.snapshotter())
        free = await asyncio.to_thread(free_there, self.daemon.endpoint, roots)
        if free is None and self.daemon.container is not None and need.download > WORTH_ASKING:
            from serpentine.daemon.shell import ContainerShell

            shell = ContainerShell(self.daemon.container)
            try:
                free = await free_inside(shell, roots)
            finally:
                await shell.close()
        if not free or len(free) < 2:
            return  # not known, or not of both
        (first, blobs), (second, snapshots) = free[0], free[-1]
        verdict = judge(need, Free(blobs, snapshots, same=first == second))
        if verdict.likely:
            return
        prunable = (await self.usage()).prunable_all
        more = f"; 'serpentine prune --all' would free {size(prunable)}" if prunable else ""
        if verdict.fits:
            on_event(PullNotice(str(image), f"the disk may become full: {verdict.text}{more}"))
            return
        raise NoSpace(
            f"{image} does not fit: {verdict.text}",
            hint=f"make room there{more}, or set SERPENTINE_CHECK_SPACE=0",
        )

    async def _bring_back(self, gone: Containerd, on_event: OnEvent) -> None:
        """Get our own containerd running again, and a new connection to it."""
        async with self._locks("daemon"):
            if self._containerd is not gone:
                return  # another task has done it
            daemon = await find(self.settings, on_event=on_event)
            assert daemon is not None
            client = Containerd(daemon.endpoint, namespace=self.settings.namespace)
            try:
                await client.check()
            except BaseException:
                await client.close()
                raise
            # Closed later: others may still be in the middle of something with it.
            self._retired.append(gone)
            self._daemon, self._containerd = daemon, client
            # It may be another version.
            self._rebases = None

    async def lock(
        self,
        images: Sequence[str | Reference],
        *,
        platforms: Sequence[str | Platform] = (),
        into: Lock | None = None,
        update: bool = False,
        on_event: OnEvent | None = None,
    ) -> Lock:
        """Find out what tags mean, and return a lock that pins them; nothing is pulled.

        images: references with a tag.
        platforms: to pin; by default the one of containerd's machine, and with ``update`` those
            that are pinned already.
        into: a lock to add to, ``Lock.load("serpentine.lock")``.  What is pinned there stays as it
            is: a platform is added from the same index, and nothing is asked for what is there.
        update: ask what the tags mean now, also of those that are pinned.
        on_event: receives the events of this, instead of the engine's.

        ``save`` of what is returned writes it to a file.  Raises InvalidReference,
        PlatformNotFound, and the RegistryError, ImageError, ContainerdError families.
        """
        from serpentine.pull.lockfile import Lock, pin_image
        from serpentine.pull.source import descriptor_of, root_here

        lock = into or Lock()
        given = [Platform.parse(p) if isinstance(p, str) else p.normalized() for p in platforms]
        references = [i if isinstance(i, Reference) else Reference.parse(i) for i in images]
        for reference in references:
            if reference.digest is not None:
                raise InvalidReference(
                    f"{reference} names a digest: that is pinned", hint="lock images by their tag"
                )
        for reference in references:
            before = lock.find(reference)
            there = [] if before is None else [Platform.parse(p) for p in before.platforms]
            wanted = given or (there if update else []) or [await self.platform()]
            root = None
            if before is not None and not update:
                wanted = [one for one in wanted if one.normalized() not in there]
                root = descriptor_of(Digest.parse(before.digest))
            elif before is not None:
                wanted = [*wanted, *(one for one in there if one not in wanted)]
            if not wanted:
                continue
            if root is None and self.settings.offline:
                with suppress(NotFound):
                    root = await root_here(self.containerd, reference)
            repository = self._repository(reference, self._listener(on_event))
            pin = await pin_image(repository, self.containerd.content, wanted, root)
            if before is not None and not update:
                pin = replace(pin, platforms={**before.platforms, **pin.platforms})
            lock = lock.merged(str(reference), pin)
        return lock

    async def images(self) -> list[LocalImage]:
        """Return the images of the namespace, by name."""
        from serpentine.pull.local import list_images

        return await list_images(self.containerd)

    async def inspect(
        self, image: str, *, platform: str | Platform | None = None
    ) -> ContainerState:
        """Return the state of an image that is there, without asking a registry.

        Raises NotFound if there is no such image, or not for the platform, or not unpacked.
        """
        wanted = Platform.parse(platform) if isinstance(platform, str) else platform
        _, state = await self._read(image, wanted or await self.platform())
        return state

    async def _read(self, image: str, platform: Platform) -> tuple[ResolvedImage, ContainerState]:
        """Return an image that is here and unpacked; raises NotFound."""
        from serpentine.pull.local import find_record, read_image

        record = await find_record(self.containerd, image)
        found = await read_image(self.containerd, record, platform)
        snapshots = await self._snapshots()
        state = state_of(found, _repository_name(record.name), snapshots.name)
        if state.snapshot_key:
            await snapshots.stat(state.snapshot_key)
        return found, state

    async def remove_image(self, image: str) -> str:
        """Remove an image record, let containerd collect what only it held; return its name.

        Layers that other images share stay.  Raises NotFound.
        """
        from serpentine.pull.local import find_record

        record = await find_record(self.containerd, image)
        await self.containerd.images.delete(record.name, sync=True)
        return record.name

    async def run(
        self,
        state: ContainerState,
        args: Sequence[str] | str | None = None,
        *,
        options: RunOptions | None = None,
        services: Mapping[str, Service] | None = None,
        use: Callable[[Step], Coroutine[Any, Any, None]] | None = None,
        on_event: OnEvent | None = None,
        **more: Any,
    ) -> RunResult:
        """Run a process on a state to its end, and return how it ended and the state after it.

        args: appended to the entry point; a string is run by ``/bin/sh -c`` in its place; None
            means the state's own command.
        options: everything else, see ``RunOptions``; ``more`` are fields of it in place of
            those: ``run(state, "make", env={"CC": "clang"}, network="none", timeout=600)``.
        services: what runs beside it and is ready before it starts, by the names that it reaches
            them by; see ``Service``.
        use: a coroutine function that gets the running step, to write to its stdin, send
            signals, resize its terminal.
        on_event: receives the events of this step, its output too, instead of the engine's.

        The new state is kept until ``remove_state``; with ``commit=False``, or when the process
        ends with another status than 0, there is none.  Whatever way it ends, nothing else is
        left behind.  Cancelled, it kills the process.

        Raises CommandNotFound, CommandNotExecutable, UserNotFound, StepTimeout, ServiceFailed;
        StepFailed with ``check=True``; StepError, ContainerdError.
        """
        from serpentine.run.options import RunOptions
        from serpentine.run.step import run_step

        if not isinstance(state, ContainerState):
            raise InvalidSetting(
                f"{state!r} is not a state", hint='give one: await engine.pull_image("alpine")'
            )
        if args is not None:
            more["args"] = args
        chosen = replace(options or RunOptions(), **more)
        context = await self._steps(self._listener(on_event))
        if services:
            from serpentine.run.services import run_with_services

            return await run_with_services(context, state, chosen, services, use=use)
        return await run_step(context, state, chosen, use=use)

    async def copy_in(
        self,
        state: ContainerState,
        source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | BinaryIO,
        destination: str,
        *,
        owner: str | None = None,
        ignore: Sequence[str] = (),
        ignore_file: str | os.PathLike[str] | None = None,
        gitignore: bool = False,
        on_event: OnEvent | None = None,
    ) -> ContainerState:
        """Copy files of this machine into a state, and return the state after it.

        source: a file or directory, or several, or an open file with a tar archive (compressed
            or not).  Given as a string, ``DIR/.`` means what is in the directory.
        destination: a path in the state; relative ones from its working directory.  A directory
            that is there takes the source inside it; otherwise the source gets that name.  With
            a slash at its end, or for several sources, it is a directory, made if need be.
            Missing directories above are root's, with mode 0755.  Symlinks on the way are
            followed inside the state.
        owner: ``USER[:GROUP]`` for all that is copied, names as in the state's files; a number
            alone is that of the group, too.  By default the files' own owners, as numbers.
        ignore: lines of a ``.dockerignore``, for what is in a directory that is copied;
            ``ignore_file`` is a file with such lines.
        gitignore: leave out what git ignores, and ``.git``.
        on_event: receives the events of this copy, instead of the engine's.

        Modes, times, hard links, devices and extended attributes are kept, symlinks are copied
        as such; sockets are left out, with a notice.  Directories are merged into those that
        are there, anything else replaces what has its name.

        The state is kept until ``remove_state``.  On failure and cancellation nothing is left.

        Raises PathNotFound; FileChanged when a file was written to meanwhile; CopyError,
        UserNotFound, NoSpace, ContainerdError.
        """
        from serpentine.run.files import copy_in

        return await copy_in(
            await self._steps(self._listener(on_event)),
            state,
            source,
            destination,
            owner=owner,
            ignore=ignore,
            ignore_file=ignore_file,
            gitignore=gitignore,
        )

    async def commit(
        self,
        state: ContainerState,
        name: str | Reference,
        *,
        comment: str = "",
        on_event: OnEvent | None = None,
    ) -> ContainerState:
        """Record a state as an image under a name, and return the image's state.

        name: a reference; one that is taken is taken over.  ``images`` shows it, and ``ctr`` and
            ``nerdctl`` in the same namespace can run it.
        comment: for the history in the image's config.

        What changed since the image that the state came from is one layer.  Raises
        InvalidReference, UnsupportedImage if that image was removed, ContainerdError.
        """
        reference = name if isinstance(name, Reference) else Reference.parse(name)
        if reference.digest is not None:
            raise InvalidReference(
                f"{name} names a digest, and that comes of what is committed",
                hint="give a name and a tag",
            )
        from serpentine.pull.commit import commit_image

        return await commit_image(
            self.containerd,
            self.containerd.snapshots(state.snapshotter),
            state,
            reference,
            locks=self._locks,
            on_event=self._listener(on_event),
            comment=comment,
        )

    async def copy_out(
        self,
        state: ContainerState,
        path: str,
        destination: str | os.PathLike[str] | BinaryIO,
        *,
        on_event: OnEvent | None = None,
    ) -> Copied:
        """Copy a file or directory of a state to this machine; return where it is now.

        path: in the state, relative ones from its working directory.  ``DIR/.`` means what is
            in the directory.  Symlinks on the way are followed inside the state; one at the end
            is copied as such, or followed if there is a slash behind it.
        destination: a directory that is there takes it inside; otherwise it gets that name.
            With a slash at its end it is a directory, made if need be.  Or an open file, which
            gets a tar archive.
        on_event: receives the events of this copy, instead of the engine's.

        Modes, times, links and extended attributes are kept, owners and devices if we are root.
        Each file appears whole or not at all, also when the copy fails or is cancelled; the
        error says how many were copied before.  Nothing is written outside of the destination.

        Where neither we nor a shell of ours can look into snapshots (another user than root, a
        containerd on another machine), containerd makes the archive: that takes as long as
        reading the whole image, and extended attributes but capabilities are lost.

        Raises PathNotFound, CopyError, StepError, ContainerdError.
        """
        from serpentine.run.files_out import copy_out

        return await copy_out(await self._steps(self._listener(on_event)), state, path, destination)

    async def find_state(self, key: str) -> ContainerState:
        """Return the state with a snapshot's key, without what else was known of it.

        Environment, command and the like are not in a snapshot: keep the state itself
        (``to_json``) where they count.  Raises NotFound.
        """
        snapshots = await self._snapshots()
        await snapshots.stat(key)
        platform = str((await self.platform()).normalized())
        return ContainerState(snapshot_key=key, snapshotter=snapshots.name, platform=platform)

    async def remove_state(self, state: ContainerState) -> None:
        """Let go of a state that ``run`` made; other states that build on it stay whole.

        Raises NotFound if it is not there, InvalidSetting for the state of an image.
        """
        if not state.snapshot_key.startswith("state-"):
            raise InvalidSetting(
                f"{state.snapshot_key or 'this state'} belongs to an image",
                hint="remove the image",
            )
        snapshots = self.containerd.snapshots(state.snapshotter)
        # Not removed: others may build on it.  Without its root, the collector knows.
        await snapshots.update_labels(state.snapshot_key, {"containerd.io/gc.root": None})
        # And it may have been there first.
        with suppress(FailedPrecondition, NotFound):
            await snapshots.remove(state.snapshot_key)

    async def usage(self) -> Usage:
        """Count what the namespace holds: blobs, snapshots, partial blobs, images, states.

        One call to containerd for each kind, lease and snapshot; no file is read.  Raises
        ContainerdError.
        """
        from serpentine.upkeep.inventory import take_inventory
        from serpentine.upkeep.usage import summarise

        return summarise(await take_inventory(self.containerd))

    async def prune(
        self,
        *,
        unused: bool = False,
        older_than: timedelta | None = None,
        keep_size: int | None = None,
        dry_run: bool = False,
    ) -> PruneResult:
        """Remove what nobody holds, and return what that was.

        By default: what clients left that are gone (their leases, partial blobs and steps), and
        what nothing leads to any more.  Images and states stay.

        unused: also images and states that no container, running client or kept state uses.
        older_than: only what has not changed for so long.  An image changes when a pull finds
            another one, or has to record it anew.
        keep_size: remove the oldest until blobs and snapshots take no more than so many bytes.
        dry_run: only find out.

        What a pull, a step or another client holds by its lease stays, whenever it began.
        Raises InvalidSetting, ContainerdError.
        """
        from serpentine.upkeep.plan import PruneOptions
        from serpentine.upkeep.prune import carry_out, find_out

        options = PruneOptions(unused, older_than, keep_size)
        plan = await find_out(self.containerd, options)
        if dry_run:
            return plan.result()
        if plan.has_steps:
            await self._end_left_steps()
        return await carry_out(self.containerd, plan)

    async def verify(
        self,
        images: Sequence[str] | None = None,
        *,
        repair: bool = False,
        on_event: OnEvent | None = None,
    ) -> VerifyResult:
        """Compare what containerd holds of images with what they should be.

        images: names as ``inspect`` takes them; None means all that are there.
        repair: mend what is damaged.  Blobs are fetched again from the image's registry; in file
            trees, what differs is replaced in place, unless a container runs on them.
        on_event: receives the events of this, instead of the engine's.

        Blobs are read and hashed.  Each layer is unpacked anew, beside its snapshot, and the two
        compared: names, kinds, contents, modes, owners, times, devices; and attributes and hard
        links where we may read containerd's directories.  Nothing is left of that.  It takes as
        long as unpacking the images and reading them twice, and room for one layer; for more of
        them, above one that is damaged.

        Damage is no error but a finding.  Raises NotFound for an image that is not there,
        ContainerdError.
        """
        from serpentine.pull.local import find_record
        from serpentine.upkeep.verify import verify

        tell = self._listener(on_event)
        if images is None:
            records = sorted(await self.containerd.images.all(), key=lambda record: record.name)
        else:
            found = [await find_record(self.containerd, image) for image in images]
            records = list({record.name: record for record in found}.values())
        return await verify(
            self.containerd,
            records,
            snapshotter=await self.snapshotter(),
            repair=repair,
            locks=self._locks,
            on_event=tell,
            repositories=lambda reference: self._repository(reference, tell),
        )

    async def _end_left_steps(self) -> None:
        from serpentine.run.sweep import sweep

        # Where no step can run, none can be ended either: then they stay.
        with suppress(StepError):
            await sweep(await self._steps(self._listener()))

    async def _steps(self, on_event: OnEvent) -> StepContext:
        """Return what steps share; the first one finds out about the daemon's machine."""
        from serpentine._session import current_session
        from serpentine.run.step import StepContext
        from serpentine.run.sweep import sweep

        # Two at once would open two, of which one would never be closed.
        async with self._locks("site"):
            first = self._site is None
            if self._site is None:
                self._site, self._network = await self._find_site()
        assert self._network is not None
        context = StepContext(
            containerd=self.containerd,
            snapshots=await self._snapshots(),
            site=self._site,
            network=self._network,
            platform=await self.platform(),
            session=current_session(),
            on_event=on_event,
        )
        if first:
            await sweep(context)
        return context

    async def _find_site(self) -> tuple[Site, Network]:
        if self.daemon.container is not None:
            return await _contained_site(self.daemon.container, self.daemon.transport)
        found = await asyncio.to_thread(_local_site, self.settings)
        if found is None:
            raise StepError(
                "steps need a containerd in Docker or Podman here", hint="leave out --address"
            )
        return found

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

    async def _can_rebase(self) -> bool:
        """Tell whether a snapshot can get its parent when it is committed; asked once."""
        if self._rebases is None:
            name = await self.snapshotter()
            self._rebases = can_rebase(name, await self.containerd.introspection.capabilities(name))
        return self._rebases

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
                endpoints=self._endpoints(),
                limit_rate=self.settings.limit_rate,
                connections_per_host=self.settings.max_connections,
                credentials=CredentialStore.from_environment(),
                insecure=self.settings.insecure_registries,
                user_agent=_USER_AGENT,
                memory=self._memory_folder,
                # A registry may have to fetch a thing itself before it answers.
                read_timeout=4 * self.settings.stall_timeout,
            )
        return self._registry

    def _endpoints(self) -> Endpoints:
        from serpentine.registry import Endpoints

        return Endpoints(hosts_folders(self.settings), self.settings.mirrors)

    @property
    def _memory_folder(self) -> Path:
        return self.settings.data_dir / "registries"

    def __repr__(self) -> str:
        where = self._daemon.endpoint.address if self._containerd and self._daemon else "closed"
        return f"<Engine {where} namespace={self.settings.namespace}>"


def _only(manifest: str, tell: OnEvent) -> OnEvent:
    """Return what ends a pull that comes to another manifest than the one that is pinned.

    That is known before anything of it is fetched.  The index decides, so only a lock that was
    changed by hand can say something else.
    """

    def watch(event: Event) -> None:
        if isinstance(event, PullResolved) and event.manifest_digest != manifest:
            raise NotPinned(
                f"{event.image} for {event.platform} is {event.manifest_digest}, and the lock says"
                f" {manifest}",
                hint=f"write it anew: serpentine lock --update {event.image}",
            )
        tell(event)

    return watch


def _failure(reference: Reference, error: BaseException, seconds: float) -> PullFailed:
    cancelled = not isinstance(error, Exception)
    return PullFailed(
        image=str(reference),
        error=type(error).__name__,
        reason="" if cancelled else str(error),
        cancelled=cancelled,
        seconds=seconds,
    )


def _nothing_to_do(found: ResolvedImage, state: ContainerState, seconds: float) -> PullFinished:
    layers = len(found.layers)
    return PullFinished(
        image=state.image or "",
        snapshot_key=state.snapshot_key,
        bytes_downloaded=0,
        layers_total=layers,
        layers_reused=layers,
        registry_requests=0,
        seconds=seconds,
    )


def _local_site(settings: Settings) -> tuple[Site, Network] | None:
    found = None
    if sys.platform == "linux":
        from serpentine.run.local import local_site

        found = local_site(settings.run_dir, settings.data_dir)
    return found


async def _contained_site(container: ContainerDaemon, transport: str) -> tuple[Site, Network]:
    from serpentine.daemon.shell import ContainerShell
    from serpentine.run.contained import PipedSite, ShellSite

    shell = ContainerShell(container)
    site: ShellSite = PipedSite(shell)
    if transport == "socket" and sys.platform == "linux":
        from serpentine.run.shared import ContainedFolders

        folder = "steps"
        site = ContainedFolders(
            shell, container.socket_dir / folder, f"{container.socket_dir_inside}/{folder}"
        )
    try:
        return site, await site.begin()
    except BaseException:
        await site.close()
        raise


def _not_open() -> DaemonError:
    return DaemonError(
        "this engine is not open", hint="use it inside 'async with serpentine.connect()'"
    )


def _repository_name(record_name: str) -> str:
    return Reference.parse(record_name).name
