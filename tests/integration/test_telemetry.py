"""A real pull, logged and traced."""

from __future__ import annotations

import logging

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from serpentine.errors import RegistryNotFound
from tests.support.images import file, image, layer, noise, push


def made(name: str):
    return image([layer([file(f"{name}{n}", noise(f"{name}{n}", 50_000))]) for n in range(3)])


async def test_spans_of_a_pull(containerd, namespace, registry):
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("test")
    reference = push(registry, "telemetry/spans", "1", made("spans"))
    async with containerd.connect(namespace=namespace, tracer=tracer) as engine:
        with tracer.start_as_current_span("mine") as mine:
            state = await engine.pull_image(reference)
        with pytest.raises(RegistryNotFound):
            await engine.pull_image(f"{registry.address}/telemetry/none:1")
    spans = exporter.get_finished_spans()
    pulls = [span for span in spans if span.name == "serpentine.pull"]
    assert pulls[0].parent.span_id == mine.get_span_context().span_id
    assert pulls[0].attributes["oci.manifest.digest"] == state.manifest_digest
    assert pulls[1].attributes["error.type"] == "RegistryNotFound"
    for name in ("serpentine.download", "serpentine.unpack"):
        below = [span for span in spans if span.name == name]
        assert len(below) == 3
        assert {span.parent.span_id for span in below} == {pulls[0].context.span_id}
        assert all(pulls[0].start_time <= span.start_time for span in below)
        assert all(span.end_time <= pulls[0].end_time for span in below)
    hosts = {span.attributes["serpentine.hosts"] for span in spans if "download" in span.name}
    assert hosts == {(registry.address,)}
    provider.shutdown()


async def test_log_records_of_a_pull(engine, registry, caplog):
    caplog.set_level(logging.INFO, logger="serpentine")
    reference = push(registry, "telemetry/logs", "1", made("logs"))
    await engine.pull_image(reference)
    names = [record.event.name for record in caplog.records if record.name == "serpentine"]
    assert names == ["pull_started", "pull_resolved", "pull_finished"]
    with pytest.raises(RegistryNotFound):
        await engine.pull_image(f"{registry.address}/telemetry/none:1")
    assert caplog.records[-1].event.name == "pull_failed"


def test_the_command_line_logs_to_stderr(command, registry):
    reference = push(registry, "telemetry/command", "1", made("command"))
    quiet = command("pull", "-q", reference)
    assert quiet.err == ""
    done = command("--log-level", "info", "pull", "-q", reference)
    assert (done.status, done.out) == (0, quiet.out)
    assert f" INFO serpentine: pull_started image={reference}\n" in done.err
    assert "layer_progress" not in done.err
    done = command("run", "--pull", "always", "-q", reference, "x", SERPENTINE_LOG="debug")
    assert " DEBUG serpentine: pull_planned" in done.err


def test_traces_by_the_environment(command, registry):
    """With nobody to collect them, they cost nothing and say nothing."""
    reference = push(registry, "telemetry/traces", "1", made("traces"))
    done = command("pull", "-q", reference, SERPENTINE_TRACES="1")
    assert (done.status, done.err) == (0, "")
    done = command("pull", "-q", reference, SERPENTINE_TRACES="maybe")
    assert done.status == 2
