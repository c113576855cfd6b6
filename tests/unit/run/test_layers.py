"""Looking through the directories of an overlay, with its own rules, never out of them."""

from __future__ import annotations

import os
import stat

import pytest

from serpentine.containerd import Mount
from serpentine.run import layers as tested
from serpentine.run.layers import Layers, layers_of
from serpentine.run.site import Found


def look(layers, path, *, read=False):
    return tested.look(Layers(layers), path, read=read)


def forget(layers, path):
    tested.forget(Layers(layers), path)


def whiteout(path):
    # Anybody may make this one, since Linux 5.8.
    os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(0, 0))


def opaque(path):
    os.setxattr(path, "user.overlay.opaque", b"y")


@pytest.fixture
def layers(tmp_path):
    """Three directories of a snapshot, the topmost first."""
    made = [tmp_path / name for name in ("top", "middle", "bottom")]
    for folder in made:
        folder.mkdir()
    return made


def put(layer, path, data=b"data"):
    place = layer / path
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(data)


def link(layer, path, target):
    place = layer / path
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(target)


def read(layers, path):
    found = look(layers, path, read=True)
    return found.data if found.kind == "file" else found.kind


def test_what_there_is(layers):
    put(layers[2], "etc/passwd")
    os.mkfifo(layers[2] / "fifo")
    link(layers[2], "to", "etc")
    assert look(layers, "/etc/passwd") == Found("file")
    assert look(layers, "/etc/passwd", read=True) == Found("file", b"data")
    assert look(layers, "/etc", read=True) == Found("directory")
    assert look(layers, "/") == Found("directory")
    assert look(layers, "") == Found("directory")
    assert look(layers, "/fifo", read=True) == Found("other")
    assert look(layers, "//etc/./passwd") == Found("file")
    assert look(layers, "/etc/../etc/passwd") == Found("file")
    assert look(layers, "/../etc/passwd") == Found("file")
    assert look(layers, "/to/passwd") == Found("file")


def test_what_there_is_not(layers):
    put(layers[2], "etc/passwd")
    assert look(layers, "/etc/hosts") == Found("absent", missing="/etc/hosts")
    assert look(layers, "/var/lib/x") == Found("absent", missing="/var", rest="lib/x")
    assert look(layers, "/etc/a/b/c") == Found("absent", missing="/etc/a", rest="b/c")
    # Below what is no directory, nothing can be.
    assert look(layers, "/etc/passwd/x") == Found("other")
    assert look(layers, "/etc/passwd/..") == Found("other")


def test_the_topmost_counts(layers):
    for layer, data in zip(layers, (b"top", b"middle", b"bottom"), strict=True):
        put(layer, "both", data)
    put(layers[1], "two", b"middle")
    put(layers[2], "two", b"bottom")
    put(layers[1], "d/here", b"middle")
    put(layers[2], "d/there", b"bottom")
    assert read(layers, "/both") == b"top"
    assert read(layers, "/two") == b"middle"
    assert read(layers, "/d/here") == b"middle"
    assert read(layers, "/d/there") == b"bottom"


def test_one_look_for_many_paths(layers, monkeypatch):
    put(layers[0], "top/x")
    put(layers[1], "etc/group", b"middle")
    put(layers[2], "etc/passwd", b"bottom")
    whole = Layers(layers)
    listed = []
    list_folder = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: listed.append(path) or list_folder(path))
    assert tested.look(whole, "/etc/passwd", read=True) == Found("file", b"bottom")
    assert tested.look(whole, "/etc/group", read=True) == Found("file", b"middle")
    assert tested.look(whole, "/top/x") == Found("file")
    # Each below the topmost once, however many paths.
    assert listed == layers[1:]
    # The topmost is somebody's who writes to it.
    put(layers[0], "etc/group", b"new")
    assert tested.look(whole, "/etc/group", read=True) == Found("file", b"new")


def test_whiteouts_hide_what_is_below(layers):
    put(layers[2], "etc/passwd")
    put(layers[2], "gone/deep/file")
    (layers[1] / "etc").mkdir()
    whiteout(layers[1] / "etc/passwd")
    whiteout(layers[0] / "gone")
    assert look(layers, "/etc/passwd") == Found("absent", missing="/etc/passwd")
    assert look(layers, "/gone/deep/file") == Found("absent", missing="/gone", rest="deep/file")
    assert look(layers, "/etc") == Found("directory")
    put(layers[0], "etc/passwd", b"again")
    assert read(layers, "/etc/passwd") == b"again"


