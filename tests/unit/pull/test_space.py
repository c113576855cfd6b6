"""Whether a pull fits, and which download is too slow: plain decisions."""

from __future__ import annotations

import pytest

from serpentine.model.digest import Digest
from serpentine.model.documents import Descriptor
from serpentine.pull.space import Free, Need, judge, need_of, size
from serpentine.pull.speed import Speeds

NEED = Need(download=100, least=100, likely=270)


class Layered:
    def __init__(self, descriptor):
        self.descriptor = descriptor


@pytest.mark.parametrize(
    ("free", "fits", "likely"),
    [
        (Free(199, 199, same=True), False, False),
        (Free(200, 200, same=True), True, False),
        (Free(369, 369, same=True), True, False),
        (Free(370, 370, same=True), True, True),
        (Free(99, 1000, same=False), False, False),
        (Free(100, 99, same=False), False, False),
        (Free(100, 269, same=False), True, False),
        (Free(100, 270, same=False), True, True),
    ],
)
def test_judgement(free, fits, likely):
    verdict = judge(NEED, free)
    assert (verdict.fits, verdict.likely) == (fits, likely)
    assert size(free.snapshots) in verdict.text


def test_need():
    blobs = [
        Descriptor(media_type="x", digest=Digest.parse(f"sha256:{n * 64}"), size=1000)
        for n in "abc"
    ]
    layers = [Layered(blob) for blob in blobs]
    there = {blobs[0].digest: 1000, blobs[1].digest: 300}
    assert need_of(blobs, layers, there) == Need(download=1700, least=3000, likely=8100)
    # What is begun and longer than it should be needs nothing, and gives nothing back.
    assert need_of(blobs[:1], [], {blobs[0].digest: 5000}).download == 0


def test_sizes():
    assert [size(n) for n in (0, 1_500_000, 2_500_000_000)] == ["0.0 MB", "1.5 MB", "2.5 GB"]


def test_which_download_is_too_slow():
    speeds = Speeds()
    # Alone, only next to nothing counts: the link may be slow.
    assert speeds.too_slow("a", 255)
    assert not speeds.too_slow("a", 257)
    for name in "bcd":
        speeds.note(name, 1_000_000)
    speeds.note("a", 10_000)
    assert speeds.too_slow("a", 10_000)
    assert not speeds.too_slow("a", 30_000)
    for name in "bcd":
        speeds.forget(name)
    assert not speeds.too_slow("a", 10_000)
