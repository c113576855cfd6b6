"""Packing, unpacking, ignoring, and the threads between them; no containerd."""

from __future__ import annotations

import asyncio
import io
import os
import random
import stat
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serpentine import ContainerState, errors
from serpentine.cli.cp import _remote
from serpentine.run.files import _Asked, _plan, _target, merged
from serpentine.run.ignoring import DockerRules, GitRules
from serpentine.run.packing import (
    END,
    Source,
    blocks,
    clean,
    entries,
    entries_again,
    mtime_ns,
    open_tar,
    pack,
)
from serpentine.run.threads import Aborted, Interruptible, Pieces, consume, in_threads
from serpentine.run.unpacking import unpack
from tests.support.images import Entry, file, folder, hardlink, make_tar, symlink
from tests.support.sources import everything, put, times
from tests.support.trees import differences, walk

ROOT = os.geteuid() == 0
as_root = pytest.mark.skipif(not ROOT, reason="needs root")


def state(**more):
    return ContainerState(snapshot_key="k", snapshotter="s", platform="linux/amd64", **more)


def packed(*sources, **more):
    return b"".join(pack(sources, **more))


class TestPack:
    def test_the_order_is_that_of_names_whatever_the_disk_says(self, tmp_path, monkeypatch):
        names = ["b", "a", "B", "é", "a.b", "a-b", os.fsdecode(b"\xff"), "10", "9"]
        for name in names:
            put(tmp_path / "s" / name / "x", os.fsencode(name))
            os.utime(tmp_path / "s" / name, (0, 0))
        os.utime(tmp_path / "s", (0, 0))
        listed = os.listdir
        results = set()
        for seed in range(4):

            def shuffled(path, seed=seed):
                found = listed(path)
                random.Random(seed).shuffle(found)
                return found

            monkeypatch.setattr(os, "listdir", shuffled)
            results.add(packed(Source(str(tmp_path / "s"), "s")))
        assert len(results) == 1
        with tarfile.open(fileobj=io.BytesIO(results.pop())) as archive:
            tops = [m.name[2:] for m in archive.getmembers() if m.isdir() and m.name != "s"]
        assert tops == sorted(names, key=os.fsencode)

    @as_root
    def test_gnu_tar_reads_it(self, tmp_path):
        source = everything(tmp_path / "s")
        (tmp_path / "out").mkdir()
        command = ["tar", "--xattrs", "--xattrs-include=*", "-xp", "-C", str(tmp_path / "out")]
        data = packed(Source(str(source), "s"))
        subprocess.run(command, input=data, check=True)
        assert not "\n".join(differences(walk(source), walk(tmp_path / "out" / "s")))
        assert times(source) == times(tmp_path / "out" / "s")

    def test_a_directory_deeper_than_a_path_may_be_long(self, tmp_path):
        """Directories are entered one by one, so no name is ever longer than one of them."""
        here = os.open(tmp_path, os.O_RDONLY)
        for _ in range(30):
            os.mkdir("d" * 200, dir_fd=here)
            below = os.open("d" * 200, os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = below
        os.close(here)
        data = packed(Source(str(tmp_path), "s"))
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            assert max(len(name) for name in archive.getnames()) == 1 + 30 * 201
        subprocess.run(["rm", "-rf", tmp_path / ("d" * 200)], check=True)

    def test_a_link_that_takes_the_place_of_a_directory_is_not_followed(self, tmp_path):
        put(tmp_path / "s" / "a" / "inside")
        put(tmp_path / "elsewhere" / "secret")
        pieces = pack([Source(str(tmp_path / "s"), "s")])
        next(pieces)  # of the top: its names are known now
        (tmp_path / "s" / "a").rename(tmp_path / "was")
        (tmp_path / "s" / "a").symlink_to(tmp_path / "elsewhere")
        assert b"secret" not in b"".join(pieces)

    def test_what_is_gone_is_an_error(self, tmp_path):
        put(tmp_path / "s" / "a")
        pieces = pack([Source(str(tmp_path / "s"), "s")])
        next(pieces)
        (tmp_path / "s" / "a").unlink()
        with pytest.raises(errors.FileChanged, match="went away"):
            list(pieces)

    def test_nothing_stays_open(self, tmp_path):
        for name in ("a/b/c/d", "a/b/e"):
            put(tmp_path / "s" / name, b"x" * 3_000_000)
        before = set(Path("/proc/self/fd").iterdir())
        packed(Source(str(tmp_path / "s"), "s"))
        half = pack([Source(str(tmp_path / "s"), "s")])
        for _ in range(6):
            next(half)
        half.close()
        assert set(Path("/proc/self/fd").iterdir()) == before

    def test_times(self):
        for value in (0, 1, 10**9, 1_700_000_000_123_456_789, -1, -1_500_000_000, 10**19 + 1):
            info = tarfile.TarInfo("x")
            from serpentine.run.packing import _set_time

            _set_time(info, value)
            with open_tar(io.BytesIO(info.tobuf(tarfile.PAX_FORMAT) + END)) as archive:
                assert mtime_ns(next(archive.one_by_one())) == value

    def test_blocks(self):
        joined = list(blocks([b"a" * 700_000, b"b" * 700_000, b"", b"c"]))
        assert [len(block) for block in joined] == [1_400_000, 1]


class TestDestination:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("/", ("", True)),
            ("//a//b/", ("a/b", True)),
            ("a", ("w/a", False)),
            (".", ("w", True)),
            ("..", ("", True)),
            ("/a/.", ("a", True)),
            ("/../../a", ("a", False)),
        ],
    )
    def test_where_it_means(self, text, expected):
        assert _target(state(working_dir="/w"), text) == expected

    def test_names(self):
        one = _Asked("/h/f", "f", False, False)
        tree = _Asked("/h/d", "d", True, False)
        contents = _Asked("/h/d/.", ".", True, True)

        def names(asked, kind, slash=False):
            plan = _plan(asked, "to", kind, as_folder=slash, destination="/to")
            return [(s.name, s.itself) for s in plan]

        assert names([one], "directory") == [("to/f", True)]
        assert names([one], "absent") == [("to", True)]
        assert names([one], "absent", True) == [("to/f", True)]
        assert names([one], "file") == [("to", True)]
        assert names([tree], "directory") == [("to/d", True)]
        assert names([tree], "absent", True) == [("to", True)]
        assert names([contents], "directory") == [("to", False)]
        assert names([contents], "absent") == [("to", True)]
        assert names([one, tree], "absent") == [("to/f", True), ("to/d", True)]
        for asked, kind, slash in [
            ([tree], "file", False),
            ([one], "file", True),
            ([one, one], "other", False),
        ]:
            with pytest.raises(errors.CopyError):
                names(asked, kind, slash)

    def test_an_overlay_alone_gets_company(self):
        from serpentine.containerd import Mount

        overlay, bind = Mount("overlay", "overlay"), Mount("bind", "/x")
        assert [m.type for m in merged([overlay])] == ["tmpfs", "overlay"]
        assert merged([bind]) == [bind]

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("alpine:/etc", ("alpine", "/etc")),
            ("alpine:3:/etc", ("alpine:3", "/etc")),
            ("h:5000/a/b:1:/x:y", ("h:5000/a/b:1", "/x:y")),
            ("a@sha256:12:/x", ("a@sha256:12", "/x")),
            ("alpine:etc", ("alpine", "etc")),
            ("alpine:", ("alpine", ".")),
            ("@s.json:/x", ("@s.json", "/x")),
            ("@./s.json:/x", ("@./s.json", "/x")),
            ("@/t/s.json:/x", ("@/t/s.json", "/x")),
            ("state-12:/x", ("state-12", "/x")),
            ("-", None),
            (".", None),
            ("..", None),
            ("./a:b", None),
            ("../a:/b", None),
            ("/a:/b", None),
            ("plain", None),
            (":/x", None),
        ],
    )
    def test_sides(self, text, expected):
        assert _remote(text) == expected


