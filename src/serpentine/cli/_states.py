"""A state on the command line: in a file, by its key, or as an image."""

from __future__ import annotations

import os
import re
from pathlib import Path

import msgspec

from serpentine.engine import Engine
from serpentine.errors import InvalidSetting
from serpentine.model.state import ContainerState

__all__ = ["is_key", "read_state", "state_here"]

_KEY = re.compile(r"state-[0-9a-f]{16}")


def is_key(text: str) -> bool:
    """Tell whether it is the key of a state that a step or a copy made."""
    return _KEY.fullmatch(text) is not None


def read_state(text: str) -> ContainerState | None:
    """Read the state in ``@FILE``, as ``cp`` or ``run --keep`` print it with ``--json``.

    None for anything else.  Raises InvalidSetting.
    """
    if not text.startswith("@"):
        return None
    path = text[1:]
    try:
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        why = os.strerror(error.errno or 0) if isinstance(error, OSError) else str(error)
        raise InvalidSetting(
            f"cannot read {path}: {why}",
            hint="give a file with what 'serpentine cp --json' or 'run --keep --json' printed",
        ) from None
    try:
        # What run prints has the exit code beside it.
        inner = msgspec.json.decode(data, type=dict[str, msgspec.Raw]).get("state")
    except (msgspec.MsgspecError, UnicodeDecodeError):
        inner = None
    if inner is not None and bytes(inner) == b"null":
        raise InvalidSetting(
            f"{path} has no state: that step was not kept, or ended with another status than 0",
            hint="run it with --keep",
        )
    return ContainerState.from_json(bytes(inner) if inner is not None else data)


async def state_here(engine: Engine, text: str) -> ContainerState:
    """Return the state with a key, or of an image that is here; raises NotFound."""
    return await (engine.find_state(text) if is_key(text) else engine.inspect(text))
