"""Steps beside ``ctr run``, ``docker run`` and ``podman run``: the same image, in turn, in one run.

Ours is ``engine.run`` inside a running program, as a graph of steps uses it; the others are what
their user types.
"""

from __future__ import annotations

import asyncio
import gzip
import os
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Awaitable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from serpentine import ContainerState, Engine
from tests.support.engines import DockerServer, PodmanServer
from tests.support.images import busybox_layer, image, push
from tests.support.servers import ContainerdServer, RegistryServer, find_containerds

NAMESPACE = "bench"
IMAGE = "localhost/bench:1"
GIGABYTE = 1 << 30
# Podman's own defaults are more than some machines allow.
LIMITS = ["--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024"]


def timed(command: list[str]) -> float:
    """Run a command; return its seconds."""
    begin = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.monotonic() - begin


async def awaited(work: Awaitable[object]) -> float:
    """Await something; return its seconds."""
    begin = time.monotonic()
    await work
    return time.monotonic() - begin


def report(title: str, runs: dict[str, list[float]], against: list[tuple[str, str]]) -> None:
    """Print medians, and the ratios within the rounds."""
    print(f"\n{title}")
    for name, seconds in runs.items():
        print(f"  {name:28}{statistics.median(seconds):8.3f} s")
    for ours, theirs in against:
        if theirs in runs:
            ratios = [a / b for a, b in zip(runs[ours], runs[theirs], strict=True)]
            print(
                f"  {ours} / {theirs}, within a round: {statistics.median(ratios):.2f}"
                f" (from {min(ratios):.2f} to {max(ratios):.2f})"
            )


def engines(stack: ExitStack, tree: bytes) -> dict[str, list[str]]:
    """Start Docker and Podman, with the same tree as an image; return their clients."""
    clients: dict[str, list[str]] = {}
    for name, kind in (("docker", DockerServer), ("podman", PodmanServer)):
        if shutil.which(name) is None:
            print(f"LEFT OUT: {name} is not on this machine")
            continue
        server = stack.enter_context(kind())
        with tempfile.NamedTemporaryFile(suffix=".tar") as file:
            file.write(tree)
            file.flush()
            server.import_image(Path(file.name), IMAGE)
        clients[name] = server.client
    return clients


async def start_and_end(
    engine: Engine,
    state: ContainerState,
    ctr: list[str],
    clients: dict[str, list[str]],
    rounds: int,
) -> dict[str, list[float]]:
    """Run ``true``, with a network and without."""
    runs: dict[str, list[float]] = {}

    def note(name: str, seconds: float) -> None:
        runs.setdefault(name, []).append(seconds)

    for number in range(rounds):
        note("ctr, no network", timed([*ctr, f"x{number}", "true"]))
        for network in ("none", "bridge"):
            work = engine.run(state, ["true"], network=network, commit=False)
            note(f"serpentine, {network}", await awaited(work))
            for name, client in clients.items():
                limits = LIMITS if name == "podman" else []
                command = [*client, "run", "--rm", f"--network={network}", *limits, IMAGE, "true"]
                note(f"{name}, {network}", timed(command))
    return runs


async def chain(engine: Engine, state: ContainerState, length: int = 100) -> dict[str, Any]:
    """Run steps that each build on the one before; see whether anything grows."""
    seconds, memory, made = [], [], []
    for number in range(length):
        begin = time.monotonic()
        result = await engine.run(state, f"echo {number} >>/numbers", network="none")
        seconds.append(time.monotonic() - begin)
        assert result.state is not None
        state = result.state
        made.append(state)
        memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
    records = len(await engine.containerd.containers.all())
    tasks = len(await engine.containerd.tasks.all())
    first, last = statistics.median(seconds[5:25]), statistics.median(seconds[-20:])
    print(f"\n{length} steps in a chain, one layer each")
    print(f"  steps 6 to 25: {first:.3f} s each; the last 20: {last:.3f} s each")
    print(f"  our peak memory after 10: {memory[9]} MB, after all: {memory[-1]} MB")
    print(f"  left in containerd: {records} containers, {tasks} tasks")
    for one in reversed(made):
        await engine.remove_state(one)
    return {"seconds": seconds, "memory_mb": memory, "containers": records, "tasks": tasks}


