"""``serpentine version``."""

from __future__ import annotations

import platform

import click

from serpentine._version import __version__


@click.command(name="version")
@click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
def command(as_json: bool) -> None:
    """Show the version of Serpentine.

    'serpentine daemon status' shows containerd's.
    """
    if as_json:
        import json

        value = {"serpentine": __version__, "python": platform.python_version()}
        click.echo(json.dumps(value))
    else:
        click.echo(f"serpentine {__version__}")
