"""Image references, with Docker Hub's rules for short names.

The grammar is the one of the distribution project's ``reference`` package, which Docker,
containerd and Podman share; the tests hold this module against an independent parser.
"""

from __future__ import annotations

import re
from typing import Self

import msgspec

from serpentine.errors import InvalidDigest, InvalidReference
from serpentine.model.digest import Digest

__all__ = ["DOCKER_HUB", "Reference"]

DOCKER_HUB = "docker.io"
_HUB_ALIASES = frozenset({DOCKER_HUB, "index.docker.io"})
_HUB_OFFICIAL = "library/"

_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
_DOMAIN = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[a-fA-F0-9:]+\])(?::[0-9]+)?")
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_PATH = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_BARE_HEX = re.compile(r"[0-9a-f]{64}")
_MAX_NAME = 255


class Reference(msgspec.Struct, frozen=True):
    """Where an image is: registry, repository, and a tag or a digest or both.

    Immutable and fully spelled out: ``alpine`` becomes ``docker.io/library/alpine:latest``.
    With both a tag and a digest, the digest decides and the tag is decoration.
    """

    registry: str
    repository: str
    tag: str | None = None
    digest: Digest | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what a person types; raises InvalidReference."""
        rest = text.strip()
        if not rest:
            raise InvalidReference("the image reference is empty", hint="for example: alpine:3.20")
        if "://" in rest:
            raise InvalidReference(
                f"{_shorten(text)} is not an image reference: it has a URL scheme",
                hint=f"leave out {_shorten(rest.partition('://')[0] + '://')}",
            )
        digest: Digest | None = None
        rest, at, digest_text = rest.partition("@")
        if at:
            try:
                digest = Digest.parse(digest_text)
            except InvalidDigest as error:
                raise InvalidReference(
                    f"{_shorten(text)} is not an image reference: {error}", hint=error.hint
                ) from None
        registry, path = _split_domain(rest)
        tag: str | None = None
        path, colon, tag_text = path.partition(":")
        if colon:
            if not _TAG.fullmatch(tag_text):
                raise InvalidReference(
                    f"{_shorten(text)} is not an image reference: bad tag {_shorten(tag_text)}",
                    hint="a tag has 1 to 128 letters, digits, '_', '.', '-' and starts with"
                    " none of the last two",
                )
            tag = tag_text
        if not _DOMAIN.fullmatch(registry):
            raise InvalidReference(
                f"{_shorten(text)} is not an image reference: bad registry {_shorten(registry)}",
                hint="a registry is HOST or HOST:PORT",
            )
        if not _PATH.fullmatch(path):
            raise InvalidReference(
                f"{_shorten(text)} is not an image reference: bad repository {_shorten(path)}",
                hint="repository names are lower case: letters, digits and single '.', '_', '-'"
                " between them",
            )
        if registry in _HUB_ALIASES:
            registry = DOCKER_HUB
            if "/" not in path:
                path = _HUB_OFFICIAL + path
        if registry == DOCKER_HUB and _BARE_HEX.fullmatch(rest):
            raise InvalidReference(
                f"{_shorten(text)} is an image ID, not an image reference",
                hint="name the repository too: NAME@sha256:HEX",
            )
        if len(registry) + 1 + len(path) > _MAX_NAME:
            raise InvalidReference(
                f"{_shorten(text)} is not an image reference: the name is longer than"
                f" {_MAX_NAME} characters",
                hint="check the name",
            )
        if digest is None and tag is None:
            tag = "latest"
        return cls(registry, path, tag, digest)

    @property
    def name(self) -> str:
        """Registry and repository, without tag and digest."""
        return f"{self.registry}/{self.repository}"

    @property
    def object(self) -> str:
        """What a registry is asked for: the digest if there is one, else the tag."""
        return str(self.digest) if self.digest else self.tag or "latest"

    @property
    def familiar(self) -> str:
        """The short form that people write: ``alpine:latest``."""
        name = self.name
        if self.registry == DOCKER_HUB:
            name = self.repository.removeprefix(_HUB_OFFICIAL)
        return name + self._suffix()

    def with_digest(self, digest: Digest) -> Self:
        """Return ``name@digest``: this repository's document with that digest."""
        return type(self)(self.registry, self.repository, digest=digest)

    def _suffix(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        return f"{tag}@{self.digest}" if self.digest else tag

    def __str__(self) -> str:
        return self.name + self._suffix()


def _split_domain(text: str) -> tuple[str, str]:
    first, slash, rest = text.partition("/")
    is_host = "." in first or ":" in first or first == "localhost" or first.lower() != first
    if slash and is_host:
        return first, rest
    return DOCKER_HUB, text


def _shorten(text: str, limit: int = 100) -> str:
    return repr(text if len(text) <= limit else text[:limit] + "…")
