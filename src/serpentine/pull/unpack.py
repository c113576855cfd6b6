"""One layer onto its parent: prepare, apply, compare the diff ID, commit under the chain ID.

Or, where containerd can do that, several at once, each applied before its parent is there, and
committed onto it in their order.  The outcome is the same, entry by entry.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from serpentine._concurrency import shielded, unbroken
from serpentine.containerd import Mount, Resource, SnapshotInfo
from serpentine.errors import (
    AlreadyExists,
    ContainerdError,
    DiffIDMismatch,
    LayerError,
    Locked,
    NoSpace,
    NotFound,
    Unavailable,
)
from serpentine.events import LayerStatus
from serpentine.model.digest import ChainID, Digest
from serpentine.model.documents import Descriptor, Layer
from serpentine.pull.job import Job
from serpentine.pull.plan import Ready, apply_next

__all__ = ["LABEL_ROOT", "Several", "is_plain", "lease_snapshot", "unpack_layer"]

# containerd's name for "decompress whatever the first bytes show, plain tar included".  Layers
# are often labelled wrongly, every other engine looks at the bytes, and the diff ID proves the
# outcome in any case (trap 23).
DETECT_COMPRESSION = "application/vnd.docker.image.rootfs.diff.tar"

UNPACK_LOCK_WAIT = 1800.0
CLEANUP_TIMEOUT = 30.0

# How far above the highest layer that is done another one may be begun: each holds a lock, which
# is a stream of its own.  Of a chain only the next one is, so that it is ready for its turn.
LOOK_AHEAD = 32
NEXT = 2

# On snapshots whose root directory is containerd's own, with its mode and owner: those that were
# made of nothing but layers, as containerd passes over what a layer says of its root.  What was
# committed by others, or is the state after a step, may have another one, and a snapshot on top of
# it gets its owner.
LABEL_ROOT = "io.serpentine/root"
_PLAIN = "0:0"


async def unpack_layer(
    job: Job,
    layer: Layer,
    place: int,
    *,
    plain: bool = False,
    several: Several | None = None,
    lock_wait: float | None = None,
) -> bool:
    """Make the committed snapshot that ``layer.chain_id`` names, unless it is there by now.

    The parent's snapshot and the layer's blob must be there; with ``several``, the blob.  The work
    is done once, however many pulls want it: in this process by a lock of ours, between processes
    by an ingest that is held open and never written, which containerd frees even when its holder
    is killed.  Who holds one waits for layers below it only, so that nobody waits for himself.

    plain: whether the parent's root directory is known to be as containerd makes it.  Returns
    whether the layer's is.  Raises Locked when another process holds the lock for longer than
    ``lock_wait`` seconds, half an hour by default.
    """
    name = f"unpack-{job.snapshots.name}-{layer.chain_id}"
    wait = UNPACK_LOCK_WAIT if lock_wait is None else lock_wait
    async with (
        job.locks(("unpack", job.containerd.namespace, name)),
        job.containerd.content.lock(name, lease=job.lease, wait=wait),
    ):
        found = await lease_snapshot(job, layer.chain_id)
        if found is not None:
            plain = is_plain(found)
            if several is not None:
                several.done(place, plain=plain)
        elif several is not None:
            plain = await several.make(layer, place)
        else:
            plain, made = await _unpack(job, layer, place, plain=plain)
            if made:
                await _label_blob(job, layer)
    job.report((place,), layer.descriptor, LayerStatus.DONE, layer.descriptor.size)
    return plain


async def lease_snapshot(job: Job, chain_id: ChainID) -> SnapshotInfo | None:
    """Hold a committed snapshot by the pull's lease; None if it is not there.

    Holding is a transaction with a sync to disk, looking is not: so look first, and look again
    once it is held, for it could have been collected in between.
    """
    if await _stat(job, chain_id) is None:
        return None
    resource = Resource(id=str(chain_id), type=f"snapshots/{job.snapshots.name}")
    await job.containerd.leases.add_resource(job.lease, resource)
    return await _stat(job, chain_id)


async def _stat(job: Job, chain_id: ChainID) -> SnapshotInfo | None:
    try:
        return await job.snapshots.stat(str(chain_id))
    except NotFound:
        return None


def is_plain(snapshot: SnapshotInfo) -> bool:
    """Tell whether a snapshot's root directory is known to be as containerd makes it."""
    return snapshot.labels.get(LABEL_ROOT) == _PLAIN


