"""Our containerd in Docker: how fast it comes up, is found, and pulls through Envoy.

Docker is a real one with data of its own; our image is built before anything is timed.  The two
ways to reach containerd, socket and Envoy, pull the same image in turn, cold, in one run.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import serpentine
from serpentine.daemon.discovery import find
from serpentine.events import ignore
from tests.support.engines import DockerServer, Mirror, OurDaemon
from tests.support.servers import RegistryServer, find_containerds

NAMESPACE = "bench"


def command(daemon: OurDaemon, *arguments: str) -> float:
    """Run the command line; return its seconds."""
    begin = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "serpentine", *arguments],
        env={**os.environ, **daemon.environ},
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return time.monotonic() - begin


def start(daemon: OurDaemon) -> dict[str, float]:
    """Bring it up with nothing there but the image; then look how fast it is found."""
    names = daemon.names
    daemon.engine.run("rm", "-f", names.containerd, names.envoy, check=False)
    daemon.engine.run("volume", "rm", "-f", names.data_volume, names.run_volume, check=False)
    shutil.rmtree(daemon.folder / "data", ignore_errors=True)
    seconds = {"start": command(daemon, "daemon", "start")}

    async def look() -> float:
        settings = daemon.settings()
        await find(settings, on_event=ignore)  # the first one pays for the imports
        begin = time.monotonic()
        await find(settings, on_event=ignore)
        return time.monotonic() - begin

    seconds["found"] = asyncio.run(look())
    seconds["a command"] = command(daemon, "images")
    return seconds


async def _pull(daemon: OurDaemon, reference: str) -> float:
    settings = daemon.settings(namespace=NAMESPACE)
    async with serpentine.connect(settings=settings) as engine:
        begin = time.monotonic()
        await engine.pull_image(reference)
        seconds = time.monotonic() - begin
        await engine.remove_image(reference)
        assert not await engine.containerd.content.all(), "not cold"
    os.sync()
    return seconds


def measure(registry: RegistryServer, reference: str, rounds: int) -> dict[str, object]:
    """Measure all of it; prints as it goes."""
    containerds = find_containerds()
    newest = Path(containerds[max(containerds)]).parent
    with ExitStack() as stack:
        docker = stack.enter_context(DockerServer()).with_images()
        folders = [Path(tempfile.mkdtemp(prefix="spt-")) for _ in range(3)]
        for folder in folders:
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
        mirror = stack.enter_context(Mirror(folders[0], newest).serving())
        socket = OurDaemon(docker, mirror, folders[1])
        envoy = OurDaemon(docker, mirror, folders[2], SERPENTINE_TRANSPORT="envoy")
        command(socket, "daemon", "start")  # builds the image
        found: dict[str, object] = {}
        for name, daemon in (("socket", socket), ("envoy", envoy)):
            runs = [start(daemon) for _ in range(rounds)]
            middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            found[name] = runs
            print(f"\nour containerd in Docker, {name}, medians of {rounds}")
            print(f"  daemon start, only the image there:    {middle['start']:.2f} s")
            print(f"  one that runs is found in:             {middle['found'] * 1000:.0f} ms")
            print(f"  'serpentine images' from the shell:    {middle['a command']:.2f} s")
        pulls: dict[str, list[float]] = {"socket": [], "envoy": []}
        for number in range(rounds):
            order = [("socket", socket), ("envoy", envoy)]
            for name, daemon in order if number % 2 else reversed(order):
                pulls[name].append(asyncio.run(_pull(daemon, reference)))
        ratios = [e / s for s, e in zip(pulls["socket"], pulls["envoy"], strict=True)]
        print(f"\npull of {reference.rpartition('/')[2]}, in turn, medians of {rounds}")
        for name, seconds in pulls.items():
            print(f"  {name:8}{statistics.median(seconds):7.2f} s")
        print(
            f"  envoy / socket, within a round: {statistics.median(ratios):.2f}"
            f" (from {min(ratios):.2f} to {max(ratios):.2f})"
        )
        found["pulls"] = pulls
    copied: dict[str, object] = json.loads(json.dumps(found))
    return copied
