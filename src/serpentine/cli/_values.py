"""Ages and sizes as people type them: callbacks of options."""

from __future__ import annotations

import re
from datetime import timedelta

import click

__all__ = ["parse_age", "parse_size"]

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_PART = re.compile(r"([0-9]{1,9}(?:\.[0-9]+)?)([smhdw])", re.ASCII)
_AGE = re.compile(rf"(?:{_PART.pattern})+", re.ASCII)
_SIZE = re.compile(r"([0-9]{1,20}(?:\.[0-9]+)?) ?(?:([kmgtp])(i?))?b?", re.ASCII | re.IGNORECASE)
# Beyond that, no age is left to be subtracted from today.
_LONGEST = timedelta(days=365_000)
_LARGEST = (1 << 63) - 1


def parse_age(ctx: click.Context, param: click.Parameter, value: str | None) -> timedelta | None:
    """Read an age like ``7d`` or ``1d12h``."""
    if value is None:
        return None
    if not _AGE.fullmatch(value):
        raise click.BadParameter(
            f"{value!r} is no age; write it like 90m, 12h, 7d or 1d12h", ctx, param
        )
    seconds = sum(float(number) * _SECONDS[unit] for number, unit in _PART.findall(value))
    if seconds > _LONGEST.total_seconds():
        raise click.BadParameter(f"{value!r} is older than anything is", ctx, param)
    return timedelta(seconds=seconds)


def parse_size(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Read a size like ``10GB`` (decimal), ``2GiB`` (binary) or a number of bytes."""
    if value is None:
        return None
    found = _SIZE.fullmatch(value)
    if found is None:
        raise click.BadParameter(
            f"{value!r} is no size; write it like 500MB, 10GB or 2GiB", ctx, param
        )
    number, unit, binary = found.groups()
    power = " kmgtp".index(unit.lower()) if unit else 0
    count = float(number) * float(1024 if binary else 1000) ** power
    if count > _LARGEST:
        raise click.BadParameter(f"{value!r} is larger than any disk", ctx, param)
    return round(count)
