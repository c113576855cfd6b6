"""Which containerd to use: one that was named, one of ours that runs, else one brought up.

The order: ``--address``; the configured kind; a daemon of ours that runs; Docker; Podman; our
own child process, with root; and last a Podman whose API we must serve ourselves.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from serpentine.daemon.candidates import (
    Candidate,
    docker_candidates,
    podman_candidates,
    podman_machine,
)
from serpentine.daemon.container import ContainerDaemon
from serpentine.daemon.embedded import Embedded
from serpentine.daemon.named import Daemon, find
from serpentine.errors import DaemonError, DaemonNotFound, DaemonUnreachable
from serpentine.events import OnEvent
from serpentine.settings import Settings

__all__ = ["Daemon", "Host", "Option", "existing", "find", "find_ours", "look_around", "options"]


@dataclass(frozen=True, slots=True)
class Host:
    """What there is on this machine that decides how a containerd can be had."""

    system: str
    is_root: bool
    containerd: str | None
    runc: str | None
    podman: str | None = None
    home: Path = field(default_factory=Path)
    environ: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def look(cls, settings: Settings) -> Host:
        """Look at the machine that this process runs on."""
        path = Embedded.from_settings(settings).search_path()
        return cls(
            system=sys.platform,
            is_root=hasattr(os, "geteuid") and os.geteuid() == 0,
            containerd=shutil.which("containerd", path=path),
            runc=shutil.which("runc", path=path),
            podman=shutil.which("podman"),
            home=Path.home(),
            environ=os.environ,
        )


@dataclass(frozen=True, slots=True)
class Option:
    """One way to have a containerd: a container engine, or our own child process.

    problem: why it cannot be had, in words for people, if that is known without trying.
    """

    kind: str
    candidate: Candidate | None = None
    problem: str | None = None


def options(settings: Settings, host: Host, *, machine: str | None = None) -> list[Option]:
    """Return the ways to have a containerd of our own, in the order in which to try them.

    machine: the address of ``podman machine``, where there is one.
    """
    found: list[Option] = []
    kinds = _kinds(settings)
    if "docker" in kinds:
        found += [
            Option("docker", candidate)
            for candidate in docker_candidates(settings, host.environ, host.home, host.system)
        ]
    if "podman" in kinds:
        found += [
            Option("podman", candidate)
            for candidate in podman_candidates(
                settings, host.environ, host.system, is_root=host.is_root, machine=machine
            )
        ]
    if "embedded" in kinds:
        found.append(Option("embedded", problem=_embedded_problem(settings, host)))
    # Last, although it is a Podman: with root and containerd at hand, a child process is up in
    # a fraction of the time that building an image takes.
    served_by_us = host.podman and host.system.startswith("linux") and not settings.podman_host
    if "podman" in kinds and served_by_us:
        found.append(Option("podman", Candidate("podman", "", f"{host.podman} on the PATH")))
    return found


def _kinds(settings: Settings) -> tuple[str, ...]:
    """Return which kinds come into question: what the user named, else all."""
    if settings.daemon:
        return (settings.daemon,)
    # Who names a Docker and does not get it wants to hear of that, and not to find their images
    # in another engine.
    named = (
        *(["docker"] if settings.docker_host or settings.docker_context else ()),
        *(["podman"] if settings.podman_host else ()),
    )
    return named or ("docker", "podman", "embedded")


def _embedded_problem(settings: Settings, host: Host) -> str | None:
    if settings.transport == "envoy":
        return "Envoy needs Docker or Podman"
    if not host.system.startswith("linux"):
        return f"containerd does not run on {host.system} itself"
    if not host.is_root:
        return "only root can start one"
    missing = [n for n, p in (("containerd", host.containerd), ("runc", host.runc)) if not p]
    return f"{' and '.join(missing)} not found" if missing else None


async def find_ours(settings: Settings, *, on_event: OnEvent, start: bool) -> Daemon | None:
    """Return the containerd of ours to use, as ``find`` does."""
    if (daemon := await _running(settings)) is not None:
        return daemon
    return await _bring_up(settings, on_event) if start else None


async def _running(settings: Settings) -> Daemon | None:
    """Return the daemon of ours that runs and fits.  Asks no container engine."""
    if settings.daemon != "embedded":
        remembered = ContainerDaemon.remembered(settings)
        if remembered is not None and (found := await remembered.running()) is not None:
            state, endpoint, _ = found
            if settings.daemon in (None, state.kind):
                reason = f"our own containerd is running in {state.kind.capitalize()}"
                return Daemon(state.kind, reason, endpoint, state.transport, remembered)
    if settings.daemon in (None, "embedded") and settings.transport != "envoy":
        embedded = Embedded.from_settings(settings)
        if embedded.socket.exists() and await embedded.running() is not None:
            return Daemon("embedded", "our own containerd is running", embedded.endpoint)
    return None


async def _bring_up(settings: Settings, on_event: OnEvent) -> Daemon:
    tried: list[str] = []
    absent: dict[str, list[str]] = {}
    refused: tuple[str, DaemonError] | None = None
    for option in await _all_options(settings):
        if option.problem is not None:
            tried.append(f"{option.kind}: {option.problem}")
        elif option.candidate is None:
            return await _start_embedded(settings, on_event)
        else:
            try:
                candidate = await _answering(option.candidate)
            except DaemonAbsent as error:
                # Most of the usual places do not exist: one sentence for all of a kind.
                absent.setdefault(option.kind, []).append(error.address)
            except DaemonError as error:
                # What can be mended is worth more than what is not there.
                if refused is None and error.hint:
                    refused = option.kind, error
                tried.append(f"{option.kind}: {error}")
            else:
                return await _start_container(settings, candidate, on_event)
    hint = _remedy(settings)
    if refused is not None:
        kind, why = refused
        hint = why.hint
        if settings.daemon or (len(tried) == 1 and not absent):
            raise type(why)(f"cannot use {kind}: {why}", address=why.address, hint=hint)
    tried += [f"{kind}: no socket at {', '.join(paths)}" for kind, paths in absent.items()]
    raise DaemonNotFound(f"there is no containerd to use; tried {'; '.join(tried)}", hint=hint)


def _remedy(settings: Settings) -> str:
    give_one = "or name a containerd with --address or CONTAINERD_ADDRESS"
    if settings.daemon == "embedded":
        return (
            "as root, run 'serpentine daemon install', or install containerd and runc"
            f" (Debian: apt-get install containerd runc), {give_one}"
        )
    return f"start Docker or Podman, or as root run 'serpentine daemon install', {give_one}"


async def _all_options(settings: Settings) -> list[Option]:
    host = Host.look(settings)
    machine = None
    if not host.system.startswith("linux"):
        machine = await asyncio.to_thread(podman_machine)
    found = options(settings, host, machine=machine)
    # Where it was brought up last are the images that its user has.
    remembered = ContainerDaemon.remembered(settings)
    if remembered is not None and settings.daemon in (None, remembered.candidate.kind):
        first = Option(remembered.candidate.kind, remembered.candidate)
        named = settings.docker_host or settings.docker_context or settings.podman_host
        if not named:
            found.insert(0, first)
    return found


class DaemonAbsent(DaemonUnreachable):
    """At one of the usual places there is nothing."""


async def look_around(
    settings: Settings,
) -> AsyncIterator[tuple[str, str, str | None, str]]:
    """Try each way to have a containerd of our own; starts nothing.

    Yields the kind, where it would be, why it cannot be used (None if it can), and the remedy.
    """
    for option in await _all_options(settings):
        if option.candidate is None:
            yield option.kind, "a child process of ours", option.problem, ""
            continue
        try:
            await _answering(option.candidate)
        except DaemonAbsent:
            continue
        except DaemonError as error:
            yield option.kind, option.candidate.source, str(error), error.hint
        else:
            yield option.kind, str(option.candidate), None, ""


async def _answering(candidate: Candidate) -> Candidate:
    """Make sure that a container engine answers.  Raises DaemonError with the reason."""
    from serpentine.daemon.api import ping

    if (
        candidate.path is not None
        and candidate.is_guess
        and not await asyncio.to_thread(Path(candidate.path).exists)
    ):
        raise DaemonAbsent("there is no such socket", address=candidate.path)
    if candidate.url or candidate.problem:
        await ping(candidate)
    return candidate


async def _start_container(settings: Settings, candidate: Candidate, on_event: OnEvent) -> Daemon:
    container = ContainerDaemon(settings, candidate)
    state, endpoint = await container.start(on_event=on_event)
    reason = f"{state.kind.capitalize()} answers at {candidate}"
    return Daemon(state.kind, reason, endpoint, state.transport, container)


async def _start_embedded(settings: Settings, on_event: OnEvent) -> Daemon:
    embedded = Embedded.from_settings(settings)
    await embedded.start(on_event=on_event)
    reason = "no address was given; root can start a containerd of our own"
    if settings.daemon:
        reason = f"{settings.sources.get('daemon', 'argument')} asks for it"
    return Daemon("embedded", reason, embedded.endpoint)


async def existing(settings: Settings) -> ContainerDaemon | Embedded | None:
    """Return our daemon as it is, running or not, to stop, look at, or remove it.

    Where we remember none, the container engines are asked for a container of ours.
    """
    if settings.daemon != "embedded":
        remembered = ContainerDaemon.remembered(settings)
        if remembered is not None and settings.daemon in (None, remembered.candidate.kind):
            return remembered
    embedded = Embedded.from_settings(settings)
    if settings.daemon in (None, "embedded") and embedded.exists():
        return embedded
    for option in await _all_options(settings):
        if option.candidate is None or not (option.candidate.url or option.problem):
            continue
        daemon = ContainerDaemon(settings, option.candidate)
        if await daemon.exists():
            return daemon
    return None
