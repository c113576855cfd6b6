"""Settings: what wins over what, and what is refused."""

from pathlib import Path

import pytest

from serpentine.errors import InvalidSetting
from serpentine.settings import VARIABLES, Settings, load


@pytest.fixture
def config(tmp_path):
    def write(text: str) -> dict[str, str]:
        path = tmp_path / "config.toml"
        path.write_text(text)
        return {"SERPENTINE_CONFIG": str(path)}

    return write


def test_defaults_without_anything(tmp_path):
    settings = load({}, {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)})
    assert settings.namespace == "serpentine"
    assert settings.address is None
    assert settings.insecure_registries == ()
    assert settings == Settings()


def test_flag_over_environment_over_file_over_default(config):
    environ = config('namespace = "file"\nsnapshotter = "file"\naddress = "/file"')
    environ |= {"CONTAINERD_NAMESPACE": "env", "CONTAINERD_SNAPSHOTTER": "env"}
    settings = load({"namespace": "flag", "snapshotter": None, "address": ""}, environ)
    assert settings.namespace == "flag"
    assert settings.snapshotter == "env"
    assert settings.address == "/file"
    assert settings.sources["namespace"] == "argument"
    assert settings.sources["snapshotter"] == "CONTAINERD_SNAPSHOTTER"
    assert settings.sources["address"] == environ["SERPENTINE_CONFIG"]


def test_an_empty_variable_is_not_set(config):
    settings = load({}, {**config('namespace = "file"'), "CONTAINERD_NAMESPACE": ""})
    assert settings.namespace == "file"


def test_insecure_registries_from_each_source(config):
    environ = config('insecure_registries = ["a:5000", "b"]')
    assert load({}, environ).insecure_registries == ("a:5000", "b")
    environ["SERPENTINE_INSECURE_REGISTRIES"] = "c, d:1,"
    assert load({}, environ).insecure_registries == ("c", "d:1")
    assert load({"insecure_registries": ("e",)}, environ).insecure_registries == ("e",)


def test_directories_are_paths(config):
    environ = config('data_dir = "/x/y"')
    assert load({}, environ).data_dir == Path("/x/y")
    assert load({"data_dir": Path("/z")}, environ).data_dir == Path("/z")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("namespace = 3", "namespace"),
        ('namespace = "a b"', "namespace"),
        ('namespace = "../x"', "namespace"),
        ('snapshotter = "-"', "snapshotter"),
        (f'namespace = "{"n" * 77}"', "namespace"),
        ("colour = true", "colour"),
        ('sources = "x"', "sources"),
        ('data_dir = "relative"', "data_dir"),
        ("max_concurrent_downloads = 0", "max_concurrent_downloads"),
        ("max_concurrent_downloads = true", "max_concurrent_downloads"),
        ("insecure_registries = 7", "insecure_registries"),
        ('insecure_registries = ["https://x"]', "insecure_registries"),
        ('insecure_registries = ["user:secret@x"]', "insecure_registries"),
        ("= broken", "TOML"),
    ],
)
def test_a_bad_file_is_refused_and_named(config, text, named):
    environ = config(text)
    with pytest.raises(InvalidSetting) as caught:
        load({}, environ)
    assert named in str(caught.value)
    assert environ["SERPENTINE_CONFIG"] in str(caught.value)
    assert caught.value.hint


def test_a_bad_variable_is_refused_and_named():
    with pytest.raises(InvalidSetting, match="CONTAINERD_NAMESPACE"):
        load({}, {"CONTAINERD_NAMESPACE": "a/b"})


def test_a_named_file_must_exist(tmp_path):
    with pytest.raises(InvalidSetting, match="does not exist"):
        load({}, {"SERPENTINE_CONFIG": str(tmp_path / "none.toml")})


def test_each_variable_is_declared_once_and_sets_something_real():
    names = [variable.name for variable in VARIABLES]
    assert len(names) == len(set(names))
    for variable in VARIABLES:
        assert variable.meaning
        assert not variable.setting or hasattr(Settings(), variable.setting)
