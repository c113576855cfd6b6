"""Files into states and out of them, with real containerds."""

from __future__ import annotations

import asyncio
import errno
import filecmp
import io
import os
import random
import signal
import socket
import stat
import subprocess
import sys
import tarfile
import threading
import time
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from msgspec.structs import replace

from serpentine import errors, events
from serpentine.containerd import Containerd
from serpentine.run import applying, files, unpacking
from serpentine.run import mounted as mounted_module
from tests.support.contents import Contents
from tests.support.images import (
    Entry,
    file,
    folder,
    hardlink,
    image,
    layer,
    make_tar,
    opaque,
    push,
    symlink,
    whiteout,
)
from tests.support.sources import everything, put, times
from tests.support.trees import differences, mounted, walk

pytestmark = [pytest.mark.containerd, pytest.mark.registry]

LAYERS = [
    layer(
        [
            folder("etc"),
            file("etc/passwd", "root:x:0:0::/root:/x\nbob:x:1001:1002::/home/bob:/x\n"),
            file("etc/group", "root:x:0:\nstaff:x:50:\n"),
            folder("srv", 0o750),
            file("srv/keep", "kept"),
            folder("gone"),
            file("gone/a", "a"),
            folder("hidden"),
            file("hidden/below", "below"),
            folder("full"),
            folder("full/of"),
            file("full/of/things", "x"),
        ]
    ),
    layer(
        [
            symlink("data", "/srv"),
            symlink("up", "../../../etc"),
            symlink("out", "/tmp/../../../../etc/passwd"),
            symlink("round", "round"),
            whiteout("gone"),
            folder("hidden"),
            opaque("hidden"),
            file("hidden/above", "above", mtime=5),
            file("plain", "p", mode=0o640, uid=3, gid=4, xattrs={"user.k": "v"}),
            hardlink("same", "plain"),
        ]
    ),
    layer([folder("job"), folder("job/dir"), file("top", "t")]),
]
# Archives by chance, for each of eight seeds.
SAMPLES = 6
CONFIG = {"Env": ["A=1"], "WorkingDir": "/job", "Cmd": ["/x"]}


@pytest.fixture
def base(registry):
    """An image without a shell: three layers, links that lead out of it, removed things."""
    return push(registry, "files/base", "1", image(LAYERS, config=CONFIG))


@pytest.fixture
async def state(engine, base):
    """That image's state."""
    return await engine.pull_image(base)


@pytest.fixture
def at(engine):
    """Return a context with a state's file system as a directory."""

    @asynccontextmanager
    async def open_state(state):
        async with mounted(engine.containerd, state.snapshotter, state.snapshot_key) as root:
            yield root

    return open_state


async def only(contents, engine, *states) -> None:
    """Nothing but the image and these states is there."""
    now: Contents = await contents(states[0].snapshotter if states else "overlayfs")
    assert (now.ingests, now.leases) == ([], [])
    base = {s for s in now.snapshots if s.startswith("sha256:")}
    assert set(now.snapshots) - base == {s.snapshot_key for s in states} - base
    assert all(
        "gc.ref" in str(b.labels) or "distribution.source" in str(b.labels)
        for b in await engine.containerd.content.all()
    )


@pytest.fixture(params=["straight", "diff service"])
async def way_in(request, engine, monkeypatch):
    """Each way by which files go in."""
    context = await engine._steps(events.ignore)
    unpack = type(context.site).unpack

    async def must(self, *arguments, **more):
        found = await unpack(self, *arguments, **more)
        assert found is not None
        return found

    async def cannot(*_, **__):
        return None

    way = must if request.param == "straight" else cannot
    monkeypatch.setattr(type(context.site), "unpack", way)
    return request.param


