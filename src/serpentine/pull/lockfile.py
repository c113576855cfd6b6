"""The lock file: which digest each tag is pinned to, for which platforms; made to be reviewed."""

from __future__ import annotations

import os
import secrets
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from serpentine.errors import InvalidSetting, NotPinned, SerpentineError
from serpentine.model.digest import Digest
from serpentine.model.documents import Descriptor
from serpentine.model.platform import Platform
from serpentine.model.reference import Reference
from serpentine.pull.resolve import Documents, find_image

if TYPE_CHECKING:
    from serpentine.containerd import Content
    from serpentine.registry import Repository

__all__ = ["Lock", "Pin", "pin_image"]

DEFAULT_NAME = "serpentine.lock"
_VERSION = 1
_LARGEST = 16 * 1024 * 1024
_HEAD = """\
# Images, pinned.  Written by 'serpentine lock IMAGE'; 'serpentine lock --update' renews it.
version = 1
"""


@dataclass(frozen=True, slots=True)
class Pin:
    """What a tag is pinned to.

    digest: of the document that the tag names, mostly an index.
    platforms: the manifest of each platform that is pinned; without an index, ``digest`` again.
    """

    digest: str
    platforms: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Lock:
    """Pinned images, by their full names with a tag.  Immutable."""

    images: Mapping[str, Pin] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a lock file.

        Raises FileNotFoundError if there is none, and InvalidSetting, naming file and place, for
        one that is not valid.
        """
        try:
            with Path(path).open("rb") as file:
                data = file.read(_LARGEST + 1)
        except FileNotFoundError:
            raise
        except (OSError, ValueError) as error:
            raise InvalidSetting(
                f"cannot read the lock file {path}: {_reason(error)}", hint="mend its permissions"
            ) from None
        if len(data) > _LARGEST:
            raise InvalidSetting(
                f"the lock file {path} is larger than {_LARGEST} bytes", hint="is it the right one?"
            )
        return cls.parse(data, str(path))

    @classmethod
    def parse(cls, data: bytes, name: str = DEFAULT_NAME) -> Self:
        """Read what a lock file holds; ``name`` is what errors call it.  Raises InvalidSetting."""
        try:
            found = tomllib.loads(data.decode())
        except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
            raise InvalidSetting(
                f"the lock file {name} is not valid TOML: {error}",
                hint="mend that place, or take it back from version control",
            ) from None
        if found.get("version") != _VERSION:
            raise InvalidSetting(
                f"the lock file {name} is of version {str(found.get('version'))[:20]},"
                f" and this Serpentine reads version {_VERSION}",
                hint="use the Serpentine that wrote it, or write it anew",
            )
        entries = found.get("images", {})
        if set(found) - {"version", "images"} or not isinstance(entries, dict):
            raise _invalid(name, "images", "it has other parts than 'version' and 'images'")
        return cls({image: _pin(name, image, entry) for image, entry in entries.items()})

    def dump(self) -> str:
        """Return it as a lock file holds it: in the same order whatever way it was made."""
        return "".join(_lines(self.images))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it, whole or not at all; raises InvalidSetting where that is not possible."""
        target = Path(path)
        try:
            # Through a link, so that it stays one.
            target = target.resolve()
            new = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
            try:
                new.write_text(self.dump(), encoding="utf-8", newline="\n")
                with suppress(OSError):
                    new.chmod(target.stat().st_mode & 0o7777)
                new.replace(target)
            finally:
                new.unlink(missing_ok=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise InvalidSetting(
                f"cannot write the lock file {path}: {_reason(error)}",
                hint="choose another place with --file",
            ) from None

    def merged(self, image: str, pin: Pin) -> Lock:
        """Return a lock with this image pinned so, in place of what there was of it."""
        return Lock({**self.images, image: pin})

    def find(self, reference: Reference) -> Pin | None:
        """Return what a reference with a tag is pinned to, or None."""
        return self.images.get(str(reference))

    def pinned(
        self, reference: Reference, platform: Platform, *, file: str | None = None
    ) -> tuple[Digest, str]:
        """Return the digest that a tag is pinned to, and the one of its platform's manifest.

        file: what the lock was read from, for the error.  Raises NotPinned.
        """
        pin, wanted = self.find(reference), str(platform.normalized())
        manifest = pin.platforms.get(wanted) if pin is not None else None
        if pin is not None and manifest is not None:
            return Digest.parse(pin.digest), manifest
        where = f"the lock file {file}" if file else "the lock"
        command = f"serpentine lock {reference}"
        command += f" --file {file}" if file and file != DEFAULT_NAME else ""
        if pin is None:
            raise NotPinned(f"{reference} is not in {where}", hint=f"add it: {command}")
        raise NotPinned(
            f"{reference} is in {where}, but not for {wanted}",
            hint=f"add that: {command} --platform {wanted}",
        )


async def pin_image(
    repository: Repository,
    content: Content,
    platforms: Iterable[Platform],
    root: Descriptor | None = None,
) -> Pin:
    """Find out what a reference means for some platforms.

    root: what it means, if that is settled; else the registry is asked.
    """
    known: dict[Digest, bytes] = {}

    async def fetch(descriptor: Descriptor, kind: str) -> bytes:
        # An index is needed for each of its platforms.
        if descriptor.digest not in known:
            known[descriptor.digest] = await repository.fetch_document(descriptor, kind)
        return known[descriptor.digest]

    if root is None:
        resolved = await repository.resolve()
        root = resolved.descriptor
        if resolved.body is not None:
            known[root.digest] = resolved.body
    manifests: dict[str, str] = {}
    for platform in platforms:
        # One reader for each, which limits how many documents an image may lead through.
        documents = Documents(content, fetch)
        image = await find_image(documents, root, platform, str(repository.reference))
        manifests[str(platform.normalized())] = str(image.manifest.digest)
    return Pin(str(root.digest), manifests)


def _lines(images: Mapping[str, Pin]) -> Iterator[str]:
    yield _HEAD
    for image, pin in sorted(images.items()):
        # Names, platforms and digests have no character that TOML would want escaped.
        yield f'\n[images."{image}"]\ndigest = "{pin.digest}"\n'
        for platform, digest in sorted(pin.platforms.items()):
            yield f'platforms."{platform}" = "{digest}"\n'


def _pin(file: str, image: str, entry: Any) -> Pin:
    try:
        reference = Reference.parse(image)
        if str(reference) != image or reference.digest is not None:
            raise _invalid(file, image, f"write the name in full, with a tag: {reference.name}:TAG")
        if not isinstance(entry, dict) or set(entry) != {"digest", "platforms"}:
            raise _invalid(file, image, "it needs 'digest' and 'platforms', and nothing else")
        platforms = entry["platforms"]
        if not isinstance(platforms, dict) or not platforms:
            raise _invalid(file, image, "it needs at least one of 'platforms'")
        for platform in platforms:
            if str(Platform.parse(platform)) != platform:
                raise _invalid(
                    file, image, f"write {Platform.parse(platform)} in place of {platform}"
                )
        for digest in (entry["digest"], *platforms.values()):
            if not isinstance(digest, str):
                raise _invalid(file, image, "a digest is a text, ALGORITHM:HEX")
            Digest.parse(digest)
    except InvalidSetting:
        raise
    except SerpentineError as error:
        raise _invalid(file, image, f"{error}; {error.hint}") from None
    return Pin(entry["digest"], dict(platforms))


def _invalid(file: str, image: str, why: str) -> InvalidSetting:
    return InvalidSetting(
        f"the lock file {file} is not valid at {image[:300]!r}: {why}",
        hint="mend that place, or take it back from version control",
    )


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
