"""What the bench makes of its figures: goals, and a picture."""

from xml.etree import ElementTree as ET

from bench.cases import PLANS, choose
from bench.chart import draw, panels
from bench.goals import best_peer, lines, outcomes, per_layer


def case(image, runs, *, layers=6, link="loopback", newest=True):
    return {
        "image": image,
        "layers": layers,
        "megabytes": 1000.0,
        "link": link,
        "decompressor": "built in",
        "newest": newest,
        "runs": {
            name: [{"seconds": one, "peak_mb": 60.0} for one in seconds]
            for name, seconds in runs.items()
        },
    }


def measured(cases):
    return {one.name: (one.measured, one.met) for one in outcomes(cases)}


def test_a_ratio_is_the_median_of_those_within_the_rounds():
    # Of the medians it would be 1.0.
    found = measured([case("six", {"serpentine": [1, 2, 9], "ctr": [2, 1, 3]})])
    assert found["six layers, loopback, beside ctr as it comes"] == (2.0, False)


def test_what_was_not_measured_is_neither_met_nor_missed():
    found = measured([case("six", {"serpentine": [1], "ctr": [1]}, newest=False)])
    assert found["six layers, loopback, beside ctr as it comes"] == (None, None)
    assert found["forty layers, beside the best peer"] == (None, None)
    assert any("not measured" in line for line in lines([]))


def test_the_line_alone_is_what_a_narrow_one_is_held_against():
    found = measured([case("six", {"serpentine": [22.0]}, link="narrow")])
    assert found["six layers, 50 MB/s: beside bytes / link"] == (1.1, True)


def test_the_best_peer_is_none_of_ours_and_pulls_from_nothing():
    runs = {"serpentine, in order": [1], "ctr, warm": [1], "podman": [3], "ctr": [2]}
    assert best_peer(case("forty", runs)) == "ctr"
    assert best_peer(case("forty", {"serpentine": [1]})) is None


def test_the_time_of_a_layer_leaves_out_what_a_pull_costs_by_itself():
    cases = [
        case(image, {"serpentine": [1 + layers / 10]}, layers=layers)
        for image, layers in (("ten", 10), ("forty", 40), ("hundred-twenty", 120))
    ]
    first, second = per_layer(cases, "serpentine")
    assert abs(first - 0.1) < 1e-9
    assert abs(second - 0.1) < 1e-9
    assert per_layer(cases[:2], "serpentine") is None


def test_a_picture_has_a_bar_for_each_program_and_is_the_same_each_time():
    cases = [case("six", {"serpentine": [2, 3], "a<b": [4, 4], "ctr, warm": [1, 1]})]
    picture = draw(panels(cases), "of today")
    assert picture == draw(panels(cases), "of today")
    names = [one.tag.rpartition("}")[2] for one in ET.fromstring(picture).iter()]
    assert names.count("rect") == 3


def test_what_is_named_in_full_is_measured_though_no_goal_needs_it():
    assert choose([], [], [], [], "") == list(PLANS)
    assert {plan.image for plan in choose(["six"], [], [], [], "")} == {"six"}
    (one,) = (plan for plan in choose(["zstd"], ["far"], ["igzip"], ["ctr"], "") if not plan.older)
    assert (one.image, one.link, one.decompressor, one.tools) == ("zstd", "far", "igzip", ("ctr",))
    assert choose(["small"], [], [], [], "")[0].link == "loopback"
