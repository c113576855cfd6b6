"""With the registry stopped: what is here or pinned is used, everything else is one clear error."""

from __future__ import annotations

import json
import tomllib
from contextlib import suppress
from pathlib import Path

import pytest

import serpentine
from serpentine import Lock
from serpentine.errors import (
    InvalidSetting,
    NotFound,
    NotPinned,
    PlatformNotFound,
    RegistryUnreachable,
)
from serpentine.events import PullFinished, PullPlanned, PullStarted
from serpentine.model.digest import Digest
from tests.support.contents import NOTHING
from tests.support.images import file, image, index, layer, noise, push
from tests.support.servers import Recording, RegistryServer

PLATFORMS = ("linux/amd64", "linux/arm64")


@pytest.fixture
def mortal():
    """A registry of the test's own, which it may stop."""
    with RegistryServer() as server:
        yield server


def made(name: str, platform: str = "linux/amd64"):
    return image(
        [layer([file("base", noise("base", 20_000))]), layer([file("name", f"{name} {platform}")])],
        platform=platform,
    )


def whole(name: str):
    parts = [(platform, made(name, platform)) for platform in PLATFORMS]
    return index([(part, part.descriptor(platform)) for platform, part in parts])


def one_line(done, status: int, *said: str) -> None:
    assert done.status == status, done.err
    assert done.out == ""
    assert len(done.err.splitlines()) == 1, done.err
    for word in said:
        assert word in done.err


async def snapshots_go(engine, key: str) -> None:
    """Leave an image as blobs: no snapshot, and no label that leads to one."""
    client = engine.containerd
    for blob in await client.content.all():
        names = [name for name in blob.labels if ".gc.ref.snapshot." in name]
        if names:
            await client.content.update_labels(blob.digest, dict.fromkeys(names))
    snapshots = client.snapshots("overlayfs")
    # containerd's collector, which a pull wakes, may come first: it takes all of them at once.
    with suppress(NotFound):
        while key:
            parent = (await snapshots.stat(key)).parent
            await snapshots.remove(key)
            key = parent
    assert await snapshots.all() == []


# --- Done when 9: the registry is stopped ---------------------------------------------------


def test_present_images_with_the_registry_stopped(command, mortal, tmp_path):
    present = push(mortal, "off/present", "1", whole("present"))
    other = push(mortal, "off/other", "1", made("other"))
    file = str(tmp_path / "our.lock")
    assert command("lock", present, other, "--file", file).status == 0
    first = command("pull", "-q", "--json", present).json
    mortal.stop()

    assert command("pull", "-q", present).status == 1  # it is gone indeed
    for arguments in (
        ("--offline", "pull", present),
        ("pull", "--pull", "never", present),
        ("pull", "--pull", "missing", present),
        ("pull", "--frozen", "--lock-file", file, present),
        ("--offline", "pull", "--frozen", "--lock-file", file, present),
        ("--offline", "pull", first["image"]),
        ("pull", "--frozen", first["image"]),
    ):
        done = command(*arguments, "--json", "-q")
        assert done.status == 0, done.err
        # By the digest of a manifest, there is no index.
        index_digest = None if arguments[-2] == "--frozen" else first["index_digest"]
        expected = {**first, "stats": None, "index_digest": index_digest}
        assert {**done.json, "stats": None} == expected
        stats = done.json["stats"]
        assert (stats["bytes_downloaded"], stats["registry_requests"]) == (0, 0)
        assert (stats["layers_total"], stats["layers_reused"]) == (2, 2)
    by_environment = command("pull", "-q", present, SERPENTINE_OFFLINE="1")
    assert by_environment.out == f"{first['image']}\n"
    frozen = {"SERPENTINE_FROZEN": "1", "SERPENTINE_LOCK_FILE": file}
    assert command("pull", "-q", present, **frozen).out == f"{first['image']}\n"

    # And what is not there.
    one_line(
        command("--offline", "pull", "-q", other),
        1,
        f"there is no image {other} in namespace",
        "no registry is asked (offline)",
        f"serpentine pull {other}",
    )
    one_line(command("pull", "-q", "--pull", "never", other), 1, "no registry is asked", "never")
    one_line(
        command("--offline", "pull", "-q", present, "--platform", "linux/arm64"),
        1,
        f"there is no image {present} for linux/arm64",
        "--platform linux/arm64",
    )
    one_line(
        command("--offline", "pull", "-q", "--frozen", "--lock-file", file, other),
        1,
        f"there is no image {other} for linux/amd64",
    )
    one_line(command("pull", "-q", "--frozen", "--lock-file", file, other), 1, mortal.address)
    one_line(
        command("pull", "-q", "--frozen", "--lock-file", file, f"{mortal.address}/off/third:1"),
        1,
        f"{mortal.address}/off/third:1 is not in the lock file {file}",
        f"serpentine lock {mortal.address}/off/third:1 --file {file}",
    )
    one_line(
        command("pull", "-q", "--frozen", "--lock-file", f"{file}.no", present),
        1,
        f"there is no lock file {file}.no",
        f"serpentine lock {present} --file {file}.no",
    )
    pinned = ("pull", "-q", "--frozen", "--lock-file", file, present)
    one_line(
        command(*pinned, "--platform", "linux/arm64"), 1, f"{file}, but not for linux/arm64",
        f"serpentine lock {present} --file {file} --platform linux/arm64",
    )  # fmt: skip


