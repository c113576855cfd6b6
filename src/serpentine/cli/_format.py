"""Sizes, speeds, ages and tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import click

__all__ = ["age", "print_table", "size"]

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def size(count: float) -> str:
    """Return a number of bytes in decimal units: ``3.4 MB``."""
    value = float(count)
    for unit in _UNITS:
        if value < 999.5 or unit == _UNITS[-1]:
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" or value >= 99.5 else f"{value:.1f} {unit}"


def age(now: datetime, then: datetime | None) -> str:
    """Return how long ago something was: ``5 minutes ago``."""
    if then is None:
        return ""
    seconds = max(0, int((now - then).total_seconds()))
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1)):
        if seconds >= length:
            count = seconds // length
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "just now"


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows of cells on stdout, the cells of a column below each other."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo("  ".join(cells).rstrip())
