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
    from serpentine.history import PullRecord
    from serpentine.model.digest import ChainID, DiffID, Digest
    from serpentine.model.platform import Platform
    from serpentine.model.reference import Reference
    from serpentine.model.state import ContainerState, HealthCheck
    from serpentine.pull.local import LocalImage
    from serpentine.pull.lockfile import Lock, Pin
    from serpentine.run.options import Bind, RunOptions, Tmpfs
    from serpentine.run.services import Service, ServiceResult
    from serpentine.run.step import RunResult, Step
    from serpentine.settings import Settings
    from serpentine.upkeep.found import VerifyResult
    from serpentine.upkeep.plan import PruneResult
    from serpentine.upkeep.usage import Usage

__all__ = [
    "Bind",
    "ChainID",
    "ContainerState",
    "DiffID",
    "Digest",
    "Engine",
    "Event",
    "HealthCheck",
    "LocalImage",
    "Lock",
    "Pin",
    "Platform",
    "PruneResult",
    "PullRecord",
    "Reference",
    "RunOptions",
    "RunResult",
    "SerpentineError",
    "Service",
    "ServiceResult",
    "Settings",
    "Step",
    "Tmpfs",
    "Usage",
    "VerifyResult",
    "__version__",
    "connect",
]

# Where each public name lives.  They are imported when first used: "import serpentine" alone
# is free, and the command line pays only for what a command needs.
_HOMES = {
    "Bind": "serpentine.run.options",
    "ChainID": "serpentine.model.digest",
    "ContainerState": "serpentine.model.state",
    "DiffID": "serpentine.model.digest",
    "Digest": "serpentine.model.digest",
    "Engine": "serpentine.engine",
    "Event": "serpentine.events",
    "HealthCheck": "serpentine.model.state",
    "LocalImage": "serpentine.pull.local",
    "Lock": "serpentine.pull.lockfile",
    "Pin": "serpentine.pull.lockfile",
    "Platform": "serpentine.model.platform",
    "PruneResult": "serpentine.upkeep.plan",
    "PullRecord": "serpentine.history",
    "Reference": "serpentine.model.reference",
    "RunOptions": "serpentine.run.options",
    "RunResult": "serpentine.run.step",
    "SerpentineError": "serpentine.errors",
    "Service": "serpentine.run.services",
    "ServiceResult": "serpentine.run.services",
    "Settings": "serpentine.settings",
    "Step": "serpentine.run.step",
    "Tmpfs": "serpentine.run.options",
    "Usage": "serpentine.upkeep.usage",
    "VerifyResult": "serpentine.upkeep.found",
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
