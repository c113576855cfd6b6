"""``serpentine verify``."""

from __future__ import annotations

from dataclasses import asdict

import click

from serpentine import VerifyResult
from serpentine.cli._common import (
    json_option,
    open_engine,
    print_json,
    progress_options,
    run,
    settings_of,
)
from serpentine.cli._format import size
from serpentine.cli._progress import progress

EXIT_DAMAGED = 1


@click.command(name="verify")
@click.argument("images", metavar="[IMAGE...]", nargs=-1)
@click.option("--all", "-a", "everything", is_flag=True, help="All images that are there.")
@click.option("--repair", is_flag=True, help="Mend what is damaged, and nothing else.")
@progress_options
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    images: tuple[str, ...],
    everything: bool,
    repair: bool,
    quiet: bool,
    mode: str,
    as_json: bool,
) -> None:
    """Compare the blobs and file trees of images with what they should be.

    Ends with 1 if anything is damaged, and is not repaired.
    """
    if bool(images) == everything:
        raise click.UsageError("name images, or give --all")
    settings = settings_of(ctx)

    async def work() -> VerifyResult:
        with progress("quiet" if quiet else mode) as show:
            async with open_engine(settings, show) as engine:
                return await engine.verify(None if everything else images, repair=repair)

    result = run(work)
    if as_json:
        print_json({**asdict(result), "is_whole": result.is_whole})
    else:
        _print(result)
    if not result.is_whole:
        ctx.exit(EXIT_DAMAGED)


def _print(result: VerifyResult) -> None:
    for one in result.findings:
        word = "repaired" if one.repaired else "damaged"
        click.echo(f"{word}: {one.image}: {one.kind} {one.name}: {one.problem}")
        for difference in one.differences:
            click.echo(f"  {difference.path}: {', '.join(difference.what)}")
        if one.count > len(one.differences):
            click.echo(f"  and {one.count - len(one.differences)} more")
        if one.reason:
            click.echo(f"  not repaired: {one.reason}")
    for line in result.unchecked:
        click.echo(f"serpentine: {line}", err=True)
    left = sum(not one.repaired for one in result.findings)
    mended = len(result.findings) - left
    click.echo(
        f"{len(result.images)} images: {result.blobs} blobs ({size(result.size)}) and"
        f" {result.trees} file trees checked, {left} damaged"
        + f", {mended} repaired"
        * bool(mended)
    )
    if left and not any(one.reason for one in result.findings):
        click.echo("serpentine: 'serpentine verify --repair' mends that", err=True)
