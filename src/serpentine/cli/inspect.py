"""``serpentine inspect``."""

from __future__ import annotations

import click

from serpentine.cli._common import open_engine, run, settings_of
from serpentine.model.platform import Platform
from serpentine.model.state import ContainerState


@click.command(name="inspect")
@click.argument("image")
@click.option(
    "--platform",
    metavar="OS/ARCH[/VARIANT]",
    help="Platform to show; by default the one of containerd's machine.",
)
@click.option("--json", "as_json", is_flag=True, help="Print it on one line, for programs.")
@click.pass_context
def command(ctx: click.Context, image: str, platform: str | None, as_json: bool) -> None:
    """Show the state of IMAGE, which must be there: no registry is asked."""
    wanted = Platform.parse(platform) if platform else None
    settings = settings_of(ctx)

    async def work() -> ContainerState:
        async with open_engine(settings) as engine:
            return await engine.inspect(image, platform=wanted)

    state = run(work)
    if as_json:
        click.echo(state.to_json())
    else:
        import json

        click.echo(json.dumps(state.to_dict(), indent=2, ensure_ascii=False))
