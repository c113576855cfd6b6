"""``serpentine prune``."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime, timedelta

import click

from serpentine import PruneResult
from serpentine.cli._common import json_option, open_engine, print_json, run, settings_of
from serpentine.cli._format import age, print_table, size
from serpentine.cli._values import parse_age, parse_size

_NAMES = {"unheld": "blobs and snapshots that nothing holds"}


@click.command(name="prune")
@click.option(
    "--all", "-a", "unused", is_flag=True, help="Also images and states that nothing uses."
)
@click.option(
    "--older-than",
    callback=parse_age,
    metavar="AGE",
    help="Only what has not changed for so long: 12h, 7d.",
)
@click.option(
    "--keep-size",
    callback=parse_size,
    metavar="SIZE",
    help="Only the oldest, until all that is left takes no more: 10GB.",
)
@click.option("--dry-run", is_flag=True, help="Remove nothing; show what would go.")
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    unused: bool,
    older_than: timedelta | None,
    keep_size: int | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Remove what is not needed, and show what went.

    By default what nobody holds: what was left by clients that are gone, blobs that were never
    finished, and what no image leads to.  What others hold meanwhile, also a pull, stays.
    """
    settings = settings_of(ctx)

    async def work() -> PruneResult:
        async with open_engine(settings) as engine:
            return await engine.prune(
                unused=unused, older_than=older_than, keep_size=keep_size, dry_run=dry_run
            )

    result = run(work)
    for name in result.skipped:
        click.echo(f"serpentine: {name} is in use by now, and stays", err=True)
    if keep_size is not None and result.left > keep_size:
        more = "" if unused else "; --all takes unused images, too"
        click.echo(
            f"serpentine: {size(result.left)} stay, more than {size(keep_size)}: the rest is in"
            f" use{more}",
            err=True,
        )
    if as_json:
        print_json({**asdict(result), "dry_run": dry_run})
        return
    now = datetime.now(UTC)
    if result.removed:
        print_table(
            [
                ("KIND", "SIZE", "CHANGED", "NAME"),
                *(
                    (one.kind, size(one.size), age(now, one.since), one.name or _NAMES[one.kind])
                    for one in result.removed
                ),
            ]
        )
    would = "would be freed" if dry_run else "freed"
    click.echo(
        f"{size(result.freed)} {would} ({result.blobs} blobs, {result.snapshots} snapshots);"
        f" {size(result.left)} left"
    )
