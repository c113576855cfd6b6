"""Bars of what was measured, as a picture for docs/performance.md.

    python -m bench.chart FIGURES.json PICTURE.svg

Readable on a light page and on a dark one: it has no background, and its colours are between both.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

Case = dict[str, Any]
WIDTH, LABEL, VALUE, BAR, GAP = 760, 210, 110, 14, 5
TEXT, OURS, OURS_TOO, OTHER = "#767c85", "#1f9d6a", "#63b391", "#9097a1"

# What one sees of an image, a link and a decompressor.
TITLES = {
    ("six", "loopback", "built in"): "Six large layers, loopback",
    ("six", "loopback", "igzip"): "Six large layers, loopback, containerd and Docker with igzip",
    ("six", "narrow", "built in"): "Six large layers, a line of 50 MB/s",
    ("one", "far", "built in"): "One large layer, a line of 200 MB/s, 50 MB/s per connection",
    ("forty", "loopback", "built in"): "Forty small layers, loopback",
    ("hundred-twenty", "loopback", "built in"): "120 small layers, loopback",
    ("files", "loopback", "built in"): "100,000 small files, loopback",
    ("zstd", "loopback", "built in"): "Six large layers of zstd, loopback",
}
WARM_OF = ("six", "loopback", "built in")


@dataclass(frozen=True)
class Panel:
    """A title and, for each program, the seconds of its runs."""

    title: str
    runs: dict[str, list[float]]


def panels(cases: Iterable[Case]) -> list[Panel]:
    """Return what is drawn: the main cases with the newest containerd, then a second pull."""
    there = {
        (case["image"], case["link"], case["decompressor"]): case
        for case in cases
        if case["newest"]
    }
    found = []
    for key, title in TITLES.items():
        if case := there.get(key):
            runs = {n: r for n, r in _seconds(case).items() if "warm" not in n.split(", ")}
            found.append(Panel(f"{title}, {case['megabytes']:.0f} MB", runs))
    if case := there.get(WARM_OF):
        runs = {
            ", ".join(part for part in name.split(", ") if part != "warm"): seconds
            for name, seconds in _seconds(case).items()
            if "warm" in name.split(", ")
        }
        found.append(Panel("The six again, with all there", runs))
    return found


def _seconds(case: Case) -> dict[str, list[float]]:
    return {name: [run["seconds"] for run in runs] for name, runs in case["runs"].items()}


def draw(found: Iterable[Panel], note: str) -> str:
    """Return an SVG: for each panel a bar per program, to a scale of the panel's own.

    A bar is the median; the line at its end goes from the fastest to the slowest run.
    """
    parts: list[str] = []
    y = 6
    for panel in found:
        parts.append(f'<text x="0" y="{y + 12}" font-weight="bold">{escape(panel.title)}</text>')
        y += 22
        longest = max(max(runs) for runs in panel.runs.values())
        scale, digits = (WIDTH - LABEL - VALUE) / longest, 1 if longest >= 10 else 2
        ours = ["serpentine" in name for name in panel.runs]
        # Ours first, then the others, the fastest first.
        order = sorted(
            zip(ours, panel.runs.items(), strict=True),
            key=lambda one: (not one[0], statistics.median(one[1][1]), one[1][0]),
        )
        for _, (name, runs) in order:
            parts.extend(_bar(name, runs, scale, digits, y))
            y += BAR + GAP
        y += 16
    parts.append(f'<text x="0" y="{y + 8}" font-size="11">{escape(note)}</text>')
    y += 16
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y}"'
        f' viewBox="0 0 {WIDTH} {y}" role="img" aria-label="Seconds that pulls took"'
        f' font-family="sans-serif" font-size="12" fill="{TEXT}">\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _bar(name: str, runs: list[float], scale: float, digits: int, y: int) -> Iterable[str]:
    middle, least, most = statistics.median(runs), min(runs), max(runs)
    ours = OURS if name == "serpentine" else OURS_TOO
    color = ours if name.startswith("serpentine") else OTHER
    center = y + BAR / 2
    yield f'<text x="{LABEL - 8}" y="{y + 11}" text-anchor="end">{escape(name)}</text>'
    yield (
        f'<rect x="{LABEL}" y="{y}" width="{middle * scale:.1f}" height="{BAR}" fill="{color}"/>'
    )
    if most > least:
        yield (
            f'<line x1="{LABEL + least * scale:.1f}" x2="{LABEL + most * scale:.1f}"'
            f' y1="{center}" y2="{center}" stroke="{TEXT}"/>'
        )
    yield f'<text x="{LABEL + most * scale + 6:.1f}" y="{y + 11}">{middle:.{digits}f} s</text>'


def main() -> None:
    figures, picture = map(Path, sys.argv[1:])
    kept = json.loads(figures.read_text())
    found = panels(kept["pulls"])
    if not found:
        raise SystemExit(f"{figures} has none of the main cases")
    versions = {case["containerd"] for case in kept["pulls"] if case["newest"]}
    note = f"Seconds, medians of {kept['rounds']} rounds, with the fastest and the slowest;"
    note += f" containerd {', '.join(sorted(versions))}, {kept['cores']} cores, {kept['date']}"
    picture.write_text(draw(found, note))


if __name__ == "__main__":
    main()
