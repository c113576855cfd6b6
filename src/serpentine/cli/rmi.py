"""``serpentine rmi``."""

from __future__ import annotations

import click

from serpentine.cli._common import json_option, open_engine, print_json, run, settings_of
from serpentine.cli._states import is_key, read_state


@click.command(name="rmi")
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True)
@json_option
@click.pass_context
def command(ctx: click.Context, images: tuple[str, ...], as_json: bool) -> None:
    """Remove images, and what only they needed.

    Layers that other images share stay.  States go by their keys, or as @FILE.  Prints the names
    of what was removed; the first image that is not there ends the command.
    """
    settings = settings_of(ctx)
    written = {image: read_state(image) for image in images}
    removed: list[str] = []

    async def work() -> None:
        async with open_engine(settings) as engine:
            for image in images:
                state = written[image] or (
                    await engine.find_state(image) if is_key(image) else None
                )
                if state is not None:
                    await engine.remove_state(state)
                    removed.append(state.snapshot_key)
                else:
                    removed.append(await engine.remove_image(image))

    try:
        run(work)
    finally:
        if as_json:
            print_json({"removed": removed})
        else:
            for name in removed:
                click.echo(name)