@pytest.mark.usefixtures("way_in")
class TestIn:
    async def test_everything_a_file_system_can_hold(self, engine, state, at, tmp_path, contents):
        source = everything(tmp_path / "source")
        after = await engine.copy_in(state, source, "/new")
        async with at(after) as root:
            assert not "\n".join(differences(walk(source), walk(root / "new")))
            assert times(root / "new") == times(source)
        assert (after.env, after.working_dir, after.cmd) == (("A=1",), "/job", ("/x",))
        assert after.platform == state.platform
        await only(contents, engine, after)

    async def test_a_state_can_be_removed(self, engine, state, tmp_path, contents):
        after = await engine.copy_in(state, put(tmp_path / "f"), "/")
        await engine.remove_state(after)
        await only(contents, engine)

    async def test_the_state_before_is_as_it_was(self, engine, state, at, tmp_path):
        async with at(state) as root:
            before = walk(root)
        await engine.copy_in(state, put(tmp_path / "plain", "other"), "/")
        async with at(state) as root:
            assert walk(root) == before

    @pytest.mark.parametrize(
        ("source", "destination", "expected"),
        [
            ("f", "/", {"f"}),
            ("f", "/srv", {"srv/f"}),
            ("f", "/srv/", {"srv/f"}),
            ("f", "/srv/g", {"srv/g"}),
            ("f", "/a/b/c", {"a/b/c"}),
            ("f", "/a/b/c/", {"a/b/c/f"}),
            ("f", "dir", {"job/dir/f"}),
            ("f", "../srv", {"srv/f"}),
            ("f", ".", {"job/f"}),
            ("f", "/top", {"top"}),
            ("d", "/", {"d/in/x", "d/y"}),
            ("d", "/srv", {"srv/d/in/x", "srv/d/y"}),
            ("d", "/d2", {"d2/in/x", "d2/y"}),
            ("d/", "/d2/", {"d2/in/x", "d2/y"}),
            ("d/.", "/", {"in/x", "y"}),
            ("d/.", "/srv", {"srv/in/x", "srv/y"}),
            ("d/.", "/d2", {"d2/in/x", "d2/y"}),
            # Links are followed inside the image, wherever they say that they lead.
            ("f", "/data", {"srv/f"}),
            ("d", "/data/", {"srv/d/in/x", "srv/d/y"}),
            ("d/.", "/data", {"srv/in/x", "srv/y"}),
            ("f", "/up", {"etc/f"}),
            ("f", "/up/more/g", {"etc/more/g"}),
            ("f", "/data/../g", {"g"}),
            ("link", "/srv", {"srv/link"}),
            ("way/y", "/srv", {"srv/y"}),
        ],
    )
    async def test_where_it_goes(self, engine, state, at, tmp_path, source, destination, expected):
        put(tmp_path / "f", "f")
        put(tmp_path / "d" / "in" / "x", "x")
        put(tmp_path / "d" / "y", "y")
        (tmp_path / "link").symlink_to("/etc")
        (tmp_path / "way").symlink_to("d")
        async with at(state) as root:
            before = walk(root)
        after = await engine.copy_in(state, f"{tmp_path}/{source}", destination)
        async with at(after) as root:
            now = walk(root)
        changed = {
            name for name in now if now[name] != before.get(name) and now[name]["type"] != "d"
        }
        assert changed == expected
        assert not before.keys() - now.keys()
        for name, entry in now.items():
            if name not in before and entry["type"] == "d" and not name.endswith(("d", "in", "d2")):
                assert (entry["mode"], entry["owner"]) == ("0o755", (0, 0)), name

    async def test_the_same_where_nobody_may_look(self, engine, state, at, tmp_path, monkeypatch):
        """As another user than root, we ask containerd what is at the destination."""
        context = await engine._steps(events.ignore)

        async def cannot(mounts, paths):
            return None

        monkeypatch.setattr(context.site, "look", cannot)
        source = put(tmp_path / "f", "f")
        for destination, expected in [
            ("/data", "srv/f"),
            ("/up/x/", "etc/x/f"),
            ("/top", "top"),
            ("/new", "new"),
            ("/", "f"),
        ]:
            after = await engine.copy_in(state, source, destination)
            async with at(after) as root:
                assert (root / expected).read_text() == "f"
                assert not list(root.glob(".serp*"))
                assert (root / "data").is_symlink()
        with pytest.raises(errors.CopyError, match="no directory"):
            await engine.copy_in(state, tmp_path, "/top")
        with pytest.raises(errors.CopyError):
            await engine.copy_in(state, source, "/top/below")
        with pytest.raises(errors.UserNotFound, match="not ours to read"):
            await engine.copy_in(state, source, "/", owner="bob")
        await engine.copy_in(state, source, "/", owner="7:8")

    async def test_several(self, engine, state, at, tmp_path):
        one, two = put(tmp_path / "one", "1"), put(tmp_path / "x" / "two", "2")
        after = await engine.copy_in(state, [one, two.parent, f"{two.parent}/."], "/new")
        async with at(after) as root:
            names = {str(p.relative_to(root)) for p in (root / "new").rglob("*")}
        assert names == {"new/one", "new/x", "new/x/two", "new/two"}

    async def test_the_native_snapshotter(
        self, containerd, namespace, base, at, tmp_path, contents
    ):
        """Nothing is mounted there: an active snapshot is a directory of its own."""
        source = everything(tmp_path / "source")
        async with containerd.connect(namespace=namespace, snapshotter="native") as engine:
            state = await engine.pull_image(base)
            after = await engine.copy_in(state, source, "/data/new")
            async with at(after) as root:
                assert not "\n".join(differences(walk(source), walk(root / "srv" / "new")))
                assert (root / "srv" / "keep").exists()
            async with at(state) as root:
                assert not (root / "srv" / "new").exists()
            await only(contents, engine, after)

    async def test_an_image_without_layers(self, engine, registry, at, tmp_path):
        reference = push(registry, "files/empty", "1", image([], config={}))
        state = await engine.pull_image(reference)
        after = await engine.copy_in(state, put(tmp_path / "f", "f"), "/a/")
        async with at(after) as root:
            assert {str(p.relative_to(root)) for p in root.rglob("*")} == {"a", "a/f"}

    async def test_in_a_chain(self, engine, state, at, tmp_path, contents):
        states = [state]
        for number in range(3):
            source = put(tmp_path / f"f{number}", str(number))
            states.append(await engine.copy_in(states[-1], source, "/srv"))
        async with at(states[-1]) as root:
            assert sorted(p.name for p in (root / "srv").iterdir()) == ["f0", "f1", "f2", "keep"]
        await only(contents, engine, *states[1:])

    @pytest.mark.parametrize(
        ("owner", "expected"),
        [
            ("5", (5, 5)),
            ("5:6", (5, 6)),
            ("bob", (1001, 1002)),
            ("bob:staff", (1001, 50)),
            ("9:staff", (9, 50)),
        ],
    )
    async def test_owner(self, engine, state, at, tmp_path, owner, expected):
        put(tmp_path / "d" / "f", "f")
        after = await engine.copy_in(state, tmp_path / "d", "/new/", owner=owner)
        async with at(after) as root:
            for path in (root / "new", root / "new" / "f"):
                assert (path.stat().st_uid, path.stat().st_gid) == expected

    async def test_dockerignore(self, engine, state, at, tmp_path):
        for name in ("a.log", "keep.log", "d/a.log", "d/b", "node/x/y", "node/keep"):
            put(tmp_path / "s" / name, name)
        rules = put(tmp_path / "rules", "# no logs\n*.log\n!keep.log\nnode\n!node/keep\n")
        after = await engine.copy_in(
            state, tmp_path / "s", "/new", ignore_file=rules, ignore=["d/b"]
        )
        async with at(after) as root:
            found = {str(p.relative_to(root / "new")) for p in (root / "new").rglob("*")}
        assert found == {"keep.log", "d", "d/a.log", "node", "node/keep"}

    async def test_gitignore_as_git_has_it(self, engine, state, at, tmp_path):
        repository = tmp_path / "r"
        for name in (
            "a.o", "src/a.o", "src/keep.o", "src/b.c", "src/build/x", "build/y", "doc/build",
            "src/deep/z.tmp", "src/deep/z.txt", "src/deep/only/this", "src/deep/only/that",
            "secret", "sub/secret",
        ):  # fmt: skip
            put(repository / name, name)
        put(repository / ".gitignore", "*.o\nbuild/\n/secret\n")
        put(repository / "src" / ".gitignore", "!keep.o\n*.tmp\n")
        put(repository / "src" / "deep" / ".gitignore", "only/*\n!only/this\n!z.tmp\n")
        git = ["git", "-C", str(repository), "-c", "init.defaultBranch=main"]
        subprocess.run([*git, "init", "-q"], check=True)
        put(repository / ".git" / "info" / "exclude", "sub\n")
        listed = subprocess.run(
            [*git, "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True
        ).stdout.split()
        after = await engine.copy_in(state, repository, "/new", gitignore=True)
        async with at(after) as root:
            found = {
                str(p.relative_to(root / "new")) for p in (root / "new").rglob("*") if p.is_file()
            }
        assert found == set(listed)
        # A directory of it knows what is above.
        after = await engine.copy_in(state, repository / "src", "/new", gitignore=True)
        async with at(after) as root:
            found = {
                f"src/{p.relative_to(root / 'new')}"
                for p in (root / "new").rglob("*")
                if p.is_file()
            }
        assert found == {name for name in listed if name.startswith("src/")}

    async def test_a_socket_is_left_out_with_a_notice(self, engine, state, at, tmp_path):
        seen = []
        put(tmp_path / "d" / "f", "f")
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(tmp_path / "d" / "s"))
            after = await engine.copy_in(state, tmp_path / "d", "/new", on_event=seen.append)
        async with at(after) as root:
            assert [p.name for p in (root / "new").iterdir()] == ["f"]
        assert [e.text for e in seen if isinstance(e, events.CopyNotice)] == [
            f"{tmp_path}/d/s is a socket and was left out"
        ]
        assert isinstance(seen[-1], events.CopyFinished)
        assert seen[-1].complete

    async def test_what_containerd_does_not_take_is_told(self, engine, state, tmp_path):
        seen = []
        os.setxattr(put(tmp_path / "d" / "f"), "trusted.mark", b"x")
        put(tmp_path / "d" / "old", time=-1_500_000_000)
        await engine.copy_in(state, tmp_path / "d", "/new", on_event=seen.append)
        assert [e.text for e in seen if isinstance(e, events.CopyNotice)] == [
            f"the attribute trusted.mark of {tmp_path}/d/f was left out",
            f"{tmp_path}/d/old is from before 1970, which no layer can say",
        ]

    async def test_an_archive(self, engine, state, at, tmp_path):
        source = everything(tmp_path / "source")
        done = subprocess.run(
            ["tar", "--xattrs", "--xattrs-include=*", "--sparse", "-cz", "-C", source, "."],
            capture_output=True,
            check=True,
        )
        after = await engine.copy_in(state, io.BytesIO(done.stdout), "/new")
        async with at(after) as root:
            assert not "\n".join(differences(walk(source), walk(root / "new")))
            assert times(root / "new") == times(source)


