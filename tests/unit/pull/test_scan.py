"""What a layer's headers tell, in whatever pieces and form they come."""

from __future__ import annotations

import asyncio
import gzip
import io
import itertools
import struct
import sys
import tarfile
import time
import tracemalloc

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from serpentine.pull import scan as module
from serpentine.pull.scan import HeaderScan, LayerScan
from tests.support.images import (
    Entry,
    file,
    folder,
    hardlink,
    make_tar,
    noise,
    opaque,
    symlink,
    whiteout,
)


def is_alone(data: bytes, size: int = 1 << 20) -> bool:
    scan = HeaderScan()
    for start in range(0, len(data), size):
        if not scan.feed(data[start : start + size]):
            break
    return scan.alone


ALONE = {
    "empty": [],
    "files": [file("a"), file("b", "x" * 5000)],
    "named": [folder("a"), folder("a/b"), file("a/b/c")],
    "dots": [folder("./"), folder("./a/"), file("a//b"), file("/a/c"), file("./a/./d")],
    "the root": [folder("./", 0o700, uid=7), file("a")],
    "whiteouts": [folder("a"), whiteout("a/b"), opaque("a"), whiteout("c"), opaque(".")],
    "links": [folder("a"), file("a/b"), hardlink("a/c", "a/b"), symlink("d", "a")],
    "twice": [folder("a"), folder("a"), file("a/b"), file("a/b")],
    "a file, then a directory": [file("a"), folder("a"), file("a/b")],
    "long": [folder("d" * 90), folder("d" * 90 + "/" + "e" * 90), file("d" * 90 + "/" + "f" * 200)],
    "attributes": [folder("a", xattrs={"user.x": "y" * 3000}), file("a/b", xattrs={"user.x": "1"})],
}
NOT_ALONE = {
    "implied": [file("a/b")],
    "implied above": [folder("a/b"), file("a/b/c")],
    "named too late": [file("a/b"), folder("a")],
    "of a whiteout": [whiteout("a/b")],
    "of an opaque directory": [opaque("a")],
    "of a link": [file("b"), hardlink("a/c", "b")],
    "through a symlink": [folder("a"), symlink("b", "a"), file("b/c")],
    "through a file": [file("a"), file("a/b")],
    "replaced": [folder("a"), folder("a/b"), file("a"), folder("a"), file("a/b/c")],
    "replaced by a link": [folder("a"), symlink("a", "b")],
    "upwards": [folder("a"), file("a/../b")],
    "a whiteout that is a directory": [folder(".wh.a")],
    "long": [file("d" * 200 + "/" + "f" * 200)],
    "of unknown kind": [Entry("a", kind=b"7")],
}