class Several:
    """The layers of one pull that are to be unpacked.

    first: the place of the lowest one, on which a parent may be that is there; plain: whether that
    one's root directory is known.  at_once: how many may be applied at once; with 1, each waits
    for the one below it, and only what goes before and after that is done beside it.  at_first: how
    many until ``all_here``, if fewer.
    """

    def __init__(
        self, job: Job, first: int, *, plain: bool, at_once: int, at_first: int | None = None
    ) -> None:
        self._job = job
        self._first = first
        self._free = at_once if at_first is None else at_first
        self._free_later = at_once - self._free
        self._look_ahead = LOOK_AHEAD if at_once > 1 else NEXT
        self._waiting: dict[int, tuple[Ready, asyncio.Event]] = {}
        # Whether the root directories are known: of those that are committed, and of the parent.
        self._plain: dict[int, bool] = {}
        self._is_done: defaultdict[int, asyncio.Event] = defaultdict(asyncio.Event)
        self.done(first - 1, plain=plain)

    async def unpack(self, layer: Layer, place: int, arrived: asyncio.Event) -> None:
        """Unpack a layer when its blob is there, and commit it when its parent is."""
        await arrived.wait()
        await self._is_done[max(place - self._look_ahead, self._first - 1)].wait()
        if place - 1 not in self._plain:
            try:
                await unpack_layer(self._job, layer, place, several=self, lock_wait=0.0)
            except Locked:
                # Another process has it, and may wait for the layers below for as long as they take
                # to come.  So do we, and only then for what it does.
                await self._is_done[place - 1].wait()
            else:
                return
        await unpack_layer(self._job, layer, place, several=self)

    def all_here(self) -> None:
        """Let more be applied at once: no blob is still to come."""
        self._free += self._free_later
        self._free_later = 0
        self._look()

    def done(self, place: int, *, plain: bool) -> None:
        """Let the next ones go on: this one is committed."""
        self._plain[place] = plain
        self._is_done[place].set()
        self._look()

    async def make(self, layer: Layer, place: int) -> bool:
        """Make a layer's snapshot, which we hold the lock of; return whether its root is plain."""
        outcome = None
        if layer.descriptor.digest in self._job.standalone:
            outcome = await self._alone(layer, place)
        if outcome is None:
            async with self._turn(Ready(place, alone=False)):
                outcome = await _unpack(self._job, layer, place, plain=self._plain[place - 1])
        plain, made = outcome
        self.done(place, plain=plain)
        if made:
            await _label_blob(self._job, layer)
        return plain

    async def _alone(self, layer: Layer, place: int) -> tuple[bool, bool] | None:
        """Apply a layer to nothing, commit it onto its parent; None if it needs the parent first.

        A layer that does not unpack like this is applied to its parent, whose error counts.
        """
        job, parent = self._job, str(layer.parent)
        key, labels = _names(layer, plain=True)
        try:
            async with self._turn(Ready(place, alone=True)):
                if place - 1 in self._plain:
                    return None  # nothing to gain: the usual way is free
                job.report((place,), layer.descriptor, LayerStatus.APPLYING, layer.descriptor.size)
                try:
                    # Unbroken: a removal could overtake a request that nobody waits for any more.
                    mounts = await unbroken(
                        job.snapshots.prepare(key, labels=labels, lease=job.lease),
                        patience=CLEANUP_TIMEOUT,
                    )
                except AlreadyExists:
                    return await _made_by_others(job, layer), False
                upper = _as_upper(mounts)
                diff_id = None if upper is None else await _try_apply(job, layer, upper)
            if diff_id is None:
                await _discard(job, key)
                return None
            _compare(job, layer, diff_id)
            await self._is_done[place - 1].wait()
            if not self._plain[place - 1]:
                # Somebody else has made it meanwhile, and it may have another root directory.
                await _discard(job, key)
                return None
            await unbroken(_commit_onto(job, layer, key, parent, labels), patience=CLEANUP_TIMEOUT)
        except AlreadyExists:
            await _discard(job, key)  # trap 20: the active snapshot stays when the name is taken
            return await _made_by_others(job, layer), False
        except BaseException:
            # The request may have been carried out although we never saw the answer.
            await _give_up(job, key)
            raise
        return True, True

    @asynccontextmanager
    async def _turn(self, ready: Ready) -> AsyncIterator[None]:
        """Be one of those that are applied, once it is this layer's turn."""
        go = asyncio.Event()
        self._waiting[ready.place] = ready, go
        self._look()
        try:
            await go.wait()
            yield
        finally:
            if self._waiting.pop(ready.place, None) is None:
                self._free += 1
            self._look()

    def _look(self) -> None:
        """Let those go on whose turn it is."""
        waiting = [ready for ready, _ in self._waiting.values()]
        for place in apply_next(waiting, self._plain, self._free):
            self._free -= 1
            self._waiting.pop(place)[1].set()


def _names(layer: Layer, *, plain: bool) -> tuple[str, dict[str, str]]:
    """Return the key and the labels of a layer's active snapshot; the key is never used again."""
    labels = {"containerd.io/snapshot.ref": str(layer.chain_id)}
    if plain:
        labels[LABEL_ROOT] = _PLAIN
    return f"extract-{secrets.token_hex(8)} {layer.chain_id}", labels