async def test_from_python_with_the_registry_stopped(containerd, namespace, engine, mortal):
    present = push(mortal, "off/python", "1", whole("python"))
    other = push(mortal, "off/absent", "1", made("absent"))
    state = await engine.pull_image(present)
    lock = await engine.lock([present, other])
    mortal.stop()

    settings = engine.settings
    offline = {"settings": serpentine.Settings(
        address=settings.address, namespace=namespace, offline=True, data_dir=settings.data_dir,
        run_dir=settings.run_dir, daemon=settings.daemon, transport=settings.transport,
    )}  # fmt: skip
    for how in ({"pull": "never"}, {"pull": "missing"}, {"lock": lock}):
        assert await engine.pull_image(present, **how) == state
    with pytest.raises(RegistryUnreachable):
        await engine.pull_image(present)
    with pytest.raises(NotFound, match="there is no image"):
        await engine.pull_image(other, pull="never")
    with pytest.raises(RegistryUnreachable):
        await engine.pull_image(other, lock=lock)
    with pytest.raises(NotPinned, match="not in the lock"):
        await engine.pull_image(f"{mortal.address}/off/third", lock=lock)
    if settings.address is not None:
        async with serpentine.connect(**offline) as quiet:
            assert await quiet.pull_image(present) == state
            assert await quiet.lock([present]) == Lock({present: lock.images[present]})
            with pytest.raises(NotFound, match="no registry is asked"):
                await quiet.lock([other])
            assert (await quiet.verify([present])).is_whole
            with pytest.raises(NotFound, match="offline"):
                await quiet.pull_image(other)


async def test_blobs_without_snapshots_are_unpacked(engine, mortal, contents):
    reference = push(mortal, "off/blobs", "1", whole("blobs"))
    state = await engine.pull_image(reference)
    before = await contents()
    mortal.stop()
    for policy in ("never", "missing"):
        await snapshots_go(engine, state.snapshot_key)
        assert (await contents()).snapshots == []
        finished: list = []
        assert await engine.pull_image(reference, pull=policy, on_event=finished.append) == state
        (done,) = [event for event in finished if isinstance(event, PullFinished)]
        assert (done.registry_requests, done.bytes_downloaded) == (0, 0)
        assert await contents() == before


async def test_what_is_missing_is_counted_and_named(engine, mortal, contents):
    parts = made("holes")
    reference = push(mortal, "off/holes", "1", parts)
    state = await engine.pull_image(reference)
    layers = json.loads(parts.data)["layers"]
    await snapshots_go(engine, state.snapshot_key)
    await engine.containerd.content.delete(Digest.parse(layers[1]["digest"]))
    left = await contents()
    with pytest.raises(NotFound) as caught:
        await engine.pull_image(reference, pull="never")
    assert f"1 of 2 layers ({layers[1]['size']} bytes)" in str(caught.value)
    assert layers[1]["digest"] in str(caught.value)
    assert "serpentine pull" in caught.value.hint
    assert await contents() == left
    # With a registry it is what a pull is for.
    assert await engine.pull_image(reference, pull="missing") == state


