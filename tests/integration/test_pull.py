"""Pulling real images from a real registry into a real containerd."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import subprocess
import sys
from datetime import timedelta

import pytest

from serpentine.errors import PlatformNotFound, UnsupportedImage
from serpentine.events import LayerStatus, PullFinished, PullPlanned
from serpentine.model.digest import DiffID, chain_ids
from tests.support.contents import NOTHING
from tests.support.fake_registry import FakeRegistry
from tests.support.images import (
    Image,
    Layer,
    attestation,
    busybox_layer,
    file,
    folder,
    image,
    index,
    layer,
    make_tar,
    noise,
    push,
    sha256,
    whiteout,
)
from tests.support.servers import Recording


def three_layers(name: str, **more):
    return image(
        [
            busybox_layer(),
            layer([folder("etc/app"), file("etc/app/name", name)]),
            layer([file("payload", noise(name, 3_000_000))]),
        ],
        config={
            "Env": ["PATH=/bin", f"NAME={name}"],
            "Entrypoint": ["/bin/cat"],
            "Cmd": ["/etc/app/name"],
            "WorkingDir": "/tmp",
            "User": "0:0",
            "Labels": {"b": "2", "a": "1"},
            "StopSignal": "SIGINT",
        },
        **more,
    )


def top_of(made) -> str:
    config = next(b for b in made.blobs.values() if b.startswith(b"{") and b"rootfs" in b)
    diff_ids = [DiffID.parse(d) for d in json.loads(config)["rootfs"]["diff_ids"]]
    return str(chain_ids(diff_ids)[-1])


async def test_the_state_of_a_pulled_image(engine, registry, contents):
    made = three_layers("state")
    reference = push(registry, "pull/state", "1", made)
    state = await engine.pull_image(reference)
    assert state.snapshot_key == top_of(made)
    assert state.snapshotter == "overlayfs"
    assert state.image == f"{registry.address}/pull/state@{made.digest}"
    assert (state.manifest_digest, state.index_digest) == (made.digest, None)
    assert state.platform == "linux/amd64"
    assert state.env == ("PATH=/bin", "NAME=state")
    assert (state.entrypoint, state.cmd) == (("/bin/cat",), ("/etc/app/name",))
    assert (state.working_dir, state.user, state.stop_signal) == ("/tmp", "0:0", "SIGINT")
    assert state.labels == (("a", "1"), ("b", "2"))
    assert await engine.inspect(reference) == state
    assert await engine.inspect(state.image) == state
    now = await contents()
    assert now.images == [reference]
    assert now.blobs == sorted([made.digest, *made.blobs])
    assert len(now.snapshots) == 3
    assert now.leases == now.ingests == []


async def test_ctr_runs_what_we_pulled(containerd, namespace, command, registry, contents):
    """Done when 2: listed and run by ctr with nothing more to fetch; rmi leaves nothing."""
    reference = push(registry, "pull/ctr", "1", three_layers("ctr runs it"))
    assert command("pull", reference).status == 0
    assert reference in containerd.ctr("images", "ls", "-q", namespace=namespace).split()
    before = await contents()
    fetched = len(registry.fetches())
    out = containerd.ctr("run", "--rm", reference, "one", namespace=namespace)
    assert out == "ctr runs it"
    out = containerd.ctr("run", "--rm", reference, "two", "/bin/ls", "/", namespace=namespace)
    assert "payload" in out.split()
    assert len(registry.fetches()) == fetched
    assert await contents() == before
    assert "incomplete" not in containerd.ctr("images", "check", namespace=namespace)

    assert command("rmi", reference).out == f"{reference}\n"
    assert await contents() == NOTHING


async def test_a_second_pull_costs_one_request(engine, registry, recording):
    reference = push(registry, "pull/twice", "1", three_layers("twice"))
    first = await engine.pull_image(reference)
    seen = len(recording.requests)
    finished: list[PullFinished] = []

    def on_event(event):
        if isinstance(event, PullFinished):
            finished.append(event)

    assert await engine.pull_image(reference, on_event=on_event) == first
    again = recording.requests[seen:]
    assert again == [("HEAD", "/v2/pull/twice/manifests/1", 200)]
    assert finished[0].registry_requests == 1
    assert finished[0].bytes_downloaded == 0
    assert (finished[0].layers_total, finished[0].layers_reused) == (3, 3)


async def test_a_moved_tag_fetches_only_what_is_new(engine, registry, recording):
    base = busybox_layer()
    one = image([base, layer([file("v", "1")])])
    two = image([base, layer([file("v", "2")])])
    reference = push(registry, "pull/moved", "latest", one)
    first = await engine.pull_image(reference)
    push(registry, "pull/moved", "latest", two)
    second = await engine.pull_image(reference)
    assert first.snapshot_key != second.snapshot_key
    assert recording.blobs().count(base.digest) == 1
    assert (await engine.inspect(reference)) == second


async def test_images_share_blobs_and_snapshots(engine, registry, recording, contents):
    base = [busybox_layer(), layer([file("shared", noise("shared", 100_000))])]
    first = push(registry, "pull/share-a", "1", image([*base, layer([file("a", "a")])]))
    second = push(registry, "pull/share-b", "1", image([*base, layer([file("b", "b")])]))
    await engine.pull_image(first)
    await engine.pull_image(second)
    for shared in base:
        assert recording.blobs().count(shared.digest) == 1
    assert len((await contents()).snapshots) == 4
    await engine.remove_image(first)
    left = await contents()
    assert len(left.snapshots) == 3
    assert base[0].digest in left.blobs
    await engine.remove_image(second)
    assert await contents() == NOTHING


async def test_two_pulls_at_once_in_one_process(engine, registry, recording, contents):
    made = three_layers("at once")
    reference = push(registry, "pull/once", "1", made)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(engine.pull_image(reference)) for _ in range(4)]
    assert len({task.result() for task in tasks}) == 1
    layers = [d for d, b in made.blobs.items() if not b.startswith(b"{")]
    assert [recording.blobs().count(digest) for digest in layers] == [1, 1, 1]
    assert len((await contents()).snapshots) == 3
    assert (await contents()).leases == []


async def test_two_engines_at_once(containerd, namespace, registry, recording, contents):
    """Two clients that know nothing of each other: containerd is the arbiter."""
    made = three_layers("engines")
    reference = push(registry, "pull/engines", "1", made)

    async def one():
        async with containerd.connect(namespace=namespace) as engine:
            return await engine.pull_image(reference)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one()) for _ in range(3)]
    assert len({task.result() for task in tasks}) == 1
    layers = [d for d, b in made.blobs.items() if not b.startswith(b"{")]
    assert [recording.blobs().count(digest) for digest in layers] == [1, 1, 1]
    now = await contents()
    assert (len(now.snapshots), now.leases, now.ingests) == (3, [], [])


async def test_two_processes_at_once(containerd, namespace, registry, recording, contents):
    """Done when 3: both succeed, and each blob is downloaded once."""
    made = three_layers("processes")
    reference = push(registry, "pull/processes", "1", made)
    arguments = [sys.executable, "-m", "serpentine", "pull", reference, "--json", "-q"]
    environ = {
        **os.environ,
        **containerd.environ,
        "CONTAINERD_NAMESPACE": namespace,
    }
    processes = [
        await asyncio.create_subprocess_exec(
            *arguments, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(2)
    ]
    results = [await process.communicate() for process in processes]
    assert [p.returncode for p in processes] == [0, 0], results
    keys = {json.loads(out)["snapshot_key"] for out, _ in results}
    assert keys == {top_of(made)}
    layers = [d for d, b in made.blobs.items() if not b.startswith(b"{")]
    assert [recording.blobs().count(digest) for digest in layers] == [1, 1, 1]
    now = await contents()
    assert (len(now.snapshots), now.leases, now.ingests) == (3, [], [])


@pytest.mark.parametrize("compression", ["gzip", "zstd", "none"])
@pytest.mark.parametrize("docker", [False, True], ids=["oci", "docker"])
async def test_each_form_and_compression(engine, registry, compression, docker):
    kind = {"compression": compression, "docker": docker}
    made = image(
        [layer([file("a", "1"), folder("d")], **kind), layer([whiteout("a")], **kind)],
        docker=docker,
    )
    reference = push(registry, f"pull/form-{docker}-{compression}".lower(), "1", made)
    state = await engine.pull_image(reference)
    assert state.snapshot_key == top_of(made)


async def test_a_layer_labelled_as_what_it_is_not(engine, registry):
    """Trap 23: the label says plain tar, the bytes are gzip, and the other way round."""
    true = layer([file("a", "1")])
    lie = Layer(true.blob, true.diff_id, "application/vnd.oci.image.layer.v1.tar")
    plain = layer([file("b", "1")], compression="none")
    other = Layer(plain.blob, plain.diff_id, "application/vnd.oci.image.layer.v1.tar+gzip")
    made = image([lie, other])
    state = await engine.pull_image(push(registry, "pull/mislabelled", "1", made))
    assert state.snapshot_key == top_of(made)


async def test_the_same_layer_twice(engine, registry, recording, contents):
    twice = layer([file("a", noise("twice", 50_000))])
    made = image([twice, layer([whiteout("a")]), twice])
    state = await engine.pull_image(push(registry, "pull/same-twice", "1", made))
    assert state.snapshot_key == top_of(made)
    assert recording.blobs().count(twice.digest) == 1
    assert len((await contents()).snapshots) == 3


async def test_an_empty_layer_and_one_of_no_bytes(engine, registry):
    empty = layer([])
    nothing = Layer(b"", sha256(b""), "application/vnd.oci.image.layer.v1.tar")
    made = image([layer([file("a", "1")]), empty, nothing])
    state = await engine.pull_image(push(registry, "pull/empty", "1", made))
    assert state.snapshot_key == top_of(made)


async def test_digests_of_sha512(containerd, engine, registry, contents):
    """Trap 14: newer containerds take them, older ones are named as the reason."""
    one = layer([file("a", "sha512")])
    digest = "sha512:" + hashlib.sha512(one.blob).hexdigest()
    made = image([one])
    value = json.loads(made.data)
    value["layers"][0]["digest"] = digest
    named = Image(json.dumps(value).encode(), made.media_type, {**made.blobs, digest: one.blob})
    with FakeRegistry() as fake:
        reference = fake.add("pull/sha512", "1", named)
        if containerd.version.startswith("1."):
            with pytest.raises(UnsupportedImage, match="knows sha256 only"):
                await engine.pull_image(reference)
            assert await contents() == NOTHING
        else:
            assert (await engine.pull_image(reference)).snapshot_key == top_of(made)


async def test_an_image_without_layers(engine, registry, contents):
    made = image([])
    reference = push(registry, "pull/no-layers", "1", made)
    state = await engine.pull_image(reference)
    assert state.snapshot_key == ""
    assert state.manifest_digest == made.digest
    assert await engine.pull_image(reference) == state
    assert await engine.inspect(reference) == state
    await engine.remove_image(reference)
    assert await contents() == NOTHING


async def test_a_manifest_without_its_media_type(engine, registry):
    made = image([layer([file("a", "1")])], with_media_type=False)
    state = await engine.pull_image(push(registry, "pull/no-type", "1", made))
    assert state.manifest_digest == made.digest


async def test_an_index_of_several_platforms(engine, registry, contents):
    parts = {
        platform: image([layer([file("p", platform)])], platform=platform)
        for platform in ("linux/arm64", "linux/amd64", "linux/arm/v7", "linux/arm/v6")
    }
    whole = index([(part, part.descriptor(name)) for name, part in parts.items()])
    reference = push(registry, "pull/index", "1", whole)
    state = await engine.pull_image(reference)
    assert state.manifest_digest == parts["linux/amd64"].digest
    assert state.index_digest == whole.digest
    assert state.platform == "linux/amd64"

    # A second platform is added to the first one, and neither is collected.
    other = await engine.pull_image(reference, platform="linux/arm/v8")
    assert other.manifest_digest == parts["linux/arm/v7"].digest
    # A collection in between takes nothing of either.
    await engine.containerd.leases.create("gc", expires=timedelta(minutes=1))
    await engine.containerd.leases.delete("gc", sync=True)
    images = await engine.images()
    assert images[0].platforms == ("linux/amd64", "linux/arm/v7")
    assert await engine.inspect(reference) == state
    assert await engine.inspect(reference, platform="linux/arm/v7") == other

    with pytest.raises(PlatformNotFound) as caught:
        await engine.pull_image(reference, platform="linux/s390x")
    assert caught.value.available == (
        "linux/arm64",
        "linux/amd64",
        "linux/arm/v7",
        "linux/arm/v6",
    )
    await engine.remove_image(reference)
    assert await contents() == NOTHING


async def test_a_nested_index(engine, registry):
    inner_image = image([layer([file("a", "inner")])])
    inner = index([(inner_image, inner_image.descriptor("linux/amd64"))])
    decoy_image = image([layer([file("a", "decoy")])], platform="linux/arm64")
    decoy = index([(decoy_image, decoy_image.descriptor("linux/arm64"))])
    outer = index([(decoy, decoy.descriptor()), (inner, inner.descriptor())])
    state = await engine.pull_image(push(registry, "pull/nested", "1", outer))
    assert state.manifest_digest == inner_image.digest
    assert state.index_digest == outer.digest


async def test_attestations_are_passed_over(engine, registry):
    made = image([layer([file("a", "attested")])])
    proof, entry = attestation(made)
    whole = index([(proof, entry), (made, made.descriptor("linux/amd64"))])
    state = await engine.pull_image(push(registry, "pull/attested", "1", whole))
    assert state.manifest_digest == made.digest


async def test_an_index_that_names_no_platforms_is_decided_by_the_configs(engine, registry):
    wrong = image([layer([file("a", "1")])], platform="linux/arm64")
    right = image([layer([file("a", "2")])], platform="linux/amd64")
    whole = index([(wrong, wrong.descriptor()), (right, right.descriptor())])
    state = await engine.pull_image(push(registry, "pull/bare-index", "1", whole))
    assert state.manifest_digest == right.digest


async def test_by_digest_and_by_tag_with_digest(engine, registry, recording):
    made = three_layers("digest")
    push(registry, "pull/digest", "1", made)
    name = f"{registry.address}/pull/digest"
    state = await engine.pull_image(f"{name}@{made.digest}")
    assert state.image == f"{name}@{made.digest}"
    assert await engine.pull_image(f"{name}:whatever@{made.digest}") == state
    names = [i.name for i in await engine.images()]
    assert names == [f"{name}:whatever@{made.digest}", f"{name}@{made.digest}"]


async def test_content_of_another_namespace_is_not_downloaded_again(
    containerd, namespace, engine, registry, recording
):
    """Trap 9."""
    made = three_layers("other namespace")
    reference = push(registry, "pull/other-namespace", "1", made)
    await engine.pull_image(reference)
    before = recording.blobs()
    async with containerd.connect(namespace=f"{namespace}-b") as other:
        state = await other.pull_image(reference)
        assert state.snapshot_key == top_of(made)
        layers = [d for d, b in made.blobs.items() if not b.startswith(b"{")]
        assert not set(recording.blobs()[len(before) :]) & set(layers)
        await other.remove_image(reference)


async def test_what_ctr_pulled_is_used(containerd, namespace, engine, registry, recording):
    made = three_layers("from ctr")
    reference = push(registry, "pull/from-ctr", "1", made)
    containerd.ctr("images", "pull", "--plain-http", reference, namespace=namespace)
    before = recording.blobs()
    state = await engine.pull_image(reference)
    assert state.snapshot_key == top_of(made)
    assert recording.blobs() == before


async def test_the_native_snapshotter(containerd, namespace, registry, contents):
    made = three_layers("native")
    reference = push(registry, "pull/native", "1", made)
    async with containerd.connect(namespace=namespace, snapshotter="native") as engine:
        state = await engine.pull_image(reference)
        assert (state.snapshotter, state.snapshot_key) == ("native", top_of(made))
        assert len((await contents("native")).snapshots) == 3
        await engine.remove_image(reference)
        assert await contents("native") == NOTHING


async def test_the_events_of_a_pull(engine, registry):
    made = three_layers("events")
    events = []
    await engine.pull_image(push(registry, "pull/events", "1", made), on_event=events.append)
    names = [event.name for event in events]
    assert names[:3] == ["pull_started", "pull_resolved", "pull_planned"]
    assert names[-1] == "pull_finished"
    planned = next(e for e in events if isinstance(e, PullPlanned))
    assert [p.status for p in planned.layers] == [LayerStatus.WAITING] * 3
    for place in range(3):
        steps = [e.status for e in events if e.name == "layer_progress" and e.index == place]
        order = list(dict.fromkeys(steps))
        assert order == [
            LayerStatus.DOWNLOADING,
            LayerStatus.DOWNLOADED,
            LayerStatus.APPLYING,
            LayerStatus.DONE,
        ]
    total = sum(len(blob) for blob in made.blobs.values()) + len(made.data)
    assert events[-1].bytes_downloaded == total


async def test_many_layers(engine, registry):
    made = image([layer([file(f"f{n}", str(n))]) for n in range(60)])
    state = await engine.pull_image(push(registry, "pull/many", "1", made))
    assert state.snapshot_key == top_of(made)


def test_a_tar_of_no_entries_has_the_known_diff_id():
    assert sha256(make_tar([])) == sha256(b"\0" * 10240)


def test_the_command_line(command, registry):
    made = three_layers("command line")
    reference = push(registry, "pull/cli", "1", made)
    done = command("pull", reference)
    exact = f"{registry.address}/pull/cli@{made.digest}"
    assert (done.status, done.out) == (0, f"{exact}\n")
    assert "downloading" in done.err

    done = command("pull", reference, "--json", "-q")
    assert (done.status, done.err) == (0, "")
    assert done.json["image"] == exact
    assert done.json["config"]["labels"] == {"a": "1", "b": "2"}
    assert done.json["stats"]["bytes_downloaded"] == 0
    assert done.json["stats"]["layers_reused"] == done.json["stats"]["layers_total"] == 3
    assert done.json["stats"]["registry_requests"] == 1
    assert set(done.json) >= {
        *("image", "snapshot_key", "snapshotter", "platform", "manifest_digest"),
        *("index_digest", "config_digest", "config", "stats"),
    }

    done = command("pull", reference, "--progress", "json")
    assert [json.loads(line)["event"] for line in done.err.splitlines()][-1] == "pull_finished"

    assert command("images", "-q").out == f"{reference}\n"
    assert command("images", "--json").json[0]["platforms"] == ["linux/amd64"]
    table = command("images").out.splitlines()
    assert table[0].split() == ["IMAGE", "DIGEST", "PLATFORMS", "SIZE", "PULLED"]
    assert table[1].startswith(reference)
    assert json.loads(command("inspect", reference).out)["image"] == exact
    assert command("inspect", reference, "--json").json["image"] == exact
    assert command("rmi", reference, "--json").json == {"removed": [reference]}
    assert command("images", "-q").out == ""


def test_a_warm_pull_from_the_shell_is_one_head_and_no_client(containerd, registry, namespace):
    reference = push(registry, "pull/warm", "1", three_layers("warm"))
    heavy = {"aiohttp", "serpentine.pull.fetch", "serpentine.registry.client", "tarfile"}
    program = (
        "import atexit, sys\n"
        f"atexit.register(lambda: print(sorted({heavy!r} & set(sys.modules)), file=sys.stderr))\n"
        "from serpentine.cli.main import main\n"
        f"main(['pull', '-q', '--json', {reference!r}])"
    )
    environ = {**os.environ, **containerd.environ, "CONTAINERD_NAMESPACE": namespace}

    def pull():
        done = subprocess.run(
            [sys.executable, "-c", program], env=environ, capture_output=True, text=True, timeout=50
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["stats"], done.stderr.splitlines()[-1]

    _, imported = pull()
    # (Through Envoy, our container's module packs files.)
    assert imported.replace(", 'tarfile'", "") == str(sorted(heavy - {"tarfile"}))
    with Recording(registry) as seen:
        stats, imported = pull()
    assert (stats["registry_requests"], stats["bytes_downloaded"]) == (1, 0)
    assert seen.requests == [("HEAD", "/v2/pull/warm/manifests/1", 200)]
    assert imported in ("[]", "['tarfile']")
    # The tag moves: that is seen, and what is new is fetched.
    moved = three_layers("moved")
    push(registry, "pull/warm", "1", moved)
    stats, imported = pull()
    assert stats["bytes_downloaded"] > 0
    assert imported != "[]"
