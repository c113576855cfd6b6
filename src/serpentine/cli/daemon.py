"""``serpentine daemon``: start, stop, look at, mend and remove the containerd of our own."""

from __future__ import annotations

from typing import Any

import click

from serpentine.cli._common import json_option, open_engine, print_json, run, settings_of
from serpentine.cli._progress import progress
from serpentine.cli.daemon_install import command as install
from serpentine.daemon.container import ContainerDaemon
from serpentine.daemon.discovery import existing, find
from serpentine.daemon.embedded import Embedded
from serpentine.errors import DaemonError, DaemonFailed, InvalidSetting
from serpentine.events import ignore
from serpentine.settings import Settings

NOTHING = "there is no containerd of our own"


@click.group(name="daemon")
def command() -> None:
    """Install, start, stop, remove and look at our own containerd."""


command.add_command(install)


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
    """Bring our own containerd up, if it does not run."""
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

    async def work() -> bool:
        daemon = await existing(settings)
        return daemon is not None and await daemon.stop()

    stopped = run(work)
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
            daemon = await existing(settings)
            if daemon is not None:
                await daemon.stop()
            await find(settings, on_event=show)
            return await _status(settings)

    _print(run(work), as_json=as_json)


@command.command()
@json_option
@click.pass_context
def upgrade(ctx: click.Context, as_json: bool) -> None:
    """Replace our own containerd by the newest build of this version.  Images stay.

    In Docker or Podman the image is built anew, from the newest base image.
    """
    settings = _ours(ctx)

    async def work() -> dict[str, Any]:
        with progress("plain") as show:
            daemon = await existing(settings)
            if isinstance(daemon, ContainerDaemon):
                await daemon.upgrade(on_event=show)
            elif daemon is not None:
                await daemon.stop()
            await find(settings, on_event=show)
            return await _status(settings)

    _print(run(work), as_json=as_json)


@command.command(name="rotate-token")
@json_option
@click.pass_context
def rotate_token(ctx: click.Context, as_json: bool) -> None:
    """Give Envoy another token and certificate.  containerd and its images stay.

    Calls that are under way through the old Envoy are cut off.
    """
    settings = _ours(ctx)

    async def work() -> bool:
        with progress("plain") as show:
            daemon = await existing(settings)
            if not isinstance(daemon, ContainerDaemon):
                return False
            return await daemon.rotate_token(on_event=show)

    rotated = run(work)
    if as_json:
        print_json({"rotated": rotated})
    if not rotated:
        raise DaemonFailed(
            "there is no token: our own containerd is not reached through Envoy",
            hint="only '--transport envoy', macOS and Windows use one",
        )


@command.command()
@click.option("--volumes", is_flag=True, help="Remove all images and snapshots, too.")
@json_option
@click.pass_context
def remove(ctx: click.Context, volumes: bool, as_json: bool) -> None:
    """Stop our own containerd and remove its state; images stay unless --volumes is given."""
    settings = _ours(ctx)

    async def work() -> bool:
        daemon = await existing(settings)
        return daemon is not None and await daemon.remove(data=volumes)

    removed = run(work)
    if as_json:
        print_json({"removed": removed})
    elif not removed:
        click.echo(f"{NOTHING} to remove", err=True)


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
    settings = _ours(ctx)

    async def work() -> list[str] | None:
        daemon = await existing(settings)
        return None if daemon is None else await daemon.log_tail(lines)

    found = run(work)
    if found is None:
        click.echo(NOTHING, err=True)
    for line in found or ():
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
    found: dict[str, Any] = {
        "kind": None,
        "transport": None,
        "endpoint": None,
        "running": False,
        "containerd_version": None,
        "snapshotter": None,
        "platform": None,
        "namespace": settings.namespace,
        "reason": "no address was given, and none of our own runs",
    }
    if not settings.address:
        found |= await _ours_in_detail(settings)
    if daemon is None:
        return found
    found["kind"] = daemon.kind
    found["transport"] = daemon.transport
    found["endpoint"] = daemon.endpoint.address
    found["reason"] = daemon.reason
    try:
        async with open_engine(settings) as engine:
            found["running"] = True
            found["containerd_version"] = (await engine.version()).version
            found["snapshotter"] = await engine.snapshotter()
            found["platform"] = str(await engine.platform())
    except DaemonError as error:
        found["reason"] = f"{found['reason']}; {error}"
    return found


async def _ours_in_detail(settings: Settings) -> dict[str, Any]:
    """Return what is known of our own containerd without asking a container engine."""
    remembered = ContainerDaemon.remembered(settings)
    if remembered is not None and settings.daemon != "embedded":
        state = remembered.state
        return {
            "kind": remembered.candidate.kind,
            "transport": state.transport if state else None,
            "engine": remembered.candidate.url or "podman on the PATH",
            "container": remembered.names.containerd,
            "volume": remembered.names.data_volume,
            "reason": f"our own in {remembered.candidate.kind.capitalize()} does not run",
        }
    embedded = Embedded.from_settings(settings)
    if not embedded.exists():
        return {}
    process = embedded.process()
    return {
        "kind": "embedded",
        "transport": "socket",
        "endpoint": embedded.endpoint.address,
        "pid": process.pid if process else None,
        "root": str(embedded.root),
        "log": str(embedded.log),
        "reason": "our own containerd does not run",
    }


def _print(found: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    for name, value in found.items():
        if value is not None:
            text = {True: "yes", False: "no"}.get(value, value) if name == "running" else value
            click.echo(f"{name.replace('_', ' ') + ':':<20}{text}")
