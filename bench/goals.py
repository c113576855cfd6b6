"""What the figures are to be, beside what they are.

python -m bench.goals FIGURES.json
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.cases import LINKS

Case = dict[str, Any]
OURS = "serpentine"
# What is in question is whether we are as fast as the best; these are others of ours, or warm.
PEERS = ("ctr", "ctr, local", "ctr, 4 unpacks", "ctr, ranges", "docker", "podman", "buildkit")


@dataclass(frozen=True)
class Goal:
    """value: what is measured, or None where it was not; it is to be ``most`` at most."""

    name: str
    most: float
    value: Callable[[Sequence[Case]], float | None]
    unit: str = ""


@dataclass(frozen=True)
class Outcome:
    name: str
    goal: float
    unit: str
    measured: float | None
    met: bool | None


def seconds(case: Case, name: str) -> list[float]:
    return [run["seconds"] for run in case["runs"].get(name, [])]


def find(
    cases: Iterable[Case], image: str, link: str = "loopback", decompressor: str = "built in"
) -> Case | None:
    """Return the case with the newest containerd."""
    wanted = (image, link, decompressor)
    for case in cases:
        if case["newest"] and (case["image"], case["link"], case["decompressor"]) == wanted:
            return case
    return None


def ratio(case: Case, ours: str, theirs: str) -> float | None:
    """Return the median of how long ours took for each second of theirs, within a round."""
    pairs = list(zip(seconds(case, ours), seconds(case, theirs), strict=False))
    return statistics.median(a / b for a, b in pairs) if pairs else None


def against(
    image: str, theirs: str, ours: str = OURS, **where: str
) -> Callable[[Sequence[Case]], float | None]:
    def value(cases: Sequence[Case]) -> float | None:
        case = find(cases, image, **where)
        return ratio(case, ours, theirs) if case else None

    return value


def best_peer(case: Case) -> str | None:
    """Return whose median is the least."""
    there = [name for name in PEERS if name in case["runs"]]
    return min(there, key=lambda name: statistics.median(seconds(case, name)), default=None)


def against_best(image: str) -> Callable[[Sequence[Case]], float | None]:
    def value(cases: Sequence[Case]) -> float | None:
        case = find(cases, image)
        peer = best_peer(case) if case else None
        return ratio(case, OURS, peer) if case and peer else None

    return value


def of_the_link(image: str, link: str) -> Callable[[Sequence[Case]], float | None]:
    """Compare with the time that the bytes alone need."""
    rate = LINKS[link].total

    def value(cases: Sequence[Case]) -> float | None:
        if (case := find(cases, image, link)) is None:
            return None
        megabytes: float = case["megabytes"]
        return statistics.median(seconds(case, OURS)) / (megabytes * 1e6 / rate)

    return value


def warm(image: str, name: str) -> Callable[[Sequence[Case]], float | None]:
    def value(cases: Sequence[Case]) -> float | None:
        case = find(cases, image)
        found = seconds(case, name) if case else []
        return statistics.median(found) if found else None

    return value


def peak_memory(cases: Sequence[Case]) -> float | None:
    """Return the most of all our cold pulls."""
    found = [run["peak_mb"] for case in cases for run in case["runs"].get(OURS, [])]
    return max(found, default=None)


def per_layer(cases: Sequence[Case], name: str) -> tuple[float, float] | None:
    """Return the seconds of one more layer, between 10 and 40 and between 40 and 120."""
    points = []
    for image in ("ten", "forty", "hundred-twenty"):
        case = find(cases, image)
        if case is None or not seconds(case, name):
            return None
        points.append((case["layers"], statistics.median(seconds(case, name))))
    first, second = (
        (after[1] - before[1]) / (after[0] - before[0]) for before, after in pairwise(points)
    )
    return first, second


def growth(cases: Sequence[Case]) -> float | None:
    found = per_layer(cases, OURS)
    return found[1] / found[0] if found and found[0] > 0 else None


SIX = "six layers, loopback, beside "
GOALS = (
    Goal(SIX + "ctr as it comes", 0.8, against("six", "ctr")),
    Goal(SIX + "ctr with four unpacks", 1.1, against("six", "ctr, 4 unpacks")),
    Goal(SIX + "Docker", 0.5, against("six", "docker")),
    Goal(SIX + "Podman", 0.5, against("six", "podman")),
    Goal(SIX + "BuildKit", 1.0, against("six", "buildkit")),
    Goal("the same, igzip for all: beside ctr", 0.8, against("six", "ctr", decompressor="igzip")),
    Goal(
        "the same, igzip for all: beside ctr with four unpacks",
        1.1,
        against("six", "ctr, 4 unpacks", decompressor="igzip"),
    ),
    Goal("six layers, 50 MB/s: beside bytes / link", 1.15, of_the_link("six", "narrow")),
    Goal("one layer, 4 x 50 MB/s: beside ctr", 0.4, against("one", "ctr", link="far")),
    Goal("forty layers, beside the best peer", 1.0, against_best("forty")),
    Goal("100,000 small files, beside the best peer", 1.0, against_best("files")),
    Goal("peak memory of ours, any cold pull", 96, peak_memory, "MB"),
    Goal("warm, from the shell", 0.35, warm("six", "serpentine, warm"), "s"),
    Goal(
        "warm, after the imports, beside ctr",
        1.5,
        against("six", "ctr, warm", "serpentine, warm, after imports"),
    ),
    Goal("one more layer after 40, beside one before", 1.2, growth),
)


def outcomes(cases: Sequence[Case]) -> list[Outcome]:
    """Compare each goal with what was measured."""
    found = []
    for goal in GOALS:
        value = goal.value(cases)
        met = None if value is None else value <= goal.most
        found.append(Outcome(goal.name, goal.most, goal.unit, value, met))
    return found


def lines(cases: Sequence[Case]) -> Iterable[str]:
    """Yield a table of the goals in Markdown, and the time of a layer for each program."""
    yield "| goal | at most | measured | |"
    yield "|---|---|---|---|"
    for one in outcomes(cases):
        unit = f" {one.unit}" if one.unit else ""
        measured = (
            ""
            if one.measured is None
            else f"{one.measured:.{0 if one.measured > 10 else 2}f}{unit}"
        )
        met = {True: "met", False: "NOT MET", None: "not measured"}[one.met]
        yield f"| {one.name} | {one.goal:g}{unit} | {measured} | {met} |"
    yield ""
    for image in ("forty", "files"):
        if (case := find(cases, image)) and (peer := best_peer(case)):
            yield f"The best peer of {image}: {peer}."
    names = [*dict.fromkeys(name for case in cases for name in case["runs"] if "warm" not in name)]
    slopes = {name: found for name in names if (found := per_layer(cases, name))}
    if slopes:
        yield ""
        yield "| milliseconds per layer more | 10 to 40 | 40 to 120 |"
        yield "|---|---|---|"
        for name, (first, second) in slopes.items():
            yield f"| {name} | {first * 1000:.0f} | {second * 1000:.0f} |"


def as_data(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Return the outcomes for the file of figures."""
    return [asdict(one) for one in outcomes(cases)]


def main() -> None:
    print("\n".join(lines(json.loads(Path(sys.argv[1]).read_text())["pulls"])))


if __name__ == "__main__":
    main()
