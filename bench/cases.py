"""What is measured when nothing is said: the cases that the goals need, not each with each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.link import Link

LINKS = {
    "loopback": Link("loopback", 0.0, 0.0, 0.0),
    "far": Link("50 MB/s per connection, 200 MB/s, 20 ms", 50e6, 200e6, 0.02),
    "narrow": Link("50 MB/s, 20 ms", 50e6, 50e6, 0.02),
}
DECOMPRESSORS = ("built in", "igzip")

# Of us, what a user has who sets nothing is always there.
OURS = ("serpentine, in order",)
CTR = ("ctr", "ctr, 4 unpacks")
FOREIGN = ("docker", "podman", "buildkit")
TOOLS = (*OURS, *CTR, "ctr, local", "ctr, ranges", *FOREIGN)
MOST = (*CTR, *FOREIGN)


@dataclass(frozen=True)
class Plan:
    """tools: beside ours; older: with each containerd that is not the newest, not with that."""

    image: str
    link: str = "loopback"
    decompressor: str = "built in"
    tools: tuple[str, ...] = MOST
    older: bool = False


PLANS = (
    Plan("six", tools=(*OURS, *MOST)),
    Plan("six", decompressor="igzip"),
    Plan("six", older=True, tools=("ctr",)),
    Plan("six", "narrow", tools=CTR),
    Plan("one", "far", tools=("ctr", "ctr, ranges")),
    Plan("ten", tools=CTR),
    Plan("forty"),
    Plan("hundred-twenty", tools=CTR),
    Plan("files"),
    Plan("zstd"),
)


def choose(
    images: Sequence[str],
    links: Sequence[str],
    decompressors: Sequence[str],
    tools: Sequence[str],
    containerd: str,
) -> list[Plan]:
    """Return the plans of these images.  With a link, decompressor, or containerd: just those."""
    found = [plan for plan in PLANS if not images or plan.image in images]
    if links or decompressors or containerd or not found:
        found = list(_each(images or [plan.image for plan in found], links, decompressors))
    if tools:
        found = [
            Plan(plan.image, plan.link, plan.decompressor, tuple(tools), plan.older)
            for plan in found
        ]
    return found


def _each(
    images: Iterable[str], links: Sequence[str], decompressors: Sequence[str]
) -> Iterable[Plan]:
    for image in dict.fromkeys(images):
        for link in links or ["loopback"]:
            for decompressor in decompressors or ["built in"]:
                yield Plan(image, link, decompressor, TOOLS)
                yield Plan(image, link, decompressor, TOOLS, older=True)