@pytest.mark.usefixtures("way_in")
class TestInRefuses:
    @pytest.mark.parametrize("name", [".wh.plain", ".wh..wh..opq", "d/.wh.x"])
    async def test_what_would_remove_something(self, engine, state, tmp_path, contents, name):
        put(tmp_path / "s" / name, "x")
        with pytest.raises(errors.CopyError, match="means that something is removed"):
            await engine.copy_in(state, tmp_path / "s", "/new")
        archive = io.BytesIO(make_tar([file(name)]))
        with pytest.raises(errors.CopyError, match="means that something is removed"):
            await engine.copy_in(state, archive, "/")
        with pytest.raises(errors.CopyError, match="means that something is removed"):
            await engine.copy_in(state, put(tmp_path / "f"), "/srv/.wh.keep")
        await only(contents, engine)

    async def test_a_device_that_is_a_whiteout(self, engine, state, tmp_path):
        os.mknod(tmp_path / "passwd", 0o020600, 0)
        with pytest.raises(errors.CopyError, match="means that something is removed"):
            await engine.copy_in(state, tmp_path / "passwd", "/etc")

    async def test_attributes_of_overlays_stay_here(self, engine, state, at, tmp_path):
        (tmp_path / "srv").mkdir()
        os.setxattr(tmp_path / "srv", "trusted.overlay.opaque", b"y")
        after = await engine.copy_in(state, f"{tmp_path}/.", "/")
        async with at(after) as root:
            assert (root / "srv" / "keep").exists()

    @pytest.mark.parametrize(
        ("source", "destination", "message"),
        [
            ("missing", "/", "there is no .*missing"),
            ("f/x", "/", "there is no"),
            ("f/.", "/", "there is no"),
            ("", "/", "there is no"),
            ("d", "/top", "/top is there and is no directory"),
            ("d/.", "/top", "is no directory"),
            ("f", "/top/", "is no directory"),
            ("f", "", "the destination has no name"),
            ("f", "/top/below", r"could not|no directory|/top/below .*: Not a directory"),
        ],
    )
    async def test_what_cannot_be(
        self, engine, state, tmp_path, contents, source, destination, message
    ):
        put(tmp_path / "f")
        put(tmp_path / "d" / "x")
        given = f"{tmp_path}/{source}" if source else ""
        with pytest.raises(errors.CopyError, match=message) as caught:
            await engine.copy_in(state, given, destination)
        assert "\n" not in str(caught.value)
        await only(contents, engine)

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"no archive",
            bytes(100),
            b"x" * 4096,
            make_tar([file("a", b"x" * 5000)])[:1024],
            make_tar([file("a", b"x" * 5000), file("b", b"y" * 5000)])[: 512 * 11],
            make_tar([file("a", b"x")])[:700],
            make_tar([file("../a", b"x")]),
            make_tar([file("a/../../b", b"x")]),
            make_tar([hardlink("a", "../../etc/passwd")]),
        ],
    )
    async def test_a_bad_archive(self, engine, state, contents, data):
        with pytest.raises(errors.CopyError, match=r"tar archive|leads out"):
            await engine.copy_in(state, io.BytesIO(data), "/new")
        await only(contents, engine)

    async def test_a_user_that_is_not_there(self, engine, state, tmp_path, contents):
        with pytest.raises(errors.UserNotFound, match="nobody-here"):
            await engine.copy_in(state, put(tmp_path / "f"), "/", owner="nobody-here")
        await only(contents, engine)

    async def test_a_file_that_grows_or_shrinks(
        self, engine, state, tmp_path, contents, monkeypatch
    ):
        source = put(tmp_path / "f", b"x" * 3_000_000)
        ways = [
            lambda: os.truncate(source, 1_500_000),
            lambda: os.truncate(source, 5_000_000),
            lambda: os.truncate(source, 0),
            lambda: os.utime(source, ns=(1, 1)),
        ]
        entries = files.entries
        for change in ways:
            put(source, b"x" * 3_000_000)

            def changing(*arguments, change=change, **more):
                items = entries(*arguments, **more)
                for number, item in enumerate(items):
                    if number == 2:
                        change()
                    yield item

            monkeypatch.setattr(files, "entries", changing)
            with pytest.raises(errors.FileChanged, match="changed while it was copied"):
                await engine.copy_in(state, source, "/")
        await only(contents, engine)


