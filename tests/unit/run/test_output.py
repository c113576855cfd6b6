"""What is kept of an output: the last bytes, in order, in bounded memory."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serpentine.events import StepOutput, StepStarted
from serpentine.run.options import RunOptions
from serpentine.run.step import Output, Step


@given(
    st.lists(st.tuples(st.sampled_from([1, 2]), st.binary(min_size=1, max_size=20))),
    st.integers(0, 50),
)
def test_the_last_bytes_are_kept(chunks, limit):
    output = Output(limit)
    for stream, data in chunks:
        output.add(stream, data)
    each_byte = [(stream, byte) for stream, data in chunks for byte in data]
    kept = [(stream, byte) for stream, data in output.chunks() for byte in data]
    assert kept == each_byte[max(0, len(each_byte) - limit) :]
    assert output.dropped == len(each_byte) - len(kept)
    # Asking once more changes nothing.
    assert [(s, b) for s, data in output.chunks() for b in data] == kept


@pytest.mark.parametrize("size", [1, 100, 5_000, 100_000])
def test_memory_does_not_grow_with_the_output(size):
    """Neither with many small pieces nor with few large ones."""
    limit = 10_000
    output = Output(limit)
    for number in range(min(100_000, 20_000_000 // size)):
        output.add(1, b"x" * size)
        if number % 100 == 0:
            held = sum(len(data) for _, data in output._chunks)
            assert held <= max(2 * limit, size)
    assert b"".join(data for _, data in output.chunks()) == b"x" * limit


def test_single_bytes_do_not_cost_an_object_each():
    """Two hundred thousand of them would be 15 MB, kept for as long as the step runs."""
    output = Output(1 << 20)
    for _ in range(200_000):
        output.add(1, b"x")
    assert len(output._chunks) < 1000
    assert sum(len(data) for _, data in output.chunks()) == 200_000


def test_empty_output():
    output = Output(10)
    assert output.chunks() == ()
    assert output.dropped == 0


def test_the_start_is_told_before_the_output():
    """A quick process has printed before containerd answers that it has started."""
    events = []
    context = SimpleNamespace(on_event=events.append, containerd=SimpleNamespace(tasks=None))
    step = Step(context, "step-1", RunOptions())
    step.args = ("echo",)
    step._on_output(1, b"early")
    assert events == []
    step._tell_started()
    step._on_output(2, b"later")
    assert events == [
        StepStarted(step="step-1", args=("echo",)),
        StepOutput(step="step-1", stream=1, data=b"early"),
        StepOutput(step="step-1", stream=2, data=b"later"),
    ]
    assert step.result(None, 0).output == b"earlylater"
