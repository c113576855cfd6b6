"""When to try a request again, and after how long: decided in plain functions."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

__all__ = ["MAX_RETRY_AFTER", "parse_retry_after", "retry_delay"]

# Waits in seconds before the second, third, fourth try, before jitter.
DELAYS = (0.25, 1.0, 4.0)
RETRYABLE = frozenset({408, 429, 500, 502, 503, 504})
# A registry that asks for more patience than this gets an error that says so.
MAX_RETRY_AFTER = 60.0


def parse_retry_after(value: str | None, now: datetime) -> float | None:
    """Return the seconds that a Retry-After header asks for: a number, or an HTTP date.

    None when there is none or it cannot be read (RFC 9110, section 10.2.3).
    """
    if not value:
        return None
    text = value.strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        until = parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    if until.tzinfo is None:
        until = until.replace(tzinfo=UTC)
    return max(0.0, (until - now).total_seconds())


def retry_delay(
    tries: int, status: int | None, retry_after: float | None, jitter: Callable[[], float]
) -> float | None:
    """Return how long to wait before the next try, in seconds; None means give up.

    tries: how many have been made.  status: of the answer, None for a broken connection.
    retry_after: what the registry asked for.  jitter: a number from 0 to 1.
    """
    if status is not None and status not in RETRYABLE:
        return None
    if tries > len(DELAYS):
        return None
    if retry_after is not None:
        # Never before the time, and not all at the same moment after it.
        return retry_after + jitter() if retry_after <= MAX_RETRY_AFTER else None
    return DELAYS[tries - 1] * (0.5 + jitter())