class TestInEnds:
    @pytest.mark.parametrize("way_in", ["diff service"], indirect=True)
    @pytest.mark.parametrize("place", ["first block", "last block", "apply", "commit"])
    async def test_cancelled(self, engine, state, way_in, tmp_path, contents, monkeypatch, place):
        source = put(tmp_path / "f", os.urandom(5_000_000))
        reached = asyncio.Event()
        hold = asyncio.Event()
        c = engine.containerd

        async def stop():
            reached.set()
            await hold.wait()

        if place.endswith("block"):
            write = files.ContentWriter.write
            wanted = 1 if place.startswith("first") else 4
            seen = 0

            async def slow(self, data):
                nonlocal seen
                seen += 1
                await write(self, data)
                if seen == wanted:
                    await stop()

            monkeypatch.setattr(files.ContentWriter, "write", slow)
        elif place == "apply":
            apply = type(c.diff).apply

            async def applied(self, *arguments, **more):
                await apply(self, *arguments, **more)
                await stop()

            monkeypatch.setattr(type(c.diff), "apply", applied)
        else:
            commit = type(c.snapshots("overlayfs")).commit

            async def committed(self, *arguments, **more):
                await commit(self, *arguments, **more)
                await stop()

            monkeypatch.setattr(type(c.snapshots("overlayfs")), "commit", committed)
        task = asyncio.create_task(engine.copy_in(state, source, "/"))
        await reached.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await only(contents, engine)

    @pytest.mark.parametrize("place", ["mount", "first block", "last block", "commit"])
    async def test_cancelled_on_the_straight_way(
        self, engine, state, tmp_path, contents, monkeypatch, place
    ):
        """Whatever its thread does at that moment, it ends before the snapshot goes."""
        put(tmp_path / "d" / "a", os.urandom(9_000_000))
        put(tmp_path / "d" / "b", os.urandom(9_000_000))
        context = await engine._steps(events.ignore)
        loop, reached, go = asyncio.get_running_loop(), asyncio.Event(), threading.Event()
        seen, open_files = [], len(list(Path("/proc/self/fd").iterdir()))

        def stop(name):
            seen.append(name)
            loop.call_soon_threadsafe(reached.set)
            go.wait(10)

        if place == "mount":
            open_active = mounted_module.open_active

            def mounting(*arguments):
                root = open_active(*arguments)
                stop("mounted")
                return root

            monkeypatch.setattr(mounted_module, "open_active", mounting)
        elif place.endswith("block"):
            write, wanted = applying.write_at, 1 if place.startswith("first") else 18

            def writing(*arguments):
                write(*arguments)
                seen.append("written")
                if len(seen) == wanted:
                    stop("stopped")

            monkeypatch.setattr(applying, "write_at", writing)
        else:
            commit = type(context.snapshots).commit

            async def committed(self, *arguments, **more):
                await commit(self, *arguments, **more)
                reached.set()
                await asyncio.Event().wait()

            monkeypatch.setattr(type(context.snapshots), "commit", committed)
        task = asyncio.create_task(engine.copy_in(state, tmp_path / "d", "/new"))
        await reached.wait()
        task.cancel()
        await asyncio.sleep(0)
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        if place == "first block":
            # What was under way was finished, and no more begun.
            assert len(seen) < 8
        assert len(list(Path("/proc/self/fd").iterdir())) == open_files
        await only(contents, engine)

    async def test_nothing_stays_mounted_or_open(self, containerd, engine, state, tmp_path):
        folder = str(containerd.folder)
        source = put(tmp_path / "f", "f")
        mounts = Path("/proc/self/mounts").read_text().count(folder)
        open_files = len(list(Path("/proc/self/fd").iterdir()))
        here = Path.cwd()
        for _ in range(5):
            await engine.copy_in(state, source, "/srv")
        with pytest.raises(errors.CopyError):
            await engine.copy_in(state, source, "/top/below")
        assert Path("/proc/self/mounts").read_text().count(folder) == mounts
        assert len(list(Path("/proc/self/fd").iterdir())) == open_files
        assert Path.cwd() == here

    def test_a_client_that_is_killed(self, containerd, namespace, command, base, tmp_path):
        """Its mount goes with it, whatever it was at."""
        script = (
            "import asyncio, sys, time, serpentine\n"
            "from serpentine.run import applying\n"
            "def forever(*_):\n"
            "    print('here', flush=True)\n"
            "    time.sleep(60)\n"
            "applying.write_at = forever\n"
            "async def main():\n"
            "    async with serpentine.connect() as engine:\n"
            "        state = await engine.pull_image(sys.argv[1])\n"
            "        await engine.copy_in(state, sys.argv[2], '/new')\n"
            "asyncio.run(main())\n"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", script, base, str(put(tmp_path / "f", "f"))],
            stdout=subprocess.PIPE,
            env={**os.environ, **containerd.environ, "CONTAINERD_NAMESPACE": namespace},
        )

        async def active():
            async with Containerd(containerd.endpoint, namespace=namespace) as client:
                snapshots = client.snapshots("overlayfs")
                (name,) = [s.name for s in await snapshots.all() if s.name.startswith("step-")]
                (mount,) = await snapshots.mounts(name)
                return mount.options

        def is_busy() -> bool:
            """With an index, the kernel refuses a directory that is part of another mount."""
            target = tmp_path / "target"
            target.mkdir(exist_ok=True)
            given = ",".join([*(o for o in options if o != "index=off"), "index=on"])
            try:
                mounted_module._mount("overlay", str(target), "overlay", 0, given)
            except OSError as error:
                return error.errno == errno.EBUSY
            subprocess.run(["umount", target], check=True)
            return False

        try:
            assert process.stdout.readline() == b"here\n"
            options = asyncio.run(active())
            assert is_busy()
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
        assert not is_busy()
        # The next client sweeps.
        done = command("cp", str(put(tmp_path / "g", "g")), f"{base}:/g")
        assert done.status == 0, done.err

        async def leases():
            async with Containerd(containerd.endpoint, namespace=namespace) as client:
                return await client.leases.all()

        assert asyncio.run(leases()) == []

    @pytest.mark.parametrize("way_in", ["diff service"], indirect=True)
    async def test_cancelled_while_containerd_unpacks(
        self, engine, state, way_in, tmp_path, contents
    ):
        (tmp_path / "d").mkdir()
        for number in range(3000):
            (tmp_path / "d" / str(number)).write_bytes(b"x")
        seen = asyncio.Event()
        apply = type(engine.containerd.diff).apply

        async def told(self, *arguments, **more):
            seen.set()
            return await apply(self, *arguments, **more)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(engine.containerd.diff), "apply", told)
            task = asyncio.create_task(engine.copy_in(state, tmp_path / "d", "/new"))
            await seen.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await only(contents, engine)

    @pytest.mark.parametrize("way_in", ["diff service"], indirect=True)
    async def test_no_space(self, engine, state, way_in, tmp_path, contents, monkeypatch):
        """containerd's own words for a full disk, from each of the two places that fill it."""
        source = put(tmp_path / "f", b"x" * 2_000_000)
        full = errors.NoSpace("containerd: write: no space left on device")

        async def fail(*_, **__):
            raise full

        for kind, name in ((files.ContentWriter, "write"), (type(engine.containerd.diff), "apply")):
            with monkeypatch.context() as patch:
                patch.setattr(kind, name, fail)
                with pytest.raises(errors.NoSpace):
                    await engine.copy_in(state, source, "/")
            await only(contents, engine)

    @pytest.mark.parametrize(
        ("number", "kind", "said"),
        [
            (errno.ENOSPC, errors.NoSpace, "No space left"),
            (errno.EDQUOT, errors.CopyError, "quota"),
            (errno.EROFS, errors.CopyError, "Read-only"),
            (errno.EIO, errors.CopyError, "/new in the state"),
        ],
    )
    async def test_a_disk_that_fails(
        self, engine, state, tmp_path, contents, monkeypatch, number, kind, said
    ):
        def fail(*_):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(applying, "write_at", fail)
        with pytest.raises(kind, match=said):
            await engine.copy_in(state, put(tmp_path / "f", "f"), "/new")
        await only(contents, engine)

    async def test_a_containerd_with_another_file_system(
        self, engine, state, at, tmp_path, monkeypatch
    ):
        """What is there by that path is somebody else's, and older: it is left alone."""
        context = await engine._steps(events.ignore)
        others, seen = tmp_path / "others", []
        others.mkdir()
        await asyncio.sleep(1.1)
        unpack = type(context.site).unpack

        async def elsewhere(self, mounts, items, **more):
            (mount,) = mounts
            options = [
                f"upperdir={others}" if o.startswith("upperdir=") else o for o in mount.options
            ]
            seen.append(await unpack(self, [replace(mount, options=options)], items, **more))
            return seen[-1]

        monkeypatch.setattr(type(context.site), "unpack", elsewhere)
        after = await engine.copy_in(state, put(tmp_path / "f", "f"), "/new")
        assert seen == [None]
        assert list(others.iterdir()) == []
        async with at(after) as root:
            assert (root / "new").read_text() == "f"

    async def test_many_at_once(self, engine, state, way_in, tmp_path, contents):
        """The same files, too, and in the same place."""
        source = put(tmp_path / "same", os.urandom(300_000))
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(engine.copy_in(state, source, f"/to/{number % 3}"))
                for number in range(24)
            ]
        states = [task.result() for task in tasks]
        assert len({s.snapshot_key for s in states}) == 24
        await only(contents, engine, *states)


