"""A state becomes an image: what is in it, who can use it, what holds it, what is left of it."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import io
import json
import tarfile
from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from serpentine.errors import InvalidReference, NotFound, UnsupportedImage
from serpentine.model.digest import Digest
from serpentine.model.state import HealthCheck
from serpentine.pull.record import snapshot_label
from tests.integration.test_pull_cancel import CancelAtCall
from tests.support.contents import NOTHING
from tests.support.foreign import Umoci, tool
from tests.support.images import file, folder, image, layer, push, symlink
from tests.support.steps import step_layers
from tests.support.trees import differences, snapshot_tree, walk

pytestmark = pytest.mark.timeout(120)

CONFIG = {
    "Env": ["A=b", "PATH=/bin"],
    "WorkingDir": "/data",
    "Cmd": ["/bin/sh"],
    "Labels": {"org.example": "1"},
    "ExposedPorts": {"80/tcp": {}},
    "Volumes": None,
    "OnBuild": None,
    "Healthcheck": {"Test": ["CMD", "true"], "Interval": 7_000_000_000, "StartInterval": 5},
}
HISTORY = [
    {"created": "2024-01-01T00:00:00Z", "created_by": "ADD one"},
    {"created_by": "ENV A=b", "empty_layer": True},
    {"created_by": "ADD two"},
]


def made(layers=None, **more):
    return image(layers or step_layers(), config=CONFIG, **more)


def with_members(made, **members):
    """Return an image whose config has further members, as other builders write them."""
    manifest = json.loads(made.data)
    config = {**json.loads(made.blobs[manifest["config"]["digest"]]), **members}
    data = json.dumps(config).encode()
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    manifest["config"] |= {"digest": digest, "size": len(data)}
    made.blobs[digest] = data
    made.data = json.dumps(manifest).encode()
    return made


@pytest.fixture
async def base(engine, registry):
    """The state of a pulled image of two layers."""
    pushed = with_members(made(), history=HISTORY, container="abc", author="me")
    return await engine.pull_image(push(registry, "commit/base", "1", pushed))


@pytest.fixture
async def run(engine):
    """Return a function that runs a script on a state and returns the state after it."""

    async def run(state, script):
        result = await engine.run(state, script, network="none", check=True)
        return result.state

    return run


@pytest.fixture
def said(engine):
    """Return a function that runs a script on a state and returns what it prints."""

    async def said(state, script):
        options = {"network": "none", "commit": False, "check": True}
        return (await engine.run(state, script, **options)).stdout

    return said


async def documents(engine, state) -> tuple[dict, dict]:
    """Return the manifest and the config of an image's state."""
    content = engine.containerd.content
    found = [
        json.loads(await content.read_all(Digest.parse(digest), 1 << 20))
        for digest in (state.manifest_digest, state.config_digest)
    ]
    assert b"null" not in json.dumps(found).encode(), "not every reader takes null"
    layers = len(found[0]["layers"])
    assert len(found[1]["rootfs"]["diff_ids"]) == layers
    history = found[1]["history"]
    assert len([one for one in history if not one.get("empty_layer")]) == layers
    return found[0], found[1]