class TestUnpack:
    def test_modes_times_and_links(self, tmp_path):
        data = make_tar(
            [
                folder("d", 0o500, mtime=5),
                file("d/a", b"a" * 10, mode=0o640, mtime=7),
                hardlink("d/b", "d/a"),
                symlink("d/c", "/nowhere"),
            ]
        )
        copied = unpack(io.BytesIO(data), "d", str(tmp_path / "new"))
        assert (copied.path, copied.count) == (str(tmp_path / "new"), 4)
        top = tmp_path / "new"
        assert stat.S_IMODE(top.stat().st_mode) == 0o500
        assert top.stat().st_mtime == 5
        assert (top / "a").samefile(top / "b")
        assert stat.S_IMODE((top / "a").stat().st_mode) == 0o640
        assert (top / "a").stat().st_mtime == 7
        assert str((top / "c").readlink()) == "/nowhere"
        top.chmod(0o700)

    def test_what_is_there_is_merged_and_replaced(self, tmp_path):
        put(tmp_path / "d" / "kept", "kept")
        old = put(tmp_path / "d" / "old", "old")
        os.link(old, tmp_path / "d" / "twin")
        (tmp_path / "d" / "link").symlink_to(old)
        entries = [file("d/old", "new"), file("d/link", "file"), hardlink("d/hard", "d/old")]
        for _ in range(2):
            unpack(io.BytesIO(make_tar([folder("d"), *entries])), "d", str(tmp_path))
        assert {p.name: p.read_text() for p in (tmp_path / "d").iterdir()} == {
            "kept": "kept", "old": "new", "twin": "old", "link": "file", "hard": "new",
        }  # fmt: skip
        assert not (tmp_path / "d" / "link").is_symlink()

    @pytest.mark.parametrize(
        "entries",
        [
            [folder("d"), symlink("d/x", "/"), file("d/x/evil", "e")],
            [folder("d"), symlink("d/x", "../.."), file("d/x/evil", "e")],
            [folder("d"), symlink("d/x", "."), folder("d/x"), file("d/x/evil", "e")],
            [folder("d"), symlink("d/x", "/etc"), hardlink("d/y", "d/x/passwd")],
            [folder("d"), file("d/../evil", "e")],
            [folder("d"), file("../evil", "e")],
            [folder("d"), file("evil", "e")],
            [folder("d"), hardlink("d/x", "../../etc/passwd")],
            [folder("d"), hardlink("d/x", "/etc/passwd")],
            [folder("d"), hardlink("d/x", "d/none")],
            [folder("d"), hardlink("d/x", "d")],
            [folder("d"), folder("d/x"), symlink("d/x", "/"), file("d/x/evil", "e")],
            [symlink("d", "/tmp"), file("d/evil", "e")],
            [file("d", "f"), file("d/evil", "e")],
            [file("d/evil", "e")],
            [],
        ],
    )
    def test_a_hostile_archive(self, tmp_path, entries):
        (tmp_path / "in").mkdir()
        before = set(Path("/tmp").iterdir()) | set(Path("/").iterdir())
        with pytest.raises(errors.CopyError):
            unpack(io.BytesIO(make_tar(entries)), "d", str(tmp_path / "in" / "new"))
        assert set(Path("/tmp").iterdir()) | set(Path("/").iterdir()) == before
        assert not list(tmp_path.rglob("evil"))
        assert not list(tmp_path.rglob(".serpentine*"))
        assert {p.name for p in tmp_path.iterdir()} == {"in"}

    def test_a_link_of_somebody_else_is_not_written_through(self, tmp_path):
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / "x").symlink_to(tmp_path / "elsewhere")
        data = make_tar([folder("d"), folder("d/x"), file("d/x/f", "f")])
        with pytest.raises(errors.CopyError, match="is no directory"):
            unpack(io.BytesIO(data), "d", str(tmp_path))
        assert not list((tmp_path / "elsewhere").iterdir())
        # The destination itself may be one: its user said so.
        (tmp_path / "way").symlink_to("elsewhere")
        unpack(io.BytesIO(make_tar([folder("."), file("./f", "f")])), "", str(tmp_path / "way"))
        assert (tmp_path / "elsewhere" / "f").exists()

    @pytest.mark.parametrize("cut", [0, 100, 512, 1024, 1500, 2048, 2560, 3000])
    def test_an_archive_that_is_cut(self, tmp_path, cut):
        data = make_tar([folder("d"), file("d/a", b"a" * 600), file("d/b", b"b" * 600)])[:cut]
        with pytest.raises(errors.CopyError, match="no whole archive"):
            unpack(io.BytesIO(data), "d", str(tmp_path / "new"))
        for path in tmp_path.rglob("*"):
            assert path.is_dir() or path.stat().st_size == 600

    def test_holes(self, tmp_path):
        data = bytes(3_000_000) + b"x" + bytes(1_000_000) + b"y" * 200_000 + bytes(2_000_000)
        unpack(io.BytesIO(make_tar([file("f", data)])), "f", str(tmp_path / "f"))
        assert (tmp_path / "f").read_bytes() == data
        assert (tmp_path / "f").stat().st_blocks * 512 < 500_000

    @as_root
    def test_as_another_user(self, tmp_path):
        """No owners, no devices, no set-user-ID; what cannot be is told."""
        put(tmp_path / "a.tar", make_tar(
            [
                folder("d", uid=1, gid=1),
                file("d/f", "f", mode=0o6755, uid=0, gid=0),
                Entry("d/null", kind=tarfile.CHRTYPE, device=(1, 3)),
                Entry("d/pipe", kind=tarfile.FIFOTYPE),
                file("d/cap", "c", xattrs={"security.capability": "x"}),
            ]
        ))  # fmt: skip
        script = (
            "import os, sys\n"
            "from serpentine.run.unpacking import unpack\n"
            f"data = open({str(tmp_path / 'a.tar')!r}, 'rb')\n"
            f"os.chdir({str(tmp_path / 'out')!r})\n"
            "os.setgroups([]); os.setgid(1234); os.setuid(1234)\n"
            "unpack(data, 'd', 'new', notice=print)\n"
        )
        (tmp_path / "out").mkdir(mode=0o777)
        (tmp_path / "out").chmod(0o777)
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "null is a device" in done.stdout
        assert "attributes like security.capability" in done.stdout
        top = tmp_path / "out" / "new"
        assert stat.S_IMODE((top / "f").stat().st_mode) == 0o755
        assert (top / "f").stat().st_uid == 1234
        assert stat.S_ISFIFO((top / "pipe").stat().st_mode)
        assert not (top / "null").exists()

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.sampled_from(["a", "b", "..", ".", "", "a/b", "/"]), max_size=5))
    def test_names_never_lead_upwards(self, parts):
        name = "/".join(parts)
        try:
            cleaned = clean(name)
        except errors.CopyError:
            assert ".." in name
        else:
            assert not cleaned.startswith("/")
            assert ".." not in cleaned.split("/")

    @as_root
    def test_what_was_packed(self, tmp_path):
        source = everything(tmp_path / "s")
        data = packed(Source(str(source), "s"))
        unpack(io.BytesIO(data), "s", str(tmp_path / "new"))
        assert not "\n".join(differences(walk(source), walk(tmp_path / "new")))
        assert times(source) == times(tmp_path / "new")


