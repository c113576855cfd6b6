"""The mark at the end of a carried output."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from serpentine.run.contained import End

MARK = b"abcabd"


@given(
    st.text(alphabet="abcd", max_size=40).map(str.encode).filter(lambda text: MARK not in text),
    st.lists(st.integers(0, 46), max_size=8),
)
def test_the_end_is_found_wherever_it_is_cut(text, cuts):
    whole = text + MARK
    places = sorted({0, len(whole), *(c for c in cuts if c < len(whole))})
    end, seen = End(MARK), b""
    for begin, stop in itertools.pairwise(places):
        assert not end.reached
        seen += end.feed(whole[begin:stop])
        assert text.startswith(seen)
    assert end.reached
    assert seen == text


def test_nothing_is_held_that_cannot_be_the_end():
    assert End(MARK).feed(b"xyz") == b"xyz"
    end = End(MARK)
    assert end.feed(b"xyzabc") == b"xyz"
    assert end.feed(b"x") == b"abcx"
