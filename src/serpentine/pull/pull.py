"""The whole pull, in the order of the seed's sequence."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING

import msgspec

from serpentine._concurrency import KeyedLock, task_group
from serpentine.containerd import Containerd, Snapshots
from serpentine.errors import LayerError, UnsupportedImage
from serpentine.events import (
    OnEvent,
    PullFinished,
    PullPlanned,
    PullResolved,
    PullStarted,
)
from serpentine.model.digest import ChainID, Digest
from serpentine.model.documents import Descriptor, Layer
from serpentine.model.platform import Platform
from serpentine.model.state import ContainerState
from serpentine.pull.leases import forget_earlier, leased
from serpentine.pull.plan import (
    Plan,
    beside_downloads,
    download_order,
    make_plan,
    unpacks_for,
    worth_a_look,
)
from serpentine.pull.record import is_recorded, record_image
from serpentine.pull.resolve import ResolvedImage, resolve

# What fetches and unpacks is imported where there is something to fetch or unpack.
if TYPE_CHECKING:
    from serpentine.pull.job import Job
    from serpentine.pull.space import Need
    from serpentine.registry import Repository

__all__ = ["PullOptions", "pull", "state_of"]


class PullOptions(msgspec.Struct, frozen=True):
    """How to pull.

    max_concurrent_downloads: at once, parts of large ones included; None for as many as bring more.
    max_concurrent_unpacks: at once, if ``can_rebase``, which is asked when it matters, says that
        containerd can put a layer onto the one below after it was applied; None for as many as the
        processors of this machine make worth while.
    stall_timeout: seconds without a byte after which a download is continued anew.
    sync_fs: whether what was unpacked is on the disk before it counts.
    check_space: is told what will be needed before the first byte of a layer comes, and raises
        NoSpace if that cannot fit.
    """

    platform: Platform
    max_concurrent_downloads: int | None = None
    max_concurrent_unpacks: int | None = None
    can_rebase: Callable[[], Awaitable[bool]] | None = None
    stall_timeout: float = 8.0
    sync_fs: bool = True
    check_space: Callable[[Need], Awaitable[None]] | None = None


async def pull(
    repository: Repository,
    containerd: Containerd,
    snapshots: Snapshots,
    options: PullOptions,
    *,
    locks: KeyedLock,
    on_event: OnEvent,
) -> ContainerState:
    """Bring the image that ``repository.reference`` names into containerd, and unpack it.

    Layers whose snapshot is there are neither downloaded nor applied.  What was written before a
    failure or a cancellation is kept for a day, under a lease, and the next pull of the image
    goes on from there.  If nothing was, nothing is left.

    Raises RegistryError, ImageError and ContainerdError families.
    """
    started = time.monotonic()
    reference = repository.reference
    name = str(reference)
    on_event(PullStarted(image=name))
    image, documents = await resolve(repository, containerd.content, options.platform)
    platform = str(image.image_config.platform.normalized())
    on_event(
        PullResolved(
            image=name,
            platform=platform,
            manifest_digest=str(image.manifest.digest),
            index_digest=image.index_digest,
        )
    )
    downloaded, reused = 0, len(image.layers)
    if await is_recorded(containerd, snapshots.name, name, image):
        everything = {layer.chain_id for layer in image.layers}
        plan = make_plan(image.layers, everything)
        on_event(PullPlanned(image=name, layers=plan.for_display()))
    else:
        from serpentine.pull.job import Job, Statistics
        from serpentine.pull.lines import Lines

        statistics = Statistics(layers_total=len(image.layers), layers_reused=reused)
        job: Job | None = None

        def keep(error: BaseException) -> bool:
            return job is not None and _worth_keeping(job, error)

        async with leased(containerd, name, platform=platform, keep=keep) as lease:
            job = Job(
                reference=reference,
                repository=repository,
                containerd=containerd,
                snapshots=snapshots,
                lease=lease,
                locks=locks,
                on_event=on_event,
                lines=Lines(options.max_concurrent_downloads),
                stall_timeout=options.stall_timeout,
                sync_fs=options.sync_fs,
                statistics=statistics,
            )
            await _fetch_and_unpack(job, image, options)
        downloaded, reused = statistics.bytes_downloaded, statistics.layers_reused
    await forget_earlier(containerd, name, platform)
    state = state_of(image, reference.name, snapshots.name)
    on_event(
        PullFinished(
            image=state.image or name,
            snapshot_key=state.snapshot_key,
            bytes_downloaded=downloaded + documents.fetched,
            layers_total=len(image.layers),
            layers_reused=reused,
            registry_requests=repository.requests,
            seconds=time.monotonic() - started,
        )
    )
    return state


def state_of(image: ResolvedImage, repository_name: str, snapshotter: str) -> ContainerState:
    """Return the state of an image that is unpacked."""
    return ContainerState.from_config(
        image.image_config,
        snapshot_key=str(image.layers[-1].chain_id) if image.layers else "",
        snapshotter=snapshotter,
        image=f"{repository_name}@{image.manifest.digest}",
        manifest_digest=str(image.manifest.digest),
        index_digest=image.index_digest,
        config_digest=str(image.config.digest),
    )


def _worth_keeping(job: Job, error: BaseException) -> bool:
    """Tell whether the next attempt can go on with what this one wrote."""
    if isinstance(error, LayerError | UnsupportedImage):
        return False  # it would end in the same way
    return bool(job.begun)


async def _fetch_and_unpack(job: Job, image: ResolvedImage, options: PullOptions) -> None:
    from serpentine.pull.fetch import fetch_blob
    from serpentine.pull.scan import can_look
    from serpentine.pull.space import need_of
    from serpentine.pull.unpack import Several

    present, plain = await _present(job, image.layers)
    plan = make_plan(image.layers, present)
    job.on_event(PullPlanned(image=job.image, layers=plan.for_display()))
    if options.check_space is not None and plan.unpack:
        there = await _bytes_there(job, plan.fetch)
        await options.check_space(need_of(plan.fetch, plan.unpack, there))
    at_once = await _at_once(options, plan) if plain else 1
    order: Iterable[Descriptor] = plan.fetch
    if at_once > 1:
        sizes = [layer.descriptor.size for layer in plan.unpack]
        look = [
            place
            for place in worth_a_look(sizes, min(at_once, _processors()))
            if can_look(plan.unpack[place].descriptor.media_type)
        ]
        job.looked_at.update(plan.unpack[place].descriptor.digest for place in look)
        order = plan.in_order(download_order(sizes, look))
        at_once = at_once if look else 1
    at_first = at_once
    if options.max_concurrent_unpacks is None:
        at_first = beside_downloads(at_once, _processors())
    first = len(plan.layers) - len(plan.unpack)
    several = Several(job, first, plain=plain, at_once=at_once, at_first=at_first)
    arrived = {blob.digest: asyncio.Event() for blob in plan.fetch}
    downloaded: set[Digest] = set()

    async def fetch(blob: Descriptor) -> None:
        async with job.lines.one(blob.size) as line:
            if await fetch_blob(job, blob, plan.places(blob.digest), line):
                downloaded.add(blob.digest)
        arrived[blob.digest].set()
        if all(event.is_set() for event in arrived.values()):
            several.all_here()

    async with task_group() as group:
        for blob in order:
            group.create_task(fetch(blob), name=f"fetch {blob.digest}")
        for place, layer in enumerate(plan.unpack, first):
            here = arrived[layer.descriptor.digest]
            group.create_task(several.unpack(layer, place, here), name=f"unpack {place}")
    job.statistics.layers_reused = sum(
        layer.descriptor.digest not in downloaded for layer in plan.layers
    )
    await record_image(job, image, plan.top)


async def _bytes_there(job: Job, blobs: Iterable[Descriptor]) -> dict[Digest, int]:
    """Return how much of each blob is there, complete or begun."""
    from serpentine.pull.fetch import blob_ref

    sizes = {blob.digest: blob.size for blob in blobs}
    if not sizes:
        return {}
    refs = {blob_ref(digest): digest for digest in sizes}
    begun = await job.containerd.content.list_statuses()
    found = {refs[status.ref]: status.offset for status in begun if status.ref in refs}
    whole = await job.containerd.content.all([f'digest=="{digest}"' for digest in sizes])
    return found | {info.digest: info.size for info in whole}


async def _present(job: Job, layers: tuple[Layer, ...]) -> tuple[set[ChainID], bool]:
    """Find the highest snapshot that is there, and hold it by the lease.

    Also tells whether its root directory is known to be as containerd makes it.
    """
    from serpentine.pull.unpack import is_plain, lease_snapshot

    for layer in reversed(layers):
        found = await lease_snapshot(job, layer.chain_id)
        if found is not None:
            return {layer.chain_id}, is_plain(found)
    return set(), True


def _processors() -> int:
    """Return how many processors we may use: containerd, mostly on this machine, has them, too."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


async def _at_once(options: PullOptions, plan: Plan) -> int:
    """Return how many layers may be unpacked at once; containerd is asked if it matters."""
    sizes = [layer.descriptor.size for layer in plan.unpack]
    wanted = options.max_concurrent_unpacks or unpacks_for(sizes, _processors())
    most = min(wanted, len(sizes))
    if most < 2 or options.can_rebase is None or not await options.can_rebase():
        return 1
    return most