@as_root
class TestApply:
    """Into an open directory; what is equal to containerd's doing is tested with containerds."""

    def apply(self, root, made, **more):
        from serpentine.run.applying import apply_entries

        items = entries_again(io.BytesIO(make_tar(made)), "", **more)
        top = os.open(root, os.O_RDONLY)
        try:
            return list(apply_entries(top, items))[-1]
        finally:
            os.close(top)

    @pytest.mark.parametrize(
        "target",
        ["/", "/tmp", "..", "../../../../../../../../tmp", "/proc/self/root", "/proc/1/cwd"],
    )
    def test_links_never_lead_out(self, tmp_path, target):
        root = tmp_path / "root"
        root.mkdir()
        (root / "way").symlink_to(target)
        (root / "there").symlink_to("way/secret")
        outside = set(Path("/tmp").iterdir()) | set(Path("/").iterdir()) | set(tmp_path.iterdir())
        made = [
            file("way/secret", "s"),
            file("there/below", "b"),
            hardlink("way/twin", "way/secret"),
            folder("way/folder", 0o700),
        ]
        with pytest.raises(errors.CopyError, match="Not a directory"):
            self.apply(root, made)
        assert self.apply(root, [made[0], *made[2:]]) == 1
        now = set(Path("/tmp").iterdir()) | set(Path("/").iterdir()) | set(tmp_path.iterdir())
        assert now == outside
        (found,) = root.rglob("secret")
        assert found.stat().st_nlink == 2
        # Nor a hard link to what is outside.
        (root / "out").symlink_to(tmp_path)
        put(tmp_path / "ours", "ours")
        with pytest.raises(errors.CopyError, match="No such file"):
            self.apply(root, [hardlink("mine", "out/ours")])

    def test_a_link_is_replaced_and_not_written_through(self, tmp_path):
        outside = put(tmp_path / "outside", "o")
        (tmp_path / "folder").mkdir()
        root = tmp_path / "root"
        root.mkdir()
        for name, target in (("a", outside), ("b", tmp_path / "folder"), ("c", outside)):
            (root / name).symlink_to(target)
        self.apply(
            root, [file("a", "new", mode=0o777, uid=5), folder("b"), file("b/x"), symlink("c", "d")]
        )
        assert outside.read_text() == "o"
        assert (outside.stat().st_uid, outside.stat().st_mode & 0o777) == (0, 0o644)
        assert list((tmp_path / "folder").iterdir()) == []
        assert (root / "a").read_text() == "new"
        assert (root / "b" / "x").exists()

    def test_a_full_disk(self, tmp_path):
        mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
        subprocess.run(mount, check=True)
        try:
            open_files = len(list(Path("/proc/self/fd").iterdir()))
            with pytest.raises(errors.NoSpace, match="/b in the state: No space left"):
                self.apply(tmp_path, [file("a", b"x" * 500_000), file("b", b"y" * 700_000)])
            assert len(list(Path("/proc/self/fd").iterdir())) == open_files
            subprocess.run(["mount", "-o", "remount,ro", tmp_path], check=True)
            with pytest.raises(errors.CopyError, match="/c in the state: Read-only"):
                self.apply(tmp_path, [file("c", "c")])
        finally:
            subprocess.run(["umount", tmp_path], check=True)

    def test_a_tree_too_deep_to_remove(self, tmp_path):
        here = os.open(tmp_path, os.O_RDONLY)
        for _ in range(1500):
            os.mkdir("d", dir_fd=here)
            below = os.open("d", os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = below
        os.close(here)
        with pytest.raises(errors.CopyError, match="/d in the state"):
            self.apply(tmp_path, [file("d", "in its place")])
        subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)

    def test_it_can_be_stopped_and_leaves_nothing_open(self, tmp_path):
        from serpentine.run.applying import apply_entries

        source = tmp_path / "source"
        put(source / "a", b"x" * 20_000_000)
        open_files = len(list(Path("/proc/self/fd").iterdir()))
        top = os.open(tmp_path, os.O_RDONLY)
        work = apply_entries(top, entries([Source(str(source), "new")]))
        assert 4_000_000 < next(work) < 9_000_000
        work.close()
        os.close(top)
        assert len(list(Path("/proc/self/fd").iterdir())) == open_files
        assert (tmp_path / "new" / "a").stat().st_size < 9_000_000

    def test_holes(self, tmp_path):
        data = bytes(3_000_000) + b"x" + bytes(2_000_000)
        self.apply(tmp_path, [file("f", data)])
        assert (tmp_path / "f").read_bytes() == data
        assert (tmp_path / "f").stat().st_blocks * 512 < 500_000

    def test_names_whatever_the_locale(self, tmp_path):
        script = (
            "import io, os, sys\n"
            "from serpentine.run.applying import apply_entries\n"
            "from serpentine.run.packing import entries_again\n"
            "assert sys.getfilesystemencoding() != 'utf-8', sys.getfilesystemencoding()\n"
            "items = entries_again(open(sys.argv[1], 'rb'), '')\n"
            "list(apply_entries(os.open(sys.argv[2], os.O_RDONLY), items))\n"
        )
        given = put(tmp_path / "a.tar", make_tar([file("gr\u00fcn/\u4f60", "x")]))
        (tmp_path / "root").mkdir()
        environ = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
        command = [sys.executable, "-X", "utf8=0", "-c", script, given, tmp_path / "root"]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "root" / "gr\u00fcn" / "\u4f60").read_text() == "x"


