"""Records of pulls: what they are made of, what they never hold, how they are kept and found."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from serpentine import history
from serpentine.cli.explain import tell
from serpentine.errors import InvalidReference, NotFound
from serpentine.events import (
    LayerPlan,
    LayerProgress,
    LayerStatus,
    PullFailed,
    PullFinished,
    PullPlanned,
    PullResolved,
    PullStarted,
    RateLimit,
    Received,
    Retrying,
)
from serpentine.history import (
    MAX_LAYERS,
    MAX_RECORDS,
    MAX_RETRIES,
    MAX_SIZE,
    HostRecord,
    PullRecord,
    Recorder,
    find_record,
    records,
    save,
)

IMAGE = "docker.io/library/alpine:3.20"
MANIFEST, INDEX = f"sha256:{'e' * 64}", f"sha256:{'f' * 64}"
DIGESTS = [f"sha256:{c * 64}" for c in "abcd0"]
HUB, MIRROR = "registry-1.docker.io", "mirror.example:5000"
NOW = datetime(2026, 11, 26, 12, tzinfo=UTC)
DONE = PullFinished(IMAGE, "key", 700, 5, 1, 4, 9.0)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Pull:
    """Plays a pull to a recorder."""

    def __init__(self, **more) -> None:
        self.clock = Clock()
        asked = {"platform": "linux/amd64", "namespace": "n", **more}
        self.recorder = Recorder(IMAGE, **asked, clock=self.clock)

    def plan(self, *statuses: LayerStatus) -> None:
        layers = [LayerPlan(d, 1000, s) for d, s in zip(DIGESTS, statuses, strict=False)]
        self.recorder(PullStarted(IMAGE))
        self.recorder(PullResolved(IMAGE, "linux/amd64", MANIFEST, INDEX))
        self.recorder(PullPlanned(IMAGE, tuple(layers)))

    def at(self, seconds: float, event) -> None:
        self.clock.now = 100.0 + seconds
        self.recorder(event)

    def layer(self, seconds: float, index: int, status: LayerStatus, offset: int = 0) -> None:
        self.at(seconds, LayerProgress(IMAGE, index, DIGESTS[index], status, offset, 1000))

    def got(self, seconds: float, index: int, host: str, size: int, took: float) -> None:
        self.at(seconds, Received(IMAGE, DIGESTS[index], host, 0, size, took))

    @property
    def record(self) -> PullRecord:
        found = self.recorder.record()
        assert found is not None
        return found


S = LayerStatus


@pytest.fixture
def told() -> Pull:
    """A pull in which everything happens."""
    pull = Pull()
    pull.plan(S.EXISTS, S.WAITING, S.WAITING, S.WAITING, S.WAITING)
    pull.recorder(RateLimit(HUB, 77, 100, 21600))
    pull.recorder(RateLimit(HUB, 76, 100, 21600))
    pull.layer(1, 1, S.DOWNLOADING, 0)
    pull.layer(1, 2, S.DOWNLOADING, 400)
    pull.layer(1, 3, S.DOWNLOADED, 1000)
    pull.layer(1, 4, S.WAITING, 0)
    pull.got(3, 1, MIRROR, 300, 2.0)
    pull.at(3, Retrying(f"layer {DIGESTS[1]}", f"{MIRROR} has sent nothing for 8 seconds", 0.5))
    pull.got(4, 2, HUB, 600, 3.0)
    pull.layer(4, 2, S.DOWNLOADED, 1000)
    pull.layer(4, 4, S.DOWNLOADED, 1000)
    pull.got(6, 1, HUB, 700, 2.0)
    pull.layer(6, 1, S.DOWNLOADED, 1000)
    pull.layer(6, 1, S.APPLYING, 1000)
    pull.layer(7.5, 1, S.DONE, 1000)
    pull.layer(8, 2, S.APPLYING, 1000)
    pull.layer(8.5, 2, S.DONE, 1000)
    pull.at(9, DONE)
    return pull


def test_each_layer_says_what_was_there_and_what_came(told):
    record = told.record
    assert (record.image, record.platform, record.outcome) == (IMAGE, "linux/amd64", "done")
    assert (record.manifest_digest, record.index_digest) == (MANIFEST, INDEX)
    assert [layer.found for layer in record.layers] == [
        "snapshot", "nothing", "partial", "blob", "elsewhere",
    ]  # fmt: skip
    assert [layer.size_found for layer in record.layers] == [0, 0, 400, 0, 0]
    one, two = record.layers[1:3]
    assert one.fetched == (HostRecord(MIRROR, 300, 1, 2.0), HostRecord(HUB, 700, 1, 2.0))
    assert two.fetched == (HostRecord(HUB, 600, 1, 3.0),)
    assert (one.unpack_seconds, two.unpack_seconds) == (1.5, 0.5)
    assert [layer.ended for layer in record.layers[1:4]] == ["done", "done", "downloaded"]
    assert record.size_fetched == 1600
    assert record.registry_requests == 4


def test_hosts_are_busy_as_long_as_any_request_ran(told):
    """From 1 to 4 and from 4 to 6: five seconds, not the sum of what ran side by side."""
    assert told.record.hosts == (HostRecord(HUB, 1300, 2, 5.0), HostRecord(MIRROR, 300, 1, 2.0))
    assert told.record.to_dict()["hosts"][0]["bytes_per_second"] == 260
    pull = Pull()
    pull.plan(S.WAITING, S.WAITING, S.WAITING)
    pull.got(4, 0, HUB, 100, 1.0)
    pull.got(6, 1, HUB, 100, 5.0)
    pull.got(9, 2, HUB, 100, 1.0)
    pull.at(9, DONE)
    assert pull.record.hosts == (HostRecord(HUB, 300, 3, 6.0),)


def test_retries_and_limits(told):
    (retry,) = told.record.retries
    assert (retry.at, retry.delay) == (3.0, 0.5)
    assert retry.reason == f"{MIRROR} has sent nothing for 8 seconds"
    (limit,) = told.record.limits
    assert (limit.host, limit.remaining, limit.limit, limit.window) == (HUB, 76, 100, 21600)


def test_without_an_end_there_is_no_record():
    pull = Pull()
    pull.plan(S.WAITING)
    assert pull.recorder.record() is None


@pytest.mark.parametrize("cancelled", [False, True])
def test_failure_and_cancellation(cancelled):
    pull = Pull(pull="missing", offline=True, frozen=True)
    pull.plan(S.WAITING, S.WAITING)
    pull.layer(1, 0, S.DOWNLOADING, 0)
    pull.got(2, 0, HUB, 300, 1.0)
    pull.at(2, PullFailed(IMAGE, "TransferError", "it broke", cancelled, 2.0))
    record = pull.record
    assert record.outcome == ("cancelled" if cancelled else "failed")
    assert (record.error, record.reason) == ("TransferError", "it broke")
    assert (record.pull, record.offline, record.frozen) == ("missing", True, True)
    assert [layer.ended for layer in record.layers] == ["downloading", "waiting"]
    assert [layer.found for layer in record.layers] == ["nothing", "unknown"]
    assert record.size_fetched == 300
    assert record.registry_requests is None


def test_after_our_containerd_came_back_the_first_look_counts():
    pull = Pull()
    pull.plan(S.EXISTS, S.WAITING, S.WAITING)
    pull.layer(1, 1, S.DOWNLOADING, 0)
    pull.layer(2, 1, S.DOWNLOADED, 1000)
    pull.layer(2, 1, S.APPLYING, 1000)
    pull.plan(S.EXISTS, S.EXISTS, S.WAITING)
    pull.layer(4, 2, S.DOWNLOADING, 500)
    pull.at(9, DONE)
    assert [layer.found for layer in pull.record.layers] == ["snapshot", "nothing", "partial"]
    assert [layer.ended for layer in pull.record.layers] == ["exists", "done", "downloading"]


@pytest.mark.parametrize(
    "text",
    [
        "GET https://cdn.example/layer/x?X-Amz-Signature=SECRET&y=1 failed",
        "https://user:SECRET@cdn.example/x",
        "sent to 'https://cdn.example/SECRET'",
        "https://cdn.example?SECRET, https://b/SECRET#SECRET",
    ],
)
def test_no_url_ever(text, tmp_path):
    pull = Pull()
    pull.plan(S.WAITING)
    pull.at(1, Retrying(text, text, 0.1))
    pull.at(2, PullFailed(IMAGE, "RegistryUnreachable", text, False, 2.0))
    save(tmp_path, pull.record)
    (path,) = tmp_path.iterdir()
    assert "SECRET" not in path.read_text()
    assert "//cdn.example/…" in path.read_text()


class TestBounds:
    def test_retries_keep_their_beginning_and_end(self):
        pull = Pull()
        pull.plan(S.WAITING)
        for number in range(1000):
            pull.at(number, Retrying(str(number), "x" * 10_000, 0.0))
        pull.at(1000, DONE)
        record = pull.record
        assert record.retries_total == 1000
        whats = [int(retry.what) for retry in record.retries]
        assert len(whats) == MAX_RETRIES
        assert (whats[0], whats[-1]) == (0, 999)
        assert max(len(retry.reason) for retry in record.retries) <= 300

    def test_a_huge_pull_is_a_small_record(self, tmp_path):
        pull = Pull()
        count = 3000
        digests = [f"sha512:{number:0128x}" for number in range(count)]
        plan = tuple(LayerPlan(digest, 1, S.WAITING) for digest in digests)
        pull.recorder(PullPlanned(IMAGE, plan))
        for digest in digests:
            for host in range(30):
                name = f"{host}.{'h' * 240}.example"
                pull.at(1, Received(IMAGE, digest, name, 0, 1, 1.0))
        for number in range(100):
            pull.at(2, Retrying(str(number), "x" * 10_000, 0.0))
        pull.at(3, DONE)
        assert len(pull.record.layers) == MAX_LAYERS
        save(tmp_path, pull.record)
        (path,) = tmp_path.iterdir()
        assert path.stat().st_size <= MAX_SIZE
        (read,) = records(tmp_path)
        assert (read.layers_total, read.size_fetched) == (count, 30 * count)

    def test_the_newest_hundred_are_kept(self, tmp_path):
        for number in range(MAX_RECORDS + 5):
            save(tmp_path, made(f"x/{number}:1", NOW + timedelta(seconds=number)))
            if number == 2:
                (tmp_path / ".20200101T000000000000Z-00000000.json").write_text("killed")
                (tmp_path / "notes.txt").write_text("somebody else's")
        names = [record.image for record in records(tmp_path)]
        assert names == [f"x/{number}:1" for number in range(MAX_RECORDS + 4, 4, -1)]
        left = sorted(path.name for path in tmp_path.iterdir())
        assert len(left) == MAX_RECORDS + 1
        assert left[-1] == "notes.txt"


def made(image: str, when: datetime = NOW, **more) -> PullRecord:
    return PullRecord(image, "linux/amd64", "n", when, 1.0, "done", **more)


class TestKeeping:
    def test_there_and_back_and_for_us_alone(self, told, tmp_path):
        folder = tmp_path / "data" / "pulls"
        save(folder, told.record)
        assert list(records(folder)) == [told.record]
        (path,) = folder.iterdir()
        assert path.stat().st_mode & 0o777 == 0o600
        assert folder.stat().st_mode & 0o777 == 0o700
        json.loads(path.read_text())

    def test_a_failure_to_write_is_silent_and_leaves_nothing(self, told, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("")
        save(tmp_path / "file", told.record)

        def fail(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(history.Path, "replace", fail)
        folder = tmp_path / "pulls"
        save(folder, told.record)
        assert list(folder.iterdir()) == []

    @pytest.mark.parametrize(
        "data", [b"", b"{", b"[]", b'{"image": 3}', b"\xff", b"[" * 100_000, b" " * MAX_SIZE + b"1"]
    )
    def test_what_cannot_be_read_is_left_out(self, told, tmp_path, data):
        save(tmp_path, told.record)
        (tmp_path / "20990101T000000000000Z-00000000.json").write_bytes(data)
        assert list(records(tmp_path)) == [told.record]

    def test_one_of_a_newer_version_is_read(self, tmp_path):
        plain = {**msgspec.to_builtins(made(IMAGE)), "new": {"field": 1}}
        (tmp_path / "20260101T000000000000Z-00000000.json").write_text(json.dumps(plain))
        assert [record.image for record in records(tmp_path)] == [IMAGE]

    def test_no_folder(self, tmp_path):
        assert list(records(tmp_path / "none")) == []
        with pytest.raises(NotFound, match="no pull is recorded"):
            find_record(tmp_path / "none")


class TestFinding:
    @pytest.fixture
    def folder(self, tmp_path):
        layer = history.LayerRecord(DIGESTS[0], 1)
        for number, record in enumerate(
            [
                {
                    "image": IMAGE,
                    "manifest_digest": MANIFEST,
                    "index_digest": INDEX,
                    "layers": (layer,),
                },
                {"image": "docker.io/library/alpine:latest"},
                {"image": "docker.io/library/abcdef:1"},
                {"image": IMAGE, "reason": "newer", "manifest_digest": f"sha256:{'1' * 64}"},
                {"image": "ghcr.io/a/b:1"},
            ]
        ):
            image = record.pop("image")
            save(tmp_path, made(image, NOW + timedelta(seconds=number), **record))
        return tmp_path

    @pytest.mark.parametrize(
        ("what", "image", "reason"),
        [
            ("last", "ghcr.io/a/b:1", ""),
            ("alpine:3.20", IMAGE, "newer"),
            (IMAGE, IMAGE, "newer"),
            ("alpine", "docker.io/library/alpine:latest", ""),
            ("ghcr.io/a/b", "ghcr.io/a/b:1", ""),
            (MANIFEST, IMAGE, ""),
            (INDEX[:30], IMAGE, ""),
            ("1" * 12, IMAGE, "newer"),
            (DIGESTS[0][7:19], IMAGE, ""),
            (f"alpine@{MANIFEST}", IMAGE, ""),
            ("abcdef", "docker.io/library/abcdef:1", ""),
        ],
    )
    def test_by(self, folder, what, image, reason):
        found = find_record(folder, what)
        assert (found.image, found.reason) == (image, reason)

    @pytest.mark.parametrize(
        "what", ["alpin", "alpine:3.2", "ghcr.io/a", f"b@{MANIFEST}", "sha512:eeeeee", "9" * 64]
    )
    def test_nothing_by(self, folder, what):
        with pytest.raises(NotFound, match="no pull of"):
            find_record(folder, what)

    def test_what_is_neither(self, folder):
        with pytest.raises(InvalidReference):
            find_record(folder, "UPPER case")


class TestTelling:
    def test_the_whole(self, told):
        record = msgspec.structs.replace(told.record, started_at=NOW)
        meanwhile = "1 fetched by another client meanwhile"
        both = f"300 B from {MIRROR} at 150 B/s; 700 B from {HUB} at 350 B/s"
        earlier = f"from an earlier attempt; 600 B from {HUB} at 200 B/s"
        assert list(tell(record, NOW + timedelta(minutes=5))) == [
            f"{IMAGE} for linux/amd64, 5 minutes ago: done after 9.0 s",
            "  asked: the registry, what the image is now; 4 requests",
            f"  found: {MANIFEST}, in index {INDEX}",
            f"  layers: 5: 1 unpacked already, 1 here as blobs, {meanwhile}, 2 fetched",
            f"  fetched: 1.3 kB from {HUB}, 2 requests, 260 B/s",
            f"  fetched: 300 B from {MIRROR}, 1 request, 150 B/s",
            f"    bbbbbbbbbbbb 1.0 kB: was not here; {both}; unpacked in 1.5 s",
            f"    cccccccccccc 1.0 kB: 400 B were here {earlier}; unpacked in 0.5 s",
            "    dddddddddddd 1.0 kB: was here, not unpacked; stopped while downloaded",
            "    000000000000 1.0 kB: another client was fetching it; stopped while downloaded",
            "  retried 1 time:",
            f"    after 3.0 s layer {DIGESTS[1]}: {MIRROR} has sent nothing for 8 seconds",
            f"  left: 76 of 100 requests in 6 hours at {HUB}",
        ]

    def test_a_failure(self):
        pull = Pull(pull="never")
        pull.at(0.2, PullFailed(IMAGE, "NotFound", "there is no image x", False, 0.2))
        record = msgspec.structs.replace(pull.record, started_at=NOW)
        assert list(tell(record, NOW)) == [
            f"{IMAGE} for linux/amd64, just now: failed after 0.2 s",
            "  because: there is no image x",
            "  asked: no registry (--pull never)",
        ]

    @pytest.mark.parametrize(
        ("asked", "words"),
        [
            ({"frozen": True}, "what is pinned, and the registry for what is not here"),
            ({"pull": "missing"}, "the registry, because the image was not here"),
            ({"offline": True}, "no registry (offline)"),
            ({"offline": True, "frozen": True}, "no registry (offline), only for what is pinned"),
        ],
    )
    def test_what_was_asked(self, asked, words):
        lines = list(tell(made(IMAGE, **asked), NOW))
        assert f"  asked: {words}" in lines
