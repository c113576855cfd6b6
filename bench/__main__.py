"""Pull the same image with ctr and with us, in turn, into the same containerd.

    make bench                       three rounds with each containerd of the machine
    make bench ARGS="--rounds 5 --image small"
    make bench ARGS="--what run"     steps, beside ctr run, docker run, podman run
    make bench ARGS="--what daemon"  our containerd in Docker: start, Envoy against the socket

Prints medians, and the ratio of the two within each round; --json FILE keeps the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from bench.daemon import measure as measure_daemon
from bench.images import Blob, large_layers, small_layers
from bench.run import measure as measure_steps
from tests.support.images import OCI_CONFIG, OCI_LAYER, OCI_MANIFEST, Pusher, sha256
from tests.support.servers import ContainerdServer, RegistryServer, find_containerds

NAMESPACE = "bench"


@dataclass(frozen=True)
class Run:
    """One process: seconds on the clock and of processors, and its largest memory in MB."""

    seconds: float
    client_cpu: float
    daemon_cpu: float
    peak_mb: float


def daemon_cpu(server: ContainerdServer) -> float:
    fields = Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()
    # Its own and its children's (the decompressors).
    return sum(int(fields[i]) for i in (11, 12, 13, 14)) / os.sysconf("SC_CLK_TCK")


def measure(server: ContainerdServer, command: list[str]) -> Run:
    before = daemon_cpu(server)
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr
    err = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stderr.close()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {err.decode()}")
    return Run(
        seconds=seconds,
        client_cpu=usage.ru_utime + usage.ru_stime,
        daemon_cpu=daemon_cpu(server) - before,
        peak_mb=usage.ru_maxrss / 1024,
    )


def push(registry: RegistryServer, name: str, layers: list[Blob]) -> str:
    config = json.dumps(
        {
            "os": "linux",
            "architecture": "amd64",
            "config": {},
            "rootfs": {"type": "layers", "diff_ids": [one.diff_id for one in layers]},
        }
    ).encode()
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": {"mediaType": OCI_CONFIG, "digest": sha256(config), "size": len(config)},
        "layers": [
            {"mediaType": f"{OCI_LAYER}+gzip", "digest": one.digest, "size": one.size}
            for one in layers
        ],
    }
    with Pusher(registry.address) as pusher:
        for one in layers:
            with one.path.open("rb") as file:
                pusher.blob(name, one.digest, file, one.size)
        pusher.blob(name, sha256(config), config)
        pusher.manifest(name, "1", json.dumps(manifest).encode(), OCI_MANIFEST)
    return f"{registry.address}/{name}:1"


def commands(server: ContainerdServer, reference: str) -> dict[str, list[str]]:
    ctr = [str(server.binary.parent / "ctr"), "-a", server.address, "-n", NAMESPACE]
    ours = [sys.executable, "-m", "serpentine", "-a", server.address, "-n", NAMESPACE]
    # ctr of 2.x leaves the pull to the daemon unless told otherwise, and then ignores
    # --plain-http for unpacking options; --local is the way that 1.6 has, too.
    local = ["--local"] if server.version.startswith("2.") else []
    return {
        "ctr": [*ctr, "images", "pull", *local, "--plain-http", reference],
        "serpentine": [*ours, "pull", "-q", reference],
    }


def forget(server: ContainerdServer, reference: str) -> None:
    server.ctr("images", "rm", "--sync", reference, namespace=NAMESPACE)
    left = server.ctr("content", "ls", "-q", namespace=NAMESPACE).split()
    assert not left, f"not cold: {left}"


def compare(server: ContainerdServer, reference: str, rounds: int) -> dict[str, list[Run]]:
    results: dict[str, list[Run]] = {"ctr": [], "serpentine": [], "serpentine, warm": []}
    for number in range(rounds):
        order = list(commands(server, reference).items())
        for name, command in order if number % 2 else reversed(order):
            results[name].append(measure(server, command))
            if name == "serpentine":
                results["serpentine, warm"].append(measure(server, command))
            forget(server, reference)
            os.sync()
    return results


def report(title: str, results: dict[str, list[Run]]) -> None:
    print(f"\n{title}")
    print(f"  {'':18}{'seconds':>9}{'client cpu':>12}{'daemon cpu':>12}{'peak MB':>9}")
    for name, runs in results.items():
        columns = [
            statistics.median(getattr(run, member) for run in runs)
            for member in ("seconds", "client_cpu", "daemon_cpu", "peak_mb")
        ]
        print("  {:18}{:9.2f}{:12.2f}{:12.2f}{:9.0f}".format(name, *columns))
    pairs = zip(results["serpentine"], results["ctr"], strict=True)
    ratios = [ours.seconds / theirs.seconds for ours, theirs in pairs]
    print(
        f"  serpentine / ctr, within a round: {statistics.median(ratios):.2f}"
        f" (from {min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} rounds)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--what", choices=["pull", "daemon", "run", "all"], default="all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--image", choices=["large", "small", "both"], default="both")
    parser.add_argument("--containerd", help="only the version that begins like this")
    parser.add_argument("--json", type=Path, help="also write the figures into this file")
    arguments = parser.parse_args()
    images = {"small": small_layers, "large": large_layers}
    kept = []
    daemon: dict[str, object] = {}
    steps: dict[str, object] = {}
    with RegistryServer() as registry:
        if arguments.what in ("run", "all"):
            steps = measure_steps(registry, arguments.rounds)
        if arguments.what == "run":
            images = {}
        for name, make in images.items():
            if arguments.image not in (name, "both"):
                continue
            layers = make()
            reference = push(registry, f"bench/{name}", layers)
            size = sum(one.size for one in layers) / 1e6
            if name == "large" and arguments.what in ("daemon", "all"):
                daemon = measure_daemon(registry, reference, arguments.rounds)
            if arguments.what == "daemon":
                continue
            for version, binary in find_containerds().items():
                if not version.startswith(arguments.containerd or ""):
                    continue
                with ContainerdServer(binary) as server:
                    results = compare(server, reference, arguments.rounds)
                title = f"{size:.0f} MB in {len(layers)} layers, containerd {version}"
                report(title, results)
                kept.append(
                    {
                        "image": name,
                        "megabytes": size,
                        "containerd": version,
                        "runs": {k: [vars(r) for r in v] for k, v in results.items()},
                    }
                )
    if arguments.json:
        about = {
            "machine": platform.platform(),
            "cores": os.cpu_count(),
            "results": kept,
            "daemon": daemon,
            "steps": steps,
        }
        arguments.json.write_text(json.dumps(about, indent=1))


if __name__ == "__main__":
    main()
