"""What pulls did: a record of each, made from its events, kept for a while, found again.

A record is small and holds no secret: hosts, and never a URL.
"""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from serpentine._version import __version__
from serpentine.errors import InvalidReference, NotFound
from serpentine.events import (
    Event,
    LayerProgress,
    LayerStatus,
    PullFailed,
    PullFinished,
    PullPlanned,
    PullResolved,
    RateLimit,
    Received,
    Retrying,
)
from serpentine.model.reference import Reference

__all__ = [
    "HostRecord",
    "LayerRecord",
    "LimitRecord",
    "PullRecord",
    "Recorder",
    "RetryRecord",
    "find_record",
    "records",
    "save",
    "without_urls",
]

MAX_RECORDS = 100
MAX_SIZE = 128 * 1024
MAX_LAYERS = 200
MAX_RETRIES = 40
MAX_HOSTS = 20
_MAX_TEXT = 300

# Texts and not compiled: a pull in which nothing happens needs none of them.
_PREFIX = r"(?:(sha256|sha384|sha512):)?([0-9a-f]{6,128})"
# A URL's path and query may hold a signature, what stands before its host a password.
_URL = r"\b(https?://)(?:[^\s/@]*@)?([^\s/?#@]*)[^\s,;)'\"]*"


class HostRecord(msgspec.Struct, frozen=True):
    """What came from one host: ``size`` bytes in ``requests`` that took ``seconds``.

    Of a pull, the seconds in which at least one of them ran; of a layer, their sum.
    """

    host: str
    size: int
    requests: int
    seconds: float

    @property
    def speed(self) -> float:
        """Bytes a second; 0.0 if it was too quick to tell."""
        return self.size / self.seconds if self.seconds > 0 else 0.0


class LayerRecord(msgspec.Struct, frozen=True):
    """One layer.

    size: of its blob, compressed, in bytes.
    found: what of it was there: ``snapshot``, ``blob``, ``partial`` (``size_found`` bytes, from
        an earlier attempt or another client), ``nothing``; ``elsewhere`` when another client was
        fetching it meanwhile; ``unknown`` when the pull ended before it was looked at.
    fetched: by host.
    ended: where it was in the end: a ``LayerStatus``.
    unpack_seconds: how long unpacking it took; None if that was not done, or did not end.
    """

    digest: str
    size: int
    found: str = "unknown"
    size_found: int = 0
    fetched: tuple[HostRecord, ...] = ()
    ended: str = "waiting"
    unpack_seconds: float | None = None


class RetryRecord(msgspec.Struct, frozen=True):
    """What was tried again and why, ``at`` so many seconds, after a wait of ``delay`` seconds."""

    what: str
    reason: str
    at: float
    delay: float


class LimitRecord(msgspec.Struct, frozen=True):
    """What a registry lets us ask for: see the event ``RateLimit``."""

    host: str
    remaining: int
    limit: int | None
    window: int | None


class PullRecord(msgspec.Struct, frozen=True):
    """One pull.

    image, platform: what was asked for; namespace: where to.
    pull: when the registry was to be asked (``always``, ``missing``, ``never``).
    offline, frozen: whether no registry might be asked, and only pinned images pulled.
    outcome: ``done``, ``failed``, ``cancelled``; error: why, as its class and its text.
    layers: bottom first, up to 200 of ``layers_total``; hosts: all that served layers.
    retries: the first and the last ones, of ``retries_total``.
    size_fetched: bytes of layers from registries, each as often as it came.
    """

    image: str
    platform: str
    namespace: str
    started_at: datetime
    seconds: float
    outcome: str
    pull: str = "always"
    offline: bool = False
    frozen: bool = False
    error: str = ""
    reason: str = ""
    manifest_digest: str | None = None
    index_digest: str | None = None
    layers_total: int = 0
    layers: tuple[LayerRecord, ...] = ()
    hosts: tuple[HostRecord, ...] = ()
    size_fetched: int = 0
    registry_requests: int | None = None
    retries_total: int = 0
    retries: tuple[RetryRecord, ...] = ()
    limits: tuple[LimitRecord, ...] = ()
    serpentine: str = __version__

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        value: dict[str, Any] = msgspec.to_builtins(self)
        for host, plain in zip(self.hosts, value["hosts"], strict=True):
            plain["bytes_per_second"] = round(host.speed)
        return value


class _Layer:
    """What is known of a layer so far."""

    def __init__(self, digest: str, size: int, status: LayerStatus) -> None:
        self.digest, self.size, self.status = digest, size, status
        self.found = "snapshot" if status is LayerStatus.EXISTS else "unknown"
        self.size_found = 0
        self.applying: float | None = None
        self.unpack_seconds: float | None = None

    def move(self, status: LayerStatus, offset: int, now: float) -> None:
        if self.found in ("unknown", "elsewhere"):
            if status is LayerStatus.DOWNLOADING:
                self.found = "partial" if offset else "nothing"
                self.size_found = offset
            elif status is LayerStatus.DOWNLOADED:
                # It came while we waited for it; or it was there at once.
                self.found = "elsewhere" if self.found == "elsewhere" else "blob"
            elif status is LayerStatus.WAITING:
                self.found = "elsewhere"
        if status is LayerStatus.APPLYING:
            self.applying = now
        elif status is LayerStatus.DONE and self.applying is not None:
            self.unpack_seconds = round(now - self.applying, 3)
            self.applying = None
        self.status = status


