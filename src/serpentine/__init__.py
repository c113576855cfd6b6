"""Serpentine: a container engine that uses containerd the way BuildKit does.

::

    import asyncio, serpentine

    async def main():
        async with serpentine.connect() as engine:
            state = await engine.pull_image("alpine")
            print(state.image, state.snapshot_key)

    asyncio.run(main())

The names below are the public API; everything else may change without notice.
"""

from typing import TYPE_CHECKING, Any

from serpentine._version import __version__

if TYPE_CHECKING:
    from serpentine.engine import Engine, connect
    from serpentine.errors import SerpentineError
    from serpentine.events import Event
    from serpentine.model.digest import ChainID, DiffID, Digest
    from serpentine.model.platform import Platform
    from serpentine.model.reference import Reference
    from serpentine.model.state import ContainerState
    from serpentine.pull.local import LocalImage
    from serpentine.settings import Settings

__all__ = [
    "ChainID",
    "ContainerState",
    "DiffID",
    "Digest",
    "Engine",
    "Event",
    "LocalImage",
    "Platform",
    "Reference",
    "SerpentineError",
    "Settings",
    "__version__",
    "connect",
]

# Where each public name lives.  They are imported when first used: "import serpentine" alone
# is free, and the command line pays only for what a command needs.
_HOMES = {
    "ChainID": "serpentine.model.digest",
    "ContainerState": "serpentine.model.state",
    "DiffID": "serpentine.model.digest",
    "Digest": "serpentine.model.digest",
    "Engine": "serpentine.engine",
    "Event": "serpentine.events",
    "LocalImage": "serpentine.pull.local",
    "Platform": "serpentine.model.platform",
    "Reference": "serpentine.model.reference",
    "SerpentineError": "serpentine.errors",
    "Settings": "serpentine.settings",
    "connect": "serpentine.engine",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'serpentine' has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(home), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
