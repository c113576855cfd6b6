"""``serpentine images``."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime

import click

from serpentine import LocalImage
from serpentine.cli._common import json_option, open_engine, print_json, run, settings_of
from serpentine.cli._format import age, print_table, size


@click.command(name="images")
@click.option("--quiet", "-q", is_flag=True, help="Print names only.")
@json_option
@click.pass_context
def command(ctx: click.Context, quiet: bool, as_json: bool) -> None:
    """List the images of the namespace."""
    settings = settings_of(ctx)

    async def work() -> list[LocalImage]:
        async with open_engine(settings) as engine:
            return await engine.images()

    images = run(work)
    if as_json:
        print_json([asdict(image) for image in images])
    elif quiet:
        for image in images:
            click.echo(image.name)
    else:
        now = datetime.now(UTC)
        rows = [("IMAGE", "DIGEST", "PLATFORMS", "SIZE", "PULLED")]
        rows += [
            (
                image.name,
                image.digest.partition(":")[2][:12],
                ",".join(image.platforms),
                size(image.size),
                age(now, image.updated_at),
            )
            for image in images
        ]
        print_table(rows)
