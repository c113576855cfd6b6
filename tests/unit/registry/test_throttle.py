"""So many bytes per second, however many take them."""

from __future__ import annotations

import pytest

from serpentine.registry.throttle import Throttle


def test_no_limit():
    assert Throttle(None).delay(1 << 40) == 0


def test_bytes_of_all_count_together():
    now = 100.0
    throttle = Throttle(1000, clock=lambda: now)
    assert throttle.delay(500) == pytest.approx(0.5)
    # Another download's, at the same moment: after the first one's.
    assert throttle.delay(1000) == pytest.approx(1.5)
    now += 1.0
    assert throttle.delay(0) == pytest.approx(0.5)
    # What was not taken is not saved up.
    now += 1000
    assert throttle.delay(100) == pytest.approx(0.1)
