"""The plan: what to fetch and to unpack, and which entry of an index serves a platform."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serpentine.events import LayerStatus
from serpentine.model.digest import DiffID, Digest, chain_ids
from serpentine.model.documents import Descriptor, Layer, PlatformEntry
from serpentine.model.platform import Platform
from serpentine.pull.plan import (
    Ready,
    apply_next,
    beside_downloads,
    can_rebase,
    candidates,
    child_labels,
    download_order,
    list_platforms,
    make_plan,
    unpacks_for,
    worth_a_look,
)

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"


def layers(*names: str) -> tuple[Layer, ...]:
    """One layer per name; the same name is the same blob."""
    diff_ids = [DiffID.of(name.encode()) for name in names]
    chain = chain_ids(diff_ids)
    return tuple(
        Layer(
            descriptor=Descriptor(
                media_type=LAYER, digest=Digest.of(b"gz" + name.encode()), size=len(name)
            ),
            diff_id=diff_id,
            chain_id=chain_id,
            parent=parent,
        )
        for name, diff_id, chain_id, parent in zip(
            names, diff_ids, chain, (None, *chain), strict=False
        )
    )


def entry(platform: str | None, *, index: bool = False, number: int = 0, **more) -> Descriptor:
    where = None
    if platform:
        system, architecture, variant = (*platform.split("/"), None)[:3]
        where = PlatformEntry(os=system, architecture=architecture, variant=variant)
    return Descriptor(
        media_type=OCI_INDEX if index else OCI_MANIFEST,
        digest=Digest.of(f"{platform}{number}".encode()),
        size=1,
        platform=where,
        **more,
    )


def test_nothing_there_means_everything_from_the_bottom():
    stack = layers("a", "b", "c")
    plan = make_plan(stack, set())
    assert plan.unpack == stack
    assert [b.digest for b in plan.fetch] == [layer.descriptor.digest for layer in stack]
    assert plan.top == stack[2].chain_id
    assert plan.base is None


def test_everything_there_means_nothing_to_do():
    stack = layers("a", "b")
    plan = make_plan(stack, {stack[1].chain_id})
    assert plan.unpack == ()
    assert plan.fetch == ()
    assert plan.base == plan.top == stack[1].chain_id
    assert [layer.status for layer in plan.for_display()] == [LayerStatus.EXISTS] * 2


def test_a_snapshot_in_the_middle_saves_what_is_below_it():
    stack = layers("a", "b", "c")
    plan = make_plan(stack, {stack[1].chain_id})
    assert plan.unpack == stack[2:]
    assert plan.base == stack[1].chain_id
    assert plan.places(stack[2].descriptor.digest) == (2,)
    assert [layer.status for layer in plan.for_display()] == [
        LayerStatus.EXISTS,
        LayerStatus.EXISTS,
        LayerStatus.WAITING,
    ]


def test_the_same_layer_twice_is_fetched_once_and_unpacked_twice():
    stack = layers("a", "b", "a")
    plan = make_plan(stack, set())
    assert len(plan.fetch) == 2
    assert len(plan.unpack) == 3
    assert plan.places(stack[0].descriptor.digest) == (0, 2)
    assert stack[0].chain_id != stack[2].chain_id


def test_an_image_without_layers_has_no_top():
    plan = make_plan((), set())
    assert plan.top is None
    assert plan.fetch == plan.unpack == ()


def test_the_best_platform_comes_first():
    entries = [
        entry("linux/arm/v6"),
        entry("linux/arm/v7"),
        entry("linux/amd64"),
        entry("linux/386"),
    ]
    got = candidates(entries, Platform.parse("linux/arm/v7"))
    assert got == (entries[1], entries[0])
    got = candidates(entries, Platform.parse("linux/amd64"))
    assert got == (entries[2], entries[3])
    assert candidates(entries, Platform.parse("linux/s390x")) == ()


def test_of_two_equal_entries_the_first_wins():
    entries = [entry("linux/amd64", number=1), entry("linux/amd64", number=2)]
    assert candidates(entries, Platform.parse("linux/amd64"))[0] is entries[0]


def test_entries_without_a_platform_come_last_and_are_kept():
    entries = [entry(None, number=1), entry("linux/amd64"), entry(None, index=True, number=2)]
    got = candidates(entries, Platform.parse("linux/amd64"))
    assert got == (entries[1], entries[0], entries[2])


def test_attestations_and_foreign_types_are_never_candidates():
    attestation = entry(
        "linux/amd64", annotations={"vnd.docker.reference.type": "attestation-manifest"}
    )
    unknown = entry("unknown/unknown")
    foreign = Descriptor(
        media_type="application/json", digest=Digest.of(b"x"), size=1, platform=None
    )
    assert candidates([attestation, unknown, foreign], Platform.parse("linux/amd64")) == ()
    assert list_platforms([attestation, unknown]) == ()


def test_platforms_are_listed_once_in_their_order():
    entries = [entry("linux/arm64/v8"), entry("linux/amd64"), entry("linux/arm64"), entry(None)]
    assert list_platforms(entries) == ("linux/arm64", "linux/amd64")


def test_labels_are_the_ones_that_containerds_collector_follows():
    config, first, second = (Digest.of(text) for text in (b"c", b"1", b"2"))
    assert child_labels(config=config, layers=[first, second]) == {
        "containerd.io/gc.ref.content.config": str(config),
        "containerd.io/gc.ref.content.l.0": str(first),
        "containerd.io/gc.ref.content.l.1": str(second),
    }
    assert child_labels(manifest=config, position=3) == {
        "containerd.io/gc.ref.content.m.3": str(config)
    }


def test_the_lowest_layers_are_applied_first_as_many_as_may():
    waiting = [Ready(4, alone=True), Ready(2, alone=True), Ready(3, alone=True)]
    assert apply_next(waiting, {-1}, 2) == (2, 3)
    assert apply_next(waiting, {-1}, 5) == (2, 3, 4)
    assert apply_next(waiting, {-1}, 0) == ()


def test_a_layer_that_needs_the_one_below_waits_for_it():
    waiting = [Ready(2, alone=False), Ready(3, alone=True)]
    assert apply_next(waiting, {-1, 0}, 2) == (3,)
    assert apply_next(waiting, {-1, 0, 1}, 2) == (2, 3)


def test_what_keeps_one_busy_anyway_is_not_looked_at():
    assert worth_a_look([], 2) == ()
    assert worth_a_look([5], 2) == ()
    assert worth_a_look([5, 5], 2) == (1,)
    assert worth_a_look([5] * 6, 2) == (3, 4, 5)
    assert worth_a_look([5] * 6, 4) == (1, 2, 3, 4, 5)
    assert worth_a_look([5] * 9, 4) == (2, 3, 4, 5, 6, 7, 8)
    # A large one at the bottom is enough for one.
    assert worth_a_look([50, 5, 5, 5, 5], 2) == (1, 2, 3, 4)
    # A large one above is too much for one that has waited.
    assert worth_a_look([1, 1, 50, 5, 5], 2) == (2, 3, 4)


@given(st.lists(st.integers(0, 1000), max_size=30), st.integers(2, 6))
def test_no_more_goes_in_order_than_one_in_so_many(sizes, at_once):
    chosen = worth_a_look(sizes, at_once)
    assert 0 not in chosen
    assert chosen == tuple(range(len(sizes) - len(chosen), len(sizes)))
    in_order = sum(size for place, size in enumerate(sizes) if place not in chosen)
    assert in_order * at_once <= max(sum(sizes), sizes[0] * at_once if sizes else 0)


@pytest.mark.parametrize(
    ("unpacks", "processors", "expected"),
    [(4, 2, 1), (8, 4, 2), (8, 64, 8), (1, 64, 1), (2, 1, 1)],
)
def test_fewer_unpacks_beside_downloads(unpacks, processors, expected):
    assert beside_downloads(unpacks, processors) == expected


def test_downloads_begin_from_both_ends():
    assert download_order([], ()) == ()
    assert download_order([5, 5, 5], ()) == (0, 1, 2)
    # The lowest, the largest that may go alone, the next lowest, ...
    assert download_order([5, 1, 9, 7, 9], (2, 3, 4)) == (0, 2, 1, 4, 3)
    assert download_order([1, 1, 1, 1], (1, 2, 3)) == (0, 1, 2, 3)
    assert download_order([9, 1, 1, 50], (1, 2, 3)) == (0, 3, 1, 2)


@given(st.lists(st.integers(0, 1000), max_size=30), st.integers(2, 6))
def test_each_download_is_begun_once(sizes, at_once):
    order = download_order(sizes, worth_a_look(sizes, at_once))
    assert sorted(order) == list(range(len(sizes)))


def seconds(sizes, order, alone, at_once, link, speed, lines=3):
    """How long a pull takes, in a simple model: lines share the link, each unpack has a processor.

    Downloads begin in the order; a layer is unpacked when it is there and, unless it may go alone,
    the one below is done; the lowest that can be is next.
    """
    now, waiting, coming, ready, working, done = 0.0, list(order), {}, set(), {}, set()
    while len(done) < len(sizes):
        while waiting and len(coming) < lines:
            place = waiting.pop(0)
            coming[place] = float(sizes[place])
        able = sorted(p for p in ready if p in alone or all(q in done for q in range(p)))
        for place in able[: at_once - len(working)]:
            ready.remove(place)
            working[place] = float(sizes[place])
        rates = [(coming, link / max(1, len(coming))), (working, speed)]
        step = min(left / rate for some, rate in rates for left in some.values())
        now += step
        for some, rate in rates:
            for place in list(some):
                some[place] -= rate * step
                if some[place] <= 1e-6:
                    del some[place]
                    (ready if some is coming else done).add(place)
    return now


@pytest.mark.parametrize("link", [0.5, 1, 4, 50])
@pytest.mark.parametrize(
    "sizes",
    [
        [115, 111, 112, 206, 237, 200],
        [30, 5, 5, 5, 5, 5, 5, 200],  # what is usual: the application on top
        [200, 5, 5, 5, 5],
        [10] * 20,
    ],
)
def test_the_order_shortens_what_comes_after_the_last_byte(sizes, link):
    """Not longer than in the order of the chain, and shorter where it can be."""
    alone = worth_a_look(sizes, 4)
    chain = seconds(sizes, range(len(sizes)), alone, 4, link, 1)
    ours = seconds(sizes, download_order(sizes, alone), alone, 4, link, 1)
    assert ours <= chain * 1.02


@pytest.mark.parametrize("link", [0.5, 1, 2])
def test_a_large_layer_on_top_begins_early(link):
    sizes = [20] * 12 + [100]
    alone = worth_a_look(sizes, 4)
    chain = seconds(sizes, range(len(sizes)), alone, 4, link, 1)
    assert seconds(sizes, download_order(sizes, alone), alone, 4, link, 1) < 0.95 * chain


def test_unpacks_by_processors():
    large = [50 << 20] * 20
    assert [unpacks_for(large, n) for n in (1, 2, 3, 4, 64)] == [1, 4, 6, 8, 8]
    assert unpacks_for(large[:3], 4) == 3


def test_small_layers_are_unpacked_one_after_the_other():
    assert unpacks_for([], 4) == 1
    assert unpacks_for([1 << 20] * 40, 4) == 1
    assert unpacks_for([500 << 20, *[1 << 20] * 40], 4) == 1  # the large one is the first anyway
    assert unpacks_for([*[1 << 20] * 3, 500 << 20], 4) == 4


def test_the_overlay_snapshotter_alone_is_given_layers_without_a_parent():
    assert can_rebase("overlayfs", ["remap-ids", "rebase"])
    assert not can_rebase("overlayfs", ["remap-ids"])
    assert not can_rebase("erofs", ["rebase"])
