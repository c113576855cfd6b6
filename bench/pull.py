"""Pulls, cold and warm, each program in turn within a round."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.cases import LINKS, Plan
from bench.disk import forget_removed
from bench.images import IMAGES, Blob, like_each_other
from bench.link import shaped
from bench.tools import ROOT, Imported, Serpentine, Tool, decompress_with, left_out, start
from tests.support.images import OCI_CONFIG, OCI_LAYER, OCI_MANIFEST, Pusher, sha256
from tests.support.servers import RegistryServer, find_containerds

# A pull of what is there takes so little that one of them says little.
WARM = 3
# What each program pulls first, so that it is in memory.
SMALL = "bench/first"


@dataclass(frozen=True)
class Run:
    """One process: seconds on the clock and of processors, MB of memory and from the registry.

    daemon_peak_mb: of its daemons in this time, each at its own moment; not of their children.
    """

    seconds: float
    client_cpu: float
    daemon_cpu: float
    peak_mb: float
    daemon_peak_mb: float
    wire_mb: float


@dataclass
class Case:
    """What was measured under the same conditions."""

    image: str
    layers: int
    megabytes: float
    unpacked: float
    link: str
    link_name: str
    containerd: str
    decompressor: str
    newest: bool
    own_decompressor: list[str]
    runs: dict[str, list[Run]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return (
            f"{self.image}: {self.megabytes:.0f} MB in {self.layers} layers"
            f" ({self.unpacked:.0f} MB unpacked), {self.link_name}, containerd {self.containerd},"
            f" {self.decompressor}"
        )

    def median(self, name: str, member: str = "seconds") -> float:
        return float(statistics.median(getattr(run, member) for run in self.runs[name]))

    def ratios(self, ours: str, theirs: str) -> list[float]:
        """Return how long ours took for each second of theirs, round by round."""
        pairs = zip(self.runs[ours], self.runs[theirs], strict=True)
        return [one.seconds / other.seconds for one, other in pairs]


def processor_time(pids: Iterable[int]) -> float:
    """Return their own and their children's (the decompressors)."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += sum(int(fields[i]) for i in (11, 12, 13, 14))
    return ticks / os.sysconf("SC_CLK_TCK")


def peak_from_now(pids: Iterable[int]) -> None:
    """Let the kernel forget how large they were."""
    for pid in pids:
        Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak(pids: Iterable[int]) -> float:
    """Return the MB that they had at most, added up."""
    found = 0
    for pid in pids:
        status = Path(f"/proc/{pid}/status").read_text()
        match = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
        found += int(match[1]) if match else 0
    return found / 1024


def served(registry: RegistryServer) -> int:
    """Return the bytes of all answers so far, by the registry's own log."""
    return sum(map(int, re.findall(r'HTTP/[\d.]+" \d+ (\d+)', registry.log.read_text())))


