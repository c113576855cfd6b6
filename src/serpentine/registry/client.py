"""The registry client: a repository's documents and blobs.

The protocol is the OCI distribution specification 1.1, the pull part.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Collection, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Self
from urllib.parse import urlencode, urljoin, urlsplit

from serpentine.errors import (
    DigestMismatch,
    DocumentTooLarge,
    InvalidDigest,
    RateLimited,
    RegistryError,
    RegistryNotFound,
    RegistryProtocolError,
    SizeMismatch,
)
from serpentine.events import OnEvent, Retrying, ignore
from serpentine.model.digest import Digest
from serpentine.model.documents import INDEX_TYPES, MANIFEST_TYPES, SCHEMA1_TYPES, Descriptor
from serpentine.model.reference import Reference
from serpentine.registry.auth import Authenticator
from serpentine.registry.blobs import BlobStream
from serpentine.registry.credentials import CredentialStore
from serpentine.registry.hosts import api_host, host_of
from serpentine.registry.messages import error_of
from serpentine.registry.retry import parse_retry_after, retry_delay
from serpentine.registry.transport import Interrupted, Response, Transport

__all__ = ["RegistryClient", "Repository", "Resolved"]

# What other engines take, too: containerd's limit is 4.4 MB.
MAX_DOCUMENT = 4 * 1024 * 1024
MAX_ERROR_BODY = 16 * 1024
MAX_TOKEN_BODY = 256 * 1024
MAX_REDIRECTS = 10

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
# Statuses by which registries, or what stands before them, refuse HEAD alone (trap 36).
_HEAD_REFUSED = frozenset({400, 403, 405, 501})

_ACCEPT = ", ".join(
    [
        *sorted(MANIFEST_TYPES | INDEX_TYPES),
        # Only so that a registry does not convert it, and we can say what is wrong with it.
        *(f"{kind};q=0.1" for kind in sorted(SCHEMA1_TYPES)),
        "*/*;q=0.01",
    ]
)


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a reference means now; ``body`` is there, verified, if it had to be fetched."""

    descriptor: Descriptor
    body: bytes | None = None


