"""What a registry says of how much it lets us ask for: the headers ``RateLimit-*``."""

from __future__ import annotations

import re
from collections.abc import Mapping

from serpentine.events import RateLimit

__all__ = ["rate_limit"]

# As Docker Hub has them: "76;w=21600", of which the window is in seconds.
_VALUE = re.compile(r"\s*(\d{1,12})\s*(?:;\s*w=(\d{1,9}))?\s*(?:[;,].*)?", re.ASCII)


def rate_limit(host: str, headers: Mapping[str, str]) -> RateLimit | None:
    """Return what an answer says is left; None if it says nothing, or nothing that is clear."""
    left = _VALUE.fullmatch(headers.get("RateLimit-Remaining", ""))
    if left is None:
        return None
    whole = _VALUE.fullmatch(headers.get("RateLimit-Limit", ""))
    window = left[2] or (whole[2] if whole else None)
    return RateLimit(
        host=host,
        remaining=int(left[1]),
        limit=int(whole[1]) if whole else None,
        window=int(window) if window else None,
    )