# --- --pull ----------------------------------------------------------------------------------


async def test_missing_asks_only_for_what_is_missing(engine, registry, recording):
    reference = push(registry, "off/missing", "1", made("missing one"))
    events: list = []
    first = await engine.pull_image(reference, pull="missing", on_event=events.append)
    assert any(isinstance(event, PullStarted) for event in events)
    push(registry, "off/missing", "1", made("missing two"))
    seen = len(recording.requests)
    events.clear()
    assert await engine.pull_image(reference, pull="missing", on_event=events.append) == first
    assert [type(event) for event in events] == [PullFinished]
    assert len(recording.requests) == seen
    assert await engine.pull_image(reference) != first


async def test_another_platform_is_missing(engine, registry):
    reference = push(registry, "off/platforms", "1", whole("platforms"))
    await engine.pull_image(reference)
    other = await engine.pull_image(reference, pull="missing", platform="linux/arm64")
    assert other.platform == "linux/arm64"
    with pytest.raises(PlatformNotFound):
        await engine.pull_image(reference, pull="missing", platform="linux/s390x")


async def test_a_policy_that_is_none(engine):
    with pytest.raises(InvalidSetting, match="sometimes"):
        await engine.pull_image("alpine", pull="sometimes")


# --- lock and --frozen -------------------------------------------------------------------------


def test_a_tag_that_moved_makes_no_difference(command, registry, tmp_path, contents):
    one, two = whole("one"), whole("two")
    reference = push(registry, "off/moved", "1", one)
    path = tmp_path / "serpentine.lock"
    at = ("--file", str(path))
    assert command("lock", reference, *at).out == f"{reference}@{one.digest}  linux/amd64  added\n"
    push(registry, "off/moved", "1", two)

    frozen = ("pull", "-q", "--json", "--frozen", "--lock-file", str(path), reference)
    state = command(*frozen).json
    assert state["index_digest"] == one.digest
    assert [image["name"] for image in command("images", "--json").json] == [reference]
    assert [image["digest"] for image in command("images", "--json").json] == [one.digest]
    with Recording(registry) as seen:
        again = command(*frozen).json
        assert again["stats"]["registry_requests"] == 0
        done = command("run", "-q", "--frozen", "--lock-file", str(path), reference, "x")
        assert done.status == 127  # it got as far as to look for the command
    assert seen.requests == []

    # What was pulled without the lock is not what is pinned.
    moved = command("pull", "-q", "--json", reference).json
    assert moved["index_digest"] == two.digest
    assert command(*frozen, "--pull", "missing").json["index_digest"] == one.digest

    # A platform is added from the index that is pinned; and renewed when that is wanted.
    done = command("lock", reference, *at, "--platform", "linux/arm64")
    assert done.out == f"{reference}@{one.digest}  linux/amd64, linux/arm64  changed\n"
    done = command("lock", reference, *at, "--platform", "linux/arm64")
    assert done.out == f"{reference}@{one.digest}  linux/amd64, linux/arm64  unchanged\n"
    done = command("lock", "--update", *at)
    assert done.out == f"{reference}@{two.digest}  linux/amd64, linux/arm64  changed\n"
    assert command(*frozen).json["index_digest"] == two.digest