class RegistryClient:
    """Talks to any number of registries; keeps connections and tokens.

    Safe for concurrent tasks of one event loop.
    """

    def __init__(
        self,
        *,
        credentials: CredentialStore,
        insecure: Collection[str] = (),
        user_agent: str = "serpentine",
        connections_per_host: int = 8,
    ) -> None:
        """Make a client; no connection is made yet.

        insecure: HOST or HOST:PORT that may be reached over plain HTTP or unverified TLS.
        """
        self.transport = Transport(
            insecure=insecure,
            user_agent=user_agent,
            connections_per_host=connections_per_host,
        )
        self.authenticator = Authenticator(credentials)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections."""
        await self.transport.close()

    def repository(self, reference: Reference, *, on_event: OnEvent = ignore) -> Repository:
        """Return the repository that a reference names, counting its own requests."""
        return Repository(self, reference, on_event)

    def __repr__(self) -> str:
        return f"<RegistryClient requests={self.transport.requests}>"


class Repository:
    """One repository of one registry, for one pull: ``requests`` counts what it took."""

    def __init__(self, client: RegistryClient, reference: Reference, on_event: OnEvent) -> None:
        self._transport = client.transport
        self._authenticator = client.authenticator
        self._on_event = on_event
        self.reference = reference
        self.host = api_host(reference.registry)
        self.requests = 0

    async def resolve(self) -> Resolved:
        """Find out what the reference means: HEAD, or GET where HEAD does not tell.

        Raises the RegistryError family; ImageError for a document that is not what it says.
        """
        path = f"manifests/{self.reference.object}"
        try:
            async with self._request("HEAD", path, {"Accept": _ACCEPT}) as response:
                descriptor = self._described(response)
        except RegistryError as error:
            if error.status not in _HEAD_REFUSED:
                raise
            descriptor = None
        if descriptor is not None:
            return Resolved(descriptor)
        async with self._request("GET", path, {"Accept": _ACCEPT}) as response:
            body = await self._read_document(response, None)
            media_type = _media_type(response)
            named = self._header_digest(response)
        wanted = self.reference.digest or named
        digest = Digest.of(body, wanted.algorithm if wanted else "sha256")
        if wanted is not None and digest != wanted:
            raise self._wrong_digest(wanted)
        descriptor = Descriptor(media_type=media_type, digest=digest, size=len(body))
        return Resolved(descriptor, body)

    async def fetch_document(self, descriptor: Descriptor, kind: str) -> bytes:
        """Return a document's bytes, verified by size and digest.

        kind: ``manifests`` or ``blobs``: where in the registry's paths it is.
        Raises DocumentTooLarge above 4 MiB (before any request if the descriptor says so),
        SizeMismatch, DigestMismatch, and the RegistryError family.
        """
        if descriptor.size > MAX_DOCUMENT:
            raise self._too_large(descriptor.digest)
        headers = {"Accept": _ACCEPT} if kind == "manifests" else {}
        async with self._request("GET", f"{kind}/{descriptor.digest}", headers) as response:
            body = await self._read_document(response, descriptor)
        if descriptor.size >= 0 and len(body) != descriptor.size:
            raise SizeMismatch(
                f"{self.reference}: {self.host} serves {len(body)} bytes as"
                f" {descriptor.digest}, and its descriptor says {descriptor.size}",
                image=str(self.reference),
                hint="pull again; if it stays, the image has to be pushed again",
            )
        if not descriptor.digest.matches(body):
            raise self._wrong_digest(descriptor.digest)
        return body

    @asynccontextmanager
    async def open_blob(
        self, descriptor: Descriptor, *, offset: int = 0
    ) -> AsyncIterator[BlobStream]:
        """Open a blob from a byte on; its bytes come as they are stored.

        The stream raises TransferError when it ends early: open it again at ``stream.offset``
        to continue.
        """
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        opened = False
        try:
            async with self._request("GET", f"blobs/{descriptor.digest}", headers) as response:
                opened = True
                yield self._blob(response, descriptor, offset)
                return
        except RegistryNotFound:
            urls = [
                url for url in descriptor.urls or () if url.startswith("https://") and host_of(url)
            ]
            if opened or not urls:
                raise
        # A foreign layer is not in the registry but where its descriptor says; whoever wrote
        # that gets none of our credentials (trap 43).  The digest is checked all the same.
        with self._named():
            async with self._follow("GET", urls[0], headers) as response:
                if response.status not in (200, 206) and not _is_empty_range(response, headers):
                    raise await self._error(response)
                yield self._blob(response, descriptor, offset)

    def _blob(self, response: Response, descriptor: Descriptor, offset: int) -> BlobStream:
        return BlobStream(response, descriptor, offset, image=str(self.reference))

    # --- one request, with authentication, redirects and retries -----------------------------

    @asynccontextmanager
    async def _request(
        self, method: str, path: str, headers: Mapping[str, str]
    ) -> AsyncIterator[Response]:
        """Send until there is an answer that is no error; raise what it means otherwise."""
        with self._named():
            async with self._retried(method, path, headers) as response:
                yield response

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Give errors of the connection, its body's included, the image's name."""
        try:
            yield
        except RegistryError as error:
            error.about(str(self.reference))
            raise

    @asynccontextmanager
    async def _retried(
        self, method: str, path: str, headers: Mapping[str, str]
    ) -> AsyncIterator[Response]:
        tries = 0
        while True:
            tries += 1
            opened = False
            try:
                async with self._authorized(method, path, headers) as response:
                    if response.status in (200, 206) or _is_empty_range(response, headers):
                        opened = True
                        yield response
                        return
                    failure = await self._error(response)
                    status: int | None = response.status
                    after = parse_retry_after(
                        response.headers.get("Retry-After"), datetime.now(UTC)
                    )
            except Interrupted as error:
                if opened:
                    raise
                failure, status, after = error, None, None
            delay = retry_delay(tries, status, after, random.random)
            if delay is None:
                raise failure
            what = f"{method} {path.partition(':')[0]} at {self.host}"
            self._on_event(Retrying(what=what, reason=str(failure), delay=delay))
            await asyncio.sleep(delay)

    @asynccontextmanager
    async def _authorized(
        self, method: str, path: str, headers: Mapping[str, str]
    ) -> AsyncIterator[Response]:
        """Send with what authorization we have, and with a fresh one when it is refused."""
        repository = self.reference.repository
        header = self._authenticator.known_header(self.host, repository)
        # A header from the cache may be stale, so it may be renewed; a fresh one may not.
        renewed = False
        while True:
            sent = {**headers, "Authorization": header} if header else headers
            async with self._redirected(method, path, sent) as response:
                if response.status != 401 or response.host != self.host:
                    yield response
                    return
                values = response.header_values("WWW-Authenticate")
            if renewed:
                raise await self._authenticator.rejection(
                    host=self.host,
                    registry=self.reference.registry,
                    repository=repository,
                    image=str(self.reference),
                )
            renewed = True
            header = await self._authenticator.answer(
                self._send_for_token,
                host=self.host,
                registry=self.reference.registry,
                repository=repository,
                image=str(self.reference),
                values=values,
                refused=header,
                plain=self._transport.scheme(self.host) == "http"
                or self._transport.is_insecure(self.host),
            )

    @asynccontextmanager
    async def _redirected(
        self, method: str, path: str, headers: Mapping[str, str]
    ) -> AsyncIterator[Response]:
        """Send to the registry, and go where it sends us."""
        url = f"/v2/{self.reference.repository}/{path}"
        async with self._transport.to_registry(method, self.host, url, headers) as response:
            self.requests += 1
            if response.status not in _REDIRECTS:
                yield response
                return
            target = self._target(response)
        async with self._follow(
            method, target, _without_secrets(headers, response.url, target)
        ) as r:
            yield r

    @asynccontextmanager
    async def _follow(
        self, method: str, url: str, headers: Mapping[str, str]
    ) -> AsyncIterator[Response]:
        for _ in range(MAX_REDIRECTS):
            async with self._transport.send(method, url, headers) as response:
                self.requests += 1
                if response.status not in _REDIRECTS:
                    yield response
                    return
                target = self._target(response)
            headers = _without_secrets(headers, url, target)
            url = target
        raise RegistryProtocolError(
            f"{self.reference}: {self.host} redirects more than {MAX_REDIRECTS} times",
            host=self.host,
            image=str(self.reference),
            hint="tell the registry's operators",
        )

    def _target(self, response: Response) -> str:
        location = response.headers.get("Location", "")
        try:
            target = urljoin(response.url, location) if location else ""
        except ValueError:
            target = ""
        host = host_of(target)
        scheme = urlsplit(target).scheme if host else ""
        if scheme not in ("http", "https"):
            why = "to nowhere"
        elif (
            scheme == "http"
            and response.url.startswith("https:")
            and not self._transport.is_insecure(host)
        ):
            why = f"to {host} without TLS"
        else:
            return target
        raise RegistryProtocolError(
            f"{self.reference}: {response.host} redirects {why}",
            host=response.host,
            image=str(self.reference),
            hint="tell the registry's operators",
        )

    async def _send_for_token(
        self,
        method: str,
        url: str,
        *,
        params: list[tuple[str, str]] | None = None,
        data: dict[str, str] | None = None,
        authorization: str | None = None,
    ) -> tuple[int, bytes]:
        if params:
            url += ("&" if "?" in url else "?") + urlencode(params)
        headers = {"Accept": "application/json"}
        if authorization:
            headers["Authorization"] = authorization
        tries = 0
        while True:
            tries += 1
            try:
                async with self._transport.send(method, url, headers, data=data) as response:
                    self.requests += 1
                    status: int | None = response.status
                    body = await response.read(MAX_TOKEN_BODY)
                    after = parse_retry_after(
                        response.headers.get("Retry-After"), datetime.now(UTC)
                    )
                    host = response.host
                failure: RegistryError | None = None
            except Interrupted as error:
                failure, status, after, body, host = error, None, None, b"", ""
            delay = retry_delay(tries, status, after, random.random)
            if delay is None:
                if failure is not None:
                    raise failure
                if status == 429:
                    raise self._rate_limited(host, after)
                assert status is not None
                return status, body
            what = f"{method} of a token for {self.host}"
            reason = str(failure) if failure else f"status {status}"
            self._on_event(Retrying(what=what, reason=reason, delay=delay))
            await asyncio.sleep(delay)

    # --- what answers mean --------------------------------------------------------------------

    def _described(self, response: Response) -> Descriptor | None:
        """Return what HEAD tells of a document; None if it does not tell enough."""
        digest = self._header_digest(response)
        length = response.headers.get("Content-Length", "")
        wanted = self.reference.digest
        if wanted is not None and digest is not None and digest != wanted:
            raise self._wrong_digest(wanted)
        digest = wanted or digest
        if digest is None or not (length.isascii() and length.isdigit()) or int(length) == 0:
            return None
        if int(length) > MAX_DOCUMENT:
            raise self._too_large(digest)
        return Descriptor(media_type=_media_type(response), digest=digest, size=int(length))

    def _header_digest(self, response: Response) -> Digest | None:
        text = response.headers.get("Docker-Content-Digest")
        if not text:
            return None
        try:
            return Digest.parse(text)
        except InvalidDigest:
            raise RegistryProtocolError(
                f"{self.reference}: {response.host} names a digest that is none: {text[:80]!r}",
                host=response.host,
                image=str(self.reference),
                hint="tell the registry's operators",
            ) from None

    async def _read_document(self, response: Response, descriptor: Descriptor | None) -> bytes:
        body = await response.read(MAX_DOCUMENT)
        if len(body) > MAX_DOCUMENT:
            raise self._too_large(descriptor.digest if descriptor else None)
        return body

    def _too_large(self, digest: Digest | None) -> DocumentTooLarge:
        what = f"document {digest}" if digest else "manifest"
        return DocumentTooLarge(
            f"{self.reference}: the {what} at {self.host} is larger than"
            f" {MAX_DOCUMENT // 1024 // 1024} MiB",
            image=str(self.reference),
            hint="this is no image that can be pulled",
        )

    def _wrong_digest(self, digest: Digest) -> DigestMismatch:
        return DigestMismatch(
            f"{self.reference}: what {self.host} serves as {digest} has another digest",
            image=str(self.reference),
            hint="pull again; if it stays, the image has to be pushed again",
        )

    def _rate_limited(self, host: str, after: float | None) -> RateLimited:
        return RateLimited(
            f"{self.reference}: {host} asks us to slow down (429)",
            host=host,
            image=str(self.reference),
            retry_after=after,
            hint=f"try again in {after:.0f} seconds" if after else "try again later, or log in",
        )

    async def _error(self, response: Response) -> RegistryError:
        """Return what a status that is no success means."""
        if response.status == 429:
            after = parse_retry_after(response.headers.get("Retry-After"), datetime.now(UTC))
            return self._rate_limited(response.host, after)
        try:
            body = await response.read(MAX_ERROR_BODY)
        except RegistryError:
            body = b""
        return error_of(response.status, body, self.reference, response.host)


def _media_type(response: Response) -> str:
    return response.headers.get("Content-Type", "").partition(";")[0].strip()


def _is_empty_range(response: Response, headers: Mapping[str, str]) -> bool:
    return response.status == 416 and "Range" in headers


def _without_secrets(headers: Mapping[str, str], before: str, after: str) -> Mapping[str, str]:
    """Return the headers for a redirect: to another host without Authorization (trap 36)."""
    old, new = urlsplit(before), urlsplit(after)
    if (old.scheme, old.netloc) == (new.scheme, new.netloc):
        return headers
    return {name: value for name, value in headers.items() if name != "Authorization"}