@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("compress", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize(
    ("entries", "alone"),
    [
        *(pytest.param(entries, True, id=name) for name, entries in ALONE.items()),
        *(pytest.param(entries, False, id=f"not: {name}") for name, entries in NOT_ALONE.items()),
    ],
)
def test_alone(entries, alone, compress, tar_format, monkeypatch):
    monkeypatch.setattr(tarfile, "PAX_FORMAT", tar_format)
    tar = make_tar(entries)
    assert is_alone(compress(tar)) is alone
    assert is_alone(compress(tar), 7) is alone


TAR = make_tar([folder("a"), file("a/b", noise(1, 70_000)), file("a/" + "c" * 300, "x")])


@given(st.lists(st.integers(0, len(TAR)), max_size=20), st.booleans())
def test_pieces_make_no_difference(cuts, compressed):
    data = gzip.compress(TAR, 1) if compressed else TAR
    places = sorted({0, len(data), *(min(cut, len(data)) for cut in cuts)})
    scan = HeaderScan()
    for start, end in itertools.pairwise(places):
        scan.feed(data[start:end])
    assert scan.alone


@given(st.integers(0, len(TAR.rstrip(b"\0"))))
def test_cut_short(end):
    """Where no entry ends, it is not alone; where one does, Go takes that for the end, too."""
    entry_ends = {0, 512}
    with tarfile.open(fileobj=io.BytesIO(TAR)) as tar:
        for member in tar:
            entry_ends.add(member.offset_data + -(-member.size // 512) * 512)
    scan = HeaderScan()
    scan.feed(TAR[:end])
    assert not scan.alone or end in entry_ends


@given(st.binary(max_size=3000), st.integers(0, 3))
def test_nothing_that_is_no_tar_raises(data, form):
    start = [b"", b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", TAR[:512]][form]
    scan = HeaderScan()
    scan.feed(start + data)
    scan.feed(data)
    assert scan.alone in (True, False)


@given(st.integers(0, 511), st.integers(1, 255))
def test_a_changed_header_is_not_believed(place, change):
    data = bytearray(make_tar([folder("a"), file("a/b")]))
    data[place] ^= change
    scan = HeaderScan()
    scan.feed(bytes(data))
    # A checksum may be written in several ways.
    assert not scan.alone or 148 <= place < 156


def raw(name: bytes, kind: bytes, size: int = 0, data: bytes = b"", **more: bytes) -> bytes:
    """A header as it is, and what comes after it."""
    block = bytearray(512)
    block[: len(name)] = name
    block[124:136] = b"%011o\x00" % size
    block[156:157] = kind
    block[257:265] = more.get("magic", b"ustar\x0000")
    for place, value in more.items():
        if place.startswith("at"):
            block[int(place[2:]) : int(place[2:]) + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\x00 " % sum(block)
    return bytes(block) + data + bytes(-len(data) % 512)


def records(**values: str) -> bytes:
    made = b""
    for key, value in values.items():
        rest = f" {key.replace('__', '.')}={value}\n".encode()
        length = len(rest) + 1
        while len(str(length)) + len(rest) != length:
            length += 1
        made += str(length).encode() + rest
    return made


def described(kind: bytes, data: bytes) -> bytes:
    return raw(b"described", kind, len(data), data)


END = bytes(1024)


@pytest.mark.parametrize(
    ("tar", "alone"),
    [
        (raw(b"a", b"0") + END, True),
        (raw(b"a", b"0") + END + b"whatever", True),
        (raw(b"a", b"0"), True),  # Go wants no end
        (raw(b"a", b"0") + bytes(512), True),
        (raw(b"a", b"0") + bytes(512) + raw(b"b", b"0"), False),
        (raw(b"a", b"0", 5, b"12345") + END, True),
        (raw(b"a", b"0", 5), False),
        (raw(b"a", b"5", 5, b"12345") + END, False),
        (raw(b"a", b"1", 5, b"12345") + END, False),
        (raw(b"a", b"S") + END, False),
        (raw(b"a", b"g") + END, False),
        (raw(b"a/", b"0") + END, False),
        (raw(b"b", b"0", at345=b"a") + END, False),  # its name is a/b
        (raw(b"a", b"5") + raw(b"b", b"0", at345=b"a") + END, True),
        (raw(b"b", b"0", magic=b"ustar  \x00", at345=b"00000000000\x00") + END, True),
        (raw(b"b", b"0", magic=b"ustar  \x00", at345=b"a") + END, False),
        (raw(b"b", b"0", at508=b"tar\x00") + END, False),
        (raw(b"b", b"0", magic=bytes(8), at345=b"a") + END, True),  # older than prefixes
        (described(b"x", records(path="a/b")) + raw(b"c", b"0") + END, False),
        (described(b"x", records(path="c")) + raw(b"a/b", b"0") + END, True),
        (described(b"L", b"a/b\x00") + raw(b"c", b"0") + END, False),
        (described(b"L", b"c\x00") + raw(b"a/b", b"0") + END, True),
        (described(b"K", b"c\x00") + raw(b"a/b", b"0") + END, False),
        (described(b"K", b"a/b\x00") + raw(b"c", b"2") + END, True),
        (described(b"x", records(size="3")) + raw(b"c", b"0", 0, b"abc") + END, True),
        (described(b"x", records(size="3")) + raw(b"c", b"5", 0, b"abc") + END, False),
        (described(b"x", records(size="-3")) + raw(b"c", b"0") + END, False),
        (described(b"x", records(GNU__sparse__major="1")) + raw(b"c", b"0") + END, False),
        (described(b"x", records(path="c")) * 2 + raw(b"c", b"0") + END, False),
        (described(b"x", b"12 path=a\n") + raw(b"c", b"0") + END, False),
        (described(b"x", b"9 path=a\n") + raw(b"c", b"0") + END, True),
        (described(b"x", b"nonsense") + raw(b"c", b"0") + END, False),
        (described(b"x", b"0 a=b\n") + raw(b"c", b"0") + END, False),
        (described(b"x", records(path="a\0b")) + raw(b"c", b"0") + END, False),
        (described(b"x", records(path="a")) + described(b"L", b"b\x00") + raw(b"c", b"0"), False),
        (described(b"x", records(path="a")), False),
        (raw(b"x", b"x", 2 << 20, bytes(2 << 20)) + raw(b"c", b"0") + END, False),
    ],
)
def test_forms(tar, alone):
    assert is_alone(tar) is alone
    assert is_alone(tar, 100) is alone


def test_several_members_of_gzip_are_one_tar():
    tar = make_tar([folder("a"), file("a/b", noise(1, 3000)), file("a/c")])
    data = b"".join(gzip.compress(tar[at : at + 700]) for at in range(0, len(tar), 700))
    assert is_alone(data)
    assert is_alone(data, 11)
    assert not is_alone(data[:600])


def test_zlib_in_place_of_isal(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "isal", None)
    test_several_members_of_gzip_are_one_tar()
    assert not is_alone(gzip.compress(make_tar([file("a/b")])))


def test_what_is_empty_or_short_is_left_to_the_chain():
    assert not is_alone(b"")
    assert not is_alone(b"\x1f")


class TestZstd:
    TAR = make_tar([folder("a"), file("a/b", noise(1, 300_000)), file("a/c", "c" * 3_000_000)])

    def test_in_pieces(self):
        data = zstandard.compress(self.TAR)
        assert is_alone(data)
        assert is_alone(data, 11)
        assert not is_alone(data[: len(data) // 2])
        assert not is_alone(zstandard.compress(make_tar([file("a/b")])))

    def test_several_frames_are_one_tar(self):
        tar = make_tar([folder("a"), file("a/b", noise(1, 3000)), file("a/c")])
        frames = [zstandard.compress(tar[at : at + 700]) for at in range(0, len(tar), 700)]
        # Some writers keep a table of contents in a frame that is to be passed over.
        frames.insert(2, struct.pack("<II", 0x184D2A50, 5) + b"12345")
        assert is_alone(b"".join(frames))
        assert is_alone(b"".join(frames), 11)
        assert not is_alone(b"".join(frames[:1]))

    def test_what_is_broken_or_wants_much_memory_is_left_to_the_chain(self):
        def window(log: int) -> bytes:
            parameters = zstandard.ZstdCompressionParameters(window_log=log, enable_ldm=log > 24)
            out = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
            return out.compress(self.TAR) + out.flush()

        assert is_alone(window(23))
        assert not is_alone(window(25))
        data = zstandard.compress(self.TAR)
        assert not is_alone(data[:200] + noise(2, len(data)))

    def test_a_large_layer_in_little_memory(self):
        """A small piece of zstd may become a thousand times as much."""
        zeros = make_tar([file("a", "\0" * 200_000_000)])
        data = zstandard.compress(zeros)
        del zeros
        assert len(data) < 100_000
        tracemalloc.start()
        try:
            assert is_alone(data)
            assert tracemalloc.get_traced_memory()[1] < 4 << 20
        finally:
            tracemalloc.stop()

    def test_left_to_the_chain_where_nobody_reads_it(self, monkeypatch):
        for name in ("backports", "compression"):
            monkeypatch.setitem(sys.modules, name, None)
        assert not is_alone(zstandard.compress(self.TAR))


@pytest.mark.parametrize("limit", ["_MOST_FOLDERS", "_MOST_NAMES"])
def test_what_is_remembered_is_limited(monkeypatch, limit):
    tar = make_tar([folder("a"), folder("b"), folder("c")])
    assert is_alone(tar)
    monkeypatch.setattr(module, limit, 2)
    assert not is_alone(tar)


def test_a_large_file_needs_no_memory():
    scan = HeaderScan()
    assert scan.feed(raw(b"a", b"0", 5 << 30))
    for _ in range(5 << 2):
        scan.feed(bytes(256 << 20))
    assert scan.alone
    assert not scan._tar._rest


class TestInAThread:
    async def test_tells(self):
        for entries, alone in (([folder("a"), file("a/b")], True), ([file("a/b")], False)):
            scan = LayerScan()
            await scan.feed(gzip.compress(make_tar(entries)))
            assert await scan.alone() is alone
            scan.stop()

    async def test_waits_for_room_only(self):
        scan = LayerScan()
        data = make_tar([file("a", noise(1, 20 << 20))])
        most = 0
        for start in range(0, len(data), 100_000):
            await scan.feed(data[start : start + 100_000])
            most = max(most, scan._given - scan._taken)
        assert await scan.alone()
        assert most <= module.MOST_AHEAD + 100_000

    async def test_a_slow_one_is_given_up(self, monkeypatch):
        monkeypatch.setattr(module, "PATIENCE", 0.05)
        monkeypatch.setattr(module, "LAST_PATIENCE", 0.05)
        original = HeaderScan.feed

        def slow(self, piece):
            time.sleep(0.2)
            return original(self, piece)

        monkeypatch.setattr(HeaderScan, "feed", slow)
        for size in (3 << 20, 10):
            scan = LayerScan()
            began = time.monotonic()
            for _ in range(5):
                await scan.feed(bytes(size))
            assert await scan.alone() is False
            assert time.monotonic() - began < 1

    async def test_ends_with_its_pull(self):
        import threading

        scan = LayerScan()
        await scan.feed(TAR[:600])
        scan.stop()
        await scan.feed(TAR[600:])
        async with asyncio.timeout(10):
            while any(t.name == "layer scan" for t in threading.enumerate()):  # noqa: ASYNC110
                await asyncio.sleep(0.001)
