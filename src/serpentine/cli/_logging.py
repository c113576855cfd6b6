"""The logger ``serpentine`` on stderr."""

from __future__ import annotations

import logging
import sys
from typing import TextIO

import click

__all__ = ["log_to_stderr"]


class _Stderr(logging.Handler):
    """Writes to what stderr is at the moment: the live display puts itself there."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a line."""
        stream: TextIO = sys.stderr
        try:
            stream.write(self.format(record) + "\n")
            stream.flush()
        except Exception:  # noqa: BLE001 - as all handlers do: logging breaks nothing
            self.handleError(record)


def log_to_stderr(ctx: click.Context, level: str) -> None:
    """Log what has this level, or a higher one, until the command ends."""
    logger = logging.getLogger("serpentine")
    before = logger.level
    handler = _Stderr()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(level.upper())

    def end() -> None:
        logger.removeHandler(handler)
        logger.setLevel(before)

    ctx.call_on_close(end)
