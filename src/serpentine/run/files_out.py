"""Files out of a state: an archive of one path, from whoever can read it, onto our disk.

Where we can look into snapshots, they are read as they are.  Elsewhere containerd itself makes
the archive, as the difference between two snapshots: the state without that path, and with it.
"""

from __future__ import annotations

import os
import posixpath
import secrets
import tarfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from typing import BinaryIO, cast

from serpentine._concurrency import shielded
from serpentine.containerd import Mount
from serpentine.errors import ContainerdError, CopyError, NotFound, PathNotFound, StepError
from serpentine.events import CopyFinished
from serpentine.model.state import ContainerState
from serpentine.run.files import (
    LAYER,
    Given,
    apply_archive,
    check_snapshotter,
    entry,
    noticing,
    probe,
    write_small,
)
from serpentine.run.packing import BLOCK, Items, StrictTar, again, as_tar, blocks, open_tar
from serpentine.run.step import (
    CLEANUP_TIMEOUT,
    LABEL_SESSION,
    LABEL_STEP,
    LEASE_EXPIRES,
    StepContext,
    discard,
)
from serpentine.run.threads import Pieces, consume
from serpentine.run.unpacking import Copied, unpack

__all__ = ["copy_out"]

# What makes of containerd's archive the one that was asked for.
_Change = Callable[[BinaryIO], Items]
# Before all names that anybody would choose, so that the archive begins with it.
_MARK = "\x01\x01\x01serpentine-"


