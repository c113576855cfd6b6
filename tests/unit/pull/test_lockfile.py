"""The lock file: what it looks like, what is refused, and that it is written whole."""

from __future__ import annotations

import itertools
import tomllib
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serpentine import Lock, Pin, Platform, Reference
from serpentine.errors import InvalidSetting, NotPinned, SerpentineError

ONE, TWO, THREE = (f"sha256:{digit * 64}" for digit in "123")
AMD64, ARM = "linux/amd64", "linux/arm/v7"
ALPINE = "docker.io/library/alpine:3.20"

TEXT = f"""\
# Images, pinned.  Written by 'serpentine lock IMAGE'; 'serpentine lock --update' renews it.
version = 1

[images."docker.io/library/alpine:3.20"]
digest = "{ONE}"
platforms."linux/amd64" = "{TWO}"
platforms."linux/arm/v7" = "{THREE}"

[images."ghcr.io/a/b:1"]
digest = "{TWO}"
platforms."linux/amd64" = "{TWO}"
"""
LOCK = Lock({ALPINE: Pin(ONE, {AMD64: TWO, ARM: THREE}), "ghcr.io/a/b:1": Pin(TWO, {AMD64: TWO})})


def test_there_and_back(tmp_path):
    path = tmp_path / "serpentine.lock"
    LOCK.save(path)
    assert path.read_text() == TEXT
    assert Lock.load(path) == Lock.load(str(path)) == LOCK
    assert Lock.parse(Lock().dump().encode()) == Lock()


def test_the_same_text_in_whatever_order_it_was_made():
    entries = list(LOCK.images.items())
    pins = [
        {name: Pin(pin.digest, dict(reversed(pin.platforms.items()))) for name, pin in order}
        for order in itertools.permutations(entries)
    ]
    assert {Lock(images).dump() for images in pins} == {TEXT}


def test_merged_leaves_the_others_alone():
    changed = LOCK.merged("ghcr.io/a/b:1", Pin(THREE, {ARM: THREE})).merged("x/y:1", Pin(ONE, {}))
    assert changed.images[ALPINE] == LOCK.images[ALPINE]
    assert changed.images["ghcr.io/a/b:1"] == Pin(THREE, {ARM: THREE})
    assert list(LOCK.images) == [ALPINE, "ghcr.io/a/b:1"]


def test_what_is_pinned_and_what_is_not():
    alpine = Reference.parse("alpine:3.20")
    digest, manifest = LOCK.pinned(alpine, Platform("linux", "arm"))
    assert (str(digest), manifest) == (ONE, THREE)
    with pytest.raises(NotPinned, match=r"not in the lock$") as caught:
        LOCK.pinned(Reference.parse("alpine"), Platform.parse(AMD64))
    assert caught.value.hint == "add it: serpentine lock docker.io/library/alpine:latest"
    with pytest.raises(NotPinned, match="the lock file a/b, but not for linux/s390x") as caught:
        LOCK.pinned(alpine, Platform.parse("linux/s390x"), file="a/b")
    assert caught.value.hint.endswith(f"{ALPINE} --file a/b --platform linux/s390x")
    with pytest.raises(NotPinned) as caught:
        LOCK.pinned(Reference.parse("x"), Platform.parse(AMD64), file="serpentine.lock")
    assert "--file" not in caught.value.hint


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "version"),
        ("version = 2", "version 2"),
        ("version = '1'", "version 1,"),
        ("version = 1\nmore = 2", "images"),
        ("version = 1\nimages = 3", "images"),
        ("version = 1\n[images.alpine]", "in full"),
        (f"version = 1\n[images.'alpine@{ONE}']", "in full"),
        ("version = 1\n[images.'UPPER']", "UPPER"),
        (f"version = 1\n[images]\n'{ALPINE}' = 3", "digest"),
        (f"version = 1\n[images.'{ALPINE}']\ndigest = '{ONE}'", "platforms"),
        (f"version = 1\n[images.'{ALPINE}']\ndigest = '{ONE}'\nplatforms = {{}}", "at least one"),
        (f"version = 1\n[images.'{ALPINE}']\ndigest = '{ONE}'\nplatforms = 3", "at least one"),
        (
            f"version = 1\n[images.'{ALPINE}']\ndigest = 'x'\nplatforms.'{AMD64}' = '{ONE}'",
            "digest",
        ),
        (f"version = 1\n[images.'{ALPINE}']\ndigest = 3\nplatforms.'{AMD64}' = '{ONE}'", "text"),
        (
            f"version = 1\n[images.'{ALPINE}']\ndigest = '{ONE}'\nplatforms.'linux' = '{ONE}'",
            "platform",
        ),
        (
            f"version = 1\n[images.'{ALPINE}']\ndigest = '{ONE}'\nplatforms.'linux/x86_64' = ''",
            "write linux/amd64",
        ),
        ("= broken", "TOML"),
        ("a = " + "[" * 100_000, "TOML"),
    ],
)
def test_what_is_refused_is_named(text, said, tmp_path):
    path = tmp_path / "our.lock"
    path.write_text(text)
    with pytest.raises(InvalidSetting, match=said) as caught:
        Lock.load(path)
    assert str(path) in str(caught.value)
    assert caught.value.hint


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError):
        Lock.load(tmp_path / "none")
    for path in (tmp_path, "a\x00b"):
        with pytest.raises(InvalidSetting, match="cannot read"):
            Lock.load(path)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidSetting, match="TOML"):
        Lock.load(tmp_path / "bytes")


@given(st.binary(max_size=300) | st.text(max_size=300).map(str.encode))
def test_anything_else_is_our_error(data):
    with suppress(SerpentineError):
        Lock.parse(data)


class TestSaving:
    def test_a_failure_leaves_what_there_was(self, tmp_path, monkeypatch):
        path = tmp_path / "serpentine.lock"
        path.write_text("before")

        def fail(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "replace", fail)
        with pytest.raises(InvalidSetting, match="No space left"):
            LOCK.save(path)
        assert path.read_text() == "before"
        assert list(tmp_path.iterdir()) == [path]

    def test_where_there_is_no_directory(self, tmp_path):
        with pytest.raises(InvalidSetting, match="cannot write"):
            LOCK.save(tmp_path / "no" / "x.lock")

    def test_the_mode_and_the_link_stay(self, tmp_path):
        real, link = tmp_path / "real", tmp_path / "link"
        real.write_text("")
        real.chmod(0o640)
        link.symlink_to(real)
        LOCK.save(link)
        assert link.is_symlink()
        assert real.read_text() == TEXT
        assert real.stat().st_mode & 0o777 == 0o640


def test_toml_agrees():
    assert tomllib.loads(TEXT)["images"][ALPINE]["platforms"] == {AMD64: TWO, ARM: THREE}
