"""HTTP: one request out, one response back, in our own errors.  aiohttp is known only here.

No redirects, no retries, no authentication: those are decisions, and made above.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import socket
import ssl
import struct
import sys
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from serpentine.errors import (
    RateLimited,
    RegistryError,
    RegistryProtocolError,
    RegistryUnreachable,
    TransferError,
)
from serpentine.registry.hosts import (
    address_kind,
    host_of,
    inner_kind,
    is_loopback,
    matches,
    may_lead,
    proxy_for,
    schemes_for,
    split_host,
)
from serpentine.registry.memory import HostMemory
from serpentine.registry.retry import MAX_RETRY_AFTER, parse_retry_after

__all__ = ["Interrupted", "PlainHTTPError", "Response", "Transport"]

CONNECT_TIMEOUT = 15.0
READ_TIMEOUT = 32.0
# How much waits to be read before the connection is left alone.  All that is between a registry and
# containerd's disk comes again if we are killed: that is to be about 1 MiB.
READ_BUFFER = 16 * 1024
# What the kernel holds (twice) for us of a host that is near, where it would hold several MiB: as a
# round trip takes less than a millisecond, more would make nothing faster.
NEAR_BUFFER = 64 * 1024
NEAR = 0.001
# Statuses with which a host may name a time before which it wants no request.
_SLOW_DOWN = frozenset({429, 503})
# Seconds without a request to a host that asks to slow down, and does not say for how long.
PATIENCE = 1.0
# Bytes per second below which a document is given up.
SLOWEST = 256.0
# Presigned Location headers are long.
MAX_HEADER = 64 * 1024
# How much of a body that nobody wants is read for the sake of its connection.
MAX_UNREAD = 16 * 1024


class Interrupted(RegistryUnreachable):
    """The connection broke, or nothing came in time: worth another try."""


class PlainHTTPError(RegistryUnreachable):
    """The host answered a TLS greeting with something else."""


@dataclass(slots=True)
class Response:
    """A response whose body has not been read; valid inside its context only."""

    status: int
    headers: Mapping[str, str]
    url: str
    host: str
    _raw: aiohttp.ClientResponse
    # Seconds after which a document's body must have come at some speed.
    patience: float = READ_TIMEOUT

    def header_values(self, name: str) -> list[str]:
        """Return all values of a header that may stand several times."""
        return list(self._raw.headers.getall(name, []))

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the body's bytes as they come, never decoded (trap 39).

        Raises TransferError when it breaks off.
        """
        _hold_little(self._raw)
        try:
            while chunk := await self._raw.content.readany():
                yield chunk
        except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
            why = "nothing came for a while" if isinstance(error, TimeoutError) else _words(error)
            raise TransferError(
                f"the connection to {self.host} broke off: {why}",
                host=self.host,
                hint="try again",
            ) from error

    async def read(self, limit: int) -> bytes:
        """Return the body, at most ``limit`` bytes and one more, which tells that it is longer.

        Raises TransferError when it breaks off, or comes so slowly that it might never end.
        """
        parts: list[bytes] = []
        size = 0
        began = time.monotonic()
        async for chunk in self.chunks():
            parts.append(chunk[: limit + 1 - size])
            size += len(parts[-1])
            if size > limit:
                break
            took = time.monotonic() - began
            if took > self.patience and size / took < SLOWEST:
                raise TransferError(
                    f"{self.host} sends {size / took:.0f} bytes a second",
                    host=self.host,
                    hint="try again",
                )
        return b"".join(parts)


def _hold_little(response: aiohttp.ClientResponse) -> None:
    """Let the kernel hold little of what we have not read, where that costs no speed."""
    transport = response.connection.transport if response.connection else None
    connection = transport.get_extra_info("socket") if transport else None
    if connection is None or connection.family not in (socket.AF_INET, socket.AF_INET6):
        return
    if sys.platform == "linux":
        # An old kernel tells less, and one that imitates it may say 0 for what it does not know.
        with contextlib.suppress(OSError, struct.error):
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 152)
            (round_trip,) = struct.unpack_from("=I", info, 148)  # the least, in µs
            if 0 < round_trip < NEAR * 1e6:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, NEAR_BUFFER)


