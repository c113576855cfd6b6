"""One endpoint of a repository: requests with authentication, redirects and retries."""

from __future__ import annotations

import asyncio
import random
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from urllib.parse import urlencode, urljoin, urlsplit

from serpentine.errors import RateLimited, RegistryError, RegistryProtocolError
from serpentine.events import OnEvent, PullNotice, Retrying
from serpentine.model.reference import Reference
from serpentine.registry.auth import Authenticator
from serpentine.registry.endpoints import Endpoint
from serpentine.registry.hosts import api_host, host_of
from serpentine.registry.limits import rate_limit
from serpentine.registry.messages import error_of
from serpentine.registry.retry import parse_retry_after, retry_delay
from serpentine.registry.transport import Interrupted, Response, Transport

__all__ = ["Source", "is_empty_range"]

MAX_ERROR_BODY = 16 * 1024
MAX_TOKEN_BODY = 256 * 1024
MAX_REDIRECTS = 10

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
# What a signed URL answers with when its time is over.
_EXPIRED = frozenset({400, 401, 403, 404, 410})


class Source:
    """Where one pull may get what it wants: an endpoint, and how to talk to it."""

    def __init__(
        self,
        transport: Transport,
        authenticator: Authenticator,
        endpoint: Endpoint,
        reference: Reference,
        *,
        tls: ssl.SSLContext | None,
        on_event: OnEvent,
        count: Callable[[], None],
    ) -> None:
        """tls: how the endpoint proves itself, if not as all others.  count: for each request."""
        self._transport = transport
        self._authenticator = authenticator
        self._tls = tls
        self._on_event = on_event
        self._count = count
        self.endpoint = endpoint
        self.reference = reference
        self.host = endpoint.host
        # Another host than the registry's own, be it a mirror or what stands in for it.
        self._elsewhere = endpoint.host != api_host(reference.registry)
        # Whose credentials count: the registry's are for itself only.
        self._registry = endpoint.host if self._elsewhere else reference.registry

    @property
    def may_wait(self) -> bool:
        """Whether it is worth its retries: there is nobody else to ask."""
        return not self.endpoint.mirror

    @asynccontextmanager
    async def request(
        self, method: str, path: str, headers: Mapping[str, str], *, before: int = 0
    ) -> AsyncIterator[Response]:
        """Send until there is an answer that is no error; raise what it means otherwise.

        before: how often that brought an answer whose body did not come.
        """
        tries = 0
        while True:
            tries += 1
            opened = False
            try:
                async with self._authorized(method, path, headers, before + tries) as response:
                    if response.status in (200, 206) or is_empty_range(response, headers):
                        opened = True
                        yield response
                        return
                    failure = await self.error(response)
                    status: int | None = response.status
                    if response.host != self.host and status in _EXPIRED:
                        # Where we were sent to, the way is good for a while only.
                        status = 502
                    after = parse_retry_after(
                        response.headers.get("Retry-After"), datetime.now(UTC)
                    )
            except Interrupted as error:
                if opened:
                    raise
                failure, status, after = error, None, None
            delay = retry_delay(tries, status, after, random.random)
            if delay is None or not self.may_wait:
                raise failure
            what = f"{method} {path.partition(':')[0]} at {self.host}"
            self._on_event(Retrying(what=what, reason=str(failure), delay=delay))
            await asyncio.sleep(delay)

    @asynccontextmanager
    async def _authorized(
        self, method: str, path: str, headers: Mapping[str, str], tries: int
    ) -> AsyncIterator[Response]:
        """Send with what authorization we have, and with a fresh one when it is refused."""
        repository = self.reference.repository
        header = self._authenticator.known_header(self.host, repository)
        # A header from the cache may be stale, so it may be renewed; a fresh one may not.
        renewed = False
        while True:
            sent = {**headers, "Authorization": header} if header else headers
            async with self._redirected(method, path, sent, tries) as response:
                if response.status != 401 or response.host != self.host:
                    yield response
                    return
                values = response.header_values("WWW-Authenticate")
            if renewed:
                raise await self._authenticator.rejection(
                    host=self.host,
                    registry=self._registry,
                    repository=repository,
                    image=str(self.reference),
                )
            renewed = True
            header = await self._authenticator.answer(
                self._send_for_token,
                host=self.host,
                registry=self._registry,
                repository=repository,
                image=str(self.reference),
                values=values,
                refused=header,
                plain=(self.endpoint.scheme or self._transport.scheme(self.host)) == "http"
                or self._transport.is_insecure(self.host),
            )

    @asynccontextmanager
    async def _redirected(
        self, method: str, path: str, headers: Mapping[str, str], tries: int
    ) -> AsyncIterator[Response]:
        """Send to the registry, and go where it sends us."""
        url = f"{self.endpoint.root}/{self.reference.repository}/{path}"
        if self._elsewhere:
            # As containerd does: one mirror may serve several registries.
            url += "?" + urlencode({"ns": self.reference.registry})
        sent = {**self._plain(headers), **self.endpoint.headers}
        async with self._transport.to_registry(
            method,
            self.host,
            url,
            sent,
            scheme=self.endpoint.scheme,
            tls=self._tls,
            tries=tries,
            hurry=not self.may_wait,
            on_wait=self._waiting,
        ) as response:
            self._count()
            if (limit := rate_limit(self.host, response.headers)) is not None:
                self._on_event(limit)
            if response.status not in _REDIRECTS:
                yield response
                return
            target = self._target(response)
        headers = self._for_redirect(sent, response.url, target)
        async with self.follow(method, target, headers, response.host, tries=tries) as r:
            yield r

    @asynccontextmanager
    async def follow(
        self, method: str, url: str, headers: Mapping[str, str], source: str, *, tries: int = 3
    ) -> AsyncIterator[Response]:
        """Go where ``source`` sent us, and on from there."""
        for _ in range(MAX_REDIRECTS):
            tls = self._tls if host_of(url) == self.host else None
            async with self._transport.send(
                method,
                url,
                headers,
                source=source,
                tls=tls,
                tries=tries,
                hurry=not self.may_wait,
                on_wait=self._waiting,
            ) as response:
                self._count()
                if response.status not in _REDIRECTS:
                    yield response
                    return
                target = self._target(response)
            headers = self._for_redirect(headers, url, target)
            url = target
        raise RegistryProtocolError(
            f"{self.reference}: {self.host} redirects more than {MAX_REDIRECTS} times",
            host=self.host,
            image=str(self.reference),
            hint="tell the registry's operators",
        )

    def _for_redirect(self, headers: Mapping[str, str], before: str, after: str) -> dict[str, str]:
        """Return the headers for a redirect: to another host without what is secret (trap 36)."""
        old, new = urlsplit(before), urlsplit(after)
        if (old.scheme, old.netloc) == (new.scheme, new.netloc):
            return dict(headers)
        plain = self._plain(headers)
        return {name: value for name, value in plain.items() if name != "Authorization"}

    def _plain(self, headers: Mapping[str, str]) -> dict[str, str]:
        """Return the headers without those that are configured for this endpoint only."""
        own = {name.lower() for name in self.endpoint.headers}
        return {name: value for name, value in headers.items() if name.lower() not in own}

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
        elif not self._transport.may_lead(response.host, host):
            why = f"to {host}, an address within a network"
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
        server = host_of(url)
        if not self._transport.may_lead(self.host, server):
            raise RegistryProtocolError(
                f"{self.reference}: {self.host} names a token server at {server}, an address within"
                " a network",
                host=self.host,
                image=str(self.reference),
                hint="tell the registry's operators",
            )
        if params:
            url += ("&" if "?" in url else "?") + urlencode(params)
        headers = {"Accept": "application/json"}
        if authorization:
            headers["Authorization"] = authorization
        tries = 0
        while True:
            tries += 1
            try:
                # How the registry proves itself counts for its token server, too, as with
                # containerd: who could stand in for the one may name the other.
                async with self._transport.send(
                    method,
                    url,
                    headers,
                    data=data,
                    source=self.host,
                    tls=self._tls,
                    tries=tries,
                    hurry=not self.may_wait,
                    on_wait=self._waiting,
                ) as response:
                    self._count()
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
            if delay is None or not self.may_wait:
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

    def _waiting(self, host: str, seconds: float) -> None:
        text = f"waiting {seconds:.0f} seconds for {host}, which asked for it"
        self._on_event(PullNotice(image=str(self.reference), text=text))

    def _rate_limited(self, host: str, after: float | None) -> RateLimited:
        return RateLimited(
            f"{self.reference}: {host} asks us to slow down (429)",
            host=host,
            image=str(self.reference),
            retry_after=after,
            hint=f"try again in {after:.0f} seconds" if after else "try again later, or log in",
        )

    async def error(self, response: Response) -> RegistryError:
        """Return what a status that is no success means."""
        if response.status == 429:
            after = parse_retry_after(response.headers.get("Retry-After"), datetime.now(UTC))
            return self._rate_limited(response.host, after)
        try:
            body = await response.read(MAX_ERROR_BODY)
        except RegistryError:
            body = b""
        return error_of(response.status, body, self.reference, response.host)


def is_empty_range(response: Response, headers: Mapping[str, str]) -> bool:
    """Tell whether a range was asked for and nothing of it is there."""
    return response.status == 416 and "Range" in headers
