"""What takes time, beside what you would use instead, in one run.

    make bench                                       all that the goals need (see bench/cases.py)
    make bench ARGS="--what pull"                    pulls only
    make bench ARGS="--what pull --image six"        one image; may be given several times
    make bench ARGS="--what pull --image one --link far --decompressor igzip"     exactly that
    make bench ARGS="--what pull --tool ctr --tool podman"      only these beside ours
    make bench ARGS="--what run"                     steps, beside ctr run, docker run, podman run
    make bench ARGS="--what daemon"                  our containerd in Docker: start, Envoy, socket

Prints medians, the ratio of the two within each round, and what was reached of the goals; --json
FILE keeps the figures, of which bench.chart draws a picture and bench.goals tells the goals again.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import platform
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.cases import DECOMPRESSORS, LINKS, TOOLS, choose
from bench.daemon import measure as measure_daemon
from bench.goals import as_data, lines
from bench.images import CACHE, IMAGES, six_layers
from bench.pull import measure_pulls, push
from bench.run import measure as measure_steps
from bench.tools import ROOT, left_out, missing, versions
from tests.support.servers import RegistryServer


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--what", choices=["pull", "daemon", "run", "all"], default="all")
    parser.add_argument("--rounds", type=int, default=3)
    for name, choices in (
        ("--image", IMAGES),
        ("--link", LINKS),
        ("--decompressor", DECOMPRESSORS),
        ("--tool", TOOLS),
    ):
        parser.add_argument(name, choices=choices, action="append", help="only this; repeatable")
    parser.add_argument("--containerd", default="", help="only the version that begins like this")
    parser.add_argument(
        "--json",
        type=Path,
        default=CACHE / "figures.json",
        help="write the figures into this file (without it: .cache/bench/figures.json)",
    )
    arguments = parser.parse_args()
    # As pip does when it installs us.  Where Python is told to write no bytecode, each of our
    # starts would compile all that it imports.
    compileall.compile_dir(ROOT / "src", quiet=1)
    kept: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": platform.platform(),
        "cores": os.cpu_count(),
        "rounds": arguments.rounds,
        "versions": versions(),
    }

    def save() -> None:
        # After each case: all of it takes long, and may be ended before.
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(kept, indent=1))

    if arguments.what in ("run", "all"):
        with RegistryServer() as registry:
            kept["steps"] = measure_steps(registry, arguments.rounds)
    if arguments.what in ("daemon", "all"):
        with RegistryServer() as registry:
            reference = f"{registry.address}/{push(registry, 'bench/six', six_layers())}"
            kept["daemon"] = measure_daemon(registry, reference, arguments.rounds)
    if arguments.what in ("pull", "all"):
        plans = choose(
            arguments.image or [],
            arguments.link or [],
            arguments.decompressor or [],
            arguments.tool or [],
            arguments.containerd,
        )
        if not shutil.which("igzip"):
            if any(plan.decompressor == "igzip" for plan in plans):
                left_out("igzip is not on this machine (Debian: isal)")
            plans = [plan for plan in plans if plan.decompressor != "igzip"]
        kept["pulls"] = []
        for case in measure_pulls(plans, containerd=arguments.containerd, rounds=arguments.rounds):
            kept["pulls"].append(case)
            kept["goals"] = as_data(kept["pulls"])
            kept["left out"] = missing
            save()
        print("\n".join(lines(kept["pulls"])))
        for what in missing:
            print(f"LEFT OUT: {what}")
    save()


if __name__ == "__main__":
    main()
