"""Which of several downloads has fallen so far behind that it is better begun anew."""

from __future__ import annotations

import statistics
from collections.abc import Hashable

__all__ = ["Speeds"]

# Fewer bytes per second than this are as good as none.
FLOOR = 256.0
# So many times slower than what the others get.
FAR_BEHIND = 50.0


class Speeds:
    """What the downloads of one pull get, in bytes per second."""

    def __init__(self) -> None:
        self._rates: dict[Hashable, float] = {}

    def note(self, stream: Hashable, rate: float) -> None:
        """Note what a download has got lately."""
        self._rates[stream] = rate

    def forget(self, stream: Hashable) -> None:
        """Leave a download that has ended out of account."""
        self._rates.pop(stream, None)

    def too_slow(self, stream: Hashable, rate: float, *, compare: bool = True) -> bool:
        """Tell whether a download is no use any more: next to nothing, or next to the others.

        compare: whether the others count.
        """
        others = [r for name, r in self._rates.items() if name != stream] if compare else []
        return rate < FLOOR or (bool(others) and rate < statistics.median(others) / FAR_BEHIND)
