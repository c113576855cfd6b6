"""What holds an image once the lease is gone: documents with labels, and the image record."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from serpentine.containerd import Containerd, ImageRecord
from serpentine.errors import NotFound
from serpentine.model.digest import ChainID
from serpentine.model.documents import Descriptor
from serpentine.pull.plan import child_labels
from serpentine.pull.resolve import Document, ResolvedImage

if TYPE_CHECKING:
    from serpentine.pull.job import Job

__all__ = ["is_recorded", "labelled_documents", "record_image", "snapshot_label"]


def snapshot_label(snapshotter: str) -> str:
    """Return the name of the config's label that holds the image's top snapshot."""
    return f"containerd.io/gc.ref.snapshot.{snapshotter}"


def labelled_documents(
    image: ResolvedImage, top: ChainID | None, snapshotter: str
) -> Iterator[tuple[str, Document, dict[str, str]]]:
    """Yield the image's documents, children before parents, each with its kind and GC labels."""
    yield "config", image.config, {snapshot_label(snapshotter): str(top)} if top else {}
    layers = [layer.descriptor.digest for layer in image.layers]
    labels = child_labels(config=image.config.digest, layers=layers)
    yield "manifest", image.manifest, labels
    child = image.manifest
    for index in reversed(image.indexes):
        yield "index", index, child_labels(manifest=child.digest, position=child.position)
        child = index


async def record_image(job: Job, image: ResolvedImage, top: ChainID | None) -> None:
    """Write the documents, children before parents, then the image record.

    A parent's labels keep its children from the collector, so they come with the parent and
    after the children (trap 16); until the record stands, the lease keeps everything.
    """
    # Here and not above: what finds that all is recorded fetches nothing.
    from serpentine.pull.fetch import source_labels

    for kind, document, labels in labelled_documents(image, top, job.snapshots.name):
        await job.containerd.content.write_blob(
            document.data,
            document.digest,
            ref=f"{kind}-{document.digest}",
            labels={**source_labels(job), **labels},
            lease=job.lease,
        )
    target = image.root.descriptor
    await job.containerd.images.put(
        ImageRecord(
            name=job.image,
            target=Descriptor(media_type=target.media_type, digest=target.digest, size=target.size),
        )
    )


async def is_recorded(
    containerd: Containerd, snapshotter: str, name: str, image: ResolvedImage
) -> bool:
    """Tell whether everything that ``record_image`` would write is there, and unpacked."""
    top = image.layers[-1].chain_id if image.layers else None
    try:
        record = await containerd.images.get(name)
        if record.target.digest != image.root.digest:
            return False
        for _, document, labels in labelled_documents(image, top, snapshotter):
            info = await containerd.content.info(document.digest)
            if not labels.items() <= info.labels.items():
                return False
        if top is not None:
            await containerd.snapshots(snapshotter).stat(str(top))
    except NotFound:
        return False
    return True
