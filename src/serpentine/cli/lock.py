"""``serpentine lock``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from serpentine import Lock
from serpentine.cli._common import (
    insecure_option,
    json_option,
    open_engine,
    print_json,
    run,
    settings_of,
)
from serpentine.cli._progress import describe
from serpentine.errors import InvalidReference, NotPinned
from serpentine.events import Event, Retrying
from serpentine.model.platform import Platform
from serpentine.model.reference import Reference


@click.command(name="lock")
@click.argument("images", metavar="IMAGE...", nargs=-1)
@click.option(
    "--platform",
    "platforms",
    metavar="OS/ARCH[/VARIANT]",
    multiple=True,
    help="Platform to pin; by default the one of containerd's machine.  Repeatable.",
)
@click.option(
    "--file",
    "-f",
    "file",
    metavar="FILE",
    help="Lock file, 'serpentine.lock' by default.  [env: SERPENTINE_LOCK_FILE]",
)
@click.option(
    "--update",
    is_flag=True,
    help="Ask anew what the tags mean; without IMAGE, all that are in the file.",
)
@insecure_option
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    images: tuple[str, ...],
    platforms: tuple[str, ...],
    file: str | None,
    update: bool,
    insecure: tuple[str, ...],
    as_json: bool,
) -> None:
    """Pin the tags of IMAGEs to digests, in a file that 'pull --frozen' and 'run --frozen' read.

    What is in the file stays as it is: a new platform is added from the same index.
    """
    if not images and not update:
        raise click.UsageError("name an IMAGE, or renew all with --update")
    settings = settings_of(ctx, lock_file=file, insecure=insecure)
    path = settings.lock_file
    before = _load(path)
    if before is None and not images:
        raise NotPinned(f"there is no lock file {path}", hint="name the images to lock")
    names = _with_tags(images) if images else list(before.images if before else ())
    wanted = [Platform.parse(platform) for platform in platforms]

    def show(event: Event) -> None:
        if isinstance(event, Retrying):
            click.echo(describe(event), err=True)

    async def work() -> Lock:
        async with open_engine(settings, show) as engine:
            return await engine.lock(names, platforms=wanted, into=before, update=update)

    found = run(work)
    # Another command may have written meanwhile: what it pinned stays.
    now = _load(path) or Lock()
    for name in dict.fromkeys(names):
        now = now.merged(name, found.images[name])
    changed = before is None or now != before
    if changed:
        now.save(path)
    if as_json:
        pins = {name: asdict(now.images[name]) for name in dict.fromkeys(names)}
        print_json({"file": str(path), "changed": changed, "images": pins})
        return
    for name in dict.fromkeys(names):
        old = before.images.get(name) if before else None
        word = "unchanged" if old == found.images[name] else "changed" if old else "added"
        platforms_there = ", ".join(sorted(found.images[name].platforms))
        click.echo(f"{name}@{found.images[name].digest}  {platforms_there}  {word}")


def _load(path: Path) -> Lock | None:
    try:
        return Lock.load(path)
    except FileNotFoundError:
        return None


def _with_tags(images: tuple[str, ...]) -> list[str]:
    """Return the full names, and refuse what needs no lock before anything is opened."""
    references = [Reference.parse(image) for image in images]
    for reference in references:
        if reference.digest is not None:
            raise InvalidReference(
                f"{reference} names a digest: that is pinned", hint="lock images by their tag"
            )
    return [str(reference) for reference in references]