def test_opaque_directories_hide_what_is_below(layers):
    put(layers[2], "d/old")
    put(layers[2], "d/e/old")
    put(layers[1], "d/new")
    opaque(layers[1] / "d")
    put(layers[0], "d/newest")
    assert read(layers, "/d/newest") == b"data"
    assert read(layers, "/d/new") == b"data"
    assert look(layers, "/d/old") == Found("absent", missing="/d/old")
    assert look(layers, "/d/e/old") == Found("absent", missing="/d/e", rest="old")


def test_what_has_another_value_is_not_opaque(layers):
    put(layers[1], "d/old")
    (layers[0] / "d").mkdir()
    os.setxattr(layers[0] / "d", "user.overlay.opaque", b"x")
    assert read(layers, "/d/old") == b"data"


def test_a_file_hides_a_directory_and_all_below_it(layers):
    put(layers[2], "d/old")
    put(layers[1], "d", b"a file now")
    assert read(layers, "/d") == b"a file now"
    assert look(layers, "/d/old") == Found("other")
    # Again a directory above it: what was there before stays hidden.
    (layers[0] / "d").mkdir()
    assert look(layers, "/d") == Found("directory")
    assert look(layers, "/d/old") == Found("absent", missing="/d/old")


def test_a_link_in_place_of_a_directory_hides_it(layers):
    put(layers[2], "etc/passwd", b"hidden")
    put(layers[2], "usr/etc/passwd", b"seen")
    link(layers[0], "etc", "usr/etc")
    assert read(layers, "/etc/passwd") == b"seen"


def test_links_are_followed_across_layers(layers):
    put(layers[2], "usr/lib/passwd", b"there")
    link(layers[0], "etc/passwd", "../usr/lib/passwd")
    link(layers[0], "etc/absolute", "/usr/lib/passwd")
    link(layers[1], "lib", "usr/lib")
    link(layers[0], "chain", "lib/../../etc/absolute")
    assert read(layers, "/etc/passwd") == b"there"
    assert read(layers, "/etc/absolute") == b"there"
    assert read(layers, "/lib/passwd") == b"there"
    # ".." is that of where the link led to: /usr/lib/../../etc.
    assert read(layers, "/chain") == b"there"


def test_links_do_not_lead_out(layers, tmp_path):
    put(tmp_path, "secret", b"the machine's own")
    put(layers[2], "secret", b"the snapshot's")
    link(layers[0], "up", "../../../../../../../../../../../secret")
    link(layers[0], "etc/up", "../../../secret")
    link(layers[0], "absolute", str(tmp_path / "secret"))
    link(layers[0], "folder", str(tmp_path))
    link(layers[0], "machine", "/proc/self/root")
    assert read(layers, "/up") == b"the snapshot's"
    assert read(layers, "/etc/up") == b"the snapshot's"
    assert look(layers, "/absolute").kind == "absent"
    assert look(layers, "/folder/secret").kind == "absent"
    assert look(layers, "/machine/etc/passwd").kind == "absent"


def test_links_that_lead_nowhere(layers):
    link(layers[0], "self", "self")
    link(layers[0], "a", "b")
    link(layers[0], "b", "/a")
    link(layers[0], "dangling", "etc/none")
    link(layers[0], "root", "/")
    for path in ("/self", "/a", "/b/c", "/self/.."):
        assert look(layers, path) == Found("other")
    # What would have to be made is said, not the link.
    assert look(layers, "/dangling") == Found("absent", missing="/etc", rest="none")
    assert look(layers, "/root") == Found("directory")


@pytest.mark.parametrize(("links", "kind"), [(40, "file"), (41, "other")])
def test_as_many_links_as_the_kernel_follows(layers, links, kind):
    put(layers[2], "0")
    for n in range(links):
        link(layers[n % 3], f"{n + 1}", f"{n}")
    assert look(layers, f"/{links}").kind == kind


def test_names_that_are_not_utf8(layers):
    link(layers[0], "to", os.fsdecode(b"\xff\xfe"))
    put(layers[2], os.fsdecode(b"\xff\xfe"), b"bytes")
    assert read(layers, "/to") == b"bytes"


