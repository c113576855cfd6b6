"""Platforms: parsing, normal form, and which image serves which machine.

The rules are those of the image specification (image-index.md) and of containerd's
platforms package, which Docker, nerdctl and BuildKit follow too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Self

import msgspec

from serpentine.errors import InvalidPlatform

__all__ = ["Platform"]

_COMPONENT = re.compile(r"[A-Za-z0-9_.-]+")

# spelling -> (architecture, variant or "" to keep what was given)
_ARCHITECTURES = {
    "x86_64": ("amd64", ""),
    "x86-64": ("amd64", ""),
    "i386": ("386", ""),
    "i686": ("386", ""),
    "aarch64": ("arm64", ""),
    "armhf": ("arm", "v7"),
    "armel": ("arm", "v6"),
    "mips64el": ("mips64le", ""),
}
_DEFAULT_VARIANT = {"arm": "v7", "arm64": "v8", "amd64": "v1"}
# Each runs what is built for those after it.
_ARM_LEVELS = ("v8", "v7", "v6", "v5")
_AMD64_LEVELS = ("v4", "v3", "v2", "v1")
_ARM64_LEVELS = (
    *(f"v9.{n}" for n in range(9, 0, -1)),
    "v9",
    *(f"v8.{n}" for n in range(9, 0, -1)),
    "v8",
)


class Platform(msgspec.Struct, frozen=True):
    """An operating system, an architecture and, where it matters, a variant of it.

    ``str()`` gives ``os/arch[/variant]``.  Compare ``normalized()`` forms: ``linux/arm64`` and
    ``linux/arm64/v8`` are the same platform.
    """

    os: str
    architecture: str
    variant: str = ""
    os_version: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``os/arch[/variant]`` in any usual spelling; raises InvalidPlatform."""
        parts = text.strip().split("/")
        if not 2 <= len(parts) <= 3 or not all(_COMPONENT.fullmatch(part) for part in parts):
            raise InvalidPlatform(
                f"{text[:100]!r} is not a platform",
                hint="write it as OS/ARCH[/VARIANT]: linux/arm64",
            )
        return cls(*parts).normalized()

    def normalized(self) -> Self:
        """Return the normal form: lower case, Go's names, no variant that is the default."""
        system = self.os.lower()
        system = {"macos": "darwin"}.get(system, system)
        architecture, variant = self.architecture.lower(), self.variant.lower()
        if architecture in _ARCHITECTURES:
            architecture, implied = _ARCHITECTURES[architecture]
            variant = variant or implied
        if variant.isdigit():
            variant = f"v{variant}"
        if architecture == "arm":
            variant = variant or "v7"
        elif variant == _DEFAULT_VARIANT.get(architecture):
            variant = ""
        return type(self)(system, architecture, variant, self.os_version)

    def serves(self) -> Iterator[Platform]:
        """Yield the platforms whose images run on this one, the best first."""
        own = self.normalized()
        yield own
        if own.architecture == "amd64":
            for lower in _below(own.variant or "v1", _AMD64_LEVELS):
                yield Platform(own.os, "amd64", lower).normalized()
            yield Platform(own.os, "386")
        elif own.architecture == "arm64":
            for lower in _below(own.variant, _ARM64_LEVELS):
                yield Platform(own.os, "arm64", lower).normalized()
            if own.variant and own.variant not in _ARM64_LEVELS:
                yield Platform(own.os, "arm64")
            for arm in _ARM_LEVELS:
                yield Platform(own.os, "arm", arm)
        elif own.architecture == "arm":
            for arm in _below(own.variant, _ARM_LEVELS):
                yield Platform(own.os, "arm", arm)

    def rank(self, candidate: Platform) -> int | None:
        """Return how well an image for ``candidate`` suits this platform: 0 is best, None not."""
        wanted = candidate.normalized()
        for position, platform in enumerate(self.serves()):
            if (platform.os, platform.architecture, platform.variant) == (
                wanted.os,
                wanted.architecture,
                wanted.variant,
            ):
                return position
        return None

    def __str__(self) -> str:
        text = f"{self.os}/{self.architecture}"
        return f"{text}/{self.variant}" if self.variant else text


def _below(level: str, levels: tuple[str, ...]) -> tuple[str, ...]:
    """Return the levels that a machine of this level runs, too; none for an unknown one."""
    return levels[levels.index(level) + 1 :] if level in levels else ()
