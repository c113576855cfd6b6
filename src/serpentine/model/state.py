"""ContainerState: what everything returns and takes."""

from __future__ import annotations

from typing import Any, Self

import msgspec

from serpentine.errors import InvalidDocument
from serpentine.model.documents import HealthConfig, ImageConfig

__all__ = ["ContainerState", "HealthCheck"]


class HealthCheck(msgspec.Struct, frozen=True, kw_only=True):
    """How to find out whether a service is ready; times in seconds.

    command: what is run in it; status 0 means ready.  A single string is run by ``/bin/sh -c``.
    interval, retries, start_period: it may fail for ``start_period`` plus ``interval`` times
        ``retries`` in all.  It is asked at least once a second until it is ready.
    timeout: of one try.
    """

    command: tuple[str, ...] | str
    interval: float = 1.0
    timeout: float = 30.0
    retries: int = 30
    start_period: float = 0.0


class ContainerState(msgspec.Struct, frozen=True, kw_only=True):
    """A file system and what a process in it needs.

    ``snapshot_key`` names a committed snapshot of ``snapshotter``: the chain ID of the layers,
    or an empty string for an image without layers.  For a pulled image, ``image`` is the exact
    version: ``name@digest`` of the platform's manifest.

    Immutable and comparable: two states with the same content are equal, whichever tag or
    index they were reached by.  ``to_json`` and ``from_json`` are each other's inverse.
    """

    snapshot_key: str
    snapshotter: str
    platform: str
    image: str | None = None
    manifest_digest: str | None = None
    index_digest: str | None = None
    config_digest: str | None = None
    env: tuple[str, ...] = ()
    working_dir: str = "/"
    user: str = ""
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    labels: tuple[tuple[str, str], ...] = ()
    stop_signal: str = "SIGTERM"
    healthcheck: HealthCheck | None = None

    def content(self) -> tuple[object, ...]:
        """Return what makes two states equal: the file system and how to run a process."""
        return (
            self.snapshot_key,
            self.snapshotter,
            self.platform,
            self.env,
            self.working_dir,
            self.user,
            self.entrypoint,
            self.cmd,
            self.labels,
            self.stop_signal,
            self.healthcheck,
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ContainerState):
            return NotImplemented
        return self.content() == other.content()

    def __hash__(self) -> int:
        return hash(self.content())

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object that the command line prints, as plain values."""
        return {
            "image": self.image,
            "snapshot_key": self.snapshot_key,
            "snapshotter": self.snapshotter,
            "platform": self.platform,
            "manifest_digest": self.manifest_digest,
            "index_digest": self.index_digest,
            "config_digest": self.config_digest,
            "config": {
                "env": list(self.env),
                "working_dir": self.working_dir,
                "user": self.user,
                "entrypoint": list(self.entrypoint),
                "cmd": list(self.cmd),
                "labels": dict(self.labels),
                "stop_signal": self.stop_signal,
                "healthcheck": msgspec.to_builtins(self.healthcheck),
            },
        }

    def to_json(self) -> str:
        """Return the state as one line of JSON."""
        return msgspec.json.encode(self.to_dict()).decode()

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Read what ``to_dict`` gave; members that it does not know are ignored."""
        try:
            config = dict(data["config"])
            config["labels"] = tuple(sorted(config["labels"].items()))
            return msgspec.convert({**data, **config}, cls)
        except (
            KeyError,
            TypeError,
            ValueError,
            AttributeError,
            msgspec.ValidationError,
        ) as error:
            raise InvalidDocument(
                f"this is not a container state: {error}", hint="use what to_json() gave"
            ) from None

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read what ``to_json`` gave; raises InvalidDocument."""
        try:
            data = msgspec.json.decode(text)
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            raise InvalidDocument(
                f"this is not a container state: {error}", hint="use what to_json() gave"
            ) from None
        return cls.from_dict(data)

    @classmethod
    def from_config(
        cls,
        config: ImageConfig,
        *,
        snapshot_key: str,
        snapshotter: str,
        image: str | None = None,
        manifest_digest: str | None = None,
        index_digest: str | None = None,
        config_digest: str | None = None,
    ) -> Self:
        """Return the state of an unpacked image.

        ``User`` and ``WorkingDir`` may be empty or absent in a config and then mean root and
        ``/`` (trap 48).
        """
        process = config.config
        return cls(
            snapshot_key=snapshot_key,
            snapshotter=snapshotter,
            platform=str(config.platform.normalized()),
            image=image,
            manifest_digest=manifest_digest,
            index_digest=index_digest,
            config_digest=config_digest,
            env=tuple((process and process.env) or ()),
            working_dir=(process and process.working_dir) or "/",
            user=(process and process.user) or "",
            entrypoint=tuple((process and process.entrypoint) or ()),
            cmd=tuple((process and process.cmd) or ()),
            labels=tuple(sorted(((process and process.labels) or {}).items())),
            stop_signal=(process and process.stop_signal) or "SIGTERM",
            healthcheck=_healthcheck(process.healthcheck if process else None),
        )


def _healthcheck(config: HealthConfig | None) -> HealthCheck | None:
    """Read an image's; its zeros mean Docker's defaults."""
    test = (config and config.test) or []
    command: tuple[str, ...] | str
    match test:
        case ["CMD", *words] if words:
            command = tuple(words)
        case ["CMD-SHELL", script]:
            command = script
        case _:  # NONE, or nothing that says what to run
            return None
    assert config is not None
    return HealthCheck(
        command=command,
        interval=_whole(config.interval, 63) / 1e9 or 30.0,
        timeout=_whole(config.timeout, 63) / 1e9 or 30.0,
        retries=_whole(config.retries, 31) or 3,
        start_period=_whole(config.start_period, 63) / 1e9,
    )


def _whole(number: int, bits: int) -> int:
    """Return a number that an image's author wrote, or 0 for one that Docker could not read."""
    return number if 0 <= number < 2**bits else 0