def _as_upper(mounts: list[Mount]) -> list[Mount] | None:
    """Return mounts by which containerd writes what it is to write into an overlay's directory.

    That is how it applies a layer with a parent: a whiteout becomes the overlay's.  To a bind mount
    it would apply it by removing what is not there.  Nothing is mounted for it.  None for what
    is not the one directory that the overlay snapshotter makes.
    """
    if len(mounts) != 1 or mounts[0].type != "bind" or not mounts[0].source:
        return None
    return [Mount("overlay", "overlay", options=(f"upperdir={mounts[0].source}",))]


async def _try_apply(job: Job, layer: Layer, mounts: list[Mount]) -> Digest | None:
    """Apply a layer; None if it does not unpack like this."""
    try:
        return await _apply(job, layer, mounts)
    except LayerError:
        # In a user namespace, early 2.2 and 2.3 say that they can and cannot.  If it is the layer,
        # its parent is no help, and the error is raised then.
        return None


async def _commit_onto(
    job: Job, layer: Layer, key: str, parent: str, labels: dict[str, str]
) -> None:
    await job.snapshots.commit(
        str(layer.chain_id), key, parent=parent, labels=labels, lease=job.lease
    )
    found = await job.snapshots.stat(str(layer.chain_id))
    if found.parent != parent:
        await _discard(job, str(layer.chain_id))
        raise ContainerdError(
            f"containerd has put layer {layer.descriptor.digest} onto"
            f" {found.parent or 'nothing'} instead of {parent}",
            hint="set SERPENTINE_MAX_UNPACKS=1",
        )


async def _made_by_others(job: Job, layer: Layer) -> bool:
    """Hold what is there, and return whether its root is plain; raises NotFound if it is not."""
    found = await lease_snapshot(job, layer.chain_id)
    if found is None:
        raise NotFound(
            f"{job.image}: the snapshot of layer {layer.descriptor.digest} was removed while it"
            " was looked for",
            hint="pull again",
        )
    return is_plain(found)


async def _unpack(job: Job, layer: Layer, place: int, *, plain: bool) -> tuple[bool, bool]:
    """Apply a layer to its parent; return whether its root is plain, and whether we made it."""
    job.report((place,), layer.descriptor, LayerStatus.APPLYING, layer.descriptor.size)
    key, labels = _names(layer, plain=plain)
    parent = str(layer.parent) if layer.parent else ""
    try:
        # Unbroken: a removal could overtake a request that nobody waits for any more.
        mounts = await unbroken(
            job.snapshots.prepare(key, parent, labels=labels, lease=job.lease),
            patience=CLEANUP_TIMEOUT,
        )
    except AlreadyExists:
        # Either the target is there (a client that ignores our lock, a lazy snapshotter), or
        # our key, which is random: only the first is possible, and stat proves it (trap 19).
        return await _made_by_others(job, layer), False
    except BaseException:
        # The request may have been carried out although we never saw the answer.
        await _give_up(job, key)
        raise
    try:
        _compare(job, layer, await _apply(job, layer, mounts))
        await job.snapshots.commit(str(layer.chain_id), key, labels=labels, lease=job.lease)
    except AlreadyExists:
        await _discard(job, key)  # trap 20: the active snapshot stays when the name is taken
        return await _made_by_others(job, layer), False
    except BaseException:
        await _give_up(job, key)
        raise
    return plain, True


def _compare(job: Job, layer: Layer, diff_id: Digest) -> None:
    if str(diff_id) != str(layer.diff_id):
        raise DiffIDMismatch(
            f"{job.image}: layer {layer.descriptor.digest} unpacks to {diff_id}, and the"
            f" config says {layer.diff_id}",
            image=job.image,
            digest=str(layer.descriptor.digest),
            hint="the image has to be built and pushed again",
        )


async def _label_blob(job: Job, layer: Layer) -> None:
    await job.containerd.content.update_labels(
        layer.descriptor.digest, {"containerd.io/uncompressed": str(layer.diff_id)}
    )


async def _apply(job: Job, layer: Layer, mounts: list[Mount]) -> Digest:
    blob = Descriptor(
        media_type=DETECT_COMPRESSION,
        digest=layer.descriptor.digest,
        size=layer.descriptor.size,
    )
    try:
        applied = await job.containerd.diff.apply(
            blob, mounts, sync_fs=job.sync_fs, lease=job.lease
        )
    except (NoSpace, Unavailable):
        raise
    except ContainerdError as error:
        raise LayerError(
            f"{job.image}: layer {layer.descriptor.digest} does not unpack: {error}",
            image=job.image,
            digest=str(layer.descriptor.digest),
            hint="if pulling again does not help, the image has to be pushed again",
        ) from error
    return applied.digest


async def _give_up(job: Job, key: str) -> None:
    """Discard it; a containerd that stands still does not hide the error that is on its way."""
    with suppress(TimeoutError):
        await shielded(_discard(job, key), timeout=CLEANUP_TIMEOUT)


async def _discard(job: Job, key: str) -> None:
    try:
        await job.snapshots.remove(key)
    except NotFound:
        pass
    except ContainerdError:
        # Its lease goes with the pull, and the collector takes the snapshot then.
        pass