async def test_one_layer_on_the_base(engine, base, run, said, containerd, namespace, command):
    after = await run(base, "echo hello >/new")
    events = []
    committed = await engine.commit(
        after, "made/by-us:1", comment="why not", on_event=events.append
    )
    assert committed == await engine.inspect("made/by-us:1")
    assert committed.snapshot_key.startswith("sha256:")
    assert committed.image == f"docker.io/made/by-us@{committed.manifest_digest}"
    assert events, "nothing was said of the layer"

    manifest, config = await documents(engine, committed)
    below = [one.descriptor for one in step_layers()]
    assert manifest["layers"][:-1] == below
    assert manifest["config"]["mediaType"] == "application/vnd.oci.image.config.v1+json"
    top = manifest["layers"][-1]
    assert top["mediaType"] == "application/vnd.oci.image.layer.v1.tar+gzip"
    blob = await engine.containerd.content.read_all(Digest.parse(top["digest"]), 1 << 20)
    assert len(blob) == top["size"]
    unpacked = gzip.decompress(blob)
    diff_ids = [one.diff_id for one in step_layers()]
    new = "sha256:" + hashlib.sha256(unpacked).hexdigest()
    assert config["rootfs"] == {"type": "layers", "diff_ids": [*diff_ids, new]}
    with tarfile.open(fileobj=io.BytesIO(unpacked)) as tar:
        assert tar.getnames() == ["new"], "what the runtime mounts on is no change"

    created = datetime.fromisoformat(config["created"])
    assert timedelta() <= datetime.now(UTC) - created < timedelta(minutes=2)
    assert config["history"] == [
        *HISTORY,
        {"created": config["created"], "created_by": "serpentine", "comment": "why not"},
    ]
    # What a state does not know of stays, what is no member of a config or null goes.
    kept = {k: v for k, v in CONFIG.items() if v is not None}
    assert config["config"] == {**kept, "StopSignal": "SIGTERM"}
    assert (config["os"], config["architecture"]) == ("linux", "amd64")
    assert set(config) == {
        *("architecture", "author", "config", "created", "history", "os", "rootfs")
    }

    shown = command("images", "--json").json
    assert "docker.io/made/by-us:1" in json.dumps(shown)
    arguments = ("run", "--rm", "docker.io/made/by-us:1", f"ctr-{namespace}", "cat", "/new")
    assert containerd.ctr(*arguments, namespace=namespace) == "hello\n"
    assert (
        await engine.run(committed, "cat /new; pwd", network="none")
    ).stdout == b"hello\n/data\n"


async def test_the_labels_hold_it(engine, base, run, said, contents, registry):
    """Without its base it works; without both, nothing is left."""
    after = await run(base, "echo kept >/new")
    committed = await engine.commit(after, "made:1")
    await engine.remove_state(after)
    await engine.remove_image(f"{registry.address}/commit/base:1")
    left = await contents()
    assert left.images == ["docker.io/library/made:1"]
    assert left.leases == []
    assert len(left.snapshots) == 3
    assert len(left.blobs) == 5
    info = await engine.containerd.content.info(Digest.parse(committed.config_digest))
    assert info.labels == {snapshot_label("overlayfs"): committed.snapshot_key}
    assert await said(committed, "cat /new") == b"kept\n"
    again = await run(committed, "echo more >>/new")
    await engine.commit(again, "made:2")
    await engine.remove_state(again)
    await engine.remove_image("made:1")
    assert await said(await engine.inspect("made:2"), "cat /new") == b"kept\nmore\n"
    await engine.remove_image("made:2")
    assert await contents() == NOTHING


async def test_an_unchanged_state_has_no_new_layer(engine, base, contents):
    before = await contents()
    committed = await engine.commit(base, "other:1")
    assert committed == base
    assert committed.snapshot_key == base.snapshot_key
    manifest, config = await documents(engine, committed)
    assert manifest["layers"] == [one.descriptor for one in step_layers()]
    assert config["history"][-1]["empty_layer"] is True
    after = await contents()
    assert after.snapshots == before.snapshots
    assert len(after.blobs) == len(before.blobs) + 2


async def test_from_an_image_without_layers(engine, registry, run, said, contents):
    """The first layer of all."""
    empty = image([], config={"Env": ["PATH=/bin"]})
    state = await engine.pull_image(push(registry, "commit/empty", "1", empty))
    assert state.snapshot_key == ""
    copied = await engine.copy_in(state, "/bin/busybox", "/bin/sh")
    after = await run(copied, "echo first >/file")
    committed = await engine.commit(after, "first:1")
    manifest, config = await documents(engine, committed)
    assert len(manifest["layers"]) == 1
    assert committed.snapshot_key == config["rootfs"]["diff_ids"][0]
    assert await said(committed, "read line </file; echo $line") == b"first\n"
    unchanged = await engine.commit(state, "nothing:1")
    manifest, _ = await documents(engine, unchanged)
    assert manifest["layers"] == []
    for one in (after, copied):
        await engine.remove_state(one)
    for one in await engine.images():
        await engine.remove_image(one.name)
    assert await contents() == NOTHING


