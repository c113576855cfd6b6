"""Files into states and out of them, with our containerd in Docker and Podman."""

from __future__ import annotations

import asyncio
import io
import os
import tarfile
from contextlib import ExitStack

import pytest

from serpentine import errors, events
from tests.integration.run.conftest import CONTAINED, Machine, contained
from tests.integration.run.test_files import CONFIG, LAYERS
from tests.support.images import image, push
from tests.support.sources import everything, put, times
from tests.support.trees import differences, walk

pytestmark = [pytest.mark.containerd, pytest.mark.registry, pytest.mark.timeout(240)]


@pytest.fixture(scope="module", params=CONTAINED)
def machine(request, registry, mirror):
    """Our containerd in a container, in each way that it can be reached."""
    with ExitStack() as stack:
        server = stack.enter_context(contained(request, mirror, request.param))
        found = Machine(request.param, server, registry)
        yield found
        asyncio.run(found.clean())


@pytest.fixture
async def engine(machine):
    async with machine.connect() as opened:
        yield opened


@pytest.fixture
async def state(machine, engine):
    """An image without a shell."""
    made = image(LAYERS, config=CONFIG)
    return await engine.pull_image(push(machine.registry, "files/base", "1", made))


@pytest.fixture
def nothing_left(machine, engine):
    async def look(*states):
        c = engine.containerd
        assert await c.leases.all() == []
        assert await c.content.list_statuses() == []
        names = {s.name for s in await c.snapshots(states[0].snapshotter).all()}
        mine = {s.snapshot_key for s in states if s.snapshot_key.startswith("state-")}
        assert {n for n in names if not n.startswith("sha256:")} >= mine
        assert not {n for n in names if n.startswith("step-")}
        assert machine.inside("grep -c serpentine-look /proc/mounts; :").strip() == "0"
        # Of a copy that nobody wants any more, too; its end takes a moment.
        async with asyncio.timeout(30):
            while await asyncio.to_thread(machine.inside, "grep -lx tar /proc/[0-9]*/comm 2>&-; :"):
                pass

    return look


async def test_everything_a_file_system_can_hold(engine, state, tmp_path, nothing_left):
    source = everything(tmp_path / "source")
    after = await engine.copy_in(state, source, "/a/new")
    copied = await engine.copy_out(after, "/a/new", tmp_path / "out")
    assert copied.count == len(walk(source))
    assert not "\n".join(differences(walk(source), walk(tmp_path / "out")))
    assert times(tmp_path / "out") == times(source)
    assert (tmp_path / "out" / "sparse").stat().st_blocks * 512 < 2_000_000
    await nothing_left(after)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/plain", {"": "p"}),
        ("/srv", {"keep": "kept"}),
        ("/srv/.", {"keep": "kept"}),
        ("/data/", {"keep": "kept"}),
        ("/data/keep", {"": "kept"}),
        ("/up/passwd", {"": "root:"}),
        ("/up/", {"passwd": "root:"}),
        ("/hidden", {"above": "above"}),
        ("../full", {"of/things": "x"}),
    ],
)
async def test_where_it_is(engine, state, tmp_path, path, expected):
    await engine.copy_out(state, path, tmp_path / "new")
    for name, text in expected.items():
        assert (tmp_path / "new" / name if name else tmp_path / "new").read_text().startswith(text)
    (tmp_path / "in").mkdir()
    if not path.endswith("/."):
        await engine.copy_out(state, path, tmp_path / "in")
        names = [p.name for p in (tmp_path / "in").iterdir()]
        assert names == [path.rstrip("/").rpartition("/")[2]]


async def test_all_of_an_image(engine, state, tmp_path):
    await engine.copy_out(state, "/", tmp_path / "root")
    names = {p.name for p in (tmp_path / "root").iterdir()}
    assert names == {
        "etc", "srv", "hidden", "full", "data", "up", "out", "round", "plain", "same",
        "job", "top",
    }  # fmt: skip
    assert str((tmp_path / "root" / "up").readlink()) == "../../../etc"
    assert (tmp_path / "root" / "plain").samefile(tmp_path / "root" / "same")
    assert os.getxattr(tmp_path / "root" / "plain", "user.k") == b"v"
    out = io.BytesIO()
    await engine.copy_out(state, "/srv", out)
    with tarfile.open(fileobj=io.BytesIO(out.getvalue())) as archive:
        assert [name.removeprefix("./") for name in archive.getnames()] == ["srv", "srv/keep"]


@pytest.mark.parametrize(
    "path", ["/nothing", "/gone", "/hidden/below", "/plain/", "/plain/x", "/out/", "/round/"]
)
async def test_what_is_not_there(engine, state, tmp_path, nothing_left, path):
    with pytest.raises(errors.PathNotFound, match=f"there is no {path}"):
        await engine.copy_out(state, path, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    await nothing_left(state)


async def test_names_that_a_shell_could_misread(engine, state, tmp_path):
    for name in ("-rf", "a b", "$(x)", "'", '"', "*", "new\nline", "\\", "{a,b}", "grün"):
        put(tmp_path / "s" / name / name, name)
    after = await engine.copy_in(state, tmp_path / "s", "/new")
    for number, path in enumerate((tmp_path / "s").iterdir()):
        for slash in ("", "/"):
            out = tmp_path / f"out{number}{len(slash)}"
            out.mkdir()
            await engine.copy_out(after, f"/new/{path.name}{slash}", out)
            assert (out / path.name / path.name).read_text() == path.name


async def test_owners_by_name(engine, state, tmp_path):
    after = await engine.copy_in(state, put(tmp_path / "f"), "/", owner="bob:staff")
    await engine.copy_out(after, "/f", tmp_path / "g")
    assert ((tmp_path / "g").stat().st_uid, (tmp_path / "g").stat().st_gid) == (1001, 50)


async def test_cancelled(engine, state, tmp_path, nothing_left):
    source = tmp_path / "in"
    for number in range(20):
        put(source / str(number), os.urandom(3_000_000))
    after = await engine.copy_in(state, source, "/new")
    some = asyncio.Event()
    loop = asyncio.get_running_loop()

    class Slow(io.RawIOBase):
        def write(self, data):
            loop.call_soon_threadsafe(some.set)
            return len(data)

    seen = []
    task = asyncio.create_task(engine.copy_out(after, "/new", Slow(), on_event=seen.append))
    await some.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [e.complete for e in seen if isinstance(e, events.CopyFinished)] == [False]
    await nothing_left(after)
