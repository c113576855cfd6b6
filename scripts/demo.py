"""The demo: a containerd comes up, an image streams into it from a real registry, a step runs.

``IMAGE=docker.io/library/alpine make demo`` takes that instead of an image made on the spot.
Everything lives in a temporary directory, except when CONTAINERD_ADDRESS names a containerd;
``SERPENTINE_DAEMON=docker make demo`` shows our containerd in Docker, and removes it again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.support.images import busybox_layer, file, folder, image, layer, noise, push, whiteout
from tests.support.servers import RegistryServer

NAMESPACE = "serpentine-demo"
TELL = ("sh", "-c", "echo And hello from a step. >>/srv/hello")


def say(text: str) -> None:
    """Print a heading."""
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


def run(*arguments: str, check: bool = True) -> int:
    """Show a command, run it, and end the demo if it fails."""
    print(f"$ {' '.join(arguments)}", flush=True)
    program = [sys.executable, "-m", "serpentine", *arguments[1:]]
    command = program if arguments[0] == "serpentine" else list(arguments)
    status = subprocess.run(command, check=False).returncode
    if check and status != 0:
        raise SystemExit(status)
    return status


@contextlib.contextmanager
def source() -> Iterator[str]:
    """Give the image to pull: the one that was asked for, or one made and pushed here."""
    if wanted := os.environ.get("IMAGE"):
        yield wanted
        return
    say("A registry on loopback, and an image of four layers pushed to it")
    made = image(
        [
            busybox_layer(),
            layer([folder("srv"), file("srv/secret", "not for everybody")]),
            layer([whiteout("srv/secret"), file("srv/hello", "Hello from a pulled image!\n")]),
            layer([file("srv/data", noise("demo", 20_000_000))], compression="zstd"),
        ],
        config={"Cmd": ["/bin/cat", "/srv/hello"], "Env": ["PATH=/bin"]},
    )
    with RegistryServer() as registry:
        reference = push(registry, "demo/hello", "latest", made)
        print(reference)
        yield reference


@contextlib.contextmanager
def directories() -> Iterator[None]:
    """Give our own containerd directories that go when the demo ends."""
    own = "CONTAINERD_ADDRESS" not in os.environ
    base = Path(tempfile.mkdtemp(prefix="serpentine-demo-"))
    os.environ["SERPENTINE_DATA_DIR"] = str(base / "data")
    os.environ["SERPENTINE_RUN_DIR"] = str(base / "run")
    os.environ["CONTAINERD_NAMESPACE"] = NAMESPACE
    # Building an image for Docker takes minutes, and it may be somebody's who did not ask.
    os.environ.setdefault("SERPENTINE_DAEMON", "embedded")
    try:
        yield
    finally:
        if own:
            run("serpentine", "daemon", "remove", "--volumes", check=False)
        shutil.rmtree(base, ignore_errors=True)


def main() -> None:
    """Run the demo."""
    with directories(), source() as reference:
        address = os.environ.get("CONTAINERD_ADDRESS")
        if not address:
            say("A containerd of our own comes up")
            run("serpentine", "daemon", "start")
        if not address and os.environ["SERPENTINE_DAEMON"] == "embedded":
            address = f"{os.environ['SERPENTINE_RUN_DIR']}/containerd.sock"
        say("The image streams from the registry into it")
        run("serpentine", "pull", reference)
        say("The same again: one request to the registry, nothing moved")
        run("serpentine", "pull", reference)
        say("What is there now")
        run("serpentine", "images")
        say("Its state: what everything later builds on")
        run("serpentine", "inspect", reference)
        say("A command runs in it, in a network of its own")
        run("serpentine", "run", reference, "--", "sh", "-c", "cat /etc/hosts")
        if shutil.which("ctr") and address:
            ctr = ("ctr", "--address", address, "--namespace", NAMESPACE)
            say("Its snapshots, one per layer, as containerd's own tool sees them")
            run(*ctr, "snapshots", "ls")
            if "IMAGE" not in os.environ:
                say("And that tool runs it, with nothing more to fetch or unpack")
                run(*ctr, "run", "--rm", reference, "demo")
        if "IMAGE" not in os.environ:
            say("What a step leaves becomes an image, and runs")
            run("serpentine", "run", "--commit", "demo/told:1", reference, "--", *TELL)
            run("serpentine", "run", "demo/told:1")
            run("serpentine", "rmi", "demo/told:1")
        say("Removed, with everything that only it needed")
        run("serpentine", "rmi", reference)


if __name__ == "__main__":
    main()
