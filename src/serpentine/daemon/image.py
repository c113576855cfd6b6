"""The image that our containerd runs in: its build context, and the tag that says what is in it."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from serpentine.errors import InvalidSetting
from serpentine.settings import Settings

__all__ = ["DEFAULT_BASE_IMAGE", "DEFAULT_ENVOY_IMAGE", "BuildContext", "build_context"]

DEFAULT_BASE_IMAGE = "docker.io/library/debian:trixie-slim"
DEFAULT_ENVOY_IMAGE = "docker.io/envoyproxy/envoy:distroless-v1.40.0"

REPOSITORY = "serpentine-containerd"
_FILES = ("Dockerfile", "packages", "fetch", "start", "containerd.toml", "releases.sha256")


@dataclass(frozen=True, slots=True)
class BuildContext:
    """What the image is built from.  ``tag`` changes when, and only when, any of it does."""

    files: dict[str, bytes]
    arguments: dict[str, str]
    tag: str

    def tar(self) -> bytes:
        """Return the context as the builder takes it: the same bytes for the same content."""
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for name, data in sorted(self.files.items()):
                info = tarfile.TarInfo(name)
                info.size, info.mode = len(data), 0o644
                tar.addfile(info, io.BytesIO(data))
        return buffer.getvalue()


def build_context(settings: Settings) -> BuildContext:
    """Return the build context for these settings.

    Where the releases come from is no part of the tag: their sums are.  Raises InvalidSetting
    if the file of sums that the user gave cannot be read.
    """
    folder = files("serpentine.daemon") / "image"
    content = {name: (folder / name).read_bytes() for name in _FILES}
    if settings.releases_sums is not None:
        content["releases.sha256"] = _read(settings.releases_sums)
    base = settings.base_image or DEFAULT_BASE_IMAGE
    digest = hashlib.sha256(
        json.dumps([base, sorted((name, data.hex()) for name, data in content.items())]).encode()
    )
    return BuildContext(
        files=content,
        arguments={"BASE_IMAGE": base, "RELEASES_URL": settings.releases_url},
        tag=f"{REPOSITORY}:{digest.hexdigest()[:12]}",
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidSetting(
            f"cannot read the sums of the releases, {path}: {error.strerror}",
            hint="mend or unset SERPENTINE_RELEASES_SUMS",
        ) from None