class TestIgnoring:
    @pytest.mark.parametrize(
        ("lines", "out", "kept"),
        [
            (["*.md", "!README.md"], ["a.md"], ["README.md", "d/a.md"]),
            (["**/*.md"], ["a.md", "d/a.md", "d/e/a.md"], ["a.mdx"]),
            (["node"], ["node", "node/x/y"], ["nodes", "x/node"]),
            (["/node/"], ["node", "node/x"], ["x/node"]),
            (["a/*/c"], ["a/b/c", "a/b/c/d"], ["a/c", "a/b/d/c"]),
            (["a/**/c"], ["a/c", "a/b/c", "a/b/d/c"], ["ac"]),
            (["**"], ["a", "a/b"], []),
            (["*", "!src", "!src/**"], ["a", "b/c"], ["src", "src/a"]),
            (["a?c", "[xy]z", "[^ab]q", "[a-c]-"], ["abc", "xz", "cq", "b-"], ["a/c", "zz", "aq"]),
            ([r"\*", r"a\?"], ["*", "a?"], ["x", "ab"]),
            (["# no", "", "  ", "."], [], ["# no", "a"]),
            (["../x", "./y"], ["x", "y"], ["z"]),
            (["\ufeffa"], ["a"], ["b"]),
            (["a.b"], ["a.b"], ["axb"]),
            (["x\n"], ["x"], ["y"]),
        ],
    )
    def test_dockerignore(self, lines, out, kept):
        rules = DockerRules(lines)
        assert [p for p in [*out, *kept] if rules.excludes(p, folder=False)] == out

    def test_a_pattern_that_is_none(self):
        with pytest.raises(errors.InvalidSetting, match="no pattern"):
            DockerRules(["a[b"])

    def test_the_nearest_gitignore_counts(self):
        rules = GitRules([("sub/", b"*.x\n/sub/top\n")])
        files = {"": b"!keep.x\n", "d": b"*.y\n", "d/e": b"!a.y\n"}
        for name, data in files.items():
            rules.enter(name, [".gitignore"], lambda _, data=data: data)
        asked = ["a.x", "keep.x", "top", "d/a.y", "d/e/a.y", "d/e/b.y", ".git", "d/.git", "a.y"]
        out = [path for path in asked if rules.excludes(path, folder=False)]
        assert out == ["a.x", "top", "d/a.y", "d/e/b.y", ".git", "d/.git"]


