"""``serpentine daemon install``."""

from __future__ import annotations

import click

from serpentine.cli._common import json_option, print_json, run, settings_of
from serpentine.cli._progress import progress
from serpentine.daemon.embedded import Embedded
from serpentine.daemon.releases import Installed, install


@click.command(name="install")
@json_option
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """Install containerd, runc and the CNI plugins into our data directory.

    The releases that this version pins, verified by their sha256 sums.  Our own containerd
    then uses them instead of those on the PATH, from its next start on.
    """
    settings = settings_of(ctx)

    async def work() -> Installed:
        with progress("plain") as show:
            return await install(settings, on_event=show)

    done = run(work)
    program = Embedded.from_settings(settings).program()
    if program is not None and program.parent != done.directory.resolve():
        click.echo(
            f"our own containerd still runs from {program}:"
            " 'serpentine daemon restart' lets it run from what is installed",
            err=True,
        )
    found = {
        "directory": str(done.directory),
        "containerd": done.containerd,
        "runc": done.runc,
        "cni": done.cni,
    }
    if as_json:
        print_json(found)
        return
    for name, value in found.items():
        click.echo(f"{name + ':':<20}{value or 'version unknown'}")
