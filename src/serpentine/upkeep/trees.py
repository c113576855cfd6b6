"""The file trees of layers, each compared with its blob unpacked anew; and mended in place.

containerd unpacks the blob beside the snapshot, on the same parent, as a pull would.  The two
directories that are then to be equal are a layer's own ones: what is below it does not count, and
is not read.  Where they lie on our file system, and we may read them, we compare them ourselves,
with all that a file system knows of a file.  Elsewhere containerd's diff service does, which mounts
the two alone; it does not look at extended attributes, at which names are one file, and takes two
files of one size and one time for equal when that time has nanoseconds.

What is mended is mended by containerd as well: it unpacks onto whatever mounts it is given, also
onto a committed snapshot's directory.
"""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from tarfile import CHRTYPE, LNKTYPE, REGTYPE, TarInfo

import msgspec

from serpentine.containerd import Mount, Resource, TaskStatus
from serpentine.errors import ContainerdError, NotFound, Unavailable
from serpentine.events import VerifyProgress
from serpentine.model.digest import Digest
from serpentine.model.documents import Descriptor, Layer
from serpentine.pull.unpack import DETECT_COMPRESSION
from serpentine.upkeep.archive import CLEAR, Entries, read_entries
from serpentine.upkeep.found import Difference, Finding
from serpentine.upkeep.work import Work

__all__ = ["TreeChecker", "own_directory"]

# What is told of a tree; how many there are is counted on, up to the second.
MOST_TOLD = 100
MOST_COUNTED = 100_000
_TAR = "application/vnd.oci.image.layer.v1.tar"
_RUNNING = (TaskStatus.CREATED, TaskStatus.RUNNING, TaskStatus.PAUSED, TaskStatus.PAUSING)


def own_directory(mounts: Sequence[Mount]) -> str:
    """Return a snapshot's own directory on containerd's machine; empty if it has none.

    Of a view that is the topmost of the lower ones; of an active snapshot the one to write to.
    """
    if len(mounts) != 1:
        return ""
    (mount,) = mounts
    if mount.type == "bind":
        return mount.source
    if mount.type != "overlay":
        return ""
    options = dict(option.partition("=")[::2] for option in mount.options)
    return options.get("upperdir") or options.get("lowerdir", "").partition(":")[0]


def in_place(fresh: Mount, directory: str) -> Mount:
    """Return the mount of a fresh snapshot with another directory to write to."""
    if fresh.type == "bind":
        return _bind(directory, "rw")
    options = tuple(
        f"upperdir={directory}" if option.startswith("upperdir=") else option
        for option in fresh.options
    )
    return msgspec.structs.replace(fresh, options=options)


def _bind(directory: str, mode: str) -> Mount:
    return Mount("bind", directory, options=("rbind", mode))


@dataclass(frozen=True, slots=True)
class _Pair:
    """A layer's two directories: as it should be, and as it is; and the mount of the first."""

    fresh: Mount
    should: str
    found: str
    since: float


@dataclass(frozen=True, slots=True)
class _Compared:
    """What two directories differ in; ``exact`` if nothing escapes who compared them."""

    differences: tuple[Difference, ...]
    count: int
    exact: bool