async def test_over_a_name_that_is_taken(engine, base, run, contents):
    first = await engine.commit(await run(base, "echo 1 >/new"), "made:1")
    second = await engine.commit(await run(base, "echo 2 >/new"), "made:1")
    assert first.snapshot_key != second.snapshot_key
    assert await engine.inspect("made:1") == second
    for snapshot in (await contents()).snapshots:
        if snapshot.startswith("state-"):
            await engine.containerd.snapshots("overlayfs").remove(snapshot)
    await engine.remove_image(base.image)  # the collector runs
    left = await contents()
    assert second.snapshot_key in left.snapshots
    assert first.snapshot_key not in left.snapshots
    assert first.manifest_digest not in left.blobs


CHANGES = """
set -e
cd /data
mkdir -m 0750 deep deep/er; echo x >deep/er/file; chown 1000:100 deep/er/file
echo linked >one; ln one two; chmod 4755 one; ln -s nowhere dangling
mkfifo pipe; mknod null c 1 3; chown 5:6 /data
rm old; echo again >suid; rm -r /home
rm /bin/script; mkdir /bin/script; echo >/bin/script/inside
touch -d @1600000000 deep/er/file
"""


async def test_the_tree_is_the_states(engine, base, run, containerd):
    """Modes, owners, hard links, special files; what was removed is a whiteout in the layer."""
    middle = await run(base, "echo temporary >/data/gone; echo 1 >/data/suid")
    after = await run(middle, f"rm /data/gone; {CHANGES}")
    committed = await engine.commit(after, "tree:1")

    async def tree(state):
        client, key = engine.containerd, state.snapshot_key
        return await snapshot_tree(client, state.snapshotter, key, containerd.here)

    ours, theirs = await tree(committed), await tree(after)
    assert differences(ours, theirs) == []
    assert ours["data/two"]["linked to"] == "data/one"
    assert ours["data/one"]["mode"] == "0o4755"
    assert ours["data/deep/er/file"]["owner"] == (1000, 100)
    assert "home" not in ours

    manifest, _ = await documents(engine, committed)
    digest = Digest.parse(manifest["layers"][-1]["digest"])
    blob = await engine.containerd.content.read_all(digest, 1 << 20)
    with tarfile.open(fileobj=io.BytesIO(blob), mode="r:gz") as tar:
        members = {one.name: one for one in tar}
    assert {name for name in members if ".wh." in name} == {"data/.wh.old", ".wh.home"}
    assert not [name for name in members if name.endswith("gone")], "never in the base, nor at last"
    kinds = {members[name].type for name in ("data/one", "data/two")}
    assert kinds == {tarfile.REGTYPE, tarfile.LNKTYPE}


@pytest.mark.parametrize("docker", [False, True], ids=["oci", "docker"])
async def test_other_tools_take_it(engine, registry, run, containerd, namespace, tmp_path, docker):
    """Exported by ctr, read by skopeo, unpacked by umoci; also on a base in Docker's form."""
    pushed = made(step_layers(docker=docker), docker=docker)
    base = await engine.pull_image(push(registry, "commit/form", "1" + "d" * docker, pushed))
    after = await run(base, CHANGES)
    committed = await engine.commit(after, "made:1")
    manifest, _ = await documents(engine, committed)
    kinds = [
        one["mediaType"].removeprefix("application/vnd.oci.image.layer.")
        for one in manifest["layers"]
    ]
    assert kinds == ["v1.tar", "v1.tar", "v1.tar+gzip"]

    archive = tmp_path / "exported.tar"
    name = "docker.io/library/made:1"
    containerd.ctr("images", "export", str(archive), name, namespace=namespace)
    umoci = Umoci(tmp_path)
    tool("skopeo", "copy", f"oci-archive:{archive}", f"oci:{umoci.layout}:x")
    # To a registry it reads the manifest through, layer by layer.
    tool("skopeo", "copy", "--dest-tls-verify=false", f"oci:{umoci.layout}:x",
         f"docker://{registry.address}/commit/exported:1")  # fmt: skip
    stat = json.loads(tool("umoci", "stat", "--json", "--image", f"{umoci.layout}:x"))
    assert [bool(one.get("empty_layer")) for one in stat["history"]] == [False] * 3
    theirs = walk(umoci.unpack("x"))
    ours = await snapshot_tree(
        engine.containerd, "overlayfs", committed.snapshot_key, containerd.here
    )
    assert differences(ours, theirs) == []


