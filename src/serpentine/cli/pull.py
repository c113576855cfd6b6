"""``serpentine pull``."""

from __future__ import annotations

import click

from serpentine.cli._common import (
    frozen_options,
    insecure_option,
    json_option,
    open_engine,
    print_json,
    progress_options,
    pull_option,
    run,
    settings_of,
)
from serpentine.cli._progress import progress
from serpentine.events import Event, PullFinished
from serpentine.model.platform import Platform
from serpentine.model.reference import Reference
from serpentine.model.state import ContainerState


@click.command(name="pull")
@click.argument("image")
@click.option(
    "--platform",
    metavar="OS/ARCH[/VARIANT]",
    help="Platform to pull for; by default the one of containerd's machine.",
)
@insecure_option
@click.option(
    "--limit-rate",
    metavar="RATE",
    help="Download at most so many bytes a second, as 500k or 10M.  [env: SERPENTINE_LIMIT_RATE]",
)
@pull_option("always")
@frozen_options
@progress_options
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    image: str,
    platform: str | None,
    insecure: tuple[str, ...],
    limit_rate: str | None,
    pull: str,
    frozen: bool | None,
    lock_file: str | None,
    quiet: bool,
    mode: str,
    as_json: bool,
) -> None:
    """Pull IMAGE into containerd, unpack it, and print its exact reference.

    What is there already is neither downloaded nor unpacked again.
    """
    reference = Reference.parse(image)
    wanted = Platform.parse(platform) if platform else None
    settings = settings_of(
        ctx, frozen=frozen, lock_file=lock_file, insecure=insecure, limit_rate=limit_rate
    )
    finished: list[PullFinished] = []

    async def work() -> ContainerState:
        with progress("quiet" if quiet else mode) as show:

            def on_event(event: Event) -> None:
                if isinstance(event, PullFinished):
                    finished.append(event)
                show(event)

            async with open_engine(settings, on_event) as engine:
                return await engine.pull_image(reference, platform=wanted, pull=pull)

    state = run(work)
    if as_json:
        done = finished[-1]
        stats = {
            "bytes_downloaded": done.bytes_downloaded,
            "layers_total": done.layers_total,
            "layers_reused": done.layers_reused,
            "registry_requests": done.registry_requests,
            "seconds": round(done.seconds, 3),
        }
        print_json({**state.to_dict(), "stats": stats})
    else:
        click.echo(state.image)
