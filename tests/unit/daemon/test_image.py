"""The build context of our image: its tag says what is in it, and the wheel carries its files."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import zipfile
from importlib.resources import files
from pathlib import Path

import pytest

from serpentine.daemon import image
from serpentine.daemon.image import DEFAULT_BASE_IMAGE, REPOSITORY, build_context
from serpentine.errors import InvalidSetting
from serpentine.settings import Settings

ROOT = Path(__file__).parents[3]


def members(context):
    with tarfile.open(fileobj=io.BytesIO(context.tar())) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar.getmembers()}


class TestTag:
    def test_is_a_name_that_engines_take(self):
        name, _, tag = build_context(Settings()).tag.partition(":")
        assert name == REPOSITORY
        assert len(tag) == 12
        assert set(tag) <= set("0123456789abcdef")

    @pytest.mark.parametrize("name", sorted(build_context(Settings()).files))
    def test_changes_with_each_file(self, name, monkeypatch, tmp_path):
        before = build_context(Settings()).tag
        folder = tmp_path / "image"
        folder.mkdir()
        for other, data in build_context(Settings()).files.items():
            (folder / other).write_bytes(data)
        monkeypatch.setattr(image, "files", lambda _: tmp_path)
        assert build_context(Settings()).tag == before
        with (folder / name).open("ab") as file:
            file.write(b"\n")
        assert build_context(Settings()).tag != before

    def test_changes_with_the_base_image(self):
        tags = {build_context(Settings(base_image=base)).tag for base in ("a:1", "a:2", None)}
        assert len(tags) == 3
        named = build_context(Settings(base_image=DEFAULT_BASE_IMAGE))
        assert named.tag == build_context(Settings()).tag

    def test_does_not_change_with_where_the_releases_come_from(self):
        """Their sums are in it: they are the same wherever they come from."""
        other = build_context(Settings(releases_url="https://mirror.example"))
        assert other.tag == build_context(Settings()).tag
        assert other.arguments["RELEASES_URL"] == "https://mirror.example"

    def test_changes_with_the_sums(self, tmp_path):
        sums = tmp_path / "sums"
        sums.write_bytes(build_context(Settings()).files["releases.sha256"])
        assert build_context(Settings(releases_sums=sums)).tag == build_context(Settings()).tag
        sums.write_text("# others\n")
        other = build_context(Settings(releases_sums=sums))
        assert other.tag != build_context(Settings()).tag
        assert members(other)["releases.sha256"] == b"# others\n"

    def test_sums_that_cannot_be_read(self, tmp_path):
        with pytest.raises(InvalidSetting, match="No such file") as caught:
            build_context(Settings(releases_sums=tmp_path / "none"))
        assert "SERPENTINE_RELEASES_SUMS" in caught.value.hint


class TestArchive:
    def test_is_the_same_for_the_same_content(self):
        assert build_context(Settings()).tar() == build_context(Settings()).tar()
        with tarfile.open(fileobj=io.BytesIO(build_context(Settings()).tar())) as tar:
            for member in tar.getmembers():
                assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o644)

    def test_holds_all_that_the_dockerfile_copies(self):
        found = members(build_context(Settings()))
        assert found == build_context(Settings()).files
        lines = found["Dockerfile"].decode().splitlines()
        copies = [line.split()[1:-1] for line in lines if line.startswith("COPY ")]
        copied = {name for names in copies for name in names if not name.startswith(("--", "/"))}
        assert copied == set(found) - {"Dockerfile"}

    def test_the_folder_holds_nothing_that_is_left_out(self):
        folder = files("serpentine.daemon") / "image"
        there = {entry.name for entry in folder.iterdir() if entry.is_file()}
        assert there == set(build_context(Settings()).files)


def test_the_wheel_carries_the_files(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name, data in build_context(Settings()).files.items():
            assert archive.read(f"serpentine/daemon/image/{name}") == data
