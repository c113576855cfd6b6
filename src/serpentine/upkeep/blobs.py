"""Blobs, read back and hashed; and fetched again where they are damaged."""

from __future__ import annotations

import time
from contextlib import aclosing
from dataclasses import dataclass, field

from serpentine.containerd import Resource
from serpentine.errors import ContainerdError, NotFound, SerpentineError, Unavailable
from serpentine.events import VerifyProgress
from serpentine.model.documents import Descriptor
from serpentine.pull.fetch import fetch_blob
from serpentine.upkeep.found import Finding
from serpentine.upkeep.inventory import references
from serpentine.upkeep.prune import collect
from serpentine.upkeep.work import Work

__all__ = ["Checked", "check_blob", "fetch_again"]

# Documents are kept when they are read, for what they lead to; larger ones are none that we made.
MAX_DOCUMENT = 8 << 20
REPORT_EVERY = 0.1


@dataclass(slots=True)
class Checked:
    """A blob as it was found: ``problem`` is empty for a whole one; ``data`` of a document.

    is_there: whether containerd knows it at all.
    """

    is_there: bool = True
    problem: str = ""
    data: bytes | None = None
    size: int = 0
    labels: dict[str, str] = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        """Whether it is there, and what it should be."""
        return self.is_there and not self.problem


async def check_blob(work: Work, blob: Descriptor, *, keep: bool) -> Checked:
    """Read a blob as containerd has it, and compare size and digest; memory does not grow."""
    content = work.containerd.content
    try:
        info = await content.info(blob.digest)
    except NotFound:
        return Checked(is_there=False)
    found = Checked(labels=dict(info.labels))
    hasher = blob.digest.hasher()
    parts: list[bytes] = []
    told = 0.0
    try:
        async with aclosing(content.read(blob.digest)) as pieces:
            async for piece in pieces:
                hasher.update(piece)
                found.size += len(piece)
                if keep and found.size <= MAX_DOCUMENT:
                    parts.append(piece)
                if (now := time.monotonic()) - told >= REPORT_EVERY:
                    told = now
                    work.on_event(_progress(blob, found.size))
    except Unavailable:
        raise
    except ContainerdError as error:
        found.problem = f"cannot be read: {error}"
        return found
    work.on_event(_progress(blob, found.size))
    if hasher.hexdigest() != blob.digest.hex:
        found.problem = "its bytes have another digest"
        if found.size != info.size:
            found.problem = f"{found.size} bytes are left of {info.size}"
    elif keep and found.size <= MAX_DOCUMENT:
        found.data = b"".join(parts)
    return found


def _progress(blob: Descriptor, offset: int) -> VerifyProgress:
    size = max(offset, blob.size)
    return VerifyProgress(what="blob", digest=str(blob.digest), offset=offset, size=size)


async def fetch_again(work: Work, blob: Descriptor, kind: str, before: Checked) -> str:
    """Fetch a blob that is damaged or missing; return why that is not possible, or nothing.

    kind: ``manifests`` or ``blobs``, as in the registry's paths; ``layers`` for large ones.
    """
    content, lease = work.containerd.content, work.lease
    try:
        repository = work.repository()
        data = None
        # Thrown away there only once it is here, or can be had.
        if kind != "layers":
            data = await repository.fetch_document(blob, kind)
        else:
            async with repository.open_blob(blob, offset=0):
                pass
        if before.is_there:
            # Its labels hold others, which the lease does until they are back.
            for held_kind, name in references(before.labels):
                if held_kind == "images":
                    continue  # they hold themselves
                await work.containerd.leases.add_resource(lease, Resource(name, held_kind))
            await content.delete(blob.digest)
            # The file goes with the collector; until then, a writer is told that it is there.
            await collect(work.containerd)
        if data is not None:
            ref = f"{kind}-{blob.digest}"
            await content.write_blob(data, blob.digest, ref=ref, labels=before.labels, lease=lease)
        else:
            await fetch_blob(work.job(), blob, ())
            await content.update_labels(blob.digest, before.labels)
    except Unavailable:
        raise
    except SerpentineError as error:
        return f"{error}; {error.hint}".rstrip("; ")
    if not (again := await check_blob(work, blob, keep=False)).is_whole:
        return (
            f"fetched again, it is as before ({again.problem or 'not there'}): another namespace"
            " holds it; repair it there"
        )
    return ""


def finding(image: str, blob: Descriptor, checked: Checked, what: str, reason: str) -> Finding:
    """Return what is to be told of a blob that is not whole."""
    problem = checked.problem if checked.is_there else "is not there"
    return Finding(
        image=image,
        kind="blob",
        name=str(blob.digest),
        problem=f"{what}: {problem}",
        reason=reason,
    )
