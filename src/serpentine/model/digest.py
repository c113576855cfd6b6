"""Digests, and the three identities of a layer (OCI image specification, descriptor.md)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

from serpentine.errors import InvalidDigest

if TYPE_CHECKING:
    from hashlib import _Hash

__all__ = ["ChainID", "DiffID", "Digest", "chain_ids"]

_HEX_LENGTH = {"sha256": 64, "sha384": 96, "sha512": 128}
_HEX = re.compile(r"[0-9a-f]+")


class Digest:
    """The digest of some bytes: of a blob as it is stored and transferred.

    Immutable by convention of its read-only members.  ``str()`` gives the usual
    ``algorithm:hex``.  Digests of different kinds (Digest, DiffID, ChainID) are never equal.
    """

    # A plain class and not a dataclass: msgspec reads a dataclass as a JSON object.
    __slots__ = ("_algorithm", "_hex")

    def __init__(self, algorithm: str, hex_digits: str) -> None:
        self._algorithm = algorithm
        self._hex = hex_digits

    @property
    def algorithm(self) -> str:
        """The hash algorithm: ``sha256``, ``sha384`` or ``sha512``."""
        return self._algorithm

    @property
    def hex(self) -> str:
        """The hash in lower-case hexadecimal digits."""
        return self._hex

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``algorithm:hex``; raises InvalidDigest for anything that we could not check."""
        algorithm, colon, value = text.partition(":")
        length = _HEX_LENGTH.get(algorithm)
        if not colon or length is None:
            known = ", ".join(_HEX_LENGTH)
            raise InvalidDigest(
                f"{_shorten(text)} is not a digest that we can check",
                hint=f"write it as ALGORITHM:HEX, with one of {known}",
            )
        if len(value) != length or not _HEX.fullmatch(value):
            raise InvalidDigest(
                f"{_shorten(text)} is not a {algorithm} digest",
                hint=f"it needs {length} lower-case hexadecimal digits",
            )
        return cls(algorithm, value)

    @classmethod
    def of(cls, data: bytes, algorithm: str = "sha256") -> Self:
        """Return the digest of some bytes in memory."""
        return cls(algorithm, hashlib.new(algorithm, data).hexdigest())

    def hasher(self) -> _Hash:
        """Return a new hash object of this digest's algorithm."""
        return hashlib.new(self.algorithm)

    def matches(self, data: bytes) -> bool:
        """Tell whether these bytes have this digest."""
        return hashlib.new(self.algorithm, data).hexdigest() == self.hex

    @property
    def short(self) -> str:
        """Twelve hexadecimal digits, for people."""
        return self.hex[:12]

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash((type(self), self._algorithm, self._hex))

    def __str__(self) -> str:
        return f"{self._algorithm}:{self._hex}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"


class DiffID(Digest):
    """The digest of a layer's uncompressed tar."""

    __slots__ = ()


class ChainID(Digest):
    """The digest that names a stack of layers, and so the snapshot that holds them."""

    __slots__ = ()


def chain_ids(diff_ids: Sequence[DiffID]) -> tuple[ChainID, ...]:
    """Return the chain ID after each layer, bottom first (image specification, config.md)."""
    chain: list[ChainID] = []
    for diff_id in diff_ids:
        if not chain:
            chain.append(ChainID(diff_id.algorithm, diff_id.hex))
        else:
            chain.append(ChainID.of(f"{chain[-1]} {diff_id}".encode()))
    return tuple(chain)


def _shorten(text: str, limit: int = 100) -> str:
    return repr(text if len(text) <= limit else text[:limit] + "…")