class TreeChecker:
    """Checks the layers of one image, bottom first.

    is_damaged: whether the layer that was checked last is, and stays so.

    Where a layer is damaged and stays so, the ones above are compared with what is unpacked on a
    whole one: what they inherit (the modes of directories that they do not name) would be wrong.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self._key = f"verify-{secrets.token_hex(8)}"
        self._made: list[str] = []
        # What the next layer is unpacked on, and whether that is a copy of ours.
        self._parent = ""
        self._beside = False
        self.is_damaged = False

    async def close(self) -> None:
        """Remove what was made; the lease takes what cannot be removed yet."""
        for key in reversed(self._made):
            with suppress(ContainerdError):
                await self._work.snapshots.remove(key)
        self._made.clear()

    def skip(self, layer: Layer) -> None:
        """Go on above a layer that is whole, or that cannot be checked."""
        if not self._beside:
            self._parent = str(layer.chain_id)

    @property
    def is_beside(self) -> bool:
        """Whether layers are unpacked on copies, because one of those below is damaged."""
        return self._beside

    async def check(self, layer: Layer) -> None:
        """Compare a layer's snapshot with its blob, which is there and whole; note a finding."""
        work = self._work
        work.on_event(_progress(layer, 0))
        self.is_damaged = False
        async with self._pair(layer) as pair:
            if pair is None:
                work.unchecked.append(
                    f"{work.image}: the tree of {layer.chain_id}: the snapshotter"
                    f" {work.snapshots.name} keeps no directories"
                )
            else:
                compared = await self._compare(pair)
                if compared.count:
                    finding = await self._judge(layer, pair, compared)
                    work.findings.append(finding)
                    self.is_damaged = not finding.repaired
                    self._beside = self._beside or self.is_damaged
                if self._beside:
                    await self._keep()
        self.skip(layer)
        work.on_event(_progress(layer, layer.descriptor.size))

    @asynccontextmanager
    async def _pair(self, layer: Layer) -> AsyncIterator[_Pair | None]:
        snapshots, lease = self._work.snapshots, self._work.lease
        self._active = f"{self._key}-{len(self._made)}"
        view = f"{self._active}-view"
        self._made += [self._active, view]
        there = own_directory(await snapshots.view(view, str(layer.chain_id), lease=lease))
        since = time.time()
        mounts = await snapshots.prepare(self._active, self._parent, lease=lease)
        here = own_directory(mounts)
        if not here or not there:
            yield None
        else:
            await self._apply(layer.descriptor, mounts[0])
            yield _Pair(mounts[0], here, there, since)
        for name in (view, self._active):
            with suppress(NotFound):
                await snapshots.remove(name)

    async def _keep(self) -> None:
        """Keep what was unpacked, for the next layer to be unpacked on."""
        name = f"{self._active}-whole"
        self._made.append(name)
        await self._work.snapshots.commit(name, self._active, lease=self._work.lease)
        self._parent = name

    async def _apply(self, blob: Descriptor, mount: Mount, *, repair: bool = False) -> None:
        """Unpack a blob; what is a repair is on the disk before it counts as one."""
        as_any_tar = Descriptor(media_type=DETECT_COMPRESSION, digest=blob.digest, size=blob.size)
        lease = self._work.lease
        await self._work.containerd.diff.apply(as_any_tar, [mount], sync_fs=repair, lease=lease)

    async def _compare(self, pair: _Pair) -> _Compared:
        if sys.platform == "linux":
            from serpentine.upkeep.compare import compare_here

            here = await compare_here(pair.should, pair.found, pair.since, MOST_TOLD)
            if here is not None:
                return _Compared(tuple(here[0]), here[1], exact=True)
        return await self._compare_there(pair)

    async def _compare_there(self, pair: _Pair) -> _Compared:
        """Let containerd compare, both ways: what one lacks, the other adds."""
        should, found = _bind(pair.should, "ro"), _bind(pair.found, "ro")
        mending = await self._difference(found, should)
        damage = await self._difference(should, found)
        what: dict[str, tuple[str, ...]] = {}
        what |= dict.fromkeys(mending.removed, ("added",))
        what |= dict.fromkeys(damage.removed, ("missing",))
        for path in {*mending.headers, *damage.headers} - set(what):
            one, other = mending.headers.get(path), damage.headers.get(path)
            if one is None or other is None:
                # Below a directory that is missing or was added.
                if not _is_below(path, what):
                    what[path] = ("missing",) if other is None else ("added",)
            elif changed := _changes(one, other):
                what[path] = changed
        told = sorted(path for path in what if not _is_below(path, what))
        first = tuple(Difference(path, what[path]) for path in told[:MOST_TOLD])
        return _Compared(first, len(told), exact=False)

    async def _difference(self, lower: Mount, upper: Mount) -> Entries:
        blob = await self._archive(lower, upper)
        async with aclosing(self._work.containerd.content.read(blob.digest)) as pieces:
            return await read_entries(pieces, MOST_COUNTED)

    async def _archive(self, lower: Mount, upper: Mount) -> Descriptor:
        """Write what has to be unpacked on one directory for it to be like the other."""
        containerd, lease = self._work.containerd, self._work.lease
        ref = f"{self._active}-{secrets.token_hex(4)}"
        blob = await containerd.diff.diff([lower], [upper], media_type=_TAR, ref=ref, lease=lease)
        # One that was there before, like that of no difference, is not in our lease.
        await containerd.leases.add_resource(lease, Resource(str(blob.digest), "content"))
        return blob

    async def _judge(self, layer: Layer, pair: _Pair, compared: _Compared) -> Finding:
        """Return what was found, mended if that was asked for."""
        finding = Finding(
            image=self._work.image,
            kind="tree",
            name=str(layer.chain_id),
            problem=f"the tree of layer {layer.descriptor.digest} is not what was unpacked",
            differences=compared.differences,
            count=compared.count,
        )
        if not self._work.repair:
            return finding
        if self._beside:
            return replace(finding, reason="a layer below it is damaged, and stays so")
        used = await self._used_by(str(layer.chain_id))
        if used:
            return replace(
                finding, reason=f"in use: container {used} runs on it; end it, and verify again"
            )
        reason = await self._mend(layer, pair, exact=compared.exact)
        return replace(finding, repaired=not reason, reason=reason)

    async def _used_by(self, key: str) -> str:
        """Return a container that runs on a snapshot; what it has mounted must not change."""
        containerd = self._work.containerd
        running = {t.id for t in await containerd.tasks.all() if t.status in _RUNNING}
        if not running:
            return ""
        parents = {info.name: info.parent for info in await self._work.snapshots.all()}
        for container in await containerd.containers.all():
            here = container.snapshot_key
            if container.id not in running or container.snapshotter != self._work.snapshots.name:
                continue
            while here:
                if here == key:
                    return container.id
                here = parents.get(here, "")
        return ""

    async def _mend(self, layer: Layer, pair: _Pair, *, exact: bool) -> str:
        """Make the directory what it should be; return why that did not work, or nothing."""
        work, there = self._work, _bind(pair.found, "rw")
        work.on_event(VerifyProgress("repair", str(layer.chain_id), 0, layer.descriptor.size))
        if exact and await self._mend_what_differs(pair, there):
            return ""
        try:
            digest = Digest.of(CLEAR)
            await work.containerd.content.write_blob(
                CLEAR, digest, ref=f"clear-{digest}", labels={}, lease=work.lease
            )
            clear = Descriptor(media_type=_TAR, digest=digest, size=len(CLEAR))
            await self._apply(clear, there, repair=True)
            await self._apply(layer.descriptor, in_place(pair.fresh, pair.found), repair=True)
        except Unavailable:
            raise
        except ContainerdError as error:
            return str(error)
        again = await self._compare(pair)
        if again.count:
            first = again.differences[0]
            return f"unpacked again, {first.path} is still another ({', '.join(first.what)})"
        return ""

    async def _mend_what_differs(self, pair: _Pair, there: Mount) -> bool:
        """Try to change no more than what differs; tell whether that was enough.

        containerd's comparison leaves out some things (a file's attributes, that a directory
        hides what is below it): only who sees all can tell.
        """
        try:
            blob = await self._archive(_bind(pair.found, "ro"), _bind(pair.should, "ro"))
            await self._apply(blob, there, repair=True)
            return not (await self._compare(pair)).count
        except Unavailable:
            raise
        except ContainerdError:
            return False


