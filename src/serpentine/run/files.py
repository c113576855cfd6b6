"""Files into a state: entries of an archive as a stream, never whole in memory.

Where the site can, they go straight into an active snapshot.  Elsewhere they go as an archive into
containerd's content store and onto the snapshot by its diff service, so that it makes no
difference where containerd is.  Whatever way it ends, mount, blob, ingest, active snapshot and
lease are gone afterwards.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import posixpath
import secrets
import stat
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import BinaryIO, cast

from serpentine._concurrency import shielded, task_group
from serpentine.containerd import ContentWriter, Mount
from serpentine.errors import (
    ContainerdError,
    CopyError,
    NoSpace,
    PathNotFound,
    StepError,
    Unavailable,
    UserNotFound,
)
from serpentine.events import CopyFinished, CopyNotice
from serpentine.model.digest import Digest
from serpentine.model.documents import Descriptor
from serpentine.model.state import ContainerState
from serpentine.run.ignoring import DockerRules, GitRules, Rules
from serpentine.run.packing import Source, as_tar, blocks, entries, entries_again, shown
from serpentine.run.step import (
    CLEANUP_TIMEOUT,
    StepContext,
    check_snapshotter,
    commit,
    discard,
    prepare,
)
from serpentine.run.threads import AHEAD, Interruptible, in_threads
from serpentine.run.users import resolve_user

__all__ = [
    "LAYER",
    "ContentWriter",
    "Given",
    "apply_archive",
    "check_snapshotter",
    "copy_in",
    "entry",
    "merged",
    "noticing",
    "probe",
    "write_small",
]

Given = str | os.PathLike[str]
LAYER = "application/vnd.oci.image.layer.v1.tar"


@dataclass(frozen=True, slots=True)
class _Asked:
    """One thing of this machine that is to be copied."""

    path: str
    name: str
    is_folder: bool
    # Ends with "/.": what is in it is meant.
    contents: bool


async def copy_in(
    context: StepContext,
    state: ContainerState,
    source: Given | Sequence[Given] | BinaryIO,
    destination: str,
    *,
    owner: str | None = None,
    ignore: Sequence[str] = (),
    ignore_file: Given | None = None,
    gitignore: bool = False,
) -> ContainerState:
    """Copy files into a state; see ``Engine.copy_in``."""
    began, since = time.monotonic(), time.time()
    rules = await asyncio.to_thread(_rules, ignore, ignore_file, gitignore=gitignore)
    asked = None
    if not hasattr(source, "read"):
        given = [source] if isinstance(source, str | os.PathLike) else list(source)
        asked = await asyncio.to_thread(_ask, given)
    path, as_folder = _target(state, destination)
    key = f"step-{secrets.token_hex(8)}"
    kept = False
    # Whether there are blobs to collect, which may take as long as all that others left.
    uploads = False
    size = 0
    given_input = None if asked is not None else Interruptible(cast("BinaryIO", source))
    try:
        await prepare(context, state, key)
        mounts = await context.snapshots.mounts(key)
        ids = await _owner(context, mounts, owner)
        # What is there, with links followed inside the snapshot.
        found = await context.site.look(mounts, {f"/{path}": False})
        uploads = found is None
        kind = found[f"/{path}"].kind if found else await probe(context, key, mounts, path)
        if asked is not None:
            sources = _plan(asked, path, kind, as_folder=as_folder, destination=destination)
            notice = noticing(context)
            items = entries(sources, owner=ids, rules=rules, layer=True, notice=notice)
        else:
            if kind not in ("directory", "absent"):
                raise _no_folder(destination)
            stream = cast("BinaryIO", given_input)
            items = entries_again(stream, path, itself=kind == "absent", owner=ids)
        interrupt = given_input.interrupt if given_input is not None else None
        written = await context.site.unpack(mounts, items, since=since, interrupt=interrupt)
        if written is None:
            uploads = True
            blob = await _upload(context, key, blocks(as_tar(items)), interrupt)
            written = blob.size
            await apply_archive(context, key, mounts, blob)
        size = written
        after = await commit(context, state, key, sync=uploads)
        kept = True
    finally:
        if not kept:
            await shielded(discard(context, key, sync=uploads), timeout=CLEANUP_TIMEOUT)
        if given_input is not None:
            given_input.close()
        seconds = time.monotonic() - began
        context.on_event(CopyFinished(size=size, count=0, seconds=seconds, complete=kept))
    return after


def noticing(context: StepContext) -> Callable[[str], None]:
    """Return a function that tells a notice from a thread."""
    loop = asyncio.get_running_loop()

    def notice(text: str) -> None:
        loop.call_soon_threadsafe(context.on_event, CopyNotice(text))

    return notice


# --- what is meant ---------------------------------------------------------------------------


def _rules(
    ignore: Sequence[str], ignore_file: Given | None, *, gitignore: bool
) -> Callable[[str], Rules] | None:
    if gitignore and (ignore or ignore_file is not None):
        raise CopyError(
            "the rules of .gitignore and an ignore file cannot both hold", hint="choose one"
        )
    if gitignore:
        return GitRules.for_folder
    lines = list(ignore)
    if ignore_file is not None:
        try:
            with open(ignore_file, encoding="utf-8", errors="surrogateescape") as file:
                lines = [*file.read().splitlines(), *lines]
        except OSError as error:
            raise CopyError(
                f"cannot read the ignore file {os.fspath(ignore_file)}: {error.strerror}",
                path=os.fspath(ignore_file),
                hint="check its path",
            ) from None
    if not lines:
        return None
    chosen = DockerRules(lines)
    return lambda _: chosen


def _ask(given: Iterable[Given]) -> list[_Asked]:
    found = []
    for one in given:
        # Path objects have dropped a "/." at the end, strings have not.
        path = os.fspath(one)
        last = os.path.basename(path.rstrip("/" + os.sep))
        try:
            status = os.stat(path) if path.endswith(("/", os.sep)) else os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            raise PathNotFound(
                f"there is no {shown(path) or 'file without a name'}",
                path=path,
                hint="check the path",
            ) from None
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise CopyError(f"cannot read {shown(path)}: {why}", path=path) from None
        contents = last in ("", ".", "..")
        found.append(_Asked(path, last, stat.S_ISDIR(status.st_mode), contents))
    if not found:
        raise CopyError("nothing was given to copy", hint="name a file or a directory")
    return found


def _target(state: ContainerState, destination: str) -> tuple[str, bool]:
    """Return the destination without a leading slash, and whether it means a directory."""
    if not destination or "\0" in destination:
        raise CopyError("the destination has no name", hint="give a path in the image")
    whole = posixpath.normpath(posixpath.join("/", state.working_dir, destination))
    return whole.lstrip("/"), destination.endswith(("/", "/.", "/..")) or destination in (".", "..")


def _plan(
    asked: Sequence[_Asked], path: str, kind: str, *, as_folder: bool, destination: str
) -> list[Source]:
    """Decide the names in the archive, as ``cp -r`` and ``docker cp`` do.

    kind: what is at the destination: ``directory``, ``file``, ``other``, ``absent``.
    """
    several = len(asked) > 1
    if kind not in ("directory", "absent") and (
        several or as_folder or asked[0].is_folder or asked[0].contents
    ):
        raise _no_folder(destination)
    plan = []
    for one in asked:
        inside = f"{path}/{one.name}" if path else one.name
        if one.contents:
            # A directory that is not there becomes one like the source.
            plan.append(Source(one.path, path, itself=kind == "absent" and not several))
        elif kind == "directory" or several or (as_folder and not one.is_folder):
            plan.append(Source(one.path, inside))
        else:
            plan.append(Source(one.path, path))
    return plan


def _no_folder(destination: str) -> CopyError:
    return CopyError(
        f"{destination} is there and is no directory",
        path=destination,
        hint="choose another destination",
    )


async def _owner(
    context: StepContext, mounts: Sequence[Mount], owner: str | None
) -> tuple[int, int] | None:
    if owner is None:
        return None
    name, colon, group = owner.partition(":")
    passwd = groups = None
    if not (name.isdigit() and (group.isdigit() or not colon)):
        found = await context.site.look(mounts, {"/etc/passwd": True, "/etc/group": True})
        if found is None:
            raise UserNotFound(
                f"cannot look up the owner {owner!r}: this containerd's files are not ours to read",
                hint="give user and group as numbers, or run as root",
            )
        passwd, groups = found["/etc/passwd"].data, found["/etc/group"].data
    user = resolve_user(owner, passwd, groups)
    # As Docker has it: a number alone is that of the group, too.
    return user.uid, (user.uid if name.isdigit() and not colon else user.gid)


# --- the daemon's side -----------------------------------------------------------------------


def merged(mounts: Sequence[Mount]) -> list[Mount]:
    """Return mounts that make containerd unpack onto the whole file system.

    For an overlay alone it takes a short cut: it writes into the topmost directory without
    mounting anything.  Then it does not see the symlinks of the layers below, and makes a
    directory ``data`` in the place of a link ``data`` that leads somewhere (seen with 1.6 and
    2.3).  An empty file system below, of which nothing can be seen, keeps it from that; it
    costs 2 ms.
    """
    if len(mounts) == 1 and mounts[0].type == "overlay":
        return [Mount("tmpfs", "tmpfs"), *mounts]
    return list(mounts)


async def probe(
    context: StepContext, key: str, mounts: Sequence[Mount], path: str, *, follow: bool = True
) -> str:
    """Find out what is at a path where we cannot look: let containerd link to it.

    It refuses to link to a directory, and to what is not there, and says which.  With ``follow``
    a link at the end counts as what it leads to.
    """
    name = f".serpentine-{secrets.token_hex(8)}"
    link, gone = entry(name, link=f"{path}/." if follow else path), entry(f".wh.{name}")
    data = link + gone + bytes(1024)
    blob = await write_small(context, key, data)
    try:
        await context.containerd.diff.apply(blob, merged(mounts), lease=key)
    except (NoSpace, Unavailable):
        raise
    except ContainerdError as error:
        text = str(error)
        if "operation not permitted" in text:
            return "directory"
        if "no such file" in text:
            return "absent"
        return "other"
    return "file"


def entry(name: str, *, link: str = "") -> bytes:
    """Return an archive's header for an empty file or a hard link."""
    import tarfile

    info = tarfile.TarInfo(name)
    if link:
        info.type, info.linkname = tarfile.LNKTYPE, link
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


