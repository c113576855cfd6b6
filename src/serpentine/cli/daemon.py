"""``serpentine daemon``: start, stop, status."""

from __future__ import annotations

from typing import Any

import click

from serpentine.cli._common import json_option, open_engine, print_json, run, settings_of
from serpentine.cli._progress import progress
from serpentine.daemon.discovery import find
from serpentine.daemon.embedded import Embedded
from serpentine.errors import DaemonError, InvalidSetting
from serpentine.events import ignore
from serpentine.settings import Settings


@click.group(name="daemon")
def command() -> None:
    """Start, stop, remove and look at our own containerd."""


def _ours(ctx: click.Context) -> Settings:
    settings = settings_of(ctx)
    if settings.address:
        source = settings.sources.get("address", "argument")
        source = "--address" if source == "argument" else source
        raise InvalidSetting(
            f"{source} names a containerd that is not ours: {settings.address}",
            hint="leave it out; we never start or stop somebody else's",
        )
    return settings


@command.command()
@json_option
@click.pass_context
def start(ctx: click.Context, as_json: bool) -> None:
    """Start our own containerd, if it does not run."""
    settings = _ours(ctx)

    async def work() -> dict[str, Any]:
        with progress("plain") as show:
            await find(settings, on_event=show)
            return await _status(settings)

    _print(run(work), as_json=as_json)


@command.command()
@json_option
@click.pass_context
def stop(ctx: click.Context, as_json: bool) -> None:
    """Stop our own containerd.  Images and snapshots stay."""
    settings = _ours(ctx)
    stopped = run(Embedded.from_settings(settings).stop)
    if as_json:
        print_json({"stopped": stopped})
    elif not stopped:
        click.echo("our own containerd is not running", err=True)


@command.command()
@json_option
@click.pass_context
def restart(ctx: click.Context, as_json: bool) -> None:
    """Stop our own containerd and start it again."""
    settings = _ours(ctx)

    async def work() -> dict[str, Any]:
        with progress("plain") as show:
            await Embedded.from_settings(settings).stop()
            await find(settings, on_event=show)
            return await _status(settings)

    _print(run(work), as_json=as_json)


@command.command()
@click.option("--volumes", is_flag=True, help="Remove all images and snapshots, too.")
@json_option
@click.pass_context
def remove(ctx: click.Context, volumes: bool, as_json: bool) -> None:
    """Stop our own containerd and remove its state; images stay unless --volumes is given."""
    embedded = Embedded.from_settings(_ours(ctx))
    removed = run(lambda: embedded.remove(data=volumes))
    if as_json:
        print_json({"removed": removed})
    elif not removed:
        click.echo("there is nothing of our own containerd to remove", err=True)


@command.command()
@click.option(
    "--tail",
    "-n",
    "lines",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    help="How many lines, counted from the end.",
)
@click.pass_context
def logs(ctx: click.Context, lines: int) -> None:
    """Print the last lines that our own containerd wrote."""
    embedded = Embedded.from_settings(_ours(ctx))
    for line in embedded.log_tail(lines):
        click.echo(line)


@command.command()
@json_option
@click.pass_context
def status(ctx: click.Context, as_json: bool) -> None:
    """Say which containerd is used, and why.  Ends with 1 when none runs."""
    settings = settings_of(ctx)
    found = run(lambda: _status(settings))
    _print(found, as_json=as_json)
    if not found["running"]:
        raise click.exceptions.Exit(1)


async def _status(settings: Settings) -> dict[str, Any]:
    daemon = await find(settings, on_event=ignore, start=False)
    embedded = Embedded.from_settings(settings)
    found: dict[str, Any] = {
        "kind": daemon.kind if daemon else "embedded",
        "transport": "socket",
        "endpoint": daemon.endpoint.address if daemon else embedded.endpoint.address,
        "running": False,
        "containerd_version": None,
        "snapshotter": None,
        "platform": None,
        "namespace": settings.namespace,
        "reason": daemon.reason if daemon else "no address was given, and our own does not run",
    }
    if daemon is None:
        return found
    if daemon.kind == "embedded":
        process = embedded.process()
        found["pid"] = process.pid if process else None
        found["root"] = str(embedded.root)
        found["log"] = str(embedded.log)
    try:
        async with open_engine(settings) as engine:
            found["running"] = True
            found["containerd_version"] = (await engine.version()).version
            found["snapshotter"] = await engine.snapshotter()
            found["platform"] = str(await engine.platform())
    except DaemonError as error:
        found["reason"] = f"{found['reason']}; {error}"
    return found


def _print(found: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    for name, value in found.items():
        if value is not None:
            text = {True: "yes", False: "no"}.get(value, value) if name == "running" else value
            click.echo(f"{name.replace('_', ' ') + ':':<20}{text}")