async def at_once(engine: Engine, state: ContainerState, number: int = 50) -> float:
    """Run many steps at once."""
    begin = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for _ in range(number):
            group.create_task(engine.run(state, ["true"], commit=False, check=True))
    seconds = time.monotonic() - begin
    print(f"\n{number} steps at once, with a network: {seconds:.1f} s, none failed")
    return seconds


async def stream(engine: Engine, state: ContainerState) -> dict[str, float]:
    """Let a step print a gigabyte."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    script = f"dd if=/dev/zero bs=1M count={GIGABYTE >> 20} 2>/dev/null"
    seconds = await awaited(engine.run(state, script, network="none", commit=False, check=True))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    rate = GIGABYTE / 1e6 / seconds
    print(f"\n1 GiB of output: {rate:.0f} MB/s, our peak memory grew by {grown:.0f} MB")
    return {"megabytes_per_second": rate, "memory_grown_mb": grown}


async def copy(
    engine: Engine, state: ContainerState, docker: list[str] | None, rounds: int
) -> dict[str, list[float]]:
    """Copy a gigabyte in and out, beside ``docker cp``."""
    runs: dict[str, list[float]] = {}

    def note(name: str, seconds: float) -> None:
        runs.setdefault(name, []).append(seconds)

    with tempfile.TemporaryDirectory(prefix="spt-") as name:
        folder = Path(name)
        source = folder / "data"
        with source.open("wb") as file:
            for _ in range(GIGABYTE >> 20):
                file.write(os.urandom(1 << 20))
        # Or whoever comes first waits for the disk.
        os.sync()
        for number in range(rounds):
            begin = time.monotonic()
            after = await engine.copy_in(state, source, "/data")
            note("serpentine, in", time.monotonic() - begin)
            note("serpentine, out", await awaited(engine.copy_out(after, "/data", folder / "out")))
            (folder / "out").unlink()
            await engine.remove_state(after)
            if docker:
                box = f"cp{number}"
                timed([*docker, "create", "--name", box, IMAGE, "true"])
                note("docker cp, in", timed([*docker, "cp", str(source), f"{box}:/data"]))
                note("docker cp, out", timed([*docker, "cp", f"{box}:/data", str(folder / "out")]))
                (folder / "out").unlink()
                timed([*docker, "rm", box])
            os.sync()
    return runs


def measure(registry: RegistryServer, rounds: int) -> dict[str, Any]:
    """Measure all of it; prints as it goes."""
    containerds = find_containerds()
    made = image([busybox_layer()])
    tree = gzip.decompress(max(made.blobs.values(), key=len))
    reference = push(registry, "bench/run", "1", made)
    with ExitStack() as stack:
        server = stack.enter_context(ContainerdServer(containerds[max(containerds)]))
        for name in ("SERPENTINE_RUN_DIR", "SERPENTINE_DATA_DIR"):
            os.environ[name] = str(server.folder / name.lower())
        clients = engines(stack, tree)
        program = str(server.binary.parent / "ctr")
        ctr = [program, "-a", server.address, "-n", NAMESPACE, "run", "--rm", reference]

        async def work() -> dict[str, Any]:
            found: dict[str, Any] = {"containerd": server.version}
            async with server.connect(namespace=NAMESPACE) as engine:
                state = await engine.pull_image(reference)
                await engine.run(state, ["true"], commit=False)
                times = await start_and_end(engine, state, ctr, clients, max(rounds, 7))
                against = [
                    ("serpentine, none", "ctr, no network"),
                    ("serpentine, none", "docker, none"),
                    ("serpentine, bridge", "docker, bridge"),
                    ("serpentine, bridge", "podman, bridge"),
                ]
                report(f"'true' on containerd {server.version}", times, against)
                found["true"] = times
                found["chain"] = await chain(engine, state)
                found["at_once"] = await at_once(engine, state)
                found["stream"] = await stream(engine, state)
                copied = await copy(engine, state, clients.get("docker"), rounds)
                against = [
                    ("serpentine, in", "docker cp, in"),
                    ("serpentine, out", "docker cp, out"),
                ]
                report("1 GiB copied", copied, against)
                found["copied"] = copied
            return found

        return asyncio.run(work())