def measure(tool: Tool, registry: RegistryServer, reference: str) -> Run:
    command = tool.command(reference)
    before, sent = processor_time(tool.daemons), served(registry)
    peak_from_now(tool.daemons)
    with tempfile.NamedTemporaryFile(prefix="spt-") as report:
        meter = [sys.executable, "-ISB", str(ROOT / "bench" / "meter.py"), report.name]
        done = subprocess.run(
            [*meter, *command],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, **tool.environ},
            check=True,
        )
        took = json.load(report)
    if took["code"]:
        raise SystemExit(f"{' '.join(command)} failed: {done.stderr.decode()}")
    begin = float(tool.began.read_text()) if tool.began else took["begin"]
    return Run(
        seconds=took["end"] - begin,
        client_cpu=took["processor"],
        daemon_cpu=processor_time(tool.daemons) - before,
        peak_mb=took["peak"] / 1024,
        daemon_peak_mb=peak(tool.daemons),
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


def stored(registry: RegistryServer, layer: Blob) -> Path:
    """Return where Debian's registry keeps a blob."""
    algorithm, _, name = layer.digest.partition(":")
    blobs = registry.storage / "docker" / "registry" / "v2" / "blobs"
    return blobs / algorithm / name[:2] / name / "data"


def compare(
    case: Case,
    tools: Sequence[Tool],
    registry: RegistryServer,
    reference: str,
    rounds: int,
    *,
    small: str,
    served: Sequence[Path],
) -> None:
    """Let each pull in each round, in another order each time; then again, with all there.

    small: an image that each pulls before, so that its programs are in memory; served: the files
    of the registry, which are to be there, too.
    """
    for number in range(rounds):
        turn = number % len(tools)
        for tool in (*tools[turn:], *tools[:turn]):
            forget_removed(served)
            measure(tool, registry, small)
            tool.forget(small)
            case.runs.setdefault(tool.name, []).append(measure(tool, registry, reference))
            again = [tool] if tool.warm else []
            if isinstance(tool, Serpentine) and tool.warm:
                imported = Imported(tool.server)
                imported.learn(reference)
                again.append(imported)
            for _ in range(WARM):
                for one in again:
                    name, _, rest = one.name.partition(", ")
                    runs = case.runs.setdefault(", ".join(filter(None, [name, "warm", rest])), [])
                    runs.append(measure(one, registry, reference))
            tool.forget(reference)


def table(case: Case) -> Iterable[str]:
    """Yield the lines of a table in Markdown."""
    yield f"**{case.title}**"
    yield ""
    heads = ["", "seconds", "ours / it", "its processor", "its daemon's"]
    heads += ["peak MB", "its daemon's peak MB", "MB served"]
    yield f"| {' | '.join(heads)} |"
    yield "|---" * len(heads) + "|"
    for name in sorted(case.runs, key=is_warm):
        ours, ratio = "serpentine, warm" if is_warm(name) else "serpentine", ""
        if name != ours:
            found = case.ratios(ours, name)
            ratio = f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"
        row = [name, f"{case.median(name):.3g}", ratio]
        row += [f"{case.median(name, m):.2f}" for m in ("client_cpu", "daemon_cpu")]
        row += [f"{case.median(name, m):.0f}" for m in ("peak_mb", "daemon_peak_mb")]
        yield f"| {' | '.join(row)} | {case.median(name, 'wire_mb'):.1f} |"
    yield ""
    if case.own_decompressor:
        names = ", ".join(case.own_decompressor)
        yield f"Not with {case.decompressor}, but with its own, as it takes no other: {names}."
        yield ""


def is_warm(name: str) -> bool:
    return "warm" in name.split(", ")


def measure_pulls(
    plans: Sequence[Plan], *, containerd: str, rounds: int
) -> Iterator[dict[str, Any]]:
    """Measure what is planned, with the containerds that begin like this; print and yield each."""
    containerds = find_containerds()
    newest = max(containerds, key=lambda one: [int(part) for part in re.findall(r"\d+", one)[:3]])
    with RegistryServer() as registry:
        for plan in plans:
            layers = IMAGES[plan.image]()
            reference = push(registry, f"bench/{plan.image}", layers)
            push(registry, SMALL, like_each_other(1))
            for version, binary in containerds.items():
                if version.startswith(containerd) and plan.older == (version != newest):
                    yield _case(plan, layers, registry, reference, version, binary, rounds)


def _case(
    plan: Plan,
    layers: Sequence[Blob],
    registry: RegistryServer,
    reference: str,
    version: str,
    binary: Path,
    rounds: int,
) -> dict[str, Any]:
    with ExitStack() as stack:
        stack.enter_context(decompress_with(plan.decompressor))
        tools = start(stack, binary, plan.tools)
        compressions = {one.compression for one in layers}
        for tool in list(tools):
            if not compressions <= set(tool.accepts):
                left_out(f"this {tool.name} cannot read {', '.join(compressions)}")
                tools.remove(tool)
        case = Case(
            image=plan.image,
            layers=len(layers),
            megabytes=sum(one.size for one in layers) / 1e6,
            unpacked=sum(one.unpacked for one in layers) / 1e6,
            link=plan.link,
            link_name=LINKS[plan.link].name,
            containerd=version.partition("+")[0],
            decompressor=plan.decompressor,
            newest=not plan.older,
            own_decompressor=[
                one.name for one in tools if plan.decompressor == "igzip" and not one.igzip
            ],
        )
        address = stack.enter_context(
            nullcontext(registry.address)
            if plan.link == "loopback"
            else shaped(registry.port, LINKS[plan.link])
        )
        compare(
            case,
            tools,
            registry,
            f"{address}/{reference}",
            rounds,
            small=f"{address}/{SMALL}:1",
            served=[stored(registry, one) for one in layers],
        )
    print("\n".join(table(case)), flush=True)
    return asdict(case)