# --- both ways in, side by side ------------------------------------------------------------------

HOSTILE = [
    layer(
        [
            folder("etc"),
            file("etc/passwd", "image"),
            folder("srv", 0o2750, uid=5, gid=6),
            folder("srv/deep"),
            file("srv/deep/f", "below", xattrs={"user.k": "v"}),
            symlink("data", "/srv"),
            symlink("up", "../../../../../../etc"),
            symlink("here", "data/deep"),
            symlink("proc", "/proc/self/root/tmp"),
            symlink("fd", "/proc/self/fd"),
            symlink("host", "/tmp/../../../../tmp"),
            symlink("loop", "loop"),
            symlink("ping", "pong"),
            symlink("pong", "ping"),
            symlink("nowhere", "/made/up"),
            symlink("beyond", "missing/../srv"),
        ]
    ),
    layer(
        [
            folder("full", 0o1777),
            folder("full/of"),
            file("full/of/things", "x"),
            symlink("full/out", "/srv"),
            file("plain", "p", mode=0o4755, uid=3, gid=4),
            hardlink("same", "plain"),
        ]
    ),
]
CAPABILITY = bytes.fromhex("0100000200200000000000000000000000000000").decode("latin-1")
NAMES = [
    "a", "b", "srv", "srv/deep", "srv/deep/f", "data", "data/x", "up/passwd", "up/x", "here/f",
    "here/g/h", "proc/x", "fd/x", "host/x", "loop/x", "ping/x", "nowhere/x", "beyond/x", "full",
    "full/of", "full/out/y", "full/of/things", "plain", "same", "plain/x", "a/b", "a/b/c",
    "b/../b", "new/new/new", "loop", ".",
]  # fmt: skip
TARGETS = [
    "/srv",
    "a",
    "../a",
    "/",
    ".",
    "..",
    "b",
    "/nowhere/at/all",
    "../../../../etc",
    "full/of",
]


def entries_by_chance(chance: random.Random) -> list[Entry]:
    """Make up an archive: what it has may lie in each other's way, or behind an image's links."""
    made = []
    for number in range(chance.randrange(1, 9)):
        name = chance.choice(NAMES)
        more = {
            "uid": chance.choice([0, 7, 70_000, 3_000_000]),
            "gid": chance.choice([0, 8]),
            "mtime": chance.choice([0, 5, 1_600_000_000.123456789, -3, 2**33, 2**34, 2**40]),
        }
        mode = chance.choice([0o644, 0o600, 0o4755, 0o2755, 0o1777, 0, 0o7777])
        xattrs = chance.choice(
            [{}, {}, {"user.k": f"{number}"}, {"user.empty": ""}, {"trusted.x": "1"}]
        )
        match chance.randrange(9):
            case 0 | 1 | 2:
                # A file's capabilities are lost when its owner changes after they were set.
                some = chance.choice([xattrs, xattrs, {"security.capability": CAPABILITY}])
                data = chance.choice([b"", b"data", bytes(200_000) + b"x" + bytes(70_000)])
                made.append(file(name, data, mode=mode, xattrs=some, **more))
            case 3 | 4:
                made.append(folder(name, mode, xattrs=xattrs, **more))
            case 5:
                made.append(symlink(name, chance.choice(TARGETS), xattrs=xattrs, **more))
            case 6:
                made.append(hardlink(name, chance.choice(NAMES), mode=mode, **more))
            case 7:
                made.append(Entry(name, kind=tarfile.FIFOTYPE, mode=mode, xattrs=xattrs, **more))
            case 8:
                kind = chance.choice([tarfile.CHRTYPE, tarfile.BLKTYPE])
                device = (chance.randrange(1, 300), chance.randrange(70_000))
                made.append(Entry(name, kind=kind, mode=mode, device=device, **more))
    return made


