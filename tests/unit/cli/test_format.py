"""Sizes and ages as people read them."""

from datetime import UTC, datetime, timedelta

import pytest

from serpentine.cli._format import age, size


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (3_400_000, "3.4 MB"),
        (99_400_000, "99.4 MB"),
        (99_500_000, "100 MB"),
        (999_499_999, "999 MB"),
        (999_500_000, "1.0 GB"),
        (10**18, "1000 PB"),
    ],
)
def test_size(count, text):
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "just now"),
        (0, "just now"),
        (1, "1 second ago"),
        (119, "1 minute ago"),
        (7200, "2 hours ago"),
        (200_000, "2 days ago"),
    ],
)
def test_age(seconds, text):
    now = datetime(2026, 1, 2, tzinfo=UTC)
    assert age(now, now - timedelta(seconds=seconds)) == text


def test_age_of_nothing():
    assert age(datetime(2026, 1, 2, tzinfo=UTC), None) == ""