class Transport:
    """Connections to all hosts, kept and reused."""

    def __init__(
        self,
        *,
        insecure: Collection[str] = (),
        user_agent: str = "serpentine",
        connections_per_host: int = 8,
        memory: HostMemory | None = None,
        read_timeout: float = READ_TIMEOUT,
    ) -> None:
        self.memory = memory or HostMemory()
        self._insecure = frozenset(insecure)
        self._verified = ssl.create_default_context()
        self._unverified = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._unverified.check_hostname = False
        self._unverified.verify_mode = ssl.CERT_NONE
        self._user_agent = user_agent
        self._connections_per_host = connections_per_host
        self._read_timeout = read_timeout
        # Of the names that were looked up: what kind of address they stand for.
        self._kinds: dict[str, str] = {}
        self._resolvers = (_Resolver(self._kinds), _PublicResolver())
        self._session = self._open(self._resolvers[0])
        # Whom a public registry sends us to is reached by connections of their own, which
        # go to public addresses only.
        self._guarded = self._open(self._resolvers[1])
        self._schemes: dict[str, str] = {}
        self.requests = 0

    def _open(self, resolver: AbstractResolver) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0, limit_per_host=self._connections_per_host, resolver=resolver
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"User-Agent": self._user_agent},
            auto_decompress=False,
            read_bufsize=READ_BUFFER,
            max_line_size=MAX_HEADER,
            max_field_size=MAX_HEADER,
            # Proxies are looked up by us: aiohttp would read .netrc as well, and put what it
            # says over the registry's own authorization (trap 41).
            trust_env=False,
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()
        await self._guarded.close()
        for resolver in self._resolvers:
            await resolver.close()

    def may_lead(self, source: str, target: str) -> bool:
        """Tell whether a host may send us to another, as far as their names say it."""
        return self.is_insecure(target) or may_lead(self._kind(source), inner_kind(target))

    def _kind(self, host: str) -> str:
        if self.is_insecure(host):
            return "private"  # the user trusts it, and the way to it
        return inner_kind(host) or self._kinds.get(split_host(host), "")

    def is_insecure(self, host: str) -> bool:
        """Tell whether the user said that this host need not prove itself."""
        return matches(host, self._insecure)

    def scheme(self, host: str) -> str | None:
        """Return the scheme by which a registry has answered before."""
        return self._schemes.get(host)

    @asynccontextmanager
    async def to_registry(
        self,
        method: str,
        host: str,
        path: str,
        headers: Mapping[str, str],
        *,
        scheme: str | None = None,
        tls: ssl.SSLContext | None = None,
        tries: int = 3,
        hurry: bool = False,
        on_wait: Callable[[str, float], None] | None = None,
    ) -> AsyncIterator[Response]:
        """Send a request to a registry, by the scheme that it speaks; found out once.

        scheme: if that is known.  tls, tries, hurry, on_wait: as for ``send``.
        """
        known = scheme or self._schemes.get(host)
        schemes = (known,) if known else schemes_for(host, self._insecure)
        for one in schemes:
            answered = False
            try:
                async with self.send(
                    method,
                    f"{one}://{host}{path}",
                    headers,
                    tls=tls,
                    tries=tries,
                    hurry=hurry,
                    on_wait=on_wait,
                ) as response:
                    if scheme is None:
                        # What was configured for a mirror says nothing of the same host asked by
                        # its own name: that would then be asked in plain HTTP.
                        self._schemes[host] = one
                    answered = True
                    yield response
                    return
            except PlainHTTPError:
                # Nothing but a TLS greeting was sent.  A host that fails the greeting in any
                # other way (a certificate, say) is an error and no reason to do without.
                if answered or one == schemes[-1]:
                    raise

    @asynccontextmanager
    async def send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        *,
        data: Mapping[str, str] | None = None,
        source: str = "",
        tls: ssl.SSLContext | None = None,
        tries: int = 3,
        hurry: bool = False,
        on_wait: Callable[[str, float], None] | None = None,
    ) -> AsyncIterator[Response]:
        """Send one request.

        source: the host that sent us to this URL, if one did.
        tls: how the host proves itself, if not as all others.
        tries: how often it was sent, this time included, by those who send it again.  A connection
            that has died silently is given up soon; a host that is slow gets more time by and by.
        hurry: there is another host to ask: give up soon, and do not wait for this one.
        on_wait: is told of a host, and for how many seconds it is waited for, if that is long.

        Waits first for a host that asked for patience, whichever of our requests it told so.

        Raises Interrupted, PlainHTTPError, RegistryUnreachable, RegistryProtocolError,
        RateLimited where the wait would be too long, and InvalidSetting for a proxy that is none.
        """
        host = host_of(url)
        await self._patience(host, 0.0 if hurry else MAX_RETRY_AFTER, on_wait)
        proxy = None if is_loopback(host) else proxy_for(url)
        context = tls or (self._unverified if self.is_insecure(host) else self._verified)
        part = 4 if hurry else max(1, 4 >> (tries - 1))
        timeout = aiohttp.ClientTimeout(
            total=None,
            sock_connect=CONNECT_TIMEOUT / part,
            sock_read=self._read_timeout / part,
        )
        # With a proxy, it is the one that looks up names.
        guard = source and not proxy and not self.is_insecure(host) and not self._kind(source)
        session = self._guarded if guard and source != host else self._session
        try:
            # encoded: the URL is as the registry gave it; a signature covers each character.
            raw = await session.request(
                method,
                URL(url, encoded=True),
                # Ranges and digests are over the bytes as stored (traps 38, 39).
                headers={"Accept-Encoding": "identity", **headers},
                data=data,
                proxy=proxy,
                ssl=context,
                timeout=timeout,
                allow_redirects=False,
            )
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise _translate(error, host, proxy=proxy) from error
        self.requests += 1
        response = Response(raw.status, raw.headers, url, host, raw, self._read_timeout)
        try:
            if raw.status in _SLOW_DOWN:
                after = parse_retry_after(raw.headers.get("Retry-After"), datetime.now(UTC))
                if after is None and raw.status == 429:
                    after = PATIENCE
                if after:
                    await asyncio.to_thread(self.memory.close, host, after)
            yield response
            if raw.status >= 300:
                # A 401 or a redirect has a short body that nobody reads; read to its end, the
                # connection serves the next request, which saves a TLS greeting.
                with contextlib.suppress(RegistryError):
                    await response.read(MAX_UNREAD)
        finally:
            # What was read to its end has given its connection back by now; what is left of
            # any other is not worth waiting for.
            raw.close()

    async def _patience(
        self, host: str, longest: float, on_wait: Callable[[str, float], None] | None
    ) -> None:
        while left := await asyncio.to_thread(self.memory.closed_for, host):
            if left > longest:
                hint = f"try again in {left:.0f} seconds"
                if (noted := self.memory.file(host)) is not None:
                    hint += f"; if you know that it is over, remove {noted}"
                raise RateLimited(
                    f"{host} asks us to wait for {left:.0f} seconds",
                    host=host,
                    retry_after=left,
                    # Logging in would not help: all of us wait, whoever we are there.
                    hint=hint,
                )
            # Never before the time, and not all at the same moment after it.
            delay = left + random.uniform(0.01, 0.2)  # noqa: S311 - no secret
            if on_wait is not None and left > PATIENCE:
                on_wait(host, delay)
            await asyncio.sleep(delay)