async def test_the_base_is_gone(engine, base, run, registry, contents):
    after = await run(base, "echo >/new")
    await engine.remove_image(f"{registry.address}/commit/base:1")
    before = await contents()
    with pytest.raises(UnsupportedImage, match="not there any more") as caught:
        await engine.commit(after, "made:1")
    assert "pull it again" in caught.value.hint
    assert await contents() == before
    await engine.remove_state(after)
    with pytest.raises(NotFound, match="the snapshot of this state is not there"):
        await engine.commit(after, "made:1")
    # Pulled again, it goes on where it was.
    pushed = with_members(made(), history=HISTORY, container="abc", author="me")
    base = await engine.pull_image(push(registry, "commit/base", "1", pushed))
    await engine.commit(await run(base, "echo >/new"), "made:1")


async def test_an_image_that_goes_on_from_the_base_lends_its_layers_only(
    engine, base, run, registry
):
    """Neither what it runs nor its history: the state never was in it."""
    more = layer([file("more", "x")])
    config = {**CONFIG, "Env": ["LONGER=1"], "ExposedPorts": {"99/tcp": {}}, "Healthcheck": None}
    longer = with_members(
        image([*step_layers(), more], config=config),
        history=[*HISTORY, {"created_by": "CMD"}, {"created_by": "x", "empty_layer": True}],
    )
    await engine.pull_image(push(registry, "commit/longer", "1", longer))
    after = await run(base, "echo >/new")
    await engine.remove_image(f"{registry.address}/commit/base:1")
    committed = await engine.commit(after, "made:1")
    manifest, found = await documents(engine, committed)
    assert [one["digest"] for one in manifest["layers"][:2]] == [
        one.digest for one in step_layers()
    ]
    assert found["history"][:-1] == HISTORY
    assert "ExposedPorts" not in found["config"]
    assert found["config"]["Env"] == CONFIG["Env"]
    assert committed.healthcheck == base.healthcheck


async def test_of_images_with_the_same_layers_it_is_the_states(engine, registry, run):
    """By the exact version, and after a step by how a process of it is run."""
    pulled = {}
    for port, name in enumerate(("a", "same", "same", "z"), 1):
        config = {"Env": [f"NAME={name}", "PATH=/bin"], "ExposedPorts": {f"{port}/tcp": {}}}
        pushed = image(step_layers(), config=config)
        pulled[port] = await engine.pull_image(push(registry, "commit/same", str(port), pushed))
    changed = {port: await run(pulled[port], "echo >/new") for port in (1, 4)}
    for port, state in [*pulled.items(), *changed.items()]:
        _, config = await documents(engine, await engine.commit(state, "made:1"))
        assert config["config"]["ExposedPorts"] == {f"{port}/tcp": {}}


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        (None, [{"created_by": "unknown"}] * 2),
        (HISTORY[:2], [*HISTORY[:2], {"created_by": "unknown"}]),
        ([*HISTORY, {"created_by": "too much"}], HISTORY),
        ("nonsense", [{"created_by": "unknown"}] * 2),
    ],
    ids=["none", "too little", "too much", "nonsense"],
)
async def test_the_history_has_an_entry_for_each_layer(engine, registry, run, history, expected):
    pushed = with_members(made(), history=history)
    base = await engine.pull_image(push(registry, "commit/history", "1", pushed))
    committed = await engine.commit(await run(base, "echo >/new"), "made:1")
    _, config = await documents(engine, committed)
    assert config["history"][:-1] == expected


async def test_the_process_is_the_states(engine, base, run):
    """What a state was made to say is what the image says; what it does not say is absent."""
    after = await run(base, "echo >/new")
    assert after.healthcheck == base.healthcheck
    check = HealthCheck(command="test -e /new", interval=0.5, timeout=2.0, retries=4)
    changed = msgspec.structs.replace(
        after,
        env=("B=c",),
        working_dir="/tmp",
        user="app",
        entrypoint=("/bin/echo",),
        cmd=(),
        labels=(),
        stop_signal="SIGINT",
        healthcheck=check,
    )
    committed = await engine.commit(changed, "made:1")
    assert msgspec.structs.replace(committed, snapshot_key=after.snapshot_key) == changed
    _, config = await documents(engine, committed)
    assert config["config"] == {
        "Env": ["B=c"],
        "WorkingDir": "/tmp",
        "User": "app",
        "Entrypoint": ["/bin/echo"],
        "StopSignal": "SIGINT",
        "ExposedPorts": {"80/tcp": {}},
        "Healthcheck": {
            "Test": ["CMD-SHELL", "test -e /new"],
            "Interval": 500_000_000,
            "Timeout": 2_000_000_000,
            "StartPeriod": 0,
            "Retries": 4,
        },
    }
    without = await engine.commit(msgspec.structs.replace(after, healthcheck=None), "made:2")
    _, config = await documents(engine, without)
    assert "Healthcheck" not in config["config"]


