"""``serpentine rmi``."""

from __future__ import annotations

import click

from serpentine.cli._common import json_option, open_engine, print_json, run, settings_of


@click.command(name="rmi")
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True)
@json_option
@click.pass_context
def command(ctx: click.Context, images: tuple[str, ...], as_json: bool) -> None:
    """Remove images, and what only they needed.

    Layers that other images share stay.  Prints the names of what was removed; the first image
    that is not there ends the command.
    """
    settings = settings_of(ctx)
    removed: list[str] = []

    async def work() -> None:
        async with open_engine(settings) as engine:
            for image in images:
                name = await engine.remove_image(image)
                removed.append(name)

    try:
        run(work)
    finally:
        if as_json:
            print_json({"removed": removed})
        else:
            for name in removed:
                click.echo(name)
