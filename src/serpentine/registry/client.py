"""The registry client: a repository's documents and blobs.

The protocol is the OCI distribution specification 1.1, the pull part.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from serpentine.errors import (
    AuthenticationError,
    DigestMismatch,
    DocumentTooLarge,
    ImageError,
    InvalidDigest,
    RegistryError,
    RegistryNotFound,
    RegistryProtocolError,
    RegistryUnreachable,
    SerpentineError,
    SizeMismatch,
    TransferError,
)
from serpentine.events import OnEvent, Retrying, ignore
from serpentine.model.digest import Digest
from serpentine.model.documents import Descriptor
from serpentine.model.reference import Reference
from serpentine.registry.accept import ACCEPT, MAX_DOCUMENT
from serpentine.registry.auth import Authenticator
from serpentine.registry.blobs import BlobStream
from serpentine.registry.credentials import CredentialStore
from serpentine.registry.endpoints import Endpoint, Endpoints, in_order
from serpentine.registry.hosts import api_host, host_of
from serpentine.registry.memory import HostMemory
from serpentine.registry.source import Source, is_empty_range
from serpentine.registry.throttle import Throttle
from serpentine.registry.transport import READ_TIMEOUT, Response, Transport

__all__ = ["RegistryClient", "Repository", "Resolved"]

# Seconds before a document whose body broke off is asked for again.
BODY_DELAYS = (0.25, 1.0)

_T = TypeVar("_T")
# Statuses by which registries, or what stands before them, refuse HEAD alone (trap 36).
_HEAD_REFUSED = frozenset({400, 403, 405, 501})


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
        memory: Path | None = None,
        read_timeout: float = READ_TIMEOUT,
        endpoints: Endpoints | None = None,
        limit_rate: int | None = None,
    ) -> None:
        """Make a client; no connection is made yet.

        insecure: HOST or HOST:PORT that may be reached over plain HTTP or unverified TLS.
        memory: a folder where processes share what they know of hosts: when one may be asked
            again, and which failed.
        read_timeout: seconds without a byte after which an answer is given up; a quarter of it
            at the first try, and where there is another host to ask, half of it at the second.
        limit_rate: bytes of blobs per second, for all downloads together.
        endpoints: where registries' content may be had besides their own hosts.
        """
        self.transport = Transport(
            insecure=insecure,
            user_agent=user_agent,
            connections_per_host=connections_per_host,
            memory=HostMemory(memory),
            read_timeout=read_timeout,
        )
        self.authenticator = Authenticator(credentials)
        self.throttle = Throttle(limit_rate)
        self._endpoints = endpoints or Endpoints()
        self._contexts: dict[str, dict[str, ssl.SSLContext]] = {}

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

    async def ping(self, registry: str) -> tuple[int, str | None]:
        """Ask a registry for its API; return the status (401 is fine) and its ``Date``.

        The end point that the distribution specification names for it.  Raises RegistryError.
        """
        async with self.transport.to_registry("GET", api_host(registry), "/v2/", {}) as response:
            if response.status not in (200, 401):
                raise RegistryProtocolError(
                    f"{registry} answers {response.status} where a registry's API should be",
                    host=registry,
                    hint="check the name of the registry",
                )
            return response.status, response.headers.get("Date")

    def endpoints_of(
        self, registry: str
    ) -> tuple[tuple[Endpoint, ...], Mapping[str, ssl.SSLContext]]:
        """Return a registry's endpoints, and how some prove themselves; reads files.

        Raises InvalidSetting.
        """
        found = self._endpoints.of(registry)
        if registry not in self._contexts:
            self._contexts[registry] = {one.host: one.context() for one in found if one.has_tls}
        return found, self._contexts[registry]

    def repository(self, reference: Reference, *, on_event: OnEvent = ignore) -> Repository:
        """Return the repository that a reference names, counting its own requests."""
        return Repository(self, reference, on_event)

    def __repr__(self) -> str:
        return f"<RegistryClient requests={self.transport.requests}>"


class Repository:
    """One repository of one registry, for one pull: ``requests`` counts what it took."""

    def __init__(self, client: RegistryClient, reference: Reference, on_event: OnEvent) -> None:
        self._client = client
        self._transport = client.transport
        # To be told of each byte of a blob that was taken.
        self.throttle = client.throttle
        # The endpoints, the registry's own last; None until they were looked up.
        self._all: list[Source] | None = None
        self._on_event = on_event
        self.reference = reference
        self.host = api_host(reference.registry)
        self.requests = 0

    async def resolve(self) -> Resolved:
        """Find out what the reference means: HEAD, or GET where HEAD does not tell.

        Raises the RegistryError family; ImageError for a document that is not what it says.
        """
        return await self._first(self._resolve, resolve=True)

    async def _resolve(self, source: Source, before: int) -> Resolved:
        path = f"manifests/{self.reference.object}"
        try:
            async with source.request("HEAD", path, {"Accept": ACCEPT}, before=before) as response:
                descriptor = self._described(response)
        except RegistryError as error:
            if error.status not in _HEAD_REFUSED:
                raise
            descriptor = None
        if descriptor is not None:
            return Resolved(descriptor)
        async with source.request("GET", path, {"Accept": ACCEPT}, before=before) as response:
            body = await self._read_document(response, None)
            media_type = _media_type(response)
            named = self._header_digest(response)
        wanted = self.reference.digest or named
        digest = Digest.of(body, wanted.algorithm if wanted else "sha256")
        if wanted is not None and digest != wanted:
            raise self._wrong_digest(wanted, source.host)
        descriptor = Descriptor(media_type=media_type, digest=digest, size=len(body))
        return Resolved(descriptor, body)

    async def fetch_document(self, descriptor: Descriptor, kind: str) -> bytes:
        """Return a document's bytes, verified by size and digest.

        kind: ``manifests`` or ``blobs``: where in the registry's paths it is.
        Raises DocumentTooLarge above 4 MiB (before any request if the descriptor says so),
        SizeMismatch, DigestMismatch, and the RegistryError family.
        """
        if descriptor.size > MAX_DOCUMENT:
            raise self._too_large(descriptor.digest, self.host)

        async def fetch(source: Source, before: int) -> bytes:
            headers = {"Accept": ACCEPT} if kind == "manifests" else {}
            path = f"{kind}/{descriptor.digest}"
            async with source.request("GET", path, headers, before=before) as response:
                body = await self._read_document(response, descriptor)
            if descriptor.size >= 0 and len(body) != descriptor.size:
                raise SizeMismatch(
                    f"{self.reference}: {source.host} serves {len(body)} bytes as"
                    f" {descriptor.digest}, and its descriptor says {descriptor.size}",
                    image=str(self.reference),
                    hint="pull again; if it stays, the image has to be pushed again",
                )
            if not descriptor.digest.matches(body):
                raise self._wrong_digest(descriptor.digest, source.host)
            return body

        return await self._first(fetch)

    @asynccontextmanager
    async def open_blob(
        self,
        descriptor: Descriptor,
        *,
        offset: int = 0,
        end: int | None = None,
        most_skipped: int | None = None,
        avoid: Collection[str] = (),
        prefer: str = "",
    ) -> AsyncIterator[BlobStream]:
        """Open a blob from a byte on; its bytes come as they are stored.

        end: where to stop, if before the blob's own end.  Nothing but the bytes between is taken.
        most_skipped: how many bytes before the offset may be read again, if the registry does not
            continue there but begins again; None for all.
        avoid: endpoints to ask only if nobody else has it; prefer: the one to ask first.

        The stream raises TransferError when it ends early: open it again at ``stream.offset``
        to continue.
        """
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        if end is not None:
            headers = {"Range": f"bytes={offset}-{end - 1}"}
        failures = _Failures(self)
        with self._named():
            sources = await self._sources(resolve=False, avoid=avoid)
            for source in sorted(sources, key=lambda one: one.host != prefer):
                opened = False
                try:
                    async with source.request(
                        "GET", f"blobs/{descriptor.digest}", headers
                    ) as response:
                        opened = True
                        yield self._blob(response, source, descriptor, offset, end, most_skipped)
                        return
                except RegistryError as error:
                    if opened:
                        raise
                    await failures.add(source, error, final=not descriptor.urls)
            own = self._own()
            urls = [
                url
                for url in descriptor.urls or ()
                if url.startswith("https://")
                and host_of(url)
                and self._transport.may_lead(own.host, host_of(url))
            ]
            reason = failures.reason()
            if not urls or not isinstance(reason, RegistryNotFound):
                raise reason
            # A foreign layer is not in the registry but where its descriptor says; whoever wrote
            # that gets none of our credentials (trap 43).  The digest is checked all the same.
            async with own.follow("GET", urls[0], headers, own.host) as response:
                if response.status not in (200, 206) and not is_empty_range(response, headers):
                    raise await own.error(response)
                yield self._blob(response, own, descriptor, offset, end, most_skipped)

    def _own(self) -> Source:
        """Return the registry's own endpoint, which comes last."""
        assert self._all
        return self._all[-1]

    def _blob(
        self,
        response: Response,
        source: Source,
        descriptor: Descriptor,
        offset: int,
        end: int | None,
        most_skipped: int | None,
    ) -> BlobStream:
        return BlobStream(
            response,
            descriptor,
            offset,
            end=end,
            endpoint=source.host,
            image=str(self.reference),
            most_skipped=offset if most_skipped is None else most_skipped,
        )

    # --- which endpoint -----------------------------------------------------------------------

    async def _sources(self, *, resolve: bool, avoid: Collection[str] = ()) -> list[Source]:
        """Return the endpoints that may be asked, in that order."""
        if self._all is None:
            endpoints, contexts = await asyncio.to_thread(
                self._client.endpoints_of, self.reference.registry
            )
            self._all = [self._source(one, contexts.get(one.host)) for one in endpoints]
        able = [
            one for one in self._all if (one.endpoint.resolve if resolve else one.endpoint.pull)
        ]
        if not able:
            raise RegistryUnreachable(
                f"no host that is configured for {self.reference.registry} may be asked to"
                f" {'resolve' if resolve else 'pull'}",
                host=self.reference.registry,
                hint="mend hosts.toml",
            )
        mirrors = [one.host for one in able if one.endpoint.mirror]
        dead = await asyncio.to_thread(self._dead, mirrors) if mirrors else ()
        ordered = in_order([one.endpoint for one in able], dead=dead, avoid=avoid)
        return sorted(able, key=lambda one: ordered.index(one.endpoint))

    def _dead(self, hosts: list[str]) -> list[str]:
        return [host for host in hosts if self._transport.memory.is_dead(host)]

    def _source(self, endpoint: Endpoint, tls: ssl.SSLContext | None) -> Source:
        return Source(
            self._transport,
            self._client.authenticator,
            endpoint,
            self.reference,
            tls=tls,
            on_event=self._on_event,
            count=self._count,
        )

    def _count(self) -> None:
        self.requests += 1

    async def _first(
        self, work: Callable[[Source, int], Coroutine[Any, Any, _T]], *, resolve: bool = False
    ) -> _T:
        """Do the work with the first endpoint where it succeeds."""
        with self._named():
            failures = _Failures(self)
            for source in await self._sources(resolve=resolve):
                try:
                    return await self._again(source, work)
                except (RegistryError, ImageError) as error:
                    await failures.add(source, error)
            raise failures.reason()

    async def _again(
        self, source: Source, work: Callable[[Source, int], Coroutine[Any, Any, _T]]
    ) -> _T:
        """Do the work; once more, and once more, if a body breaks off and nobody else has it."""
        delays = BODY_DELAYS if source.may_wait else ()
        for before, delay in enumerate(delays):
            try:
                return await work(source, before)
            except TransferError as error:
                self._on_event(Retrying(what=source.host, reason=str(error), delay=delay))
            await asyncio.sleep(delay)
        return await work(source, len(delays))

    async def failed(self, endpoint: str, why: str) -> None:
        """Note that an endpoint failed; while there are others, it is not asked for a while."""
        for source in self._all or ():
            if source.host == endpoint and source.endpoint.mirror:
                await asyncio.to_thread(self._transport.memory.note_dead, endpoint, why)

    def is_mirror(self, endpoint: str) -> bool:
        """Tell whether a host is one for which there are others."""
        return any(one.host == endpoint and one.endpoint.mirror for one in self._all or ())

    def tell(self, source: Source, error: Exception) -> None:
        """Tell that the next endpoint is asked."""
        self._on_event(Retrying(what=f"{source.host}", reason=str(error), delay=0.0))

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Give errors of the connection, its body's included, the image's name."""
        try:
            yield
        except RegistryError as error:
            error.about(str(self.reference))
            raise

    # --- what answers mean --------------------------------------------------------------------

    def _described(self, response: Response) -> Descriptor | None:
        """Return what HEAD tells of a document; None if it does not tell enough."""
        digest = self._header_digest(response)
        length = response.headers.get("Content-Length", "")
        wanted = self.reference.digest
        if wanted is not None and digest is not None and digest != wanted:
            raise self._wrong_digest(wanted, response.host)
        digest = wanted or digest
        if digest is None or not (length.isascii() and length.isdigit()) or int(length) == 0:
            return None
        if int(length) > MAX_DOCUMENT:
            raise self._too_large(digest, response.host)
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
            raise self._too_large(descriptor.digest if descriptor else None, response.host)
        return body

    def _too_large(self, digest: Digest | None, host: str) -> DocumentTooLarge:
        what = f"document {digest}" if digest else "manifest"
        return DocumentTooLarge(
            f"{self.reference}: the {what} at {host} is larger than"
            f" {MAX_DOCUMENT // 1024 // 1024} MiB",
            image=str(self.reference),
            hint="this is no image that can be pulled",
        )

    def _wrong_digest(self, digest: Digest, host: str) -> DigestMismatch:
        return DigestMismatch(
            f"{self.reference}: what {host} serves as {digest} has another digest",
            image=str(self.reference),
            hint="pull again; if it stays, the image has to be pushed again",
        )


class _Failures:
    """Why the endpoints that were asked did not serve."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._errors: list[tuple[Source, SerpentineError]] = []

    async def add(self, source: Source, error: SerpentineError, *, final: bool = True) -> None:
        """Note it; raises it at once if the registry itself has spoken, and that is final."""
        self._errors.append((source, error))
        if not source.endpoint.mirror:
            if final and isinstance(
                error, RegistryNotFound | AuthenticationError | DocumentTooLarge
            ):
                raise self.reason()
            return
        if isinstance(error, RegistryUnreachable | TransferError):
            await self._repository.failed(source.host, str(error))
        self._repository.tell(source, error)

    def reason(self) -> SerpentineError:
        """Return the error to raise: the registry's own if there is one."""
        chosen = next((e for s, e in self._errors if not s.endpoint.mirror), self._errors[-1][1])
        for source, error in self._errors:
            if error is not chosen:
                chosen.add_note(f"before, {source.host} failed: {error}")
        return chosen


def _media_type(response: Response) -> str:
    return response.headers.get("Content-Type", "").partition(";")[0].strip()
