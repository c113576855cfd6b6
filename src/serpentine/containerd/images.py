"""Image records."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from google.protobuf.empty_pb2 import Empty
from google.protobuf.field_mask_pb2 import FieldMask

from serpentine.containerd._convert import descriptor_from, descriptor_to, time_from
from serpentine.containerd._proto import images_pb2 as pb
from serpentine.containerd.channel import UNARY_TIMEOUT, Channel
from serpentine.containerd.types import ImageRecord
from serpentine.errors import AlreadyExists, InvalidArgument, NotFound
from serpentine.model.documents import Descriptor

__all__ = ["Images"]

_SERVICE = "/containerd.services.images.v1.Images/"
# How often a record may be made and deleted by others while we write it.
PUT_TRIES = 10


class Images:
    """The image records of one namespace."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    async def get(self, name: str) -> ImageRecord:
        """Return a record; raises NotFound."""
        request = pb.GetImageRequest(name=name)
        answer = await self._channel.unary(_SERVICE + "Get", request, pb.GetImageResponse)
        return _record(answer.image)

    async def all(self, filters: Sequence[str] = ()) -> list[ImageRecord]:
        """Return all records that match one of the filters, or all."""
        request = pb.ListImagesRequest(filters=filters)
        answer = await self._channel.unary(_SERVICE + "List", request, pb.ListImagesResponse)
        return [_record(image) for image in answer.images]

    async def create(self, record: ImageRecord) -> ImageRecord:
        """Make a record; raises AlreadyExists."""
        request = pb.CreateImageRequest(image=_image(record))
        answer = await self._channel.unary(_SERVICE + "Create", request, pb.CreateImageResponse)
        return _record(answer.image)

    async def update(self, record: ImageRecord, fields: Sequence[str]) -> ImageRecord:
        """Set some fields of a record (``target``, ``labels``, ``labels.NAME``); raises NotFound.

        There must be one: an empty mask would replace everything (trap 15).
        """
        if not fields:
            raise InvalidArgument("an update of an image record needs the names of its fields")
        request = pb.UpdateImageRequest(image=_image(record), update_mask=FieldMask(paths=fields))
        answer = await self._channel.unary(_SERVICE + "Update", request, pb.UpdateImageResponse)
        return _record(answer.image)

    async def put(self, record: ImageRecord) -> ImageRecord:
        """Make a record, or point the one of this name at the target; its labels stay."""
        # There is no call that does either: another client may make the record, or delete it,
        # in between.  Who loses twice in a row has lost to two others.
        for _ in range(PUT_TRIES):
            with suppress(AlreadyExists):
                return await self.create(record)
            with suppress(NotFound):
                return await self.update(record, ["target"])
        return await self.create(record)

    async def delete(
        self, name: str, *, target: Descriptor | None = None, sync: bool = False
    ) -> None:
        """Delete a record; raises NotFound.  With ``sync``, return after the collector ran.

        target: delete it only if it stands for this, and raise NotFound otherwise; older
            containerds do not look (seen: 2.3 does, 1.6 does not).
        """
        request = pb.DeleteImageRequest(
            name=name,
            sync=sync,
            target=None if target is None else descriptor_to(target),
        )
        # The collector may have gigabytes to remove.
        timeout = None if sync else UNARY_TIMEOUT
        await self._channel.unary(_SERVICE + "Delete", request, Empty, timeout=timeout)


def _image(record: ImageRecord) -> pb.Image:
    return pb.Image(
        name=record.name, labels=dict(record.labels), target=descriptor_to(record.target)
    )


def _record(image: pb.Image) -> ImageRecord:
    return ImageRecord(
        name=image.name,
        target=descriptor_from(image.target),
        labels=dict(image.labels),
        created_at=time_from(image.created_at),
        updated_at=time_from(image.updated_at),
    )
