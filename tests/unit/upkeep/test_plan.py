"""What a prune takes and what is counted, decided on made-up namespaces."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from types import MappingProxyType

import pytest

from serpentine.containerd import (
    BlobInfo,
    ContainerRecord,
    ImageRecord,
    IngestStatus,
    Lease,
    SnapshotInfo,
    SnapshotKind,
)
from serpentine.errors import InvalidSetting
from serpentine.model.digest import Digest
from serpentine.model.documents import Descriptor
from serpentine.pull.leases import LABEL_SESSION
from serpentine.upkeep.inventory import ROOT, Inventory, Snapshot
from serpentine.upkeep.plan import PruneOptions, PruneResult, make_plan
from serpentine.upkeep.usage import summarise

NOW = datetime(2026, 11, 26, tzinfo=UTC)
SNAPSHOTS = "snapshots/overlayfs"


def ago(days: float) -> datetime:
    return NOW - timedelta(days=days)


def digest(name: str) -> str:
    return str(Digest.of(name.encode()))


class Made:
    """A namespace that is put together bit by bit."""

    def __init__(self) -> None:
        self.parts = {
            name: {}
            for name in (
                "images", "blobs", "ingests", "snapshots", "leases", "resources", "containers"
            )
        }  # fmt: skip

    def blob(self, name: str, size: int, **labels: str) -> str:
        found = Digest.of(name.encode())
        self.parts["blobs"][str(found)] = BlobInfo(found, size, labels, ago(9), ago(9))
        return str(found)

    def snapshot(self, key: str, parent: str, size: int, days: float = 9, **labels: str) -> str:
        kind = SnapshotKind.COMMITTED
        info = SnapshotInfo(key, parent, kind, labels, ago(days), ago(days))
        self.parts["snapshots"][SNAPSHOTS, key] = Snapshot(info, "overlayfs", size)
        return key

    def state(self, key: str, parent: str, size: int, days: float = 9) -> str:
        return self.snapshot(key, parent, size, days, **{ROOT: "x"})

    def image(self, name: str, days: float, layers: list[tuple[str, int]]) -> str:
        """Blobs as large as their snapshots, a config of 10 bytes and a manifest of 1."""
        parent = ""
        for layer, size in layers:
            parent = self.snapshot(layer, parent, size)
            self.blob(layer, size)
        config = self.blob(
            f"{name}-config", 10, **{"containerd.io/gc.ref.snapshot.overlayfs": parent}
        )
        labels = {
            f"containerd.io/gc.ref.content.l.{i}": digest(x) for i, (x, _) in enumerate(layers)
        }
        labels["containerd.io/gc.ref.content.config"] = config
        manifest = self.blob(f"{name}-manifest", 1, **labels)
        target = Descriptor(media_type="", digest=Digest.parse(manifest), size=1)
        record = ImageRecord(name, target, {}, ago(99), ago(days))
        self.parts["images"][name] = record
        return parent

    def lease(
        self, name: str, session: str, *held: tuple[str, str], days: float = 1, **labels: str
    ):
        labels[LABEL_SESSION] = session
        self.parts["leases"][name] = Lease(name, ago(days), labels)
        self.parts["resources"][name] = held

    def ingest(self, ref: str, size: int, days: float = 1) -> None:
        self.parts["ingests"][ref] = IngestStatus(ref, size, 2 * size, ago(days), ago(days))

    def container(self, name: str, key: str, image: str = "", session: str = "alive") -> None:
        self.parts["containers"][name] = ContainerRecord(
            name, b"", "overlayfs", key, "", image, {LABEL_SESSION: session}, ago(1), ago(1)
        )

    def done(self) -> Inventory:
        parts = {name: MappingProxyType(part) for name, part in self.parts.items()}
        return Inventory(now=NOW, dead=frozenset({"dead"}), **parts)

    def prune(self, **options: object) -> PruneResult:
        return make_plan(self.done(), PruneOptions(**options)).result()


def names(result: PruneResult) -> list[tuple[str, str, int]]:
    return [(str(one.kind), one.name, one.size) for one in result.removed]


@pytest.fixture
def made() -> Made:
    """Two images on a base of 100 bytes; what is theirs alone is 20 and 40 bytes."""
    made = Made()
    made.image("a", 5, [("base", 100), ("a-top", 20)])
    made.image("b", 3, [("base", 100), ("b-top", 40)])
    return made


def test_nothing_to_do(made):
    assert made.prune() == PruneResult((), 0, 2 * 160 + 22, 0, 0)


def test_what_nothing_holds(made):
    made.snapshot("loose", "base", 7)
    made.blob("loose", 3)
    result = made.prune(older_than=timedelta(days=1000))
    assert names(result) == [("unheld", "", 10)]
    assert (result.freed, result.blobs, result.snapshots) == (10, 1, 1)


def test_leases_of_clients_that_are_gone(made):
    made.snapshot("half", "base", 7)
    made.ingest("layer-x", 5)
    made.lease("gone", "dead", (SNAPSHOTS, "half"), ("ingests", "layer-x"), days=2)
    made.lease("here", "alive", ("content", made.blob("fetched", 9)))
    made.lease("elsewhere", "", (SNAPSHOTS, made.snapshot("foreign", "", 6)))
    assert names(made.prune()) == [("lease", "gone", 12)]
    assert made.prune(older_than=timedelta(days=3)).removed == ()


def test_what_two_hold_goes_with_the_last_of_them(made):
    both = (SNAPSHOTS, made.snapshot("half", "", 7))
    made.lease("first", "dead", both, days=3)
    made.lease("second", "dead", both, days=2)
    assert names(made.prune()) == [("lease", "first", 0), ("lease", "second", 7)]
    made.lease("second", "alive", both)
    assert names(made.prune()) == [("lease", "first", 0)]


def test_an_expired_lease_holds_nothing(made):
    held = (SNAPSHOTS, made.snapshot("half", "", 7))
    made.lease("old", "", held, **{"containerd.io/gc.expire": "2026-11-25T23:59:59Z"})
    assert names(made.prune()) == [("unheld", "", 7)]
    made.lease("old", "", held, **{"containerd.io/gc.expire": "2026-11-26T00:00:01Z"})
    assert made.prune().removed == ()


def test_partial_blobs_that_no_lease_holds(made):
    made.ingest("loose", 5, days=2)
    made.ingest("held", 6)
    made.lease("here", "alive", ("ingests", "held"))
    assert names(made.prune()) == [("partial", "loose", 5)]
    assert made.prune(older_than=timedelta(days=3)).removed == ()


def test_a_step_of_a_client_that_is_gone(made):
    made.snapshot("step-1", "a-top", 8)
    made.lease("step-1", "dead", (SNAPSHOTS, "step-1"))
    made.container("step-1", "step-1", session="dead")
    assert names(made.prune()) == [("step", "step-1", 8)]


def test_all_takes_images_the_oldest_first(made):
    result = made.prune(unused=True)
    # What both share goes with the second.
    assert names(result) == [("image", "a", 2 * 20 + 11), ("image", "b", 2 * 140 + 11)]
    assert (result.left, result.blobs, result.snapshots) == (0, 7, 3)


def test_age_is_that_of_the_record(made):
    assert names(made.prune(unused=True, older_than=timedelta(days=4))) == [("image", "a", 51)]
    assert names(made.prune(unused=True, older_than=timedelta(days=5))) == [("image", "a", 51)]
    assert made.prune(unused=True, older_than=timedelta(days=6)).removed == ()


@pytest.mark.parametrize(
    ("size", "gone"), [(342, []), (341, ["a"]), (291, ["a"]), (290, ["a", "b"]), (0, ["a", "b"])]
)
def test_keep_size_takes_no_more_than_it_must(made, size, gone):
    assert [one.name for one in made.prune(unused=True, keep_size=size).removed] == gone


def test_keep_size_counts_what_nothing_holds_as_gone(made):
    made.blob("loose", 1000)
    assert names(made.prune(unused=True, keep_size=342)) == [("unheld", "", 1000)]


def test_images_in_use_stay(made):
    made.container("c", made.snapshot("active", "a-top", 1))
    assert [one.name for one in made.prune(unused=True).removed] == ["b"]
    made.container("d", "", image="b")
    assert made.prune(unused=True).removed == ()


def test_images_that_a_running_client_works_on_stay(made):
    made.lease("step", "alive", (SNAPSHOTS, made.snapshot("active", "b-top", 1)))
    assert [one.name for one in made.prune(unused=True).removed] == ["a"]


def test_an_image_below_one_that_is_used_is_not_used(made):
    made.image("base-image", 7, [("base", 100)])
    made.container("c", made.snapshot("active", "a-top", 1))
    assert [one.name for one in made.prune(unused=True).removed] == ["base-image", "b"]


def test_states_only_with_all(made):
    made.state("state-1", "a-top", 4)
    assert made.prune().removed == ()
    # The image goes after its youngest state: what is left could be committed until then.
    assert names(made.prune(unused=True)) == [
        ("state", "state-1", 4),
        ("image", "a", 51),
        ("image", "b", 291),
    ]
    made.state("state-1", "a-top", 4, days=1)
    assert [one.name for one in made.prune(unused=True).removed] == ["b", "state-1", "a"]


def test_a_state_that_stays_keeps_its_image_and_the_states_below(made):
    made.state("state-1", "a-top", 4, days=9)
    made.state("state-2", "state-1", 5, days=1)
    assert [x.name for x in made.prune(unused=True, older_than=timedelta(days=2)).removed] == ["b"]
    made.container("c", made.snapshot("active", "state-1", 1))
    assert [one.name for one in made.prune(unused=True).removed] == ["b", "state-2"]


def test_a_state_without_its_root_is_nobodys(made):
    made.snapshot("state-1", "a-top", 4)
    assert names(made.prune()) == [("unheld", "", 4)]


def test_what_cannot_be_asked_for():
    with pytest.raises(InvalidSetting):
        PruneOptions(older_than=timedelta(-1))
    with pytest.raises(InvalidSetting):
        PruneOptions(keep_size=-1)


def test_usage(made):
    made.state("state-1", "a-top", 4)
    made.ingest("loose", 5)
    made.lease("here", "alive")
    usage = summarise(made.done())
    assert (usage.blobs.count, usage.blobs.size) == (7, 182)
    assert (usage.snapshots.count, usage.snapshots.size) == (4, 164)
    assert (usage.ingests.count, usage.ingests.size) == (1, 5)
    assert usage.total == 182 + 164 + 5
    assert [(i.name, i.size, i.shared) for i in usage.images] == [("a", 251, 200), ("b", 291, 200)]
    assert [(s.key, s.size) for s in usage.states] == [("state-1", 4)]
    assert (usage.shared, usage.leases) == (200, 1)
    assert (usage.prunable, usage.prunable_all) == (5, usage.total)
