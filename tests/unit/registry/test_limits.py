"""How many requests a registry says are left."""

import pytest

from serpentine.events import RateLimit
from serpentine.registry.limits import rate_limit


@pytest.mark.parametrize(
    ("remaining", "limit", "found"),
    [
        ("76;w=21600", "100;w=21600", (76, 100, 21600)),
        ("0;w=21600", "100;w=21600", (0, 100, 21600)),
        ("76", "100", (76, 100, None)),
        (" 76 ; w=60 ", "100;w=60, 1000;w=3600", (76, 100, 60)),
        ("76", "100;w=60", (76, 100, 60)),
        ("76;w=60", "", (76, None, 60)),
        ("76;w=60", "lots", (76, None, 60)),
        ("76;w=1;burst=3", "100", (76, 100, 1)),
    ],
)
def test_what_is_left(remaining, limit, found):
    headers = {"RateLimit-Remaining": remaining, "RateLimit-Limit": limit}
    assert rate_limit("h", headers) == RateLimit("h", *found)


@pytest.mark.parametrize("remaining", ["", "many", "-1", "1.5", "\u0661", "9" * 100])
def test_nothing_that_is_clear(remaining):
    headers = {"RateLimit-Remaining": remaining, "RateLimit-Limit": "100;w=21600"}
    assert rate_limit("h", headers) is None


def test_without_the_header():
    assert rate_limit("h", {}) is None
