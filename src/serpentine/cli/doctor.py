"""``serpentine doctor``: what works here, and how to mend what does not."""

from __future__ import annotations

from dataclasses import asdict

import click

from serpentine.cli._common import json_option, print_json, run, settings_of
from serpentine.doctor import Check, Outcome, examine


@click.command(name="doctor")
@click.option(
    "--registry",
    metavar="HOST",
    default="docker.io",
    show_default=True,
    help="Registry to try to reach.",
)
@json_option
@click.pass_context
def command(ctx: click.Context, registry: str, as_json: bool) -> None:
    """Check each part, and say how to mend what fails.  Changes nothing.

    Ends with 1 when something fails.
    """
    settings = settings_of(ctx)

    async def work() -> list[Check]:
        found = []
        async for check in examine(settings, registry=registry):
            found.append(check)
            if not as_json:
                _show(check)
        return found

    checks = run(work)
    if as_json:
        print_json([asdict(check) for check in checks])
    if any(check.outcome is Outcome.FAIL for check in checks):
        raise click.exceptions.Exit(1)


def _show(check: Check) -> None:
    click.echo(f"{check.outcome:<5}{check.name + ':':<16}{check.detail}")
    if check.remedy:
        click.echo(f"{'':<21}-> {check.remedy}")