def test_what_the_file_holds(command, registry, tmp_path):
    second = push(registry, "off/b", "2.0", whole("b"))
    first = push(registry, "off/a", "1", made("a"))
    path = tmp_path / "locks" / "serpentine.lock"
    path.parent.mkdir()
    at = ("--file", str(path))
    both = ("--platform", "linux/arm64", "--platform", "linux/amd64")
    assert command("lock", second, *at, *both).status == 0
    done = command("lock", first, *at, "--json")
    assert done.json["changed"] is True
    assert done.json["file"] == str(path)
    parts = [made("b", platform).digest for platform in PLATFORMS]
    assert path.read_text() == (
        "# Images, pinned.  Written by 'serpentine lock IMAGE';"
        " 'serpentine lock --update' renews it.\n"
        "version = 1\n"
        f'\n[images."{first}"]\n'
        f'digest = "{made("a").digest}"\n'
        f'platforms."linux/amd64" = "{made("a").digest}"\n'
        f'\n[images."{second}"]\n'
        f'digest = "{whole("b").digest}"\n'
        f'platforms."linux/amd64" = "{parts[0]}"\n'
        f'platforms."linux/arm64" = "{parts[1]}"\n'
    )
    assert set(tomllib.loads(path.read_text())["images"]) == {first, second}
    # Nothing new: the file is not even touched, and no registry is asked.
    stamp = path.stat().st_mtime_ns
    with Recording(registry) as seen:
        assert command("lock", first, second, *at, "--json").json["changed"] is False
    assert seen.requests == []
    assert path.stat().st_mtime_ns == stamp
    assert [entry.name for entry in path.parent.iterdir()] == ["serpentine.lock"]


def test_the_file_of_the_working_directory(command, registry, tmp_path, monkeypatch):
    """Without any option, as a project would have it."""
    source = str(Path(serpentine.__file__).parents[1])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", source)
    reference = push(registry, "off/cwd", "1", made("cwd"))
    one_line(
        command("pull", "-q", "--frozen", reference),
        1,
        f"there is no lock file serpentine.lock; make it: serpentine lock {reference}",
    )
    assert command("lock", reference).status == 0
    assert (tmp_path / "serpentine.lock").exists()
    assert command("pull", "-q", "--frozen", reference).status == 0


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["lock"], 2, "name an IMAGE"),
        (["lock", "--update"], 1, "there is no lock file"),
        (["lock", "UPPER"], 1, "UPPER"),
        (["lock", f"alpine@sha256:{'0' * 64}"], 1, "names a digest"),
        (["lock", "alpine", "--platform", "linux"], 2, "platform"),
        (["lock", "127.0.0.1:1/no/where"], 1, "127.0.0.1:1"),
        (["--offline", "lock", "127.0.0.1:1/no/where"], 1, "no registry is asked"),
        (["pull", "alpine", "--pull", "sometimes"], 2, "sometimes"),
    ],
)
def test_bad_input_writes_nothing(command, tmp_path, arguments, status, said):
    path = tmp_path / "x.lock"
    done = command(*arguments, SERPENTINE_LOCK_FILE=str(path))
    assert done.status == status, done.err
    assert said in done.err
    assert done.out == ""
    assert not path.exists()


@pytest.mark.parametrize("text", ["= broken", "version = 2", 'version = 1\n[images."x"]\n'])
def test_a_file_that_is_not_valid_is_named_and_left_alone(command, registry, tmp_path, text):
    path = tmp_path / "x.lock"
    path.write_text(text)
    for arguments in (("lock", "alpine", "--file"), ("pull", "alpine", "--frozen", "--lock-file")):
        one_line(command(*arguments, str(path)), 2, str(path))
    assert path.read_text() == text


async def test_an_index_that_another_hand_wrote_into_the_lock(engine, registry, contents):
    """Only the platform's line was changed: nothing is fetched, and nothing recorded."""
    reference = push(registry, "off/hand", "1", whole("hand"))
    lock = await engine.lock([reference])
    pin = lock.images[reference]
    other = "sha256:" + "0" * 64
    changed = Lock({reference: serpentine.Pin(pin.digest, {"linux/amd64": other})})
    planned: list = []
    with pytest.raises(NotPinned, match="the lock says sha256:000"):
        await engine.pull_image(reference, lock=changed, on_event=planned.append)
    assert not any(isinstance(event, PullPlanned) for event in planned)
    assert await contents() == NOTHING


async def test_a_repair_offline_says_that_no_registry_is_asked(engine, command, registry):
    parts = made("repair")
    reference = push(registry, "off/repair", "1", parts)
    await engine.pull_image(reference)
    config = json.loads(parts.data)["config"]["digest"]
    await engine.containerd.content.delete(Digest.parse(config))
    with Recording(registry) as seen:
        done = command("--offline", "verify", "--repair", "-q", reference)
    assert done.status == 1
    assert "no registry is asked" in done.out + done.err
    assert seen.requests == []
    assert command("verify", "--repair", "-q", reference).status == 0