class TestBothWays:
    """What comes of a copy does not tell which way it went."""

    @pytest.fixture
    async def both(self, engine, at, registry, monkeypatch):
        """Return a function that copies in both ways and returns what came of each."""
        context = await engine._steps(events.ignore)
        reference = push(registry, "files/hostile", "1", image(HOSTILE, config={}))
        state = await engine.pull_image(reference)
        kind = type(context.site)
        straight, used = kind.unpack, []

        async def noted(self, *arguments, **more):
            found = await straight(self, *arguments, **more)
            used.append(found is not None)
            return found

        async def cannot(*_, **__):
            return None

        async def outcome(source, destination, owner):
            try:
                after = await engine.copy_in(state, source, destination, owner=owner)
            except errors.CopyError as error:
                return type(error)
            try:
                async with at(after) as root:
                    return await asyncio.to_thread(described, root, began)
            finally:
                await engine.remove_state(after)

        async def copy(make, destination, owner=None):
            monkeypatch.setattr(kind, "unpack", noted)
            ours = await outcome(make(), destination, owner)
            monkeypatch.setattr(kind, "unpack", cannot)
            return ours, await outcome(make(), destination, owner)

        # All times that were given are older than that, or far away.
        began = time.time_ns() - 10**12
        yield copy
        assert all(used)

    @pytest.mark.parametrize(
        "destination", ["/new", "/", "/data", "/here/more", "/nowhere/x/", "/srv/", "/full"]
    )
    async def test_files(self, both, tmp_path, destination):
        source = everything(tmp_path / "source")
        os.mknod(source / "far", stat.S_IFCHR | 0o600, os.makedev(300, 70_000))
        os.setxattr(source / "capable", "user.empty", b"")
        os.link(source / "capable", source / "capable-too")
        os.link(source / "dangling", source / "dangling-too", follow_symlinks=False)
        (source / "full").symlink_to("/srv")
        put(source / "srv", "in the place of a directory")
        put(source / "data" / "in the place of a link", "x", time=-5)
        put(source / "late", "2262", time=(1 << 63) - 1)
        ours, theirs = await both(lambda: f"{source}/.", destination)
        assert isinstance(ours, dict)
        assert ours == theirs
        ours, theirs = await both(lambda: source, destination, "7:8")
        assert isinstance(ours, dict)
        assert ours == theirs

    @pytest.mark.parametrize("seed", range(8))
    async def test_archives_by_chance(self, both, seed):
        refused = []
        for number in range(SAMPLES):
            chance = random.Random(f"{seed}-{number}")
            made = entries_by_chance(chance)
            destination = chance.choice(["/", "/", "/data", "/new", "/here"])
            before = set(Path("/tmp").iterdir())
            ours, theirs = await both(lambda made=made: io.BytesIO(make_tar(made)), destination)
            assert ours == theirs, (made, destination)
            refused.append(ours)
            assert not {p.name for p in set(Path("/tmp").iterdir()) - before} & {"x", "passwd"}
        # Both happen.
        assert any(isinstance(one, dict) for one in refused)
        assert any(one is errors.CopyError for one in refused)


def described(root: Path, began: int) -> dict[str, dict[str, object]]:
    """Return all that is known of what is below a directory, and of itself."""
    found = walk(root)
    for name, entry in found.items():
        status = (root / name).lstat()
        # Those that nobody gave a time have one of their own.
        is_given = status.st_mtime_ns < began or status.st_mtime > 4_000_000_000
        entry["ns"] = status.st_mtime_ns if is_given else "now"
        entry["size"] = status.st_size if entry["type"] == "-" else None
        entry["links"] = status.st_nlink if entry["type"] != "d" else None
        entry["group"] = sorted(
            other for other in found
            if entry["type"] != "d" and (root / other).lstat().st_ino == status.st_ino
        ) if status.st_nlink > 1 else []  # fmt: skip
    return found


@pytest.fixture(params=["we look", "containerd archives"])
async def way(request, engine, monkeypatch):
    """Each way by which files come out."""
    context = await engine._steps(events.ignore)
    if request.param == "containerd archives":

        @asynccontextmanager
        async def cannot(*_):
            yield None

        monkeypatch.setattr(context.site, "pack", cannot)
    return request.param