def test_names_that_are_too_long(layers):
    """No file can be called so; an image's link may still say it."""
    link(layers[0], "to", "x" * 300)
    assert look(layers, "/to").kind == "absent"
    assert look(layers, f"/{'y' * 300}/z").kind == "absent"


def test_a_file_of_any_size_is_read_up_to_a_bound(layers):
    with (layers[0] / "large").open("wb") as file:
        file.truncate(1 << 40)
    assert len(look(layers, "/large", read=True).data) == 4 << 20


def overlay(*options):
    return Mount("overlay", "overlay", "", tuple(options))


@pytest.mark.parametrize(
    ("mounts", "expected"),
    [
        ([overlay("lowerdir=/a:/b")], ["/a", "/b"]),
        ([overlay("index=off", "workdir=/w", "upperdir=/u", "lowerdir=/a")], ["/u", "/a"]),
        ([Mount("bind", "/only", "", ("rw", "rbind"))], ["/only"]),
        ([], None),
        ([overlay("lowerdir=/a"), overlay("lowerdir=/b")], None),
        ([overlay("index=off")], None),
        ([Mount("ext4", "/dev/mapper/x", "", ())], None),
        ([Mount("fuse3.fuse-overlayfs", "overlay", "", ("lowerdir=/a",))], None),
    ],
)
def test_layers_of_mounts(mounts, expected):
    found = layers_of(mounts)
    assert (found and [str(p) for p in found]) == expected


# --- what was made to mount on, and goes again --------------------------------------------------


def test_what_is_empty_is_forgotten(layers):
    put(layers[0], "etc/hosts", b"")
    put(layers[0], "etc/written", b"x")
    (layers[0] / "proc").mkdir()
    for path in ("/etc/hosts", "/etc/written", "/etc", "/proc", "/none", "/none/x", "/"):
        forget(layers, path)
    assert sorted(p.name for p in layers[0].rglob("*")) == ["etc", "written"]


def test_nothing_is_forgotten_through_a_link(layers, tmp_path):
    put(tmp_path, "outside/hosts", b"")
    put(layers[0], "real/hosts", b"")
    link(layers[0], "etc", "real")
    link(layers[0], "out", str(tmp_path / "outside"))
    link(layers[0], "hosts", "real/hosts")
    for path in ("/etc/hosts", "/out/hosts", "/hosts", "/real/../real/hosts"):
        forget(layers, path)
    assert (tmp_path / "outside/hosts").exists()
    assert (layers[0] / "real/hosts").exists()
    assert (layers[0] / "hosts").is_symlink()


def copied_up(layers):
    """Two directories in which nothing but a place to mount on was made."""
    for layer in layers[:2]:
        (layer / "etc/deep").mkdir(parents=True)
    put(layers[2], "etc/passwd")
    put(layers[0], "etc/deep/mounted", b"")


def test_directories_that_were_copied_up_go_as_well(layers):
    copied_up(layers)
    forget(layers, "/etc/deep/mounted")
    assert list(layers[0].iterdir()) == []
    assert (layers[1] / "etc/deep").is_dir()


def test_directories_that_the_step_changed_stay(layers):
    copied_up(layers)
    (layers[0] / "etc/deep").chmod(0o700)
    forget(layers, "/etc/deep/mounted")
    assert [p.name for p in (layers[0] / "etc").iterdir()] == ["deep"]


@pytest.mark.parametrize("change", ["mode", "attribute", "opaque", "new", "file"])
def test_directories_that_are_not_as_before_stay(layers, change):
    put(layers[0], "etc/mounted", b"")
    folder = layers[0] / "etc"
    if change not in ("new", "file"):
        (layers[2] / "etc").mkdir()
    if change == "mode":
        folder.chmod(0o711)
    elif change == "attribute":
        os.setxattr(folder, "user.mine", b"x")
    elif change == "opaque":
        opaque(folder)
    elif change == "file":
        put(layers[2], "etc")
    forget(layers, "/etc/mounted")
    assert [p.name for p in layers[0].rglob("*")] == ["etc"]


def test_one_layer_alone(tmp_path):
    put(tmp_path, "etc/mounted", b"")
    forget([tmp_path], "/etc/mounted")
    assert [p.name for p in tmp_path.rglob("*")] == ["etc"]