class TestThreads:
    async def test_a_generator_that_is_cancelled_is_closed_when_its_step_is_done(self):
        inside, go, closed = threading.Event(), threading.Event(), threading.Event()

        def slow():
            try:
                yield b"1"
                inside.set()
                go.wait(10)
                yield b"2"
            finally:
                closed.set()

        async def use():
            async for _ in in_threads(slow()):
                pass

        task = asyncio.create_task(use())
        await asyncio.to_thread(inside.wait)
        task.cancel()
        await asyncio.sleep(0)
        assert not closed.is_set()
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert closed.is_set()

    async def test_a_consumer_is_told_and_awaited(self):
        started, ended = asyncio.Event(), []
        loop = asyncio.get_running_loop()

        async def never():
            yield b"x"
            await asyncio.Event().wait()

        def work(stream):
            try:
                assert stream.read(5) == b"x"
                loop.call_soon_threadsafe(started.set)
                stream.read(1)
            except Aborted:
                ended.append(True)
                raise

        task = asyncio.create_task(consume(never(), work))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended == [True]

    async def test_errors_of_both_sides(self):
        async def fail():
            yield b"x"
            raise errors.CopyError("there")

        async def endless():
            while True:
                yield bytes(1000)

        def read_all(stream):
            while stream.read(10):
                pass

        def refuse(stream):
            stream.read(1)
            raise errors.CopyError("here")

        with pytest.raises(errors.CopyError, match="there"):
            await consume(fail(), read_all)
        with pytest.raises(errors.CopyError, match="here"):
            await consume(endless(), refuse)
        assert await consume(endless(), lambda stream: len(stream.read(10))) == 10

    async def test_more_consumers_than_the_pool_has_threads(self):
        def make():
            for _ in range(5):
                yield bytes(10)

        def read_all(stream):
            size = 0
            while data := stream.read():
                size += len(data)
            return size

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(consume(in_threads(make()), read_all)) for _ in range(60)]
        assert [task.result() for task in tasks] == [50] * 60

    async def test_an_input_that_does_not_come_is_given_up(self):
        theirs, ours = os.pipe()
        with os.fdopen(theirs, "rb") as stream, os.fdopen(ours, "wb", buffering=0) as other:
            waiting = Interruptible(stream)
            other.write(b"first")

            def read():
                while data := waiting.read(100):
                    yield data

            pieces = in_threads(read(), waiting.interrupt)
            assert await anext(pieces) == b"first"
            task = asyncio.ensure_future(anext(pieces))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await pieces.aclose()
            waiting.close()

    def test_pieces(self):
        stream = Pieces(iter([b"abc", b"", b"defg"]))
        assert [stream.read(2) for _ in range(5)] == [b"ab", b"c", b"de", b"fg", b""]
