"""``serpentine df``."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime

import click

from serpentine import Usage
from serpentine.cli._common import json_option, open_engine, print_json, run, settings_of
from serpentine.cli._format import age, print_table, size


@click.command(name="df")
@click.option("--verbose", "-v", is_flag=True, help="List each image and each state, too.")
@json_option
@click.pass_context
def command(ctx: click.Context, verbose: bool, as_json: bool) -> None:
    """Show how much room the namespace takes, and what 'prune' could free."""
    settings = settings_of(ctx)

    async def work() -> Usage:
        async with open_engine(settings) as engine:
            return await engine.usage()

    usage = run(work)
    if as_json:
        print_json(asdict(usage))
        return
    states = sum(state.size for state in usage.states)
    print_table(
        [
            ("", "COUNT", "SIZE"),
            ("blobs", str(usage.blobs.count), size(usage.blobs.size)),
            ("snapshots", str(usage.snapshots.count), size(usage.snapshots.size)),
            ("partial blobs", str(usage.ingests.count), size(usage.ingests.size)),
            ("all", "", size(usage.total)),
            ("images", str(len(usage.images)), f"{size(usage.shared)} shared among them"),
            ("states", str(len(usage.states)), size(states)),
        ]
    )
    click.echo(f"'serpentine prune' frees {size(usage.prunable)}", nl=False)
    click.echo(f", with --all {size(usage.prunable_all)}")
    if verbose:
        now = datetime.now(UTC)
        click.echo()
        print_table(
            [
                ("IMAGE", "SIZE", "SHARED", "ALONE", "PULLED"),
                *(
                    (
                        image.name,
                        size(image.size),
                        size(image.shared),
                        size(image.size - image.shared),
                        age(now, image.updated_at),
                    )
                    for image in usage.images
                ),
            ]
        )
        click.echo()
        print_table(
            [
                ("STATE", "SIZE", "MADE"),
                *((one.key, size(one.size), age(now, one.created_at)) for one in usage.states),
            ]
        )
