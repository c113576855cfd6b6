"""Two directories on this machine, and the mounts that name them."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from serpentine.containerd import Mount
from serpentine.upkeep.compare import compare, compare_here
from serpentine.upkeep.trees import in_place, own_directory


@pytest.fixture
def pair(tmp_path):
    """A directory and a copy of it; old enough for the times of directories to count."""
    should = tmp_path / "should"
    (should / "d/e").mkdir(parents=True)
    (should / "d/file").write_text("data")
    (should / "d/link").symlink_to("file")
    (should / "a\udcff").write_text("no text")
    for path in [*should.rglob("*"), should]:
        os.utime(path, (1_600_000_000, 1_600_000_000), follow_symlinks=False)
    found = tmp_path / "found"
    shutil.copytree(should, found, symlinks=True)
    return should, found


def told(pair: tuple[Path, Path], since: float | None = None) -> list[tuple[str, tuple[str, ...]]]:
    moment = time.time() if since is None else since
    return [(one.path, one.what) for one in compare(str(pair[0]), str(pair[1]), moment)]


def test_equal(pair):
    assert told(pair) == []


def test_in_the_order_of_paths_and_nothing_below_what_is_missing(pair):
    shutil.rmtree(pair[1] / "d/e")
    (pair[1] / "d/new").mkdir()
    (pair[1] / "d/new/file").touch()
    (pair[1] / "b").touch()
    (pair[1] / "a\udcff").write_text("NO TEXT")
    os.utime(pair[1] / "d", (1_600_000_000, 1_600_000_000))
    assert told(pair) == [
        ("a\\xff", ("content", "time")),
        ("b", ("added",)),
        ("d/e", ("missing",)),
        ("d/new", ("added",)),
    ]


def test_a_directory_that_nobody_gave_a_time(pair):
    """Made on the way, it has the time of its making: in both another one."""
    os.utime(pair[1] / "d/e", (1_650_000_000, 1_650_000_000))
    assert told(pair) == [("d/e", ("time",))]
    assert told(pair, since=1_600_000_000) == []


def test_the_root_itself(pair):
    pair[1].chmod(0o711)
    os.utime(pair[1])
    assert told(pair) == [("/", ("mode",))]


def test_a_link_is_not_followed(pair):
    (pair[1] / "d/link").unlink()
    shutil.copy2(pair[1] / "d/file", pair[1] / "d/link")
    os.utime(pair[1] / "d", (1_600_000_000, 1_600_000_000))
    assert told(pair) == [("d/link", ("kind",))]


def test_a_content_that_differs_late(pair):
    for path, last in zip(pair, "ab", strict=True):
        (path / "d/file").write_text("x" * 3_000_000 + last)
        os.utime(path / "d/file", (1_600_000_000, 1_600_000_000))
    assert told(pair) == [("d/file", ("content",))]


def test_nobody_wants_to_know(pair):
    shutil.rmtree(pair[1] / "d")
    assert list(compare(str(pair[0]), str(pair[1]), 0, lambda: False)) == []


async def test_not_what_it_seems_to_be(pair, monkeypatch):
    """A directory that was there before: the daemon's is on another file system."""
    now = time.time()
    args = (*map(str, pair), now, 10)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert await compare_here(*args) == ([], 0)
    assert await compare_here(*args[:2], now + 100, 10) is None
    assert await compare_here("/no/such", *args[1:]) is None
    monkeypatch.setattr(os, "geteuid", lambda: 1)
    assert await compare_here(*args) is None


async def test_many_are_counted_and_the_first_told(pair, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    for number in range(30):
        (pair[1] / f"z{number:02}").touch()
    found, count = await compare_here(*map(str, pair), time.time(), 7)
    assert ([one.path for one in found], count) == ([f"z0{n}" for n in range(7)], 30)


OVERLAY = ("index=off", "workdir=/s/2/work", "upperdir=/s/2/fs", "lowerdir=/s/1/fs:/s/0/fs")


@pytest.mark.parametrize(
    ("mounts", "directory"),
    [
        ([Mount("bind", "/s/1/fs", options=("ro", "rbind"))], "/s/1/fs"),
        ([Mount("overlay", "overlay", options=OVERLAY)], "/s/2/fs"),
        ([Mount("overlay", "overlay", options=OVERLAY[3:])], "/s/1/fs"),
        ([Mount("overlay", "overlay")], ""),
        ([Mount("ext4", "/dev/loop1")], ""),
        ([Mount("bind", "/a"), Mount("bind", "/b")], ""),
        ([], ""),
    ],
)
def test_own_directory(mounts, directory):
    assert own_directory(mounts) == directory


def test_in_place():
    fresh = Mount("overlay", "overlay", options=OVERLAY)
    assert in_place(fresh, "/s/9/fs").options == (*OVERLAY[:2], "upperdir=/s/9/fs", OVERLAY[3])
    bind = Mount("bind", "/s/1/fs", options=("rw", "rbind"))
    assert in_place(bind, "/s/9/fs") == Mount("bind", "/s/9/fs", options=("rbind", "rw"))
