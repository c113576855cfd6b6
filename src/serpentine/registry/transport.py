"""HTTP: one request out, one response back, in our own errors.  aiohttp is known only here.

No redirects, no retries, no authentication: those are decisions, and made above.
"""

from __future__ import annotations

import contextlib
import errno
import os
import ssl
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aiohttp
from yarl import URL

from serpentine.errors import (
    RegistryError,
    RegistryProtocolError,
    RegistryUnreachable,
    TransferError,
)
from serpentine.registry.hosts import host_of, is_loopback, matches, proxy_for, schemes_for

__all__ = ["Interrupted", "PlainHTTPError", "Response", "Transport"]

CONNECT_TIMEOUT = 30.0
READ_TIMEOUT = 60.0
# One socket read hands us up to this much: larger costs memory per connection, smaller time.
READ_BUFFER = 256 * 1024
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

    def header_values(self, name: str) -> list[str]:
        """Return all values of a header that may stand several times."""
        return list(self._raw.headers.getall(name, []))

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the body's bytes as they come, never decoded (trap 39).

        Raises TransferError when it breaks off.
        """
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
        """Return the body, at most ``limit`` bytes and one more, which tells that it is longer."""
        parts: list[bytes] = []
        size = 0
        async for chunk in self.chunks():
            parts.append(chunk[: limit + 1 - size])
            size += len(parts[-1])
            if size > limit:
                break
        return b"".join(parts)


class Transport:
    """Connections to all hosts, kept and reused."""

    def __init__(
        self,
        *,
        insecure: Collection[str] = (),
        user_agent: str = "serpentine",
        connections_per_host: int = 8,
    ) -> None:
        self._insecure = frozenset(insecure)
        self._verified = ssl.create_default_context()
        self._unverified = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._unverified.check_hostname = False
        self._unverified.verify_mode = ssl.CERT_NONE
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, limit_per_host=connections_per_host),
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=CONNECT_TIMEOUT, sock_read=READ_TIMEOUT
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"User-Agent": user_agent},
            auto_decompress=False,
            read_bufsize=READ_BUFFER,
            max_line_size=MAX_HEADER,
            max_field_size=MAX_HEADER,
            # Proxies are looked up by us: aiohttp would read .netrc as well, and put what it
            # says over the registry's own authorization (trap 41).
            trust_env=False,
        )
        self._schemes: dict[str, str] = {}
        self.requests = 0

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()

    def is_insecure(self, host: str) -> bool:
        """Tell whether the user said that this host need not prove itself."""
        return matches(host, self._insecure)

    def scheme(self, host: str) -> str | None:
        """Return the scheme by which a registry has answered before."""
        return self._schemes.get(host)

    @asynccontextmanager
    async def to_registry(
        self, method: str, host: str, path: str, headers: Mapping[str, str]
    ) -> AsyncIterator[Response]:
        """Send a request to a registry, by the scheme that it speaks; found out once."""
        known = self._schemes.get(host)
        schemes = (known,) if known else schemes_for(host, self._insecure)
        for scheme in schemes:
            answered = False
            try:
                async with self.send(method, f"{scheme}://{host}{path}", headers) as response:
                    self._schemes[host] = scheme
                    answered = True
                    yield response
                    return
            except PlainHTTPError:
                # Nothing but a TLS greeting was sent.  A host that fails the greeting in any
                # other way (a certificate, say) is an error and no reason to do without.
                if answered or scheme == schemes[-1]:
                    raise

    @asynccontextmanager
    async def send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        *,
        data: Mapping[str, str] | None = None,
    ) -> AsyncIterator[Response]:
        """Send one request.

        Raises Interrupted, PlainHTTPError, RegistryUnreachable, RegistryProtocolError, and
        InvalidSetting for a proxy that is none.
        """
        host = host_of(url)
        proxy = None if is_loopback(host) else proxy_for(url)
        context = self._unverified if self.is_insecure(host) else self._verified
        try:
            # encoded: the URL is as the registry gave it; a signature covers each character.
            raw = await self._session.request(
                method,
                URL(url, encoded=True),
                # Ranges and digests are over the bytes as stored (traps 38, 39).
                headers={"Accept-Encoding": "identity", **headers},
                data=data,
                proxy=proxy,
                ssl=context,
                allow_redirects=False,
            )
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise _translate(error, host, proxy=proxy) from error
        self.requests += 1
        response = Response(raw.status, raw.headers, url, host, raw)
        try:
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


def _translate(error: Exception, host: str, *, proxy: str | None) -> RegistryError:
    """Return the error of our tree for a request that got no response."""
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
