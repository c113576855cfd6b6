"""What containerd wrote of a comparison, read piece by piece, also when it is no archive."""

from __future__ import annotations

import tarfile
from collections.abc import AsyncIterator

import pytest

from serpentine.errors import ContainerdError
from serpentine.upkeep.archive import CLEAR, read_entries
from tests.support.images import file, folder, hardlink, make_tar, noise, symlink, whiteout

LONG = "d/" + "ä" * 120
ENTRIES = [
    folder("d", 0o750),
    file(LONG, noise("x", 5000), mode=0o600, uid=7, gid=1 << 30, xattrs={"user.a": "b"}),
    hardlink("d/hard", LONG),
    symlink("d/soft", "e" * 150),
    whiteout("d/gone"),
    whiteout("gone"),
    file("empty"),
]


async def pieces(data: bytes, size: int) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


@pytest.mark.parametrize("size", [1, 511, 512, 513, 1 << 20])
async def test_all_that_there_is_however_it_comes(size):
    found = await read_entries(pieces(make_tar(ENTRIES), size), 100)
    assert list(found.headers) == ["d", LONG, "d/hard", "d/soft", "empty"]
    assert found.removed == {"d/gone", "gone"}
    one = found.headers[LONG]
    assert (one.size, one.mode, one.uid, one.gid) == (5000, 0o600, 7, 1 << 30)
    assert found.headers["d/hard"].linkname == LONG
    assert found.headers["d/soft"].linkname == "e" * 150
    assert found.headers["d"].isdir()


async def test_no_more_than_is_wanted():
    endless = pieces(b"".join(make_tar([file("a", "1")])[:1024] for _ in range(50)), 1024)
    assert len((await read_entries(endless, 1)).headers) == 1


async def test_an_archive_of_nothing():
    found = await read_entries(pieces(bytes(1024), 512), 10)
    assert (found.headers, found.removed) == ({}, frozenset())


@pytest.mark.parametrize("cut", [0, 1, 600, 1500, 3000])
async def test_what_breaks_off(cut):
    with pytest.raises(ContainerdError, match="broke off"):
        await read_entries(pieces(make_tar(ENTRIES)[:cut], 512), 100)


def header(**members: object) -> bytes:
    info = tarfile.TarInfo("a")
    for name, value in members.items():
        setattr(info, name, value)
    return info.tobuf(tarfile.GNU_FORMAT)


def extended(record: bytes) -> bytes:
    padding = bytes(-len(record) % 512)
    return header(type=tarfile.XHDTYPE, size=len(record)) + record + padding


@pytest.mark.parametrize(
    "data",
    [
        b"x" * 1024,
        extended(b"12 size=nan\n") + header(),
        extended(b"11 size=-1\n") + header(),
        extended(b"13 mtime=new\n") + header(),
        header(type=tarfile.XHDTYPE, size=1 << 40),
        header(type=tarfile.XHDTYPE, size=-512),
    ],
)
async def test_what_is_no_archive(data):
    with pytest.raises(ContainerdError):
        await read_entries(pieces(data + bytes(1024), 512), 100)


def test_what_empties_a_directory():
    assert len(CLEAR) % 512 == 0
    assert tarfile.TarInfo.frombuf(CLEAR[:512], "utf-8", "strict").name == ".wh..wh..opq"
