"""``serpentine explain``."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

import click

from serpentine import PullRecord
from serpentine.cli._common import json_option, open_engine, print_json, run, settings_of
from serpentine.cli._format import age, size

_ENDED = {"done": "done", "failed": "failed", "cancelled": "was cancelled"}
_SHOWN_LAYERS = 40
_SHOWN_RETRIES = 10


@click.command(name="explain")
@click.argument("what", metavar="[last|IMAGE|DIGEST]", default="last")
@json_option
@click.pass_context
def command(ctx: click.Context, what: str, as_json: bool) -> None:
    """Tell what the last pull did, or the last one of IMAGE or DIGEST.

    What was asked for, what of it was here, what was fetched, from where and how fast, what was
    tried again and why.  The newest hundred pulls are kept.  No registry or containerd is asked.
    """
    settings = settings_of(ctx)

    async def work() -> PullRecord:
        # Not opened: for what was noted, no containerd need run.
        return await open_engine(settings).explain(what)

    record = run(work)
    if as_json:
        print_json(record.to_dict())
        return
    for line in tell(record, datetime.now(UTC)):
        click.echo(line)


def tell(record: PullRecord, now: datetime) -> Iterator[str]:
    """Yield a record in lines for a person."""
    ended = f"{_ENDED.get(record.outcome, record.outcome)} after {record.seconds:.1f} s"
    yield f"{record.image} for {record.platform}, {age(now, record.started_at)}: {ended}"
    if record.reason:
        yield f"  because: {record.reason}"
    yield f"  asked: {_asked(record)}"
    if record.manifest_digest:
        index = f", in index {record.index_digest}" if record.index_digest else ""
        yield f"  found: {record.manifest_digest}{index}"
    if record.layers:
        yield f"  layers: {_summary(record)}"
    for host in record.hosts:
        requests = f"{host.requests} request{'s' if host.requests != 1 else ''}"
        yield f"  fetched: {size(host.size)} from {host.host}, {requests}, {_speed(host.speed)}"
    yield from _layers(record)
    yield from _retries(record)
    for limit in record.limits:
        of = f" of {limit.limit}" if limit.limit is not None else ""
        window = f" in {_span(limit.window)}" if limit.window else ""
        yield f"  left: {limit.remaining}{of} requests{window} at {limit.host}"


def _asked(record: PullRecord) -> str:
    if record.frozen:
        words = "what is pinned, and the registry for what is not here"
    elif record.pull == "missing":
        words = "the registry, because the image was not here"
    else:
        words = "the registry, what the image is now"
    if record.offline or record.pull == "never":
        words = "no registry (offline)" if record.offline else "no registry (--pull never)"
        words += ", only for what is pinned" if record.frozen else ""
    if record.registry_requests is not None:
        words += f"; {record.registry_requests} request"
        words += "" if record.registry_requests == 1 else "s"
    return words


def _summary(record: PullRecord) -> str:
    fetched = [layer for layer in record.layers if layer.fetched]
    kinds = {
        "unpacked already": [x for x in record.layers if x.found == "snapshot"],
        "here as blobs": [x for x in record.layers if x.found == "blob"],
        "fetched by another client meanwhile": [
            x for x in record.layers if x.found == "elsewhere" and not x.fetched
        ],
        "fetched": fetched,
    }
    parts = [f"{len(layers)} {words}" for words, layers in kinds.items() if layers]
    rest = len(record.layers) - sum(map(len, kinds.values()))
    parts += [f"{rest} not begun or not fetched"] if rest > 0 else []
    return f"{record.layers_total}: {', '.join(parts)}"


def _layers(record: PullRecord) -> Iterator[str]:
    """Yield a line for each layer of which something was to be done, and why."""
    busy = [layer for layer in record.layers if layer.found != "snapshot"]
    for layer in busy[:_SHOWN_LAYERS]:
        name = layer.digest.partition(":")[2][:12]
        why = {
            "nothing": "was not here",
            "partial": f"{size(layer.size_found)} were here from an earlier attempt",
            "blob": "was here, not unpacked",
            "elsewhere": "another client was fetching it",
        }.get(layer.found, "was not begun")
        words = [why]
        words += [f"{size(x.size)} from {x.host} at {_speed(x.speed)}" for x in layer.fetched]
        if layer.unpack_seconds is not None:
            words.append(f"unpacked in {layer.unpack_seconds:.1f} s")
        elif layer.ended not in ("done", "exists") and layer.found != "unknown":
            words.append(f"stopped while {layer.ended}")
        yield f"    {name} {size(layer.size)}: {'; '.join(words)}"
    if len(busy) > _SHOWN_LAYERS:
        yield f"    and {len(busy) - _SHOWN_LAYERS} more"


def _retries(record: PullRecord) -> Iterator[str]:
    if record.retries_total:
        yield f"  retried {record.retries_total} time{'s' if record.retries_total > 1 else ''}:"
    for retry in record.retries[:_SHOWN_RETRIES]:
        yield f"    after {retry.at:.1f} s {retry.what}: {retry.reason}"
    if record.retries_total > _SHOWN_RETRIES:
        yield f"    and {record.retries_total - _SHOWN_RETRIES} more"


def _span(seconds: int) -> str:
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length and seconds % length == 0:
            count = seconds // length
            return unit if count == 1 else f"{count} {unit}s"
    return f"{seconds} seconds"


def _speed(speed: float) -> str:
    return f"{size(speed)}/s" if speed else "too quick to tell"
