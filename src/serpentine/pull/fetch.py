"""One blob: ask containerd, stream what is missing from the registry, commit."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field

from serpentine._concurrency import task_group
from serpentine.containerd import PATIENCE, ContentWriter
from serpentine.errors import (
    AlreadyExists,
    DigestMismatch,
    FailedPrecondition,
    Locked,
    NoSuchRange,
    RateLimited,
    RegistryError,
    SizeMismatch,
    TransferError,
    Unavailable,
    UnsupportedImage,
)
from serpentine.events import LayerStatus, Received, Retrying
from serpentine.model.digest import Digest
from serpentine.model.documents import Descriptor
from serpentine.pull.job import Job
from serpentine.pull.lines import Line
from serpentine.pull.parts import PART, PARTS_AHEAD, Part, Parts
from serpentine.pull.processors import Processors
from serpentine.pull.scan import ALONE_BY, LABEL_ALONE, LayerScan

__all__ = ["blob_ref", "fetch_blob", "source_labels"]

# A broken body is continued where it broke.  What is limited is not the number of tries, but
# those in a row that brought next to nothing.
RETRY_DELAYS = (0.1, 0.5, 1.0, 2.0, 5.0)
PROGRESS = 64 * 1024
# What was on its way to a blob that was held, and still comes after its connection has broken.
HELD_PROGRESS = 8 << 20
# A registry that begins again at 0 whenever it should continue is put up with after so many tries.
BEGINS_AGAIN_AFTER = 2
MAX_SKIPPED = 1 << 20
# Seconds spent waiting for bytes after which a download is compared with the others.
WINDOW = 5.0
# How often a blob is begun anew for being far behind: if that does not help, it is its way, and it
# gets on all the same.
SLOW_TRIES = 3

# Less than this, in bytes and in seconds, is not worth being asked for in parts.
PARTS_FROM = 16 << 20
PARTS_SECONDS = 1.5
# Measured: 0.75 to 0.95 over a link of 10 or 50 MB/s; on loopback anything.
PARTS_IDLE = 0.6
# Measured: 0.53 and 0.66 for one layer over a link, up to 0.05 on loopback.
PROCESSORS_IDLE = 0.25
# So many broken parts, and a blob is no more asked for in parts.
PARTS_BROKEN = 3

# Another client writes the same blob: wait for it as long as it moves.
HOLDER_STALLED_AFTER = 60.0

# Events are for eyes and logs; one per chunk would cost more than it tells.
REPORT_EVERY = 0.1


def blob_ref(digest: Digest) -> str:
    """Return the name of a blob's ingest: the one that containerd's own clients use."""
    return f"layer-{digest}"


async def fetch_blob(
    job: Job, blob: Descriptor, places: tuple[int, ...], line: Line | None = None
) -> bool:
    """Bring a blob into containerd's content store; tell whether anything was downloaded.

    line: the connection to use, where others are used beside it.

    Who else wants it waits for us, and we for them, instead of downloading it twice.
    """
    async with job.locks(("blob", job.containerd.namespace, blob.digest)):
        waiting = _Waiting()
        way = _Way(line or Line(job.lines, blob.size))
        while True:
            try:
                return await _fetch_once(job, blob, places, way)
            except Locked:
                await waiting.pause(job, blob, places)
            except Unavailable:
                # Over TCP, gRPC's Python forgets why a stream ended if we wrote to it before it
                # knew: a full disk looks like this, too.  Once more, with an answer before each
                # next message.
                if way.careful:
                    raise
                way.careful = True


@dataclass(slots=True)
class _Way:
    """What is known of the way of a blob's bytes, over several attempts.

    asked: endpoints that have sent some of this attempt's; avoid: those that had better not again.
    suspected: mirrors that had a part in something with another digest.
    slow: how often it was begun anew for being far behind the others.
    careful: the write stream broke, and we would like to know why.
    served: the endpoint that served last.  broken: how many parts did not come.
    line: its connection among those of the pull.
    """

    line: Line
    asked: set[str] = field(default_factory=set)
    avoid: set[str] = field(default_factory=set)
    suspected: set[str] = field(default_factory=set)
    slow: int = 0
    careful: bool = False
    served: str = ""
    broken: int = 0


async def _fetch_once(job: Job, blob: Descriptor, places: tuple[int, ...], way: _Way) -> bool:
    way.asked.clear()
    try:
        async with job.containerd.content.writer(
            blob_ref(blob.digest),
            total=blob.size,
            expected=blob.digest,
            lease=job.lease,
            careful=way.careful,
        ) as writer:
            # What an earlier attempt left; or all of it, when another namespace has the blob: then
            # the commit alone makes it visible in ours (trap 9).
            before = writer.offset
            if before > blob.size:
                await writer.reset()
                before = 0
            # Of what came in two attempts we saw only the second part.
            scan = LayerScan() if blob.digest in job.looked_at and not before else None
            try:
                await _stream(job, blob, places, writer, way, scan)
                job.statistics.bytes_downloaded += writer.offset - before
                try:
                    await writer.commit(source_labels(job))
                except FailedPrecondition as error:
                    job.begun.discard(blob.digest)
                    raise _Mismatch(resumed=before > 0) from error
                if scan is not None and await scan.alone():
                    job.standalone.add(blob.digest)
                    labels = {LABEL_ALONE: ALONE_BY}
                    await job.containerd.content.update_labels(blob.digest, labels)
            finally:
                if scan is not None:
                    scan.stop()
            return writer.offset > before
    except AlreadyExists:
        if blob.digest in job.looked_at:
            found = await job.containerd.content.info(blob.digest)
            if found.labels.get(LABEL_ALONE) == ALONE_BY:
                job.standalone.add(blob.digest)
        job.report(places, blob, LayerStatus.DOWNLOADED, blob.size)
        return False
    except _Mismatch as mismatch:
        if mismatch.resumed:
            # The bytes that somebody left may have been the wrong ones (trap 6): the writer
            # has thrown them away, so begin at the beginning, once.
            return await _fetch_once(job, blob, places, way)
        mirrors = {h for h in way.asked if job.repository and job.repository.is_mirror(h)}
        if not mirrors <= way.suspected:
            # One of them may serve something else: the registry itself is asked instead.  That one
            # of them is avoided for what it did before does not mean that its bytes are gone.
            way.suspected |= mirrors
            way.avoid |= mirrors
            return await _fetch_once(job, blob, places, way)
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
    job: Job,
    blob: Descriptor,
    places: tuple[int, ...],
    writer: ContentWriter,
    way: _Way,
    scan: LayerScan | None,
) -> None:
    """Write what is missing, over as many requests as it takes; one write stream for all."""
    job.report(places, blob, LayerStatus.DOWNLOADING, writer.offset)
    job.statistics.bytes_resumed += writer.offset
    way.line.left = blob.size - writer.offset
    failures = 0
    while writer.offset < blob.size:
        start = writer.offset
        # Once it is clear that it cannot be had otherwise, all of it comes again.
        skipped = blob.size if failures >= BEGINS_AGAIN_AFTER else MAX_SKIPPED
        try:
            if await _download(job, blob, places, writer, way, scan, most_skipped=skipped):
                await _download_in_parts(job, blob, places, writer, way, scan)
        except TransferError as error:
            # A registry may be silent for longer than containerd has been gone.
            await writer.check()
            held_at, way.line.held_at = way.line.held_at, None
            if held_at is not None and held_at - way.line.left < HELD_PROGRESS:
                continue  # whoever gives up one who does not read is not to blame
            if error.endpoint and job.repository is not None:
                way.avoid.add(error.endpoint)
                await job.repository.failed(error.endpoint, str(error))
            failures = 1 if writer.offset - start >= PROGRESS else failures + 1
            if failures > len(RETRY_DELAYS):
                raise _stopped(job, blob, writer.offset, error) from error
            delay = RETRY_DELAYS[failures - 1] * random.uniform(0.5, 1.5)  # noqa: S311
            job.on_event(Retrying(what=f"layer {blob.digest}", reason=str(error), delay=delay))
            await asyncio.sleep(delay)
        except RegistryError as error:
            raise error.during(f"layer {blob.digest}, at byte {writer.offset}") from error.__cause__
    way.line.done()
    job.report(places, blob, LayerStatus.DOWNLOADED, blob.size)


async def _download(
    job: Job,
    blob: Descriptor,
    places: tuple[int, ...],
    writer: ContentWriter,
    way: _Way,
    scan: LayerScan | None,
    *,
    most_skipped: int,
) -> bool:
    """Pass on what one request brings, until its end, or until it is no use any more.

    Returns whether the rest may come faster in parts.  Raises TransferError for a body that breaks
    off, stalls, or falls far behind the others.
    """
    assert job.repository is not None  # what was made here is not fetched
    now = asyncio.get_running_loop().time
    stream = object()
    start = writer.offset
    began = reported = now()
    # Bytes, and the seconds that we waited for them: what containerd takes does not count.
    size = since = 0
    waited = idle = 0.0
    processors = Processors()
    host = endpoint = ""
    try:
        async with job.repository.open_blob(
            blob, offset=start, most_skipped=most_skipped, avoid=way.avoid
        ) as body:
            host, endpoint = body.host, body.endpoint
            way.asked.add(endpoint)
            way.served = endpoint
            way.line.patient = body.ranges and not blob.urls
            asked = now()
            async with asyncio.timeout(job.stall_timeout) as limit:
                async for chunk in body:
                    limit.reschedule(None)
                    came = now()
                    waited += came - asked
                    idle += came - asked
                    size += len(chunk)
                    since += len(chunk)
                    way.line.came(len(chunk))
                    await _pass_on(job, blob, writer, scan, chunk)
                    asked = now()
                    if held := await way.line.turn():
                        asked = reported = now()
                        since, idle = 0, 0.0
                        began += held
                    if asked - reported >= REPORT_EVERY:
                        job.report(places, blob, LayerStatus.DOWNLOADING, writer.offset)
                        rate = since / (asked - reported)
                        job.speeds.note(stream, rate)
                        idle /= asked - reported
                        await processors.look(asked)
                        if (
                            body.ranges
                            and way.broken < PARTS_BROKEN
                            and _parts_pay(job, blob, writer, rate, idle, processors.idle or 0.0)
                        ):
                            return True
                        reported, since, idle = asked, 0, 0.0
                    if waited >= WINDOW:
                        compare = way.slow < SLOW_TRIES
                        if job.speeds.too_slow(stream, size / waited, compare=compare):
                            way.slow += 1
                            raise TransferError(
                                f"{host} sends {size / waited:.0f} bytes a second", host=host
                            )
                        size, waited = 0, 0.0
                    limit.reschedule(asked + job.stall_timeout)
    except TimeoutError as error:
        silent = TransferError(
            f"{host} has sent nothing for {job.stall_timeout:g} seconds", host=host
        )
        silent.endpoint = endpoint
        raise silent from error
    except TransferError as error:
        error.endpoint = endpoint
        raise
    except SizeMismatch as error:
        if not job.repository.is_mirror(endpoint):
            raise
        # It serves something else; the registry may have the right one.
        wrong = TransferError(str(error), host=host)
        wrong.endpoint = endpoint
        raise wrong from error
    finally:
        way.line.patient = False
        job.speeds.forget(stream)
        _tell(job, blob, host, start, writer.offset - start, now() - began)
    return False


async def _pass_on(
    job: Job, blob: Descriptor, writer: ContentWriter, scan: LayerScan | None, chunk: bytes
) -> None:
    assert job.repository is not None
    if chunk:  # what is passed over comes as nothing
        await writer.write(chunk)
        job.begun.add(blob.digest)
    if scan is not None:
        await scan.feed(chunk)
    await job.repository.throttle.take(len(chunk))


def _parts_pay(
    job: Job, blob: Descriptor, writer: ContentWriter, rate: float, idle: float, processors: float
) -> bool:
    """Tell whether what is left may come faster in parts.

    rate: bytes a second, lately; idle: the part of that time in which we waited for the registry
    and not for containerd, which other connections would not make faster; processors: the part of
    the machine's that did nothing, without which they would have nothing to bring more with.
    """
    left = blob.size - writer.offset
    if blob.urls or left < max(PARTS_FROM, rate * PARTS_SECONDS) or idle < PARTS_IDLE:
        return False
    if processors < PROCESSORS_IDLE:
        return False
    return job.lines.more()


async def _download_in_parts(
    job: Job,
    blob: Descriptor,
    places: tuple[int, ...],
    writer: ContentWriter,
    way: _Way,
    scan: LayerScan | None,
) -> None:
    """Pass on what several connections bring, until the end, or as long as they bring more.

    What goes wrong with a part is told to nobody: the rest comes in one again, whose errors count.
    """
    now = asyncio.get_running_loop().time
    reported = now()
    parts = Parts(writer.offset, blob.size, size=PART, ahead=PARTS_AHEAD)
    others = 0

    async def fetch(*, extra: bool) -> None:
        while (part := await parts.take()) is not None:
            group.create_task(_fetch_part(job, blob, way, parts, part), name=f"at {part.start}")
            await part.nearly.wait()
            if extra and job.lines.too_many():
                return

    def begin_more() -> None:
        nonlocal others
        while parts.left and job.lines.try_more():
            others += 1
            task = group.create_task(fetch(extra=True), name=f"parts of {blob.digest}")
            # And not within it: a task that is cancelled before it begins comes to no finally.
            task.add_done_callback(give_back)

    def give_back(_task: asyncio.Task[None]) -> None:
        nonlocal others
        others -= 1
        job.lines.give_back()

    try:
        async with task_group() as group:
            group.create_task(fetch(extra=False), name=f"parts of {blob.digest}")
            begin_more()
            async for chunk in parts.read():
                await _pass_on(job, blob, writer, scan, chunk)
                if now() - reported >= REPORT_EVERY:
                    job.report(places, blob, LayerStatus.DOWNLOADING, writer.offset)
                    reported = now()
                    begin_more()
                    if not others:
                        parts.stop()
    except RegistryError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            # It came while the group was ending, which forgets it (Python 3.11, 3.12).
            raise asyncio.CancelledError from error
        if isinstance(error, NoSuchRange | RateLimited):
            job.lines.parts = False
        way.broken += 1


async def _fetch_part(job: Job, blob: Descriptor, way: _Way, parts: Parts, part: Part) -> None:
    """Bring a part into memory; if it breaks off, stalls or hardly moves, the part has failed.

    An error would cancel who reads the parts, in the middle of a write to containerd.
    """
    assert job.repository is not None
    now = asyncio.get_running_loop().time
    began = now()
    host = ""
    try:
        async with job.repository.open_blob(
            blob, offset=part.start, end=part.end, avoid=way.avoid, prefer=way.served
        ) as body:
            host = body.host
            way.asked.add(body.endpoint)
            began = now()
            async with asyncio.timeout(job.stall_timeout) as limit:
                async for chunk in body:
                    part.put(chunk)
                    way.line.came(len(chunk))
                    limit.reschedule(now() + job.stall_timeout)
                    if (took := now() - began) >= WINDOW:
                        job.speeds.note(part, part.came / took)
                        if job.speeds.too_slow(part, part.came / took):
                            raise TransferError("too slow", host=host)
                    elif took > REPORT_EVERY:
                        job.speeds.note(part, part.came / took)
    except TimeoutError:
        parts.stop()
        part.fail(TransferError("silent", host=host))
    except RegistryError as error:
        parts.stop()
        part.fail(error)
    finally:
        job.speeds.forget(part)
        _tell(job, blob, host, part.start, part.came, now() - began)


def _tell(job: Job, blob: Descriptor, host: str, offset: int, size: int, seconds: float) -> None:
    """Tell what a request has brought, if it has brought anything."""
    if size > 0:
        job.on_event(
            Received(
                image=job.image,
                digest=str(blob.digest),
                host=host,
                offset=offset,
                size=size,
                seconds=seconds,
            )
        )


def _stopped(job: Job, blob: Descriptor, offset: int, error: TransferError) -> TransferError:
    return TransferError(
        f"{job.image}: the download of layer {blob.digest} from {error.host} stopped at byte"
        f" {offset} of {blob.size}, {len(RETRY_DELAYS) + 1} times: {error}",
        host=error.host,
        image=job.image,
        hint="pull again: it goes on from there",
    )


def source_labels(job: Job) -> dict[str, str]:
    """Return the label by which containerd's clients find a blob's source again."""
    # Per registry one label; containerd's clients gather several repositories in it, which
    # can outgrow the limit of 4096 (trap 15): one is enough to find the blob again.
    if job.repository is None:
        return {}
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
        status = await content.wait_released(blob_ref(blob.digest), patience=patience)
        if status is None or status.offset != self._offset:
            self._offset, self._moved = status.offset if status else -1, time.monotonic()
        elif time.monotonic() - self._moved > HOLDER_STALLED_AFTER:
            raise Locked(
                f"another client has been holding layer {blob.digest} for"
                f" {HOLDER_STALLED_AFTER:.0f} seconds and does not get on",
                hint="end that client, or restart containerd",
            )
