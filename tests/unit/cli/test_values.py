"""Ages and sizes as people type them."""

from datetime import timedelta

import click
import pytest

from serpentine.cli._values import parse_age, parse_size
from serpentine.cli.main import _run

CONTEXT = click.Context(click.Command("x"))
PARAMETER = click.Option(["--x"])


@pytest.mark.parametrize(
    ("text", "age"),
    [
        ("0s", timedelta(0)),
        ("90m", timedelta(hours=1, minutes=30)),
        ("1d12h", timedelta(hours=36)),
        ("0.5w", timedelta(days=3.5)),
    ],
)
def test_ages(text, age):
    assert parse_age(CONTEXT, PARAMETER, text) == age


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("17", 17),
        ("500MB", 500_000_000),
        ("1.5 kb", 1500),
        ("2GiB", 2 << 30),
        ("1T", 10**12),
        ("3b", 3),
    ],
)
def test_sizes(text, size):
    assert parse_size(CONTEXT, PARAMETER, text) == size


@pytest.mark.parametrize("text", ["", "7", "d", "-1d", "7 d", "7y", "1e9d", "٣d", "999999999w"])
def test_no_ages(text, capsys):
    with pytest.raises(click.BadParameter):
        parse_age(CONTEXT, PARAMETER, text)
    assert _run(["prune", "--older-than", text]) == 2
    assert "--older-than" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "GB", "-1", "1.", "1XB", "1iB", "9" * 400, "1e3", "9999PB"])
def test_no_sizes(text, capsys):
    with pytest.raises(click.BadParameter):
        parse_size(CONTEXT, PARAMETER, text)
    assert _run(["prune", "--keep-size", text]) == 2
    assert "--keep-size" in capsys.readouterr().err
