"""Which releases are wanted, for which machine, and whether what is there is whole."""

from __future__ import annotations

import json
import os
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serpentine.daemon import releases
from serpentine.daemon.discovery import Host
from serpentine.daemon.releases import (
    directory_name,
    installed,
    parse_sums,
    search_path,
    select,
)
from serpentine.errors import DaemonNotFound, InvalidSetting
from serpentine.settings import Settings, load

SUM = "0123456789abcdef" * 4
CONTAINERD = "containerd/containerd/releases/download/v2.3.4/containerd-2.3.4-linux-amd64.tar.gz"
RUNC = "opencontainers/runc/releases/download/v1.4.3/runc.amd64"
CNI = "containernetworking/plugins/releases/download/v1.9.1/cni-plugins-linux-amd64-v1.9.1.tgz"
THREE = "".join(f"{SUM}  {path}\n" for path in (CONTAINERD, RUNC, CNI))


def ours(machine: str) -> tuple[releases.Release, ...]:
    return releases._wanted(Settings(), machine)


@pytest.mark.parametrize(
    ("machine", "arch"),
    [
        ("x86_64", "amd64"),
        ("amd64", "amd64"),
        ("AMD64", "amd64"),
        ("aarch64", "arm64"),
        ("arm64", "arm64"),
    ],
)
def test_our_own_pins_name_three_releases_for_each_machine(machine, arch):
    chosen = ours(machine)
    assert [(r.kind, r.version) for r in chosen] == [
        ("containerd", "2.3.4"),
        ("runc", "1.4.3"),
        ("cni", "1.9.1"),
    ]
    assert {r.arch for r in chosen} == {arch}
    assert all(arch in r.path for r in chosen)
    assert "static" in chosen[0].path, "the other one needs the C library it was built with"


def test_the_directory_is_named_after_exactly_what_is_in_it():
    names = {directory_name(ours(machine)) for machine in ("x86_64", "aarch64", "amd64")}
    assert len(names) == 2
    (one,) = {directory_name(select(parse_sums(t, "s"), "amd64", "s")) for t in (THREE, THREE)}
    changed = THREE.replace(SUM, "f" * 64, 1)
    assert directory_name(select(parse_sums(changed, "s"), "amd64", "s")) != one
    assert one.startswith("bin-")
    assert len(one) == len("bin-") + 12


@pytest.mark.parametrize("machine", ["riscv64", "i686", "armv7l", "", "s390x"])
def test_another_machine_is_told_which_there_are(machine):
    with pytest.raises(DaemonNotFound, match="amd64 and arm64") as caught:
        ours(machine)
    assert repr(machine) in str(caught.value)
    assert caught.value.hint


def test_what_sha256sum_writes_is_read():
    text = f"# ours\n\n{SUM.upper()} *{CONTAINERD}\r\n{SUM}  {RUNC}\n  {SUM}  {CNI}"
    assert [r.line for r in parse_sums(text, "s")] == THREE.splitlines(keepends=True)


def test_files_of_no_use_are_left_out():
    more = (
        f"{SUM}  a/cri-containerd-2.3.4-linux-amd64.tar.gz\n{SUM}  runc.riscv64\n{SUM}  LICENSE\n"
    )
    assert parse_sums(more + THREE, "s") == parse_sums(THREE, "s")


@pytest.mark.parametrize(
    ("path", "version"),
    [
        ("runc.amd64", ""),
        ("v1.4.3/runc.amd64", "1.4.3"),
        ("1.4.3+ours/runc.amd64", "1.4.3+ours"),
        ("mirror/runc.amd64", ""),
        ("cni-plugins-linux-amd64-v1.9.1-rc.1.tgz", "1.9.1-rc.1"),
        ("containerd-static-2.3.4-rc.0-linux-amd64.tar.gz", "2.3.4-rc.0"),
    ],
)
def test_the_version_stands_in_the_path(path, version):
    (release,) = parse_sums(f"{SUM}  {path}", "s")
    assert release.version == version


@pytest.mark.parametrize(
    "line",
    [
        "what",
        SUM,
        f"{SUM}  ",
        f"{SUM} {RUNC}",
        f"{SUM[1:]}  {RUNC}",
        f"{SUM}0  {RUNC}",
        f"{'g' * 64}  {RUNC}",
        f"{SUM}  /{RUNC}",
        f"{SUM}  ../{RUNC}",
        f"{SUM}  a/../../{RUNC}",
        f"{SUM}  a//b",
        f"{SUM}  https://example.com/runc.amd64",
        f"{SUM}  runc.amd64?x=1",
        f"{SUM}  a b",
        f"\\{SUM}  a\\nb",
    ],
)
def test_a_bad_line_is_named(line):
    with pytest.raises(InvalidSetting, match=r"line 4 of /s\.txt") as caught:
        parse_sums(f"{THREE}{line}\n", "/s.txt")
    assert caught.value.hint


def test_two_sums_for_one_file():
    with pytest.raises(InvalidSetting, match="another sum"):
        parse_sums(f"{THREE}{'f' * 64}  {RUNC}\n", "s")
    assert parse_sums(THREE + THREE, "s") == parse_sums(THREE, "s")