async def write_small(context: StepContext, key: str, data: bytes) -> Descriptor:
    """Write an archive of a few headers into the content store, held by the lease ``key``."""
    data += _unlike_any()
    digest = Digest.parse(f"sha256:{hashlib.sha256(data).hexdigest()}")
    ref = f"copy-{secrets.token_hex(8)}"
    await context.containerd.content.write_blob(data, digest, ref=ref, labels={}, lease=key)
    return Descriptor(media_type=LAYER, digest=digest, size=len(data))


def _unlike_any() -> bytes:
    """Return what follows the end of an archive, where nobody reads on.

    Two copies of the same files would be one blob, which could be collected with the one's lease
    before the other's holds it.
    """
    return secrets.token_bytes(16).ljust(512, b"\0")


async def _upload(
    context: StepContext,
    key: str,
    archive: Generator[bytes, None, None],
    interrupt: Callable[[], None] | None,
) -> Descriptor:
    """Write an archive into the content store, held by the lease ``key``."""
    queue: asyncio.Queue[bytes | None] = asyncio.Queue(AHEAD)
    seen = hashlib.sha256()

    def hashed() -> Generator[bytes, None, None]:
        for block in archive:
            seen.update(block)
            yield block
        last = _unlike_any()
        seen.update(last)
        yield last

    async def read() -> None:
        async with aclosing(in_threads(hashed(), interrupt)) as found:
            async for block in found:
                await queue.put(block)
        await queue.put(None)

    ref = f"copy-{secrets.token_hex(8)}"
    async with task_group() as group:
        group.create_task(read())
        async with context.containerd.content.writer(ref, lease=key) as writer:
            while (block := await queue.get()) is not None:
                await writer.write(block)
            digest = Digest.parse(f"sha256:{seen.hexdigest()}")
            await writer.commit(expected=digest)
            size = writer.offset
    return Descriptor(media_type=LAYER, digest=digest, size=size)


async def apply_archive(
    context: StepContext, key: str, mounts: Sequence[Mount], blob: Descriptor
) -> None:
    """Unpack an archive onto an active snapshot as a whole, with links on the way followed."""
    try:
        applied = await context.containerd.diff.apply(blob, merged(mounts), lease=key)
    except (NoSpace, Unavailable):
        raise
    except ContainerdError as error:
        raise CopyError(
            f"containerd could not unpack the files: {error}", hint="check the destination"
        ) from error
    if applied.digest != blob.digest:
        raise StepError(
            f"containerd unpacked {applied.digest} where {blob.digest} was sent",
            hint="look at containerd's log and its disk",
        )
