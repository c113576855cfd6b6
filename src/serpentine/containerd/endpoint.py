"""Where a containerd is, and what must be sent along to be let in."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Self

from serpentine.errors import InvalidSetting

__all__ = ["Endpoint"]

# sun_path has 108 bytes with its final zero.
MAX_SOCKET_PATH = 107

# What gRPC takes: it raises an error of its own at the first call for anything else.
_KEY = re.compile(r"[a-z0-9_.-]+")
_VALUE = re.compile(r"[\x20-\x7e]+")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A unix socket (``unix:///path``) or ``host:port``.

    ``metadata`` goes with every call and may hold a token, ``root_certificates`` (PEM) makes
    the connection a TLS one; neither appears in ``repr``.  ``server_name`` is whose certificate
    it must be, and what ``:authority`` says; by default the host of the address.  Raises
    InvalidSetting for metadata that cannot be sent: a key needs lower case, a value printable
    ASCII.
    """

    address: str
    metadata: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    root_certificates: bytes | None = field(default=None, repr=False)
    server_name: str | None = None

    def __post_init__(self) -> None:
        for key, value in self.metadata:
            # gRPC takes what ends in "-bin" for bytes in base64.
            if not _KEY.fullmatch(key) or key.endswith("-bin") or not _VALUE.fullmatch(value):
                # Without the value, which may be a token.
                raise InvalidSetting(
                    f"the metadata {key!r} for {self} cannot be sent",
                    hint="write its name in lower case, its value in printable ASCII",
                )

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a path, ``unix:///path``, ``host:port`` or ``tcp://host:port``.

        Raises InvalidSetting.
        """
        given = text.strip()
        if given.startswith("unix:"):
            return cls._socket(given.removeprefix("unix:").removeprefix("//"), text)
        if given.startswith("/"):
            return cls._socket(given, text)
        address = given.removeprefix("tcp://")
        host, colon, port = address.rpartition(":")
        if (
            not (colon and host and port.isascii() and port.isdigit() and 0 < int(port) < 65536)
            or "/" in address
        ):
            raise InvalidSetting(
                f"{text!r} is not a containerd address",
                hint="give the path of its socket: /run/containerd/containerd.sock",
            )
        if ":" in host and not host.startswith("["):
            raise InvalidSetting(
                f"{text!r} is not a containerd address",
                hint="put an IPv6 address into brackets: [::1]:PORT",
            )
        return cls(address)

    @classmethod
    def _socket(cls, path: str, text: str) -> Self:
        if not path.startswith("/"):
            raise InvalidSetting(
                f"{text!r} is not a containerd address", hint="the socket's path must be absolute"
            )
        if len(path.encode()) > MAX_SOCKET_PATH:
            raise InvalidSetting(
                f"the socket path {path} is longer than the {MAX_SOCKET_PATH} bytes that the"
                " system allows",
                hint="choose a shorter directory",
            )
        return cls(f"unix://{path}")

    @property
    def socket_path(self) -> str | None:
        """The path of the unix socket; None for a TCP endpoint."""
        path = self.address.removeprefix("unix://")
        return path if path != self.address else None

    def __str__(self) -> str:
        return self.socket_path or self.address