class TestOut:
    async def test_everything_a_file_system_can_hold(self, engine, state, way, tmp_path, contents):
        source = everything(tmp_path / "source")
        after = await engine.copy_in(state, source, "/a/new")
        copied = await engine.copy_out(after, "/a/new", tmp_path / "out")
        assert copied.path == str(tmp_path / "out")
        assert copied.count == len(walk(source))
        there, here = walk(source), walk(tmp_path / "out")
        if way == "containerd archives":
            for entry in there.values():
                kept = {k: v for k, v in entry["xattrs"].items() if k == "security.capability"}
                entry["xattrs"] = kept
        assert not "\n".join(differences(there, here))
        exact = 1 if way == "we look" else 10**9
        assert times(tmp_path / "out") == {
            name: time // exact * exact for name, time in times(source).items()
        }
        assert (tmp_path / "out" / "sparse").stat().st_blocks * 512 < 2_000_000
        await only(contents, engine, after)
        await engine.remove_state(after)
        await only(contents, engine)

    @pytest.mark.parametrize(
        ("path", "destination", "expected"),
        [
            ("/plain", "new", {"new": "p"}),
            ("/plain", ".", {"plain": "p"}),
            ("/plain", "dir", {"dir/plain": "p"}),
            ("/plain", "made/", {"made/plain": "p"}),
            ("/plain", "old", {"old": "p"}),
            ("/plain", "dir/old", {"dir/old": "p"}),
            ("/srv", "new", {"new/keep": "kept"}),
            ("/srv/", "new", {"new/keep": "kept"}),
            ("/srv", "dir", {"dir/srv/keep": "kept"}),
            ("/srv", "dir/", {"dir/srv/keep": "kept"}),
            ("/srv/.", "new", {"new/keep": "kept"}),
            ("/srv/.", "dir", {"dir/keep": "kept"}),
            ("/srv/.", "made/", {"made/keep": "kept"}),
            ("dir/../../top", "new", {"new": "t"}),
            ("../top", "new", {"new": "t"}),
            ("/data/keep", "new", {"new": "kept"}),
            ("/data/", "new", {"new/keep": "kept"}),
            ("/data/", "dir", {"dir/data/keep": "kept"}),
            ("/data/.", "dir", {"dir/keep": "kept"}),
            ("/up/passwd", "new", {"new": "root:"}),
            ("/hidden", "new", {"new/above": "above"}),
            ("/full", "new", {"new/of/things": "x"}),
        ],
    )
    async def test_where_it_goes(self, engine, state, way, tmp_path, path, destination, expected):
        put(tmp_path / "old", "old")
        put(tmp_path / "dir" / "old", "old")
        before = {p for p in tmp_path.rglob("*") if not p.is_dir()}
        await engine.copy_out(state, path, f"{tmp_path}/{destination}")
        now = {p for p in tmp_path.rglob("*") if not p.is_dir()}
        assert now - before == {tmp_path / e for e in expected if tmp_path / e not in before}
        for name, text in expected.items():
            assert (tmp_path / name).read_text().startswith(text)

    async def test_links_themselves(self, engine, state, way, tmp_path):
        for name, target in [("data", "/srv"), ("up", "../../../etc"), ("round", "round")]:
            await engine.copy_out(state, f"/{name}", tmp_path)
            assert str((tmp_path / name).readlink()) == target

    async def test_all_of_an_image(self, engine, state, way, at, tmp_path):
        await engine.copy_out(state, "/", tmp_path / "root")
        async with at(state) as root:
            there, here = walk(root), walk(tmp_path / "root")
            if way == "containerd archives":
                for entry in there.values():
                    entry["xattrs"] = {}
            assert not "\n".join(differences(there, here))
        assert not (tmp_path / "root" / "gone").exists()
        assert (tmp_path / "root" / "plain").samefile(tmp_path / "root" / "same")

    async def test_as_an_archive(self, engine, state, way, tmp_path):
        out = io.BytesIO()
        await engine.copy_out(state, "/srv", out)
        with tarfile.open(fileobj=io.BytesIO(out.getvalue())) as archive:
            assert archive.getnames() == ["srv", "srv/keep"]
            assert archive.extractfile("srv/keep").read() == b"kept"
        out = io.BytesIO()
        await engine.copy_out(state, "/srv/.", out)
        after = await engine.copy_in(state, io.BytesIO(out.getvalue()), "/again")
        await engine.copy_out(after, "/again", tmp_path / "again")
        assert (tmp_path / "again" / "keep").read_text() == "kept"
        assert (tmp_path / "again").stat().st_mode & 0o7777 == 0o750

    @pytest.mark.parametrize(
        "path",
        ["/nothing", "/gone", "/gone/a", "/hidden/below", "/plain/", "/plain/x", "/plain/.",
         "/data/nothing", "/out/", "/round/", "/full/of/things/"],
    )  # fmt: skip
    async def test_what_is_not_there(self, engine, state, way, tmp_path, contents, path):
        with pytest.raises(errors.CopyError) as caught:
            await engine.copy_out(state, path, tmp_path / "new")
        assert path.rstrip("/.") in str(caught.value)
        assert not (tmp_path / "new").exists()
        await only(contents, engine)

    async def test_links_out_of_the_image_stay_inside(self, engine, state, way, tmp_path):
        """``/out`` leads to ``/tmp/../../../../etc/passwd``: to the image's own."""
        await engine.copy_out(state, "/up/passwd", tmp_path / "a")
        assert "bob" in (tmp_path / "a").read_text()

    async def test_an_image_without_layers(self, engine, registry, way, tmp_path):
        reference = push(registry, "files/empty", "1", image([], config={}))
        state = await engine.pull_image(reference)
        copied = await engine.copy_out(state, "/", tmp_path / "new")
        assert list((tmp_path / "new").iterdir()) == []
        assert copied.count == 1
        with pytest.raises(errors.PathNotFound):
            await engine.copy_out(state, "/x", tmp_path / "new")

    async def test_a_snapshot_of_many_layers(self, engine, state, tmp_path, contents):
        """More directories than the options of one mount have room for (trap 52)."""
        states = [state]
        for number in range(70):
            source = put(tmp_path / "in" / f"f{number}", str(number))
            states.append(await engine.copy_in(states[-1], source, "/many/"))
        await engine.copy_out(states[-1], "/many", tmp_path / "out")
        assert len(list((tmp_path / "out").iterdir())) == 70
        await only(contents, engine, *states[1:])

    async def test_nothing_stays_mounted_or_open(self, containerd, engine, state, tmp_path):
        folder = str(containerd.folder)
        mounts = Path("/proc/self/mounts").read_text().count(folder)
        open_files = len(list(Path("/proc/self/fd").iterdir()))
        here = Path.cwd()
        for number in range(5):
            await engine.copy_out(state, "/srv", tmp_path / str(number))
        assert Path("/proc/self/mounts").read_text().count(folder) == mounts
        assert len(list(Path("/proc/self/fd").iterdir())) == open_files
        assert Path.cwd() == here

    async def test_many_at_once(self, engine, state, way, tmp_path, contents):
        async with asyncio.TaskGroup() as group:
            for number in range(12):
                group.create_task(engine.copy_out(state, "/srv", tmp_path / str(number)))
        assert len(list(tmp_path.glob("*/keep"))) == 12
        await only(contents, engine)

    async def test_a_disk_that_is_full_here(self, engine, state, way, tmp_path, contents):
        source = tmp_path / "in"
        for name in "abc":
            put(source / name, os.urandom(1_500_000))
        after = await engine.copy_in(state, source, "/new")
        small = tmp_path / "small"
        small.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(small)]
        subprocess.run(mount, check=True)
        try:
            with pytest.raises(errors.CopyError, match=r"No space left.*copied before: 3"):
                await engine.copy_out(after, "/new", small)
            left = {p.name: p.stat().st_size for p in (small / "new").iterdir()}
            assert left == {"a": 1_500_000, "b": 1_500_000}
            assert (small / "new").stat().st_mode & 0o777 == 0o755
        finally:
            subprocess.run(["umount", str(small)], check=True)
        await only(contents, engine, after)

    async def test_cancelled(self, engine, state, way, tmp_path, contents, monkeypatch):
        source = tmp_path / "in"
        for name in "abcdef":
            put(source / name, os.urandom(3_000_000))
        after = await engine.copy_in(state, source, "/new")
        reached, loop = asyncio.Event(), asyncio.get_running_loop()
        write, going = unpacking.write_at, threading.Event()

        def slow(file, place, piece):
            write(file, place, piece)
            if place > 2_000_000 and (tmp_path / "out" / "b").exists():
                loop.call_soon_threadsafe(reached.set)
                going.wait(10)

        monkeypatch.setattr(unpacking, "write_at", slow)
        seen = []
        task = asyncio.create_task(
            engine.copy_out(after, "/new", tmp_path / "out", on_event=seen.append)
        )
        await reached.wait()
        task.cancel()
        await asyncio.sleep(0)
        going.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert {p.name: p.stat().st_size for p in (tmp_path / "out").iterdir()}.items() >= {
            "a": 3_000_000,
            "b": 3_000_000,
        }.items()
        assert all(p.stat().st_size == 3_000_000 for p in (tmp_path / "out").iterdir())
        assert not list(tmp_path.rglob(".serpentine*"))
        assert [e.complete for e in seen if isinstance(e, events.CopyFinished)] == [False]
        await only(contents, engine, after)

    async def test_a_containerd_that_goes_away(self, engine, state, tmp_path, monkeypatch):
        """What it answers half-way is an error, never a short archive."""
        context = await engine._steps(events.ignore)

        @asynccontextmanager
        async def broken(mounts, path, name, notice):
            async def pieces():
                yield make_tar([folder("srv"), file("srv/a", b"x" * 9000)])[:5000]

            yield pieces()

        monkeypatch.setattr(context.site, "pack", broken)
        with pytest.raises(errors.CopyError, match=r"no whole archive.*copied before: 1"):
            await engine.copy_out(state, "/srv", tmp_path / "out")
        assert list((tmp_path / "out").iterdir()) == []


