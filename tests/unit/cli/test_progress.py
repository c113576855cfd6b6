"""The event stream as lines, as JSON and as a live table."""

import json

import pytest
from msgspec.structs import replace

from serpentine.cli import _progress
from serpentine.cli._progress import PlainProgress, progress
from serpentine.events import (
    DaemonStarting,
    LayerPlan,
    LayerProgress,
    LayerStatus,
    PullFinished,
    PullPlanned,
    PullStarted,
    ReleaseInstalled,
    ReleaseProgress,
    ReleaseWaiting,
    Retrying,
    VerifyFound,
    VerifyProgress,
)

IMAGE = "example.com/a:1"
DIGESTS = [f"sha256:{c * 64}" for c in "abc"]
PLAN = PullPlanned(
    image=IMAGE,
    layers=(
        LayerPlan(DIGESTS[0], 100, LayerStatus.EXISTS),
        LayerPlan(DIGESTS[1], 2_000_000, LayerStatus.WAITING),
        LayerPlan(DIGESTS[2], 0, LayerStatus.WAITING),
    ),
)
DONE = PullFinished(
    image=IMAGE,
    snapshot_key="k",
    bytes_downloaded=2_000_000,
    layers_total=3,
    layers_reused=1,
    registry_requests=4,
    seconds=1.25,
)


def moved(status: LayerStatus, offset: int = 0, index: int = 1) -> LayerProgress:
    return LayerProgress(IMAGE, index, DIGESTS[index], status, offset, PLAN.layers[index].size)


EVENTS = [
    DaemonStarting(kind="embedded"),
    PullStarted(image=IMAGE),
    PLAN,
    moved(LayerStatus.DOWNLOADING, 0),
    moved(LayerStatus.DOWNLOADING, 1_000_000),
    Retrying(what="layer x", reason="connection reset", delay=0.5),
    moved(LayerStatus.DOWNLOADED, 2_000_000),
    moved(LayerStatus.APPLYING, 2_000_000),
    moved(LayerStatus.DONE, 2_000_000),
    moved(LayerStatus.DONE, 0, index=2),
    DONE,
]


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

        def monotonic(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(_progress, "time", clock)
    return clock


def test_plain_lines_go_to_stderr_one_per_change(capsys):
    with progress("plain") as show:
        for event in EVENTS:
            show(event)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert f"{'b' * 12}: downloading 2.0 MB" in lines
    assert sum("downloading" in line for line in lines) == 1, "no line per chunk"
    assert f"{'b' * 12}: applying" in lines
    assert f"{'b' * 12}: done" in lines
    assert any("retrying layer x in 0.5 s: connection reset" in line for line in lines)
    assert "2.0 MB downloaded" in lines[-1]


def test_what_was_here_needs_no_line(capsys):
    show = PlainProgress()
    show(replace(DONE, bytes_downloaded=0, registry_requests=0))
    assert capsys.readouterr().err == ""
    show(replace(DONE, bytes_downloaded=0, registry_requests=1))
    assert "0 B downloaded" in capsys.readouterr().err


def test_a_long_download_gets_a_line_every_five_seconds_with_its_speed(capsys, clock):
    show = PlainProgress()
    show(moved(LayerStatus.DOWNLOADING, 0))
    for second in range(1, 11):
        clock.now += 1
        show(moved(LayerStatus.DOWNLOADING, second * 100_000))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[1].endswith("downloading 500 kB of 2.0 MB, 100 kB/s")


def test_releases_get_a_line_each_and_one_every_five_seconds(capsys, clock):
    show = PlainProgress()
    show(ReleaseWaiting("/data/install.lock"))
    for second in range(11):
        for program, total in (("runc", 2_000_000), ("cni", None)):
            show(ReleaseProgress(program, "1.2", f"http://x/{program}", second * 100_000, total))
        clock.now += 1
    show(ReleaseInstalled("/data/bin-1", 4_000_000, 11.0))
    show(ReleaseInstalled("/data/bin-1", 0, 0.0))
    lines = capsys.readouterr().err.splitlines()
    assert "/data/install.lock" in lines[0]
    assert lines[1] == "runc 1.2: downloading http://x/runc"
    assert lines[3:5] == ["runc 1.2: 500 kB of 2.0 MB, 100 kB/s", "cni 1.2: 500 kB, 100 kB/s"]
    assert len(lines) == 9
    assert lines[-2:] == ["4.0 MB downloaded, 11.0 s", "already there: /data/bin-1"]


def test_json_lines_are_whole_events(capsys):
    with progress("json") as show:
        for event in EVENTS:
            show(event)
    out, err = capsys.readouterr()
    assert out == ""
    values = [json.loads(line) for line in err.splitlines()]
    assert [value["event"] for value in values] == [event.name for event in EVENTS]
    assert values[2]["layers"][0]["status"] == "exists"
    assert values[-1]["bytes_downloaded"] == 2_000_000


def test_quiet_is_quiet(capsys):
    with progress("quiet") as show:
        for event in EVENTS:
            show(event)
    assert capsys.readouterr() == ("", "")


def test_auto_is_plain_without_a_terminal(capsys):
    with progress("auto") as show:
        assert isinstance(show, PlainProgress)


def test_the_live_table_ends_with_every_layer_done(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    with progress("tty") as show:
        for event in EVENTS:
            show(event)
    out, err = capsys.readouterr()
    assert out == ""
    for word in ("a" * 12, "b" * 12, "already there", "done", "downloaded"):
        assert word in err


def test_a_verification_as_lines(capsys, clock):
    with progress("plain") as show:
        for second in range(7):
            show(VerifyProgress("blob", DIGESTS[0], second * 1000, 6000))
            clock.now += 1
        show(VerifyProgress("tree", DIGESTS[1], 0, 6000))
        show(VerifyProgress("tree", DIGESTS[1], 6000, 6000))
        show(VerifyFound(IMAGE, "tree", DIGESTS[1], "is bent", repaired=False))
        show(VerifyFound(IMAGE, "tree", DIGESTS[1], "is bent", repaired=True))
    assert capsys.readouterr().err.splitlines() == [
        f"{'a' * 12}: read 5.0 kB of 6.0 kB",
        f"{'b' * 12}: unpacking it anew, to compare",
        f"{IMAGE}: tree {'b' * 12} damaged: is bent",
        f"{IMAGE}: tree {'b' * 12} repaired: is bent",
    ]


def test_a_verification_as_one_moving_line(capsys, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    with progress("tty") as show:
        for what in ("blob", "tree", "repair"):
            show(VerifyProgress(what, DIGESTS[0], 0, 0))
            show(VerifyProgress(what, DIGESTS[1], 500, 1000))
    err = capsys.readouterr().err
    assert "mending" in err
    assert "500 B / 1.0 kB" in err
