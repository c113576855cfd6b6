"""How busy the machine is."""

from __future__ import annotations

import sys

import pytest

from serpentine.pull import processors
from serpentine.pull.processors import LOOK_EVERY, Idle, Processors, idle_so_far


@pytest.fixture
def uptime(tmp_path, monkeypatch):
    """A file of ours in the kernel's place."""
    path = tmp_path / "uptime"
    monkeypatch.setattr(processors, "_UPTIME", path)
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_here():
    first = idle_so_far()
    assert first is not None
    assert first.uptime > 0
    assert first.idle > 0


def test_what_the_file_says(uptime):
    uptime.write_text("27801.79 51234.06\n")
    assert idle_so_far() == Idle(27801.79, 51234.06)


@pytest.mark.parametrize("text", [None, "", "1.0\n", "1 2 3\n", "a b\n", "5.0 0.00\n"])
def test_a_system_that_does_not_tell(uptime, text):
    if text is not None:
        uptime.write_text(text)
    assert idle_so_far() is None


def test_the_share_is_of_all_processors(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    before = Idle(100.0, 300.0)
    assert Idle(102.0, 306.0).share_since(before) == 0.75
    assert Idle(102.0, 300.0).share_since(before) == 0.0
    assert before.share_since(before) == 1.0  # nothing has passed: nothing is known to be busy


async def test_what_was_lately(monkeypatch):
    """And not since the beginning."""
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    looks = iter([Idle(10.0, 5.0), Idle(11.0, 6.0), Idle(13.0, 6.5)])
    monkeypatch.setattr(processors, "idle_so_far", lambda: next(looks))
    watch = Processors()
    assert watch.idle is None
    await watch.look(0.0)
    assert watch.idle is None
    await watch.look(LOOK_EVERY / 2)  # too soon: no look
    await watch.look(LOOK_EVERY)
    assert watch.idle == 1.0
    await watch.look(LOOK_EVERY * 2)
    assert watch.idle == 0.25


async def test_where_nobody_tells(monkeypatch):
    """Nothing is known to be busy."""
    monkeypatch.setattr(processors, "idle_so_far", lambda: None)
    watch = Processors()
    await watch.look(0.0)
    assert watch.idle == 1.0
