"""The content store: blobs by digest, ingests by name, and the stream that writes them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, Self

from google.protobuf.empty_pb2 import Empty
from google.protobuf.field_mask_pb2 import FieldMask

from serpentine._concurrency import shielded
from serpentine.containerd._convert import label_mask, time_from, varint
from serpentine.containerd._http2 import Buffer
from serpentine.containerd._proto import content_pb2 as pb
from serpentine.containerd.channel import Channel
from serpentine.containerd.duplex import Duplex
from serpentine.containerd.leases import Leases
from serpentine.containerd.types import BlobInfo, IngestStatus, Resource
from serpentine.errors import (
    AlreadyExists,
    ContainerdError,
    FailedPrecondition,
    Locked,
    NotFound,
    ResourceExhausted,
)
from serpentine.model.digest import Digest

__all__ = ["Content", "ContentWriter"]

_SERVICE = "/containerd.services.content.v1.Content/"

# containerd takes 16 MiB per message, overhead included (trap 12).  Smaller messages cost time (a
# GB over a socket: 0.6 s of our processor and 2.2 of containerd's with 1 MiB, 0.9 and 2.7 with 192
# KiB; over TCP, three times as much with 64 KiB as with 1 MiB), larger ones memory on both sides,
# and what comes again after a kill; answers are waited for only when the window is full.
MESSAGE_SIZE = 192 * 1024
MAX_IN_FLIGHT = 2

# How a field of bytes begins on the wire: its number, and "so many bytes follow".
_DATA_TAG = pb.WriteContentRequest.DESCRIPTOR.fields_by_name["data"].number << 3 | 2

# How often to look whether an ingest that another client holds is gone, in seconds.
POLL_FIRST = 0.002
POLL_LONGEST = 0.1
# How long an ingest may stand still before we try whether its holder has gone: a stream that was
# cancelled a moment ago is gone in milliseconds, one that lives may stand still for long.  By the
# number of the try, in seconds.
PATIENCE = (0.03, 2.0, 4.0, 8.0)
CLEANUP_TIMEOUT = 10.0
# A small blob is written in milliseconds: who holds it for a minute is stuck.
WRITE_BLOB_WAIT = 60.0


class Content:
    """Blobs and ingests of one namespace."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    async def info(self, digest: Digest) -> BlobInfo:
        """Return what is known of a blob; raises NotFound."""
        request = pb.InfoRequest(digest=str(digest))
        answer = await self._channel.unary(_SERVICE + "Info", request, pb.InfoResponse)
        return _blob_info(answer.info)

    async def exists(self, digest: Digest) -> bool:
        """Tell whether a blob is there, complete."""
        try:
            await self.info(digest)
        except NotFound:
            return False
        return True

    async def all(self, filters: Sequence[str] = ()) -> list[BlobInfo]:
        """Return all blobs that match one of the filters, or all."""
        request = pb.ListContentRequest(filters=filters)
        answers = self._channel.stream(_SERVICE + "List", request, pb.ListContentResponse)
        return [_blob_info(info) async for answer in answers for info in answer.info]

    async def read(
        self, digest: Digest, offset: int = 0, size: int = 0
    ) -> AsyncGenerator[bytes, None]:
        """Yield a blob's bytes from ``offset``, ``size`` of them or (0) all; raises NotFound.

        Who does not read to the end closes it (``contextlib.aclosing``): that ends the call.
        """
        request = pb.ReadContentRequest(digest=str(digest), offset=offset, size=size)
        answers = self._channel.stream(_SERVICE + "Read", request, pb.ReadContentResponse)
        async with aclosing(answers):
            async for answer in answers:
                yield answer.data

    async def read_all(self, digest: Digest, limit: int) -> bytes:
        """Return a small blob's bytes; raises NotFound, ResourceExhausted above ``limit`` bytes."""
        parts: list[bytes] = []
        size = 0
        async with aclosing(self.read(digest)) as content:
            async for part in content:
                parts.append(part)
                size += len(part)
                if size > limit:
                    raise ResourceExhausted(f"the blob {digest} is larger than {limit} bytes")
        return b"".join(parts)

    async def update_labels(self, digest: Digest, labels: Mapping[str, str | None]) -> BlobInfo:
        """Set labels of a blob, remove those whose value is None, leave the others alone.

        Raises NotFound.
        """
        if not labels:
            return await self.info(digest)  # an empty mask would replace them all (trap 15)
        info = pb.Info(digest=str(digest), labels={k: v or "" for k, v in labels.items()})
        request = pb.UpdateRequest(info=info, update_mask=FieldMask(paths=label_mask(labels)))
        answer = await self._channel.unary(_SERVICE + "Update", request, pb.UpdateResponse)
        return _blob_info(answer.info)

    async def delete(self, digest: Digest) -> None:
        """Delete a blob; raises NotFound."""
        request = pb.DeleteContentRequest(digest=str(digest))
        await self._channel.unary(_SERVICE + "Delete", request, Empty)

    async def status(self, ref: str) -> IngestStatus:
        """Return how far an ingest is; raises NotFound."""
        request = pb.StatusRequest(ref=ref)
        answer = await self._channel.unary(_SERVICE + "Status", request, pb.StatusResponse)
        return _ingest_status(answer.status)

    async def list_statuses(self, filters: Sequence[str] = ()) -> list[IngestStatus]:
        """Return all ingests that match one of the filters, or all."""
        request = pb.ListStatusesRequest(filters=filters)
        answer = await self._channel.unary(
            _SERVICE + "ListStatuses", request, pb.ListStatusesResponse
        )
        return [_ingest_status(status) for status in answer.statuses]

    async def wait_released(self, ref: str, *, patience: float) -> IngestStatus | None:
        """Wait for another client's ingest: until it is gone, or has not moved for a while.

        Returns None when it is gone (committed or aborted), else its status after
        ``patience`` seconds without a new byte.

        Opening a ref that is held is no way to wait for it: containerd before 2.0 tries for
        half a second, inside a transaction, and every other write waits as long.
        """
        delay = POLL_FIRST
        last: IngestStatus | None = None
        moved = time.monotonic()
        while True:
            try:
                status = await self.status(ref)
            except NotFound:
                return None
            if last is None or status.offset != last.offset:
                last, moved = status, time.monotonic()
            elif time.monotonic() - moved >= patience:
                return status
            await asyncio.sleep(delay)
            delay = min(delay * 2, POLL_LONGEST)

    async def abort(self, ref: str) -> None:
        """Throw an ingest away; it need not be there."""
        try:
            await self._channel.unary(_SERVICE + "Abort", pb.AbortRequest(ref=ref), Empty)
        except NotFound:
            return

    async def write_blob(
        self,
        data: bytes,
        expected: Digest,
        *,
        ref: str,
        labels: Mapping[str, str],
        lease: str | None = None,
    ) -> None:
        """Write a small blob, with labels; one that is there gets the labels, too.

        Waits while another client writes the same ref.  Raises Locked after a minute,
        FailedPrecondition if the data has another digest.
        """
        deadline = time.monotonic() + WRITE_BLOB_WAIT
        while True:
            left = max(deadline - time.monotonic(), 0.0)
            try:
                async with self._when_free(ref, expected, len(data), lease, wait=left) as writer:
                    if writer is None:
                        break
                    if writer.offset:
                        await writer.reset()
                    await writer.write(data)
                    await writer.commit(labels)
                    return
            except Locked:
                # Not on opening only: of a blob that another namespace has, containerd makes
                # the ingest, and finds it held, when the first byte comes.
                if time.monotonic() >= deadline:
                    raise
            await self.wait_released(ref, patience=PATIENCE[0])
        await self.update_labels(expected, labels)

    @asynccontextmanager
    async def writer(
        self,
        ref: str,
        *,
        total: int = 0,
        expected: Digest | None = None,
        lease: str | None = None,
        careful: bool = False,
    ) -> AsyncIterator[ContentWriter]:
        """Open the stream that writes the blob ``expected`` of ``total`` bytes.

        Both may be unknown until ``commit``.  careful: wait for the answer to each message, so
        that no error can be lost; slower.

        Raises AlreadyExists when the blob is there (and then it is in the lease: trap 8),
        Locked when another client writes this ref.  ``offset`` says what an earlier attempt
        left.  Leaving without ``commit`` keeps the ingest; what is in a lease goes with it.
        """
        async with self._channel.duplex(
            _SERVICE + "Write", pb.WriteContentResponse, lease=lease
        ) as call:
            writer = ContentWriter(self, call, ref, total, expected, lease)
            if careful:
                writer._most_in_flight = 1
            await writer._open()
            yield writer

    @asynccontextmanager
    async def lock(self, ref: str, *, wait: float, lease: str | None = None) -> AsyncIterator[None]:
        """Hold a lock that all clients of this namespace see, for ``wait`` seconds at most.

        It is an ingest that is held open and never committed: containerd lets one client
        write a ref, and lets go of it when that client's stream ends, however it ends.
        Raises Locked when the wait is over.
        """
        async with self._when_free(ref, None, 0, lease, wait=wait) as writer:
            assert writer is not None
            try:
                yield
            finally:
                # First abort, then end the stream.  Seen with containerd 1.6 and 2.3: an abort
                # while we hold the ref removes the ingest at once, and still nobody else gets
                # the ref before our stream ends; an abort after that would take away what the
                # next holder has opened.  For the same reason, none if the stream broke.
                if writer.is_open:
                    await self._clean_up(self.abort(ref))

    async def _discard(
        self, ref: str, *, total: int, expected: Digest, lease: str | None = None
    ) -> None:
        """Throw away what is in an ingest, unless another client holds it by now.

        ``abort`` takes an ingest from whoever writes it; that one's commit fails then.
        """
        # Hold it, then abort.  Opened with the same total, containerd would hash what is there,
        # and all its other work would wait (trap 13: 600 MiB took 1.7 s, and this 0.01 s).
        async with self.writer(ref, total=total + 1, expected=expected, lease=lease):
            await self.abort(ref)

    async def _adopt(self, digest: Digest, labels: Mapping[str, str], lease: str | None) -> None:
        """Let our lease hold a blob that another client has just committed; add our labels.

        ALREADY_EXISTS on opening puts a blob into the lease (trap 8), on COMMIT it does not
        (seen with containerd 1.6 and 2.3): the blob would go with the other client's lease.
        Raises NotFound if it has gone by now.
        """
        if lease:
            await Leases(self._channel).add_resource(lease, Resource(str(digest), "content"))
        await self.update_labels(digest, labels)

    async def _clean_up(self, work: Coroutine[Any, Any, None]) -> None:
        """Do what leaves nothing behind, even while we are cancelled; its failure is silent."""
        try:
            await shielded(work, timeout=CLEANUP_TIMEOUT)
        except (ContainerdError, TimeoutError):
            return  # what stays goes with its lease, or after a day

    @asynccontextmanager
    async def _when_free(
        self, ref: str, expected: Digest | None, total: int, lease: str | None, *, wait: float
    ) -> AsyncIterator[ContentWriter | None]:
        """Open a writer once no other client holds the ref; None when the blob is there."""
        deadline = time.monotonic() + wait
        tries = 0
        while True:
            async with self._channel.duplex(
                _SERVICE + "Write", pb.WriteContentResponse, lease=lease
            ) as call:
                writer = ContentWriter(self, call, ref, total, expected, lease)
                try:
                    await writer._open()
                except AlreadyExists:
                    break
                except Locked:
                    left = deadline - time.monotonic()
                    if left <= 0:
                        raise
                else:
                    yield writer
                    return
            patience = PATIENCE[min(tries, len(PATIENCE) - 1)]
            await self.wait_released(ref, patience=min(patience, left))
            tries += 1
        yield None