async def copy_out(
    context: StepContext, state: ContainerState, path: str, destination: Given | BinaryIO
) -> Copied:
    """Copy files out of a state; see ``Engine.copy_out``."""
    began = time.monotonic()
    where, name = _meant(state, path)
    key = f"step-{secrets.token_hex(8)}"
    notice = noticing(context)
    copied: Copied | None = None
    size = count = 0

    def counting(done: int) -> None:
        nonlocal count
        count = done

    async def counted(archive: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
        nonlocal size
        async for block in archive:
            size += len(block)
            yield block

    async def take(archive: AsyncIterator[bytes], change: _Change | None = None) -> Copied:
        def work(stream: BinaryIO) -> Copied:
            if change is not None:
                stream = cast("BinaryIO", Pieces(blocks(as_tar(change(stream)))))
            if isinstance(destination, str | os.PathLike):
                return unpack(stream, name, os.fspath(destination), notice=notice, count=counting)
            return _pour(stream, destination)

        # A write into a pipe may last for ever, and leaves nothing to clean up.
        wait = isinstance(destination, str | os.PathLike)
        async with aclosing(counted(archive)) as blocks_read:
            return await consume(blocks_read, work, wait=wait)

    try:
        async with (
            _view(context, state, key) as mounts,
            context.site.pack(mounts, where, name, notice) as archive,
        ):
            if archive is not None:
                copied = await take(archive)
        if copied is None:
            async with _difference(context, state, where, name) as (archive, change):
                copied = await take(archive, change)
    finally:
        seconds = time.monotonic() - began
        done = copied is not None
        context.on_event(CopyFinished(size=size, count=count, seconds=seconds, complete=done))
    return copied


def _meant(state: ContainerState, path: str) -> tuple[str, str]:
    """Return the absolute path, with a slash at its end if it must be a directory, and its name.

    The name is "" if the contents are meant: for a last "." and for the root.
    """
    if not path or "\0" in path:
        raise CopyError("the path has no name", hint="give a path in the image")
    whole = posixpath.normpath(posixpath.join("/", state.working_dir, path))
    whole = "/" + whole.lstrip("/")
    last = path.rpartition("/")[2]
    if whole == "/" or last in (".", ".."):
        return f"{whole.rstrip('/')}/", ""
    return whole + "/" * (last == ""), posixpath.basename(whole)


@asynccontextmanager
async def _view(
    context: StepContext, state: ContainerState, key: str
) -> AsyncIterator[list[Mount]]:
    check_snapshotter(state, context)
    labels = {LABEL_STEP: key, LABEL_SESSION: context.session}
    try:
        await context.containerd.leases.create(key, expires=LEASE_EXPIRES, labels=labels)
        parent = state.snapshot_key
        try:
            yield await context.snapshots.view(key, parent, labels=labels, lease=key)
        except NotFound as error:
            raise StepError(
                f"the snapshot of this state is not there: {parent}",
                hint="pull its image again, or run the steps again that made it",
            ) from error
    finally:
        await shielded(discard(context, key), timeout=CLEANUP_TIMEOUT)


@asynccontextmanager
async def _difference(
    context: StepContext, state: ContainerState, where: str, name: str
) -> AsyncIterator[tuple[AsyncIterator[bytes], _Change]]:
    """Let containerd archive a path: it is what a snapshot without it lacks.

    A mark beside it tells where it really is when links lead to it.  Extended attributes are
    lost, but for capabilities, and so are parts of seconds; and containerd compares all files
    whose times have no nanoseconds byte by byte, so it takes as long as reading the whole image.
    """
    key = f"step-{secrets.token_hex(8)}"
    labels = {LABEL_STEP: key, LABEL_SESSION: context.session}
    without, marked = f"{key}-without", f"{key}-marked"
    mark = f"{_MARK}{secrets.token_hex(8)}"
    path = where.strip("/")
    if where.endswith("/"):
        # A directory, perhaps by a link: all that is in it.
        above, gone = path, ".wh..wh..opq"
    else:
        above, _, last = path.rpartition("/")
        gone = f".wh.{last}"
    diff, snapshots = context.containerd.diff, context.snapshots
    try:
        await context.containerd.leases.create(key, expires=LEASE_EXPIRES, labels=labels)
        mounts = [
            await snapshots.prepare(snapshot, state.snapshot_key, labels=labels, lease=key)
            for snapshot in (without, marked)
        ]
        kind = await probe(context, key, mounts[0], path, follow=where.endswith("/"))
        there = ("directory",) if where.endswith("/") else ("directory", "file")
        if kind not in there:
            raise PathNotFound(f"there is no {where} in the state", path=where, hint="check it")
        prefix = f"{above}/" if above else ""
        for made, what in zip(mounts, (gone, mark), strict=True):
            data = entry(f"{prefix}{what}") + bytes(1024)
            await apply_archive(context, key, made, await write_small(context, key, data))
        blob = await diff.diff(
            *mounts, media_type=LAYER, ref=f"copy-{secrets.token_hex(8)}", lease=key
        )

        def change(stream: BinaryIO) -> Items:
            return _relocated(stream, mark, name, contents=where.endswith("/"))

        async with aclosing(context.containerd.content.read(blob.digest)) as archive:
            yield archive, change
    finally:
        await shielded(_discard(context, key, without, marked), timeout=CLEANUP_TIMEOUT)


async def _discard(context: StepContext, lease: str, *names: str) -> None:
    for snapshot in names:
        with suppress(ContainerdError):
            await context.snapshots.remove(snapshot)
    with suppress(ContainerdError):
        await context.containerd.leases.delete(lease, sync=True)


def _relocated(stream: BinaryIO, mark: str, name: str, *, contents: bool) -> Items:
    """Yield what the mark says was asked for, named from there on."""
    # Directories on the way to the mark, of which one may be what was asked for.
    way: dict[str, tarfile.TarInfo] = {}
    base: str | None = None
    with open_tar(stream) as archive:
        for member in archive.one_by_one():
            path = member.name.strip("/")
            above, _, last = path.rpartition("/")
            if last == mark:
                base = above if contents else f"{above}/{name}".lstrip("/")
                if contents:
                    yield from _root(archive, way.get(base), name)
            elif base is None:
                way[path] = member
            elif path == base or path.startswith(f"{base}/" if base else ""):
                link = member.linkname
                if member.islnk():
                    link = _under(link.strip("/"), base, name)
                yield from again(archive, member, _under(path, base, name), link)


def _root(archive: StrictTar, found: tarfile.TarInfo | None, name: str) -> Items:
    if found is None:
        found = tarfile.TarInfo()
        found.type, found.mode = tarfile.DIRTYPE, 0o755
    yield from again(archive, found, name or ".", "")


def _under(path: str, base: str, name: str) -> str:
    below = path[len(base) :].strip("/")
    return "/".join(part for part in (name, below) if part) or "."


def _pour(stream: BinaryIO, destination: BinaryIO) -> Copied:
    try:
        while data := stream.read(BLOCK):
            destination.write(data)
        destination.flush()
    except BrokenPipeError:
        raise  # whoever read it has gone; the command line knows what that means
    except OSError as error:
        raise CopyError(f"cannot write the archive: {error.strerror}") from None
    return Copied("-", 0)
