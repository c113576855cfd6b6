"""A blob's bytes as they come in, counted against what its descriptor says."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

from serpentine.errors import SizeMismatch, TransferError
from serpentine.model.documents import Descriptor
from serpentine.registry.transport import Response

__all__ = ["BlobStream"]

_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-[0-9]{1,19}/([0-9]{1,19}|\*)")


class BlobStream:
    """Iterate over it for the bytes from the offset on, to the end of the blob.

    host: which sends the bytes; endpoint: which was asked, and may have sent us there.
    most_skipped: how many bytes that we have may come again, from a registry that does not
        continue; beyond it that is a TransferError.

    ``offset`` moves with what was handed out.  Raises TransferError when the body ends before
    the descriptor's size (cleanly or not), which is worth another try, and SizeMismatch when it
    goes on after it, which is not.  No Content-Length is needed.
    """

    def __init__(
        self,
        response: Response,
        descriptor: Descriptor,
        offset: int,
        *,
        endpoint: str,
        image: str,
        most_skipped: int,
    ) -> None:
        self._response = response
        self._descriptor = descriptor
        self._image = image
        self._most_skipped = most_skipped
        self.offset = offset
        self.host = response.host
        self.endpoint = endpoint

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = self._descriptor.size
        skip = self._check_range()
        if self._response.status == 416:
            return
        async for chunk in self._response.chunks():
            part = chunk
            if skip:
                part = chunk[skip:]
                skip -= len(chunk) - len(part)
            if self.offset + len(part) > size:
                raise self._too_long()
            self.offset += len(part)
            if part:
                yield part
        if self.offset < size:
            raise self._broken(f"it ended after {self.offset} of {size} bytes")

    def _check_range(self) -> int:
        """Return how many bytes of the body to pass over (trap 38)."""
        status = self._response.status
        if status == 200:
            # The whole blob, whatever we asked for.
            if self.offset > self._most_skipped:
                raise self._broken(f"it does not continue at byte {self.offset}, but begins again")
            return self.offset
        if status == 416:
            if self.offset == self._descriptor.size:
                return 0
            raise self._broken(f"it refuses to continue at byte {self.offset}")
        found = _CONTENT_RANGE.fullmatch(self._response.headers.get("Content-Range", "").strip())
        if found is None or int(found[1]) != self.offset:
            raise self._broken(f"it continues somewhere else than at byte {self.offset}")
        if found[2] != "*" and int(found[2]) > self._descriptor.size:
            raise self._too_long()
        return 0

    def _too_long(self) -> SizeMismatch:
        return SizeMismatch(
            f"{self._image}: layer {self._descriptor.digest} from {self.host} is longer than the"
            f" {self._descriptor.size} bytes of its descriptor",
            image=self._image,
            hint="the image has to be pushed again",
        )

    def _broken(self, why: str) -> TransferError:
        return TransferError(
            f"{self._image}: layer {self._descriptor.digest} from {self.host}: {why}",
            host=self.host,
            image=self._image,
            hint="pull again; if it stays, the image has to be pushed again",
        )