class ContentWriter:
    """One write stream: messages of 192 KiB, two on their way at once.

    Not for concurrent use.  ``offset`` is how many bytes it has been given, those of an earlier
    attempt included; what does not fill a message waits for more, or for ``commit``.
    """

    def __init__(
        self,
        content: Content,
        call: Duplex[pb.WriteContentResponse],
        ref: str,
        total: int,
        expected: Digest | None,
        lease: str | None,
    ) -> None:
        self._content = content
        self._call = call
        self._lease = lease
        self._in_flight = 0
        self._most_in_flight = MAX_IN_FLIGHT
        self._waiting: list[Buffer] = []
        self._waiting_size = 0
        self.ref = ref
        self.total = total
        self.expected = expected
        self.offset = 0

    @property
    def is_open(self) -> bool:
        """Whether the stream stands, and with it our hold of the ref."""
        return self._call.is_open

    async def check(self) -> None:
        """Raise what ended the stream, if anything has."""
        if not self._call.is_open:
            raise await self._call.error()

    async def _open(self) -> Self:
        await self._send(pb.STAT, ref=self.ref)
        self.offset = (await self._answer()).offset
        return self

    async def write(self, data: bytes) -> None:
        """Take bytes; waits only while too many messages are unanswered.

        An error that containerd found in an earlier message is raised here or at ``commit``.
        """
        self.offset += len(data)
        rest = memoryview(data)
        while self._waiting_size + len(rest) >= MESSAGE_SIZE:
            cut = MESSAGE_SIZE - self._waiting_size
            parts = [*self._waiting, rest[:cut]]
            rest = rest[cut:]
            self._waiting, self._waiting_size = [], 0
            await self._send_data(self.offset - len(rest) - MESSAGE_SIZE, parts)
        if rest:
            self._waiting.append(rest)
            self._waiting_size += len(rest)

    async def reset(self) -> None:
        """Begin again at 0: a write there truncates what an earlier attempt left (trap 4)."""
        await self._settle()
        self._waiting, self._waiting_size = [], 0
        await self._send(pb.WRITE, offset=0)
        self.offset = (await self._answer()).offset

    async def _send_data(self, offset: int, data: Sequence[Buffer]) -> None:
        if self._in_flight >= self._most_in_flight:
            await self._answer()
        await self._send(pb.WRITE, offset=offset, data=data)

    async def commit(
        self, labels: Mapping[str, str] | None = None, *, expected: Digest | None = None
    ) -> None:
        """Make the blob visible; containerd checks size and digest first.

        expected: the digest, if it was not known before; the size is what was written.

        A blob that somebody else committed meanwhile is a success, too: it gets the labels and
        is put into the lease.  Raises FailedPrecondition for a wrong digest or size; the ingest
        is thrown away then, or each later attempt would find it complete and fail again
        (trap 6).
        """
        if expected is not None:
            self.expected, self.total = expected, self.offset
        try:
            # The last bytes go along with it, which saves a small blob a round trip (trap 11).
            rest, size = self._waiting, self._waiting_size
            self._waiting, self._waiting_size = [], 0
            # The offset must be where they belong: 0 would truncate (trap 4).
            await self._send(pb.COMMIT, offset=self.offset - size, data=rest, labels=labels)
            await self._settle()
            await self._drain()
        except AlreadyExists:
            if self.expected is not None:
                await self._content._adopt(self.expected, labels or {}, self._lease)
        except FailedPrecondition:
            if self.expected is not None:
                await self._content._clean_up(
                    self._content._discard(
                        self.ref, total=self.total, expected=self.expected, lease=self._lease
                    )
                )
            raise

    async def _send(
        self,
        action: pb.WriteAction,
        *,
        ref: str = "",
        offset: int = 0,
        data: Sequence[Buffer] = (),
        labels: Mapping[str, str] | None = None,
    ) -> None:
        message = pb.WriteContentRequest(
            action=action,
            ref=ref,
            total=self.total,
            expected=str(self.expected or ""),
            offset=offset,
            labels=labels or {},
        )
        self._in_flight += 1
        await self._call.send(_parts(message, data))

    async def _answer(self) -> pb.WriteContentResponse:
        answer = await self._call.receive()
        if answer is None:
            raise await self._call.error()
        self._in_flight -= 1
        return answer

    async def _settle(self) -> None:
        while self._in_flight:
            await self._answer()

    async def _drain(self) -> None:
        """Read to the end of the stream: the call counts as cancelled otherwise (trap 10)."""
        await self._call.finish()
        while await self._call.receive() is not None:
            pass

    def __repr__(self) -> str:
        return f"<ContentWriter {self.ref} at {self.offset} of {self.total}>"


def _parts(message: pb.WriteContentRequest, data: Sequence[Buffer]) -> list[Buffer]:
    """Return the message serialized, with these bytes as its data, in parts that follow each other.

    Fields may stand in any order, so that the large one is put after the others as it is: protobuf
    would copy it three times (a third of our processor's time).
    """
    size = sum(len(part) for part in data)
    if not size:
        return [message.SerializeToString()]
    head = message.SerializeToString() + varint(_DATA_TAG) + varint(size)
    return [head, *data]


def _blob_info(info: pb.Info) -> BlobInfo:
    return BlobInfo(
        digest=Digest.parse(info.digest),
        size=info.size,
        labels=dict(info.labels),
        created_at=time_from(info.created_at),
        updated_at=time_from(info.updated_at),
    )


def _ingest_status(status: pb.Status) -> IngestStatus:
    return IngestStatus(
        ref=status.ref,
        offset=status.offset,
        total=status.total,
        started_at=time_from(status.started_at),
        updated_at=time_from(status.updated_at),
    )
