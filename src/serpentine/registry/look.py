"""One look at a registry on loopback: a HEAD that tells what a tag means, without the client.

To import the HTTP client takes longer than all the rest of a pull that finds everything there.
Far away, its connection is worth more than that, as it serves what comes next; here, another one
costs nothing.

Only an answer that leaves no question open counts.  Whatever else happens (TLS, a login, a
redirect, an error, a registry that is slow) is no answer, and the client asks as if nobody had.
"""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

from serpentine.errors import InvalidDigest
from serpentine.model.digest import Digest
from serpentine.model.documents import Descriptor
from serpentine.model.reference import Reference
from serpentine.registry.accept import ACCEPT, MAX_DOCUMENT
from serpentine.registry.endpoints import Endpoint, Endpoints
from serpentine.registry.hosts import is_loopback
from serpentine.registry.memory import HostMemory

__all__ = ["is_near", "look", "read_head"]

TIMEOUT = 1.0
MAX_HEAD = 16 * 1024


def is_near(host: str) -> bool:
    """Tell whether a registry is on loopback, at a port that was named."""
    try:
        # Without a port, it is the one of HTTPS that is asked first.
        return is_loopback(host) and urlsplit(f"//{host}").port is not None
    except ValueError:
        return False


async def look(
    reference: Reference, endpoints: Endpoints, memory: HostMemory, *, user_agent: str
) -> Descriptor | None:
    """Return what a near registry says of a reference by one request; None for no clear answer."""
    host = reference.registry
    # A mirror, a header, a certificate: what is configured is the client's to heed.
    plain = (Endpoint(host), Endpoint(host, "http"))

    def may_ask() -> bool:
        found = endpoints.of(host)
        return len(found) == 1 and found[0] in plain and not memory.closed_for(host)

    if not await asyncio.to_thread(may_ask):
        return None
    request = (
        f"HEAD /v2/{reference.repository}/manifests/{reference.object} HTTP/1.1\r\n"
        f"Host: {host}\r\n"
        f"User-Agent: {user_agent}\r\n"
        f"Accept: {ACCEPT}\r\n"
        "Accept-Encoding: identity\r\n"
        "Connection: close\r\n\r\n"
    )
    try:
        async with asyncio.timeout(TIMEOUT):
            head = await _exchange(host, request.encode())
    except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        return None
    return read_head(head, reference.digest)


async def _exchange(host: str, request: bytes) -> bytes:
    address = urlsplit(f"//{host}")
    reader, writer = await asyncio.open_connection(address.hostname, address.port, limit=MAX_HEAD)
    try:
        writer.write(request)
        return await reader.readuntil(b"\r\n\r\n")
    finally:
        writer.close()


def read_head(head: bytes, wanted: Digest | None = None) -> Descriptor | None:
    """Return what the head of an answer tells of a document; None unless it tells all of it.

    wanted: the digest that was asked for.
    """
    status, *lines = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
    version, _, rest = status.partition(" ")
    if version not in ("HTTP/1.0", "HTTP/1.1") or rest.split(" ", 1)[0] != "200":
        return None
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        name = name.lower()
        # Continued, or said twice, or what counts requests and is to be told of.
        if not colon or name.strip() != name or name in headers or name.startswith("ratelimit"):
            return None
        headers[name] = value.strip()
    length = headers.get("content-length", "")
    try:
        digest = Digest.parse(headers.get("docker-content-digest", ""))
    except InvalidDigest:
        return None
    if wanted not in (None, digest) or not (length.isascii() and length.isdigit()):
        return None
    if not 0 < int(length) <= MAX_DOCUMENT:
        return None
    media_type = headers.get("content-type", "").partition(";")[0].strip()
    return Descriptor(media_type=media_type, digest=digest, size=int(length))