def _is_below(path: str, others: Collection[str]) -> bool:
    while path := path.rpartition("/")[0]:
        if path in others:
            return True
    return False


def _changes(should: TarInfo, found: TarInfo) -> tuple[str, ...]:
    """Return what two headers of one path differ in; the same directory may be in both."""
    if should.type == found.type == CHRTYPE and not should.devmajor and not should.devminor:
        # A whiteout, whose time is that of its making; any other device is none.
        return () if not found.devmajor and not found.devminor else ("device",)
    if should.type != found.type:
        if {should.type, found.type} <= {REGTYPE, LNKTYPE}:
            return ("links",)
        return ("kind",)
    what = []
    if should.size != found.size:
        what.append("size")
    if not should.issym() and should.mode != found.mode:
        what.append("mode")
    if (should.uid, should.gid) != (found.uid, found.gid):
        what.append("owner")
    if not should.isdir() and should.mtime != found.mtime:
        what.append("time")
    if should.linkname != found.linkname:
        what.append("target")
    if (should.devmajor, should.devminor) != (found.devmajor, found.devminor):
        what.append("device")
    if not what and should.isreg():
        what.append("content")
    return tuple(what)


def _progress(layer: Layer, offset: int) -> VerifyProgress:
    return VerifyProgress("tree", str(layer.chain_id), offset, layer.descriptor.size)