class Recorder:
    """Listens to one pull, and tells what it did."""

    def __init__(
        self,
        image: str,
        *,
        platform: str,
        namespace: str,
        pull: str = "always",
        offline: bool = False,
        frozen: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._asked: dict[str, Any] = {
            "image": image,
            "platform": platform,
            "namespace": namespace,
            "pull": pull,
            "offline": offline,
            "frozen": frozen,
        }
        self._clock = clock
        self._began = clock()
        self._started_at = datetime.now(UTC)
        self._resolved: PullResolved | None = None
        self._layers: dict[int, _Layer] = {}
        # By layer and host: bytes, requests, seconds.
        self._fetched: dict[str, dict[str, tuple[int, int, float]]] = {}
        self._spans: dict[str, list[tuple[float, float]]] = {}
        self._retries: list[RetryRecord] = []
        self._retries_total = 0
        self._limits: dict[str, LimitRecord] = {}
        self._end: PullFinished | PullFailed | None = None

    def __call__(self, event: Event) -> None:
        """Take an event in."""
        now = self._clock()
        match event:
            case LayerProgress():
                if (layer := self._layers.get(event.index)) is not None:
                    layer.move(event.status, event.offset, now)
            case Received():
                self._received(event, now)
            case Retrying():
                self._retried(event, now)
            case PullResolved():
                self._resolved = event
            case PullPlanned():
                for index, plan in enumerate(event.layers):
                    # What the first look found counts: one after that finds what we did.
                    if (layer := self._layers.get(index)) is None:
                        self._layers[index] = _Layer(plan.digest, plan.size, plan.status)
                    elif plan.status is LayerStatus.EXISTS and layer.found != "snapshot":
                        layer.status = LayerStatus.DONE
            case RateLimit():
                if len(self._limits) < MAX_HOSTS or event.host in self._limits:
                    self._limits[event.host] = LimitRecord(
                        _text(event.host), event.remaining, event.limit, event.window
                    )
            case PullFinished() | PullFailed():
                self._end = event

    def _received(self, event: Received, now: float) -> None:
        host = _text(event.host)
        hosts = self._fetched.setdefault(event.digest, {})
        size, requests, seconds = hosts.get(host, (0, 0, 0.0))
        hosts[host] = (size + event.size, requests + 1, seconds + event.seconds)
        # Joined with what it overlaps, so that there are never many.
        start, joined = now - event.seconds, []
        for span in self._spans.get(host, []):
            if span[1] < start:
                joined.append(span)
            else:
                start = min(start, span[0])
        self._spans[host] = [*joined[-MAX_RETRIES:], (start, now)]

    def _retried(self, event: Retrying, now: float) -> None:
        self._retries_total += 1
        if len(self._retries) >= MAX_RETRIES:
            # The first ones say how it began, the last ones how it ended.
            del self._retries[MAX_RETRIES // 2]
        self._retries.append(
            RetryRecord(
                _text(event.what),
                _text(event.reason),
                round(now - self._began, 3),
                round(event.delay, 3),
            )
        )

    def record(self) -> PullRecord | None:
        """Return what is known by now; None if the pull has neither ended nor begun."""
        end = self._end
        if end is None:
            return None
        layers = [self._layers[index] for index in sorted(self._layers)]
        failed = end if isinstance(end, PullFailed) else None
        outcome = "done"
        if failed is not None:
            outcome = "cancelled" if failed.cancelled else "failed"
        hosts = self._hosts()
        resolved = self._resolved
        return PullRecord(
            **self._asked,
            started_at=self._started_at,
            seconds=round(end.seconds, 3),
            outcome=outcome,
            error=failed.error if failed else "",
            reason=_text(failed.reason) if failed else "",
            manifest_digest=resolved.manifest_digest if resolved else None,
            index_digest=resolved.index_digest if resolved else None,
            layers_total=len(layers),
            layers=tuple(self._layer(layer) for layer in layers[:MAX_LAYERS]),
            hosts=hosts[:MAX_HOSTS],
            size_fetched=sum(host.size for host in hosts),
            registry_requests=end.registry_requests if isinstance(end, PullFinished) else None,
            retries_total=self._retries_total,
            retries=tuple(self._retries),
            limits=tuple(self._limits.values()),
        )

    def _layer(self, layer: _Layer) -> LayerRecord:
        hosts = self._fetched.get(layer.digest, {})
        fetched = [
            HostRecord(host, size, requests, round(seconds, 3))
            for host, (size, requests, seconds) in sorted(hosts.items())
        ]
        return LayerRecord(
            layer.digest,
            layer.size,
            layer.found,
            layer.size_found,
            tuple(fetched[:MAX_HOSTS]),
            str(layer.status),
            layer.unpack_seconds,
        )

    def _hosts(self) -> tuple[HostRecord, ...]:
        sums: dict[str, tuple[int, int]] = {}
        for hosts in self._fetched.values():
            for host, (size, requests, _) in hosts.items():
                before = sums.get(host, (0, 0))
                sums[host] = (before[0] + size, before[1] + requests)
        found = [
            HostRecord(
                host,
                size,
                requests,
                round(sum(end - start for start, end in self._spans[host]), 3),
            )
            for host, (size, requests) in sums.items()
        ]
        return tuple(sorted(found, key=lambda one: (-one.size, one.host)))


def without_urls(text: str) -> str:
    """Return a text in which a URL ends after its host: what follows may be a signature."""
    return re.sub(_URL, r"\1\2/…", text) if "://" in text else text


def _text(text: str) -> str:
    """Return a text without what may be secret or long."""
    clean = without_urls(text)
    return clean if len(clean) <= _MAX_TEXT else clean[: _MAX_TEXT - 1] + "…"


def _encode(record: PullRecord) -> bytes:
    data = msgspec.json.encode(record)
    while len(data) > MAX_SIZE:
        half = record.layers[: len(record.layers) // 2]
        record = msgspec.structs.replace(
            record, layers=half, retries=record.retries[: len(record.retries) // 2]
        )
        data = msgspec.json.encode(record)
        if not half:
            break
    return data


def save(folder: Path, record: PullRecord) -> None:
    """Write a record, whole or not at all, and remove the oldest ones.

    Nobody is told when that fails: a pull that ended well did so without it, too.
    """
    name = f"{record.started_at:%Y%m%dT%H%M%S%f}Z-{secrets.token_hex(4)}.json"
    new = folder / f".{name}"
    with suppress(OSError, ValueError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            # What somebody pulls is nobody else's business.
            descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(_encode(record))
            new.replace(folder / name)
        finally:
            new.unlink(missing_ok=True)
        # Also those that were never finished.  The ones that others write now are the newest.
        names = sorted(_names(folder), key=lambda one: one.lstrip("."))
        for old in names[:-MAX_RECORDS]:
            (folder / old).unlink(missing_ok=True)


def _names(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries if _is_ours(entry.name)]


def _is_ours(name: str) -> bool:
    """Tell a record's name, or that of one that is being written, from anybody else's."""
    bare = name.removeprefix(".")
    return len(bare) == 36 and bare[8:22:13] == "TZ" and bare.endswith(".json")


def records(folder: Path) -> Iterator[PullRecord]:
    """Yield the records of a folder, the newest first; what cannot be read is left out."""
    names: list[str] = []
    with suppress(OSError):
        names = sorted((name for name in _names(folder) if name[0] != "."), reverse=True)
    for name in names:
        with suppress(OSError, ValueError, msgspec.MsgspecError, RecursionError):
            with (folder / name).open("rb") as file:
                data = file.read(MAX_SIZE + 1)
            if len(data) <= MAX_SIZE:
                yield msgspec.json.decode(data, type=PullRecord)


def find_record(folder: Path, what: str = "last") -> PullRecord:
    """Return the newest record of what a person means.

    what: ``last``; an image as it is pulled; or a digest of an index, a manifest or a layer, of
        which the first six digits suffice.  Raises NotFound, InvalidReference.
    """
    if what == "last":
        for record in records(folder):
            return record
        raise NotFound("no pull is recorded", hint="pull something first")
    prefix = re.fullmatch(_PREFIX, what)
    reference: Reference | None = None
    try:
        reference = Reference.parse(what)
    except InvalidReference:
        if prefix is None:
            raise
    by_name = by_digest = None
    for record in records(folder):
        if reference is not None and _is_of(record, reference):
            return record
        if by_digest is None and prefix is not None and _has_digest(record, prefix):
            by_digest = record
        if by_name is None and reference is not None and _is_named(record, reference, what):
            by_name = record
    found = by_digest or by_name
    if found is None:
        raise NotFound(
            f"no pull of {what} is recorded",
            hint=f"the newest {MAX_RECORDS} are kept: 'serpentine explain' tells of the last one",
        )
    return found


def _is_of(record: PullRecord, reference: Reference) -> bool:
    if record.image == str(reference):
        return True
    if reference.digest is None:
        return False
    known = (record.manifest_digest, record.index_digest)
    return str(reference.digest) in known and _same_repository(record, reference)


def _is_named(record: PullRecord, reference: Reference, what: str) -> bool:
    """Tell whether only the tag differs, and none was given."""
    given = what.strip().rpartition("/")[2]
    if ":" in given or "@" in given:
        return False
    return _same_repository(record, reference)


def _same_repository(record: PullRecord, reference: Reference) -> bool:
    return record.image.startswith((f"{reference.name}:", f"{reference.name}@"))


def _has_digest(record: PullRecord, prefix: re.Match[str]) -> bool:
    algorithm, digits = prefix.groups()
    digests = [record.manifest_digest, record.index_digest, *(x.digest for x in record.layers)]
    return any(
        one is not None
        and one.partition(":")[2].startswith(digits)
        and algorithm in (None, one.partition(":")[0])
        for one in digests
    )
