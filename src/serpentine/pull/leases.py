"""What protects a pull while it runs, and what a broken one leaves for the next to go on with."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from datetime import timedelta

from serpentine._concurrency import shielded, unbroken
from serpentine._session import current_session, is_dead
from serpentine.containerd import Containerd
from serpentine.errors import ContainerdError, Unavailable

__all__ = ["LABEL_PULL", "LABEL_SESSION", "forget_earlier", "leased"]

# What a broken pull leaves is kept for this long; it is also the longest that a pull may take.
LIFETIME = timedelta(hours=24)
CLEANUP_TIMEOUT = 60.0

# The image that a lease is for, and who holds it.
LABEL_PULL = "io.serpentine/pull"
LABEL_PLATFORM = "io.serpentine/platform"
LABEL_SESSION = "io.serpentine/session"

# Those of this process that are in use: its session alone does not tell, it goes on living.
_in_use: set[str] = set()


@asynccontextmanager
async def leased(
    containerd: Containerd,
    image: str = "",
    *,
    platform: str = "",
    keep: Callable[[BaseException], bool] | None = None,
) -> AsyncIterator[str]:
    """Hold a lease for an image of a platform; let it go at the end.

    keep: asked with the error on any other way out than success: whether what was written is
        worth keeping, under the lease, for the next attempt.  If not, the collector runs at
        once, so that nothing half-made is left.
    """
    lease_id = f"serpentine-pull-{secrets.token_hex(8)}"
    _in_use.add(lease_id)
    failed = kept = False
    try:
        session = await asyncio.to_thread(current_session)
        labels = (
            {LABEL_PULL: image, LABEL_PLATFORM: platform, LABEL_SESSION: session} if image else {}
        )
        # Unbroken: its removal could overtake a request that nobody waits for any more.
        await unbroken(
            containerd.leases.create(lease_id, expires=LIFETIME, labels=labels),
            patience=CLEANUP_TIMEOUT,
        )
        yield lease_id
    except BaseException as error:
        failed = True
        kept = keep is not None and keep(error)
        raise
    finally:
        # With an error on its way, nothing could be done without hiding it.
        quiet = failed or not image
        try:
            if not kept:
                # Nor with a collector that takes its time.
                with suppress(TimeoutError):
                    await shielded(
                        _drop(containerd, lease_id, sync=failed, quiet=quiet),
                        timeout=CLEANUP_TIMEOUT,
                    )
        finally:
            _in_use.discard(lease_id)


async def forget_earlier(containerd: Containerd, image: str, platform: str = "") -> None:
    """Let go of what earlier attempts at an image have left: it is there now, for the platform.

    Those of processes that live, and may go on, are left alone.
    """
    leases = await containerd.leases.all([f'labels."{LABEL_PULL}"=="{image}"'])
    found = [
        one
        for one in leases
        if one.id not in _in_use and one.labels.get(LABEL_PLATFORM, "") in ("", platform)
    ]
    if not found:
        return
    sessions = {one.labels.get(LABEL_SESSION, "") for one in found}
    gone = await asyncio.to_thread(_over, sessions)
    over = [one.id for one in found if one.labels.get(LABEL_SESSION, "") in gone]
    for lease_id in over:
        # Only the last one waits for the collector.
        await _drop(containerd, lease_id, sync=lease_id == over[-1], quiet=False)


def _over(sessions: set[str]) -> set[str]:
    own = current_session()
    # Where a system does not name processes, all have the same empty name, those that live too.
    return {s for s in sessions if s and (s == own or is_dead(s))}


async def _drop(containerd: Containerd, lease_id: str, *, sync: bool, quiet: bool) -> None:
    try:
        await containerd.leases.delete(lease_id, sync=sync)
    except ContainerdError as error:
        # It expires by itself.  But of a pull whose containerd went away when all was done,
        # something would be left: tried again, it finds everything there, and forgets the rest.
        if isinstance(error, Unavailable) and not quiet:
            raise
