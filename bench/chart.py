"""Bars of what was measured, as a picture for docs/performance.md.

python -m bench.chart FIGURES.json PICTURE.svg
"""

from __future__ import annotations

import json
import statistics
import sys
from html import escape
from pathlib import Path
from typing import Any

WIDTH, LABEL, BAR, GAP, HEAD = 760, 190, 14, 4, 34
COLORS = {"serpentine": "#2f6f4f", "serpentine, 4 unpacks": "#7fb596"}
OTHER = "#9a9a9a"


def bars(case: dict[str, Any]) -> dict[str, float]:
    """Return the median seconds of each cold pull."""
    return {
        name: statistics.median(run["seconds"] for run in runs)
        for name, runs in case["runs"].items()
        if not name.endswith("warm")
    }


def draw(cases: list[dict[str, Any]]) -> str:
    """Return an SVG: for each case a bar per program, to a scale of the case's own."""
    parts: list[str] = []
    y = 10
    for case in cases:
        found = bars(case)
        scale = (WIDTH - LABEL - 70) / max(found.values())
        title = f"{case['image']}, {case['megabytes']:.0f} MB, {case['link']}"
        title += f", containerd {case['containerd'].partition('+')[0]}, {case['decompressor']}"
        parts.append(f'<text x="0" y="{y + 12}" font-weight="bold">{escape(title)}</text>')
        y += 20
        for name, seconds in found.items():
            parts.append(
                f'<text x="{LABEL - 8}" y="{y + 11}" text-anchor="end">{escape(name)}</text>'
                f'<rect x="{LABEL}" y="{y}" width="{seconds * scale:.1f}" height="{BAR}"'
                f' fill="{COLORS.get(name, OTHER)}"/>'
                f'<text x="{LABEL + seconds * scale + 6:.1f}" y="{y + 11}">{seconds:.1f} s</text>'
            )
            y += BAR + GAP
        y += HEAD - 20
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y}"'
        ' font-family="sans-serif" font-size="12">'
        f'<rect width="100%" height="100%" fill="#ffffff"/>{"".join(parts)}</svg>\n'
    )


def main() -> None:
    figures, picture = map(Path, sys.argv[1:])
    picture.write_text(draw(json.loads(figures.read_text())["pulls"]))


if __name__ == "__main__":
    main()
