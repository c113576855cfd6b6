"""What a verification found: values."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Difference", "Finding", "VerifyResult"]


@dataclass(frozen=True, slots=True)
class Difference:
    """A path in a file tree, and in what it is not as it should be.

    what: ``missing``, ``added``, ``kind``, ``size``, ``content``, ``mode``, ``owner``, ``time``,
        ``target`` (of a symlink), ``device``, ``attributes``, ``links`` (hard ones).
    """

    path: str
    what: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it should be.

    kind: ``blob`` or ``tree``.
    name: a blob's digest, or a snapshot's key.
    problem: in words.
    differences: of a tree: paths, the first hundred.  count: how many there are.
    repaired: whether it is whole again.  reason: why it is not, if that was asked for.
    """

    image: str
    kind: str
    name: str
    problem: str
    differences: tuple[Difference, ...] = ()
    count: int = 0
    repaired: bool = False
    reason: str = ""


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """What was checked (each blob and tree once, however many images have it), and what was found.

    unchecked: what could not be checked, and why, a line each.
    """

    images: tuple[str, ...]
    blobs: int
    size: int
    trees: int
    findings: tuple[Finding, ...]
    unchecked: tuple[str, ...]

    @property
    def is_whole(self) -> bool:
        """Whether nothing is damaged (any more)."""
        return all(finding.repaired for finding in self.findings)
