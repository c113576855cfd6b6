"""A blob's bytes as they come in, counted against what its descriptor says."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

from serpentine.errors import NoSuchRange, SizeMismatch, TransferError
from serpentine.model.documents import Descriptor
from serpentine.registry.transport import Response

__all__ = ["BlobStream"]

_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19}|\*)")


class BlobStream:
    """Iterate over it for the bytes from the offset on, to the end of the blob or of the part.

    host: which sends the bytes; endpoint: which was asked, and may have sent us there.
    most_skipped: how many bytes that we have may come again, from a registry that does not
        continue; beyond it that is a TransferError.
    end: where to stop; any answer but exactly that range is NoSuchRange (RFC 9110, section 14).

    ranges: whether the endpoint says that it can be asked for parts.

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
        end: int | None = None,
    ) -> None:
        self._response = response
        self._descriptor = descriptor
        self._image = image
        self._most_skipped = most_skipped
        self._end = end
        self.offset = offset
        self.host = response.host
        units = response.headers.get("Accept-Ranges", "").lower()
        self.ranges = response.status == 206 or units.strip() == "bytes"
        self.endpoint = endpoint

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = self._descriptor.size if self._end is None else self._end
        skip = self._check_range() if self._end is None else self._check_part(self._end)
        if self._response.status == 416:
            return
        async for chunk in self._response.chunks():
            part = chunk
            if skip:
                part = chunk[skip:]
                skip -= len(chunk) - len(part)
            if self.offset + len(part) > size:
                raise self._too_long() if self._end is None else self._not_that("more")
            self.offset += len(part)
            # Also what is passed over is told: something comes, though nothing that counts.
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
        if found[3] != "*" and int(found[3]) > self._descriptor.size:
            raise self._too_long()
        return 0

    def _check_part(self, end: int) -> int:
        """Return 0: no byte of the body is passed over, as it must be the range that was wanted."""
        found = _CONTENT_RANGE.fullmatch(self._response.headers.get("Content-Range", "").strip())
        if self._response.status != 206 or found is None:
            raise self._not_that(f"status {self._response.status}")
        wanted = (self.offset, end - 1, self._descriptor.size)
        if (int(found[1]), int(found[2])) != wanted[:2] or found[3] not in ("*", str(wanted[2])):
            raise self._not_that(found[0])
        return 0

    def _not_that(self, what: str) -> NoSuchRange:
        why = f"it answers a range that ends before {self._end} with {what}"
        broken = self._broken(why)
        return NoSuchRange(str(broken), host=broken.host, image=broken.image, hint=broken.hint)

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