class _Resolver(AbstractResolver):
    """Looks up names, and notes which stand for inner addresses only."""

    def __init__(self, kinds: dict[str, str]) -> None:
        self._inner = aiohttp.DefaultResolver()
        self._kinds = kinds

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Return the addresses of a name."""
        found = await self._inner.resolve(host, port, family)
        kinds = [address_kind(one["host"]) for one in found]
        self._kinds[host] = kinds[0] if all(kinds) else ""
        return found

    async def close(self) -> None:
        """Let go of what the look-ups need."""
        await self._inner.close()


class _InnerAddressError(OSError):
    """A name that should be a public host's stands for an inner address."""


class _PublicResolver(_Resolver):
    """Looks up names, and refuses those that stand for an inner address."""

    def __init__(self) -> None:
        super().__init__({})

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Return the addresses of a name, all of them public."""
        found = await super().resolve(host, port, family)
        if any(address_kind(one["host"]) for one in found):
            raise _InnerAddressError(host)
        return found


def _translate(error: Exception, host: str, *, proxy: str | None) -> RegistryError:
    """Return the error of our tree for a request that got no response."""
    if isinstance(error.__cause__, _InnerAddressError):
        return RegistryProtocolError(
            f"a registry on the internet sends us to {host}, which is an address within a network",
            host=host,
            hint=f"if that is meant so, use --insecure-registry {host}",
        )
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        reason = getattr(error.certificate_error, "verify_message", "") or "not valid"
        return RegistryUnreachable(
            f"the certificate of {host} is not trusted: {reason}",
            host=host,
            hint="name its authority in SSL_CERT_FILE,"
            f" or use --insecure-registry {host} if you must",
        )
    if isinstance(error, aiohttp.ClientProxyConnectionError | aiohttp.ClientHttpProxyError) or (
        # With a proxy, its own name is the only one that is looked up here.
        proxy and isinstance(error, aiohttp.ClientConnectorDNSError)
    ):
        return RegistryUnreachable(
            f"cannot reach {host} through the proxy {host_of(proxy or '')}",
            host=host,
            hint="check HTTPS_PROXY, HTTP_PROXY and NO_PROXY",
        )
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return RegistryUnreachable(
            f"cannot find the host {host}",
            host=host,
            hint="check the registry's name, and the network",
        )
    if isinstance(error, aiohttp.ClientSSLError) or isinstance(error.__cause__, ssl.SSLError):
        return _tls(error, host)
    if isinstance(error, aiohttp.ClientConnectorError):
        return RegistryUnreachable(
            f"cannot connect to {host}: {_words(error)}",
            host=host,
            hint="check the registry's name and port, and the network",
        )
    if isinstance(error, aiohttp.ServerDisconnectedError | ConnectionError | TimeoutError):
        why = "no answer in time" if isinstance(error, TimeoutError) else _words(error)
        return Interrupted(
            f"{host} does not answer: {why}", host=host, hint="try again; check the network"
        )
    if isinstance(error, aiohttp.ClientOSError):
        return Interrupted(
            f"the connection to {host} broke: {_words(error)}", host=host, hint="try again"
        )
    return RegistryProtocolError(
        f"{host} gave an answer that is no valid HTTP: {_words(error)}",
        host=host,
        hint="check that there is a registry at this address",
    )


def _tls(error: Exception, host: str) -> RegistryUnreachable:
    reason = getattr(error.__cause__, "reason", None) or getattr(error, "reason", None) or ""
    if reason in (
        "WRONG_VERSION_NUMBER",
        "UNEXPECTED_MESSAGE",
        "HTTP_REQUEST",
        "RECORD_LAYER_FAILURE",
    ):
        return PlainHTTPError(
            f"{host} does not speak HTTPS",
            host=host,
            hint=f"if you trust the way to it, use --insecure-registry {host}",
        )
    return RegistryUnreachable(
        f"cannot make a TLS connection to {host}: {str(reason).replace('_', ' ').lower()}",
        host=host,
        hint="check the registry's address and its TLS set-up",
    )


def _words(error: BaseException) -> str:
    """Return what went wrong in the system's words, without addresses or objects in it."""
    if isinstance(error, aiohttp.ClientConnectorError):
        error = error.os_error
    number = error.errno if isinstance(error, OSError) else None
    if number in errno.errorcode and not isinstance(error, ssl.SSLError):
        return os.strerror(number or 0).lower()
    if isinstance(error, aiohttp.InvalidURL):
        return "the address is not valid"  # its text is the URL
    if isinstance(error, aiohttp.ClientResponseError):
        # Its text holds the URL, and that a signature; its message quotes what came.
        text = error.message.partition(":")[0]
    else:
        text = str(error).split("[", 1)[0].partition(": <")[0]
    return text.strip(" ,:").lower() or type(error).__name__