class TestCommand:
    @pytest.fixture
    def name(self, engine, state):
        return state.image.partition("@")[0] + ":1"

    def test_in_and_out(self, command, name, tmp_path):
        source = put(tmp_path / "f", "from here")
        done = command("cp", "--owner", "5:6", str(source), f"{name}:/new/")
        assert done.status == 0, done.err
        key = done.out.strip()
        assert key.startswith("state-")
        done = command("cp", f"{key}:/new/f", str(tmp_path / "back"))
        assert (done.status, done.out, done.err) == (0, "", "")
        assert (tmp_path / "back").read_text() == "from here"
        assert ((tmp_path / "back").stat().st_uid, (tmp_path / "back").stat().st_gid) == (5, 6)
        done = command("cp", "--json", f"{name}:/srv", str(tmp_path))
        assert done.json == {"path": str(tmp_path / "srv"), "count": 2}

    def test_a_state_in_a_file(self, command, name, tmp_path):
        done = command("cp", "--json", str(put(tmp_path / "f", "1")), f"{name}:one")
        assert done.status == 0, done.err
        assert done.json["config"]["working_dir"] == "/job"
        written = put(tmp_path / "state.json", done.out)
        done = command("cp", str(put(tmp_path / "g", "2")), str(tmp_path / "f"), f"@{written}:.")
        assert done.status == 0, done.err
        done = command("cp", f"{done.out.strip()}:/job/.", str(tmp_path / "out"))
        assert done.status == 0, done.err
        assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["dir", "f", "g", "one"]

    def test_archives_on_the_streams(self, containerd, namespace, name, tmp_path):
        run = [sys.executable, "-m", "serpentine.cli", "cp"]
        environ = {**os.environ, **containerd.environ, "CONTAINERD_NAMESPACE": namespace}
        data = make_tar([folder("d"), file("d/f", "f")])
        done = subprocess.run(
            [*run, "-", f"{name}:/in"], input=data, capture_output=True, env=environ, timeout=50
        )
        assert done.returncode == 0, done.stderr
        key = done.stdout.decode().strip()
        done = subprocess.run(
            [*run, f"{key}:/in/d", "-"], capture_output=True, env=environ, timeout=50
        )
        assert done.returncode == 0, done.stderr
        with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
            assert archive.getnames() == ["d", "d/f"]
        done = subprocess.run(
            [*run, "-", f"{name}:/in"], input=b"x", capture_output=True, env=environ, timeout=50
        )
        assert done.returncode == 1
        assert b"no tar archive" in done.stderr

    def test_interrupted_while_nothing_comes_in(self, containerd, namespace, name):
        """A pipe that stays open and empty is no reason to stay."""
        environ = {**os.environ, **containerd.environ, "CONTAINERD_NAMESPACE": namespace}
        process = subprocess.Popen(
            [sys.executable, "-m", "serpentine.cli", "cp", "-", f"{name}:/in"],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environ,
        )
        process.stdin.write(bytes.fromhex("31") * 100)
        process.stdin.flush()

        async def leased():
            async with Containerd(containerd.endpoint, namespace=namespace) as client:
                while not await client.leases.all():
                    pass

        asyncio.run(leased())
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert b"interrupted" in process.stderr.read()
        process.stdin.close()
        process.stderr.close()

    @pytest.mark.parametrize(
        ("words", "status", "said"),
        [
            (["a", "b"], 2, "no side is in an image"),
            (["IMAGE:/a", "IMAGE:/b"], 2, "both sides"),
            (["IMAGE:/a", "IMAGE:/b", "c"], 2, "no side"),
            (["--owner", "1", "IMAGE:/a", "b"], 2, "for copying in"),
            (["-", "x", "IMAGE:/a"], 2, "stands alone"),
            (["/nothing/here", "IMAGE:/a"], 1, "there is no /nothing/here"),
            (["IMAGE:/nothing", "OUT"], 1, "there is no /nothing"),
            (["IMAGE:/srv", "OUT/no/where"], 1, "there is no directory"),
            (["nothing.example/x:/srv", "OUT"], 1, "nothing.example/x"),
            (["state-0:/srv", "OUT"], 1, "state-0"),
            (["@/nothing.json:/srv", "OUT"], 2, "/nothing.json"),
            (["--gitignore", "--ignore-file", "x", "OUT", "IMAGE:/"], 1, "cannot both hold"),
        ],
    )
    def test_mistakes(self, command, name, tmp_path, words, status, said):
        words = [w.replace("IMAGE", name).replace("OUT", str(tmp_path / "out")) for w in words]
        done = command("cp", *words)
        assert done.status == status, done.err
        assert said in done.err
        assert len(done.err.splitlines()) == 1


async def test_memory_does_not_grow_with_what_is_copied(containerd, namespace, state, tmp_path):
    """The peak of a process that copies 300 MB is that of one that copies 3."""

    def peak(megabytes: int) -> int:
        script = (
            "import asyncio, resource, sys, serpentine\n"
            "async def main():\n"
            "    async with serpentine.connect() as engine:\n"
            "        state = serpentine.ContainerState.from_json(sys.argv[1])\n"
            "        after = await engine.copy_in(state, sys.argv[2], '/new')\n"
            "        await engine.copy_out(after, '/new', sys.argv[3])\n"
            "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
            "asyncio.run(main())\n"
        )
        source, out = tmp_path / f"in{megabytes}", tmp_path / f"out{megabytes}"
        with source.open("wb") as written:
            for number in range(megabytes):
                written.write(bytes([number % 251 + 1]) * 1_000_000)
        done = subprocess.run(
            [sys.executable, "-c", script, state.to_json(), str(source), str(out)],
            capture_output=True,
            env={**os.environ, **containerd.environ, "CONTAINERD_NAMESPACE": namespace},
        )
        assert done.returncode == 0, done.stderr
        assert out.stat().st_size == megabytes * 1_000_000
        assert filecmp.cmp(source, out, shallow=False)
        return int(done.stdout) // 1024

    assert peak(300) < peak(3) + 25
