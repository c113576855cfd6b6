"""One blob: ask containerd, stream what is missing from the registry, commit."""

from __future__ import annotations

import asyncio
import time

from serpentine.containerd import PATIENCE, ContentWriter
from serpentine.errors import (
    AlreadyExists,
    DigestMismatch,
    FailedPrecondition,
    Locked,
    TransferError,
    UnsupportedImage,
)
from serpentine.events import LayerStatus, Retrying
from serpentine.model.documents import Descriptor
from serpentine.pull.job import Job

__all__ = ["fetch_blob", "source_labels"]

# A broken body is continued where it broke.  What is limited is not the number of tries, but
# those in a row that brought nothing.
MAX_TRIES_WITHOUT_PROGRESS = 4
RETRY_DELAYS = (0.1, 0.5, 2.0, 5.0)

# Another client writes the same blob: wait for it as long as it moves.
HOLDER_STALLED_AFTER = 60.0

# Events are for eyes and logs; one per chunk would cost more than it tells.
REPORT_EVERY = 0.1


async def fetch_blob(job: Job, blob: Descriptor, places: tuple[int, ...]) -> bool:
    """Bring a blob into containerd's content store; tell whether anything was downloaded.

    The ingest's name is the one that containerd's own clients use, so that they and we wait
    for each other instead of downloading twice.
    """
    async with job.locks(("blob", job.containerd.namespace, blob.digest)):
        waiting = _Waiting()
        while True:
            try:
                return await _fetch_once(job, blob, places)
            except Locked:
                await waiting.pause(job, blob, places)


async def _fetch_once(job: Job, blob: Descriptor, places: tuple[int, ...]) -> bool:
    try:
        async with job.containerd.content.writer(
            f"layer-{blob.digest}", total=blob.size, expected=blob.digest, lease=job.lease
        ) as writer:
            # What an earlier attempt left; or all of it, when another namespace has the blob: then
            # the commit alone makes it visible in ours (trap 9).
            before = writer.offset
            if before > blob.size:
                await writer.reset()
                before = 0
            await _stream(job, blob, places, writer)
            job.statistics.bytes_downloaded += writer.offset - before
            try:
                await writer.commit(source_labels(job))
            except FailedPrecondition as error:
                raise _Mismatch(resumed=before > 0) from error
            return writer.offset > before
    except AlreadyExists:
        job.report(places, blob, LayerStatus.DOWNLOADED, blob.size)
        return False
    except _Mismatch as mismatch:
        if mismatch.resumed:
            # The bytes that somebody left may have been the wrong ones (trap 6): the writer
            # has thrown them away, so begin at the beginning, once.
            return await _fetch_once(job, blob, places)
        if blob.digest.algorithm != "sha256" and "sha256:" in str(mismatch.__cause__):
            raise UnsupportedImage(
                f"{job.image}: layer {blob.digest.algorithm}:{blob.digest.short}… is named by"
                f" {blob.digest.algorithm}, and this containerd knows sha256 only",
                image=job.image,
                hint="use containerd 2 or newer",
            ) from mismatch.__cause__
        raise DigestMismatch(
            f"{job.image}: what {job.reference.registry} serves as layer {blob.digest} has"
            " another digest",
            image=job.image,
            hint="pull again; if it stays, the image has to be pushed again",
        ) from mismatch.__cause__


class _Mismatch(Exception):
    def __init__(self, *, resumed: bool) -> None:
        super().__init__()
        self.resumed = resumed


async def _stream(
    job: Job, blob: Descriptor, places: tuple[int, ...], writer: ContentWriter
) -> None:
    job.report(places, blob, LayerStatus.DOWNLOADING, writer.offset)
    failures = 0
    reported = time.monotonic()
    while writer.offset < blob.size:
        start = writer.offset
        try:
            async with job.repository.open_blob(blob, offset=start) as body:
                async for chunk in body:
                    await writer.write(chunk)
                    now = time.monotonic()
                    if now - reported >= REPORT_EVERY:
                        reported = now
                        job.report(places, blob, LayerStatus.DOWNLOADING, writer.offset)
        except TransferError as error:
            failures = 1 if writer.offset > start else failures + 1
            if failures >= MAX_TRIES_WITHOUT_PROGRESS:
                raise
            delay = RETRY_DELAYS[failures - 1]
            job.on_event(Retrying(what=f"layer {blob.digest}", reason=str(error), delay=delay))
            await asyncio.sleep(delay)
    job.report(places, blob, LayerStatus.DOWNLOADED, blob.size)


def source_labels(job: Job) -> dict[str, str]:
    """Return the label by which containerd's clients find a blob's source again."""
    # Per registry one label; containerd's clients gather several repositories in it, which
    # can outgrow the limit of 4096 (trap 15): one is enough to find the blob again.
    key = f"containerd.io/distribution.source.{job.reference.registry}"
    return {key: job.reference.repository}


class _Waiting:
    """Waits for the client that writes a blob, as long as its offset moves."""

    def __init__(self) -> None:
        self._offset = -1
        self._moved = time.monotonic()
        self._tries = 0

    async def pause(self, job: Job, blob: Descriptor, places: tuple[int, ...]) -> None:
        """Return when it is worth another try."""
        job.report(places, blob, LayerStatus.WAITING, max(self._offset, 0))
        content = job.containerd.content
        patience = PATIENCE[min(self._tries, len(PATIENCE) - 1)]
        self._tries += 1
        status = await content.wait_released(f"layer-{blob.digest}", patience=patience)
        if status is None or status.offset != self._offset:
            self._offset, self._moved = status.offset if status else -1, time.monotonic()
        elif time.monotonic() - self._moved > HOLDER_STALLED_AFTER:
            raise Locked(
                f"another client has been holding layer {blob.digest} for"
                f" {HOLDER_STALLED_AFTER:.0f} seconds and does not get on",
                hint="end that client, or restart containerd",
            )