def test_exactly_one_of_each_kind():
    with pytest.raises(InvalidSetting, match="runc for linux/amd64, and names none"):
        select(parse_sums(THREE.replace("runc.amd64", "runc.arm64"), "s"), "amd64", "s")
    static = CONTAINERD.replace("containerd-2", "containerd-static-2")
    with pytest.raises(InvalidSetting, match="containerd-static-2"):
        select(parse_sums(f"{THREE}{SUM}  {static}\n", "s"), "amd64", "s")


@given(st.text(alphabet=string.hexdigits + " */.\n#\\-runcamd64\x00é", max_size=200))
def test_any_text_is_read_or_refused(text):
    try:
        found = parse_sums(text, "s")
    except InvalidSetting:
        return
    for release in found:
        assert ".." not in release.path.split("/")
        assert not release.path.startswith("/")


def test_a_sums_file_of_ones_own(tmp_path):
    path = tmp_path / "sums"
    settings = load({}, {"SERPENTINE_RELEASES_SUMS": str(path)})
    with pytest.raises(InvalidSetting, match=f"{path}: No such file"):
        releases._wanted(settings, "amd64")
    path.write_bytes(b"\xff")
    with pytest.raises(InvalidSetting, match="not a text"):
        releases._wanted(settings, "amd64")
    path.write_text(THREE)
    assert [r.path for r in releases._wanted(settings, "amd64")] == [CONTAINERD, RUNC, CNI]


# --- what is there ---------------------------------------------------------------------------


@pytest.fixture
def data_dir(tmp_path):
    """A data directory with something whole in it."""
    directory = tmp_path / "bin-0"
    (directory / "cni").mkdir(parents=True)
    files = ("containerd", "ctr", "containerd-shim-runc-v2", "runc", "cni/bridge")
    for name in files:
        (directory / name).write_text("#!/bin/sh\n")
        (directory / name).chmod(0o755)
    note = {
        "versions": {"containerd": "2.3.4", "runc": "1.4.3", "cni": "1.9.1"},
        "files": dict.fromkeys(files, 10),
    }
    (directory / "installed.json").write_text(json.dumps(note))
    (tmp_path / "bin").symlink_to("bin-0")
    return tmp_path


def test_what_is_whole_is_used_and_comes_first(data_dir, monkeypatch):
    found = installed(data_dir)
    assert found is not None
    assert (found.containerd, found.runc, found.cni) == ("2.3.4", "1.4.3", "1.9.1")
    assert found.plugins == data_dir / "bin-0" / "cni"
    monkeypatch.setenv("PATH", "/a:/b")
    # Not the link: another install may let it point elsewhere while a daemon runs.
    assert search_path(data_dir) == f"{data_dir / 'bin-0'}:/a:/b"
    monkeypatch.delenv("PATH")
    assert search_path(data_dir) == f"{data_dir / 'bin-0'}:{os.defpath}"
    host = Host.look(Settings(data_dir=data_dir))
    assert host.containerd == str(data_dir / "bin-0/containerd")
    assert host.runc == str(data_dir / "bin-0/runc")


def truncate(path: Path) -> None:
    path.write_text("#!")


def forbid(path: Path) -> None:
    path.chmod(0o644)


@pytest.mark.parametrize("harm", [Path.unlink, truncate, forbid])
@pytest.mark.parametrize("name", ["containerd", "runc", "cni/bridge"])
def test_what_is_not_whole_is_not_used(data_dir, harm, name, monkeypatch):
    harm(data_dir / "bin" / name)
    assert installed(data_dir) is None
    monkeypatch.setenv("PATH", "/a")
    assert search_path(data_dir) == "/a"
    assert Host.look(Settings(data_dir=data_dir)).containerd is None


@pytest.mark.parametrize("note", ["", "[]", "{", "{}", '{"files": {}}', '{"files": [], "v": 1}'])
def test_a_broken_note_is_no_installation(data_dir, note):
    (data_dir / "bin/installed.json").write_text(note)
    assert installed(data_dir) is None


def test_no_link_or_one_to_nowhere(data_dir, tmp_path):
    link = data_dir / "bin"
    for target in ("nowhere", "bin"):
        link.unlink()
        link.symlink_to(target)
        assert installed(data_dir) is None
    link.unlink()
    assert installed(data_dir) is None
    assert installed(tmp_path / "none") is None


def test_a_process_keeps_the_directory_that_it_runs_from():
    assert releases._in_use(Path("/proc/self/exe").readlink().parent)
    assert not releases._in_use(Path("/nonexistent"))


@pytest.mark.parametrize(
    ("name", "kind", "target"),
    [
        ("bin/ctr", "containerd", "ctr"),
        ("./bin/ctr", "containerd", "ctr"),
        ("bin/", "containerd", None),
        ("bin/a/b", "containerd", None),
        ("ctr", "containerd", None),
        ("../bin/ctr", "containerd", None),
        ("bin/..", "containerd", None),
        ("/bin/ctr", "containerd", None),
        ("./bridge", "cni", "cni/bridge"),
        ("bridge", "cni", "cni/bridge"),
        ("./", "cni", None),
        ("..", "cni", None),
        ("/", "cni", None),
        ("/bridge", "cni", None),
        ("a/bridge", "cni", None),
    ],
)
def test_where_a_member_of_an_archive_goes(name, kind, target):
    assert releases._target(name, kind) == target
