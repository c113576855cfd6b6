"""What we remember of a daemon in a container, so that the next command finds it at once."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from serpentine.errors import DaemonFailed

__all__ = ["DaemonState"]


@dataclass(frozen=True, slots=True)
class DaemonState:
    """A containerd that we brought up in Docker or Podman.

    kind: ``docker`` or ``podman``.
    transport: ``socket`` or ``envoy``.
    api: the URL of the container engine's API.
    version: of Serpentine, that brought it up.
    fingerprint: of the configuration, without the transport.
    port: that Envoy listens on, on 127.0.0.1; None without Envoy.

    A hint, never the truth: the daemon itself is asked before it is used.
    """

    kind: str
    transport: str
    api: str
    version: str
    fingerprint: str
    port: int | None = None

    @classmethod
    def load(cls, path: Path) -> Self | None:
        """Read it; None if there is none, or one that cannot be understood."""
        try:
            noted = json.loads(path.read_text(encoding="utf-8"))
            state = cls(**noted)
        except (OSError, ValueError, TypeError, RecursionError):
            return None
        known = state.kind in ("docker", "podman") and state.transport in ("socket", "envoy")
        texts = (state.api, state.version, state.fingerprint)
        port_fits = isinstance(state.port, int) if state.transport == "envoy" else not state.port
        return state if known and port_fits and all(isinstance(t, str) for t in texts) else None

    def save(self, path: Path) -> None:
        """Write it, whole or not at all."""
        write_private(path, json.dumps(asdict(self)).encode())


def write_private(path: Path, data: bytes) -> None:
    """Write a file that only its owner may read, whole or not at all.

    Raises DaemonFailed if it cannot be written, for instance on a full disk.
    """
    new = path.with_name(path.name + ".new")
    try:
        new.unlink(missing_ok=True)
        # With its mode from the first moment, not after a moment in which it is open to all.
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        new.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise DaemonFailed(
                f"cannot write {path}: {error.strerror}",
                hint="make room and its directory writable, or choose another with"
                " SERPENTINE_DATA_DIR",
            ) from None
        raise
