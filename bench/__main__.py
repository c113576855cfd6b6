"""What takes time, beside what you would use instead, in one run.

    make bench                                       everything (an hour or so)
    make bench ARGS="--what pull --image six"        one image; may be given several times
    make bench ARGS="--what pull --link far"         through a link that is shaped, too
    make bench ARGS="--what run"                     steps, beside ctr run, docker run, podman run
    make bench ARGS="--what daemon"                  our containerd in Docker: start, Envoy, socket

Prints medians, and the ratio of the two within each round; --json FILE keeps the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.daemon import measure as measure_daemon
from bench.images import IMAGES, six_layers
from bench.pull import LINKS, measure_pulls, push
from bench.run import measure as measure_steps
from tests.support.servers import RegistryServer


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--what", choices=["pull", "daemon", "run", "all"], default="all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--image", choices=IMAGES, action="append", help="only this; repeatable")
    parser.add_argument("--link", choices=LINKS, action="append", help="only this; repeatable")
    parser.add_argument(
        "--decompressor",
        choices=["built in", "igzip"],
        action="append",
        help="only with what containerd has built in, or only with igzip",
    )
    parser.add_argument("--containerd", default="", help="only the version that begins like this")
    parser.add_argument("--json", type=Path, help="also write the figures into this file")
    arguments = parser.parse_args()
    kept: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": platform.platform(),
        "cores": os.cpu_count(),
    }

    def save() -> None:
        # After each case: all of it takes long, and may be ended before.
        if arguments.json:
            arguments.json.write_text(json.dumps(kept, indent=1))

    if arguments.what in ("run", "all"):
        with RegistryServer() as registry:
            kept["steps"] = measure_steps(registry, arguments.rounds)
    if arguments.what in ("daemon", "all"):
        with RegistryServer() as registry:
            reference = f"{registry.address}/{push(registry, 'bench/six', six_layers())}"
            kept["daemon"] = measure_daemon(registry, reference, arguments.rounds)
    if arguments.what in ("pull", "all"):
        decompressors = arguments.decompressor or ["built in", "igzip"]
        if "igzip" in decompressors and not shutil.which("igzip"):
            print("LEFT OUT: igzip is not on this machine")
            decompressors.remove("igzip")
        cases = measure_pulls(
            images=arguments.image or list(IMAGES),
            links=arguments.link or list(LINKS),
            decompressors=decompressors,
            containerd=arguments.containerd,
            rounds=arguments.rounds,
        )
        kept["pulls"] = []
        for case in cases:
            kept["pulls"].append(case)
            save()
    save()


if __name__ == "__main__":
    main()
