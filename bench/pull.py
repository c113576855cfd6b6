"""Pulls, cold and warm, each program in turn within a round."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.images import IMAGES, Blob
from bench.link import Link, shaped
from bench.tools import Ctr, Serpentine, Tool, decompress_with, engines
from tests.support.images import OCI_CONFIG, OCI_LAYER, OCI_MANIFEST, Pusher, sha256
from tests.support.servers import ContainerdServer, RegistryServer, find_containerds

LOOPBACK = Link("loopback", 0.0, 0.0, 0.0)
FAR = Link("50 MB/s per connection, 200 MB/s, 20 ms", 50e6, 200e6, 0.02)
NARROW = Link("50 MB/s, 20 ms", 50e6, 50e6, 0.02)
LINKS = {"loopback": LOOPBACK, "far": FAR, "narrow": NARROW}


@dataclass(frozen=True)
class Run:
    """One process: seconds on the clock and of processors, MB of memory and from the registry."""

    seconds: float
    client_cpu: float
    daemon_cpu: float
    peak_mb: float
    wire_mb: float


@dataclass
class Case:
    """What was measured under the same conditions."""

    image: str
    layers: int
    megabytes: float
    unpacked: float
    link: str
    containerd: str
    decompressor: str
    runs: dict[str, list[Run]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return (
            f"{self.image}: {self.megabytes:.0f} MB in {self.layers} layers"
            f" ({self.unpacked:.0f} MB unpacked), {self.link}, containerd {self.containerd},"
            f" {self.decompressor}"
        )

    def median(self, name: str, member: str = "seconds") -> float:
        return statistics.median(getattr(run, member) for run in self.runs[name])

    def ratios(self, ours: str, theirs: str) -> list[float]:
        """Return how long ours took for each second of theirs, round by round."""
        pairs = zip(self.runs[ours], self.runs[theirs], strict=True)
        return [one.seconds / other.seconds for one, other in pairs]


def processor_time(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    # Its own and its children's (the decompressors).
    return sum(int(fields[i]) for i in (11, 12, 13, 14)) / os.sysconf("SC_CLK_TCK")


def served(registry: RegistryServer) -> int:
    """Return the bytes of all answers so far, by the registry's own log."""
    return sum(map(int, re.findall(r'HTTP/[\d.]+" \d+ (\d+)', registry.log.read_text())))


def measure(tool: Tool, registry: RegistryServer, reference: str) -> Run:
    before, sent = processor_time(tool.daemon) if tool.daemon else 0.0, served(registry)
    start = time.monotonic()
    process = subprocess.Popen(
        tool.command(reference),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, **tool.environ},
    )
    assert process.stderr
    err = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stderr.close()
    if process.returncode:
        raise SystemExit(f"{' '.join(tool.command(reference))} failed: {err.decode()}")
    after = processor_time(tool.daemon) if tool.daemon else 0.0
    return Run(
        seconds=seconds,
        client_cpu=usage.ru_utime + usage.ru_stime,
        daemon_cpu=after - before,
        peak_mb=usage.ru_maxrss / 1024,
        wire_mb=(served(registry) - sent) / 1e6,
    )


def push(registry: RegistryServer, name: str, layers: Sequence[Blob]) -> str:
    """Push an image; return its repository and tag."""
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
            {
                "mediaType": f"{OCI_LAYER}+{one.compression}",
                "digest": one.digest,
                "size": one.size,
            }
            for one in layers
        ],
    }
    with Pusher(registry.address) as pusher:
        for one in layers:
            with one.path.open("rb") as file:
                pusher.blob(name, one.digest, file, one.size)
        pusher.blob(name, sha256(config), config)
        pusher.manifest(name, "1", json.dumps(manifest).encode(), OCI_MANIFEST)
    return f"{name}:1"


def compare(
    case: Case, tools: Sequence[Tool], registry: RegistryServer, reference: str, rounds: int
) -> None:
    """Let each pull in each round, in another order each time; ours once more, with all there."""
    for number in range(rounds):
        turn = number % len(tools)
        for tool in (*tools[turn:], *tools[:turn]):
            case.runs.setdefault(tool.name, []).append(measure(tool, registry, reference))
            if type(tool) in (Ctr, Serpentine) and "," not in tool.name:
                warm = measure(tool, registry, reference)
                case.runs.setdefault(f"{tool.name}, warm", []).append(warm)
            tool.forget(reference)
            os.sync()


def table(case: Case) -> Iterable[str]:
    """Yield the lines of a table in Markdown."""
    yield f"**{case.title}**"
    yield ""
    heads = ("", "seconds", "ours / it", "our processor", "daemon's", "peak MB", "MB served")
    yield f"| {' | '.join(heads)} |"
    yield "|---|---|---|---|---|---|---|"
    for name in case.runs:
        ratio = ""
        if name != "serpentine" and not name.endswith("warm"):
            found = case.ratios("serpentine", name)
            ratio = f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"
        figures = [case.median(name, m) for m in ("client_cpu", "daemon_cpu")]
        yield (
            f"| {name} | {case.median(name):.2f} | {ratio} | {figures[0]:.2f} | {figures[1]:.2f} |"
            f" {case.median(name, 'peak_mb'):.0f} | {case.median(name, 'wire_mb'):.1f} |"
        )
    yield ""


def measure_pulls(
    *,
    images: Sequence[str],
    links: Sequence[str],
    decompressors: Sequence[str],
    containerd: str,
    rounds: int,
) -> Iterator[dict[str, Any]]:
    """Measure each image over each link with each containerd; print and yield each case."""
    with RegistryServer() as registry:
        for name in images:
            layers = IMAGES[name]()
            reference = push(registry, f"bench/{name}", layers)
            for decompressor in decompressors:
                decompress_with(decompressor)
                for version, binary in find_containerds().items():
                    if not version.startswith(containerd):
                        continue
                    with ExitStack() as stack:
                        server = stack.enter_context(ContainerdServer(binary))
                        tools: list[Tool] = [Serpentine(server), Ctr(server)]
                        if version.startswith("2."):
                            tools.insert(1, Serpentine(server, 4))
                        tools += engines(stack)
                        for link in links:
                            case = Case(
                                image=name,
                                layers=len(layers),
                                megabytes=sum(one.size for one in layers) / 1e6,
                                unpacked=sum(one.unpacked for one in layers) / 1e6,
                                link=LINKS[link].name,
                                containerd=version,
                                decompressor=decompressor,
                            )
                            way = (
                                nullcontext(registry.address)
                                if link == "loopback"
                                else shaped(registry.port, LINKS[link])
                            )
                            with way as address:
                                compare(case, tools, registry, f"{address}/{reference}", rounds)
                            print("\n".join(table(case)), flush=True)
                            yield asdict(case)