@pytest.mark.parametrize("variant", ["arm/v6", "arm64/v8"])
async def test_the_variant_stays(engine, registry, variant):
    platform = f"linux/{variant}"
    pushed = made([layer([folder("etc"), symlink("a", "b")])], platform=platform)
    reference = push(registry, "commit/variant", variant.replace("/", "-"), pushed)
    state = await engine.pull_image(reference, platform=platform)
    committed = await engine.commit(state, "made:1")
    assert committed == await engine.inspect("made:1", platform=platform)
    _, config = await documents(engine, committed)
    assert f"{config['architecture']}/{config['variant']}" == variant


async def test_a_digest_is_no_name(engine, base, contents, command):
    before = await contents()
    name = f"made@sha256:{'0' * 64}"
    with pytest.raises(InvalidReference, match="digest"):
        await engine.commit(base, name)
    done = command("run", "--commit", name, "none/such:1", "true")
    assert done.status != 0
    assert "names a digest" in done.err, "it is said before anything else is tried"
    assert await contents() == before


async def test_several_at_once(engine, base, run):
    after = await run(base, "echo >/new")
    found = await asyncio.gather(*(engine.commit(after, f"made:{n}") for n in range(5)))
    assert len({one.snapshot_key for one in found}) == 1


@pytest.mark.timeout(300)
async def test_cancelled_at_every_call(containerd, namespace, base, run, contents, monkeypatch):
    """Wherever it is cancelled, nothing is left of it."""
    after = await run(base, "echo new >/new; rm /data/old")
    before = await contents()
    number = 0
    while True:
        number += 1
        with monkeypatch.context() as patch:
            cancel = CancelAtCall(patch, number)
            async with containerd.connect(namespace=namespace) as engine:
                cancel.task = task = asyncio.create_task(engine.commit(after, "made:1"))
                await asyncio.wait([task])
                cancel.task = None
        if not task.cancelled():
            break
        left = await contents()
        if left.images != before.images:
            # The last calls: the image stood already when the cancellation arrived.
            async with containerd.connect(namespace=namespace) as engine:
                await engine.remove_image("made:1")
            left = await contents()
        assert left == before, f"after call {number}"
    assert number > 25, "the cancellations did not reach far into the commit"
    assert task.result().snapshot_key in (await contents()).snapshots


async def test_cancelled_while_the_layer_is_written(engine, base, contents):
    """containerd is in the middle of it; it gives up and leaves nothing."""
    script = "dd if=/dev/urandom of=/big bs=1M count=24 2>&-"
    after = (await engine.run(base, script, network="none", check=True)).state
    before = await contents()
    task = asyncio.create_task(engine.commit(after, "made:1"))
    async with asyncio.timeout(30):
        while not (await contents()).ingests:
            assert not task.done()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert await contents() == before
    await engine.commit(after, "made:1")


def test_from_the_command_line(registry, command, contents):
    reference = push(registry, "commit/base", "1", made())
    insecure = ("--insecure-registry", registry.address)
    script = "echo from the command line >/new"
    done = command("run", "--commit", "cli/made:1", *insecure, reference, "--", "sh", "-c", script)
    assert (done.status, done.out) == (0, "")
    assert "recorded as docker.io/cli/made:1" in done.err
    assert "cli/made" in command("images").out
    assert command("run", "cli/made:1", "cat", "/new").out == "from the command line\n"
    failed = command("run", "--commit", "cli/made:2", "cli/made:1", "sh", "-c", "exit 3")
    assert failed.status == 3
    assert command("inspect", "cli/made:2").status != 0, "a step that failed is no image"
    left = asyncio.run(contents())
    assert all(name.startswith("sha256:") for name in left.snapshots)
    assert left.leases == []
    assert command("rmi", "cli/made:1").status == 0
    assert command("rmi", reference).status == 0
    assert asyncio.run(contents()) == NOTHING
