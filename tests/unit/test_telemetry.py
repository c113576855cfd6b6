"""Events as log lines and as spans."""

from __future__ import annotations

import logging
import subprocess
import sys
from typing import get_args

import pytest
from msgspec.structs import fields
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

import serpentine
from serpentine import events
from serpentine.cli.main import _run
from serpentine.errors import InvalidSetting
from serpentine.events import (
    CopyNotice,
    LayerPlan,
    LayerProgress,
    LayerStatus,
    PullFailed,
    PullFinished,
    PullPlanned,
    PullResolved,
    PullStarted,
    Received,
    Retrying,
    ServiceOutput,
    StepOutput,
    StepStarted,
)
from serpentine.settings import load
from serpentine.telemetry import LOGGER, Logs, Spans, watched

IMAGE = "example.com/a:1"
ONE, TWO = f"sha256:{'1' * 64}", f"sha256:{'2' * 64}"
S = LayerStatus
DONE = PullFinished(IMAGE, "key", 1500, 2, 0, 6, 3.0)
URL = "https://cdn.example/x?signature=SECRET"


def moved(index: int, digest: str, status: LayerStatus, offset: int = 0) -> LayerProgress:
    return LayerProgress(IMAGE, index, digest, status, offset, 1000)


PULL = [
    PullStarted(IMAGE),
    PullResolved(IMAGE, "linux/amd64", "sha256:m", "sha256:i"),
    PullPlanned(IMAGE, (LayerPlan(ONE, 1000, S.WAITING), LayerPlan(TWO, 1000, S.WAITING))),
    moved(0, ONE, S.DOWNLOADING),
    moved(1, TWO, S.DOWNLOADING, 500),
    moved(0, ONE, S.DOWNLOADING, 100),
    Received(IMAGE, ONE, "mirror.example", 0, 400, 0.5),
    Retrying(f"layer {ONE}", f"mirror.example broke {URL}", 0.25),
    Retrying("GET blobs/x", "slow down", 1.0),
    Received(IMAGE, ONE, "example.com", 400, 600, 0.5),
    moved(0, ONE, S.DOWNLOADED, 1000),
    moved(0, ONE, S.APPLYING, 1000),
    Received(IMAGE, TWO, "example.com", 500, 500, 0.5),
    moved(1, TWO, S.DOWNLOADED, 1000),
    moved(0, ONE, S.DONE, 1000),
    moved(1, TWO, S.APPLYING, 1000),
    moved(1, TWO, S.DONE, 1000),
    DONE,
]


class TestLogs:
    def lines(self, caplog, level: int, *happened: events.Event) -> list[str]:
        caplog.set_level(level, logger="serpentine")
        logs = Logs()
        for event in happened:
            logs(event)
        return [f"{record.levelname} {record.getMessage()}" for record in caplog.records]

    def test_a_pull_at_info(self, caplog):
        digests = "manifest_digest=sha256:m index_digest=sha256:i"
        reason = 'reason="mirror.example broke https://cdn.example/…"'
        counts = "bytes_downloaded=1500 layers_total=2 layers_reused=0 registry_requests=6"
        assert self.lines(caplog, logging.INFO, *PULL) == [
            f"INFO pull_started image={IMAGE}",
            f"INFO pull_resolved image={IMAGE} platform=linux/amd64 {digests}",
            f'INFO retrying what="layer {ONE}" {reason} delay=0.250',
            'INFO retrying what="GET blobs/x" reason="slow down" delay=1.000',
            f"INFO pull_finished image={IMAGE} snapshot_key=key {counts} seconds=3.000",
        ]
        assert caplog.records[0].event == PULL[0]
        assert caplog.records[0].name == "serpentine"

    def test_at_debug_each_change_of_a_layer_once(self, caplog):
        found = self.lines(caplog, logging.DEBUG, *PULL)
        assert "DEBUG pull_planned image=example.com/a:1 layers=0/2" in found
        layers = [line for line in found if "layer_progress" in line]
        assert len(layers) == 8
        assert len([line for line in found if "DEBUG received" in line]) == 3

    def test_what_a_step_prints_and_is_given_is_not_logged(self, caplog):
        found = self.lines(
            caplog,
            logging.DEBUG,
            StepStarted("s1", ("sh", "-c", "login SECRET")),
            StepOutput("s1", 1, b"SECRET"),
            ServiceOutput("db", 1, b"SECRET"),
        )
        assert found == ["INFO step_started step=s1 args=sh"]

    def test_one_line_whatever_is_in_it(self, caplog):
        (line,) = self.lines(caplog, logging.INFO, CopyNotice('a\nb "c"\x1b[0m'))
        assert line == r'INFO copy_notice text="a\nb \"c\"\u001b[0m"'

    def test_every_event_can_be_logged(self, caplog):
        kinds = [
            kind
            for kind in vars(events).values()
            if isinstance(kind, type) and issubclass(kind, events.Event)
        ]
        values = {str: "x", int: 1, float: 1.0, bool: True, bytes: b"x"}
        for kind in kinds:
            given = {
                field.name: values.get((*get_args(field.type), field.type)[0], ())
                for field in fields(kind)
            }
            if "status" in given:
                given["status"] = S.DONE
            self.lines(caplog, logging.DEBUG, kind(**given))

    def test_off_unless_somebody_asks(self):
        """Without a handler of the application's, Python would print warnings on stderr."""
        code = (
            "from serpentine.telemetry import LOGGER, Logs\n"
            "from serpentine.events import PullStarted\n"
            "Logs()(PullStarted('a')); LOGGER.warning('x')"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30
        )
        assert (done.stdout, done.stderr) == ("", "")


class TestSpans:
    @pytest.fixture
    def exporter(self):
        return InMemorySpanExporter()

    @pytest.fixture
    def tracer(self, exporter):
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        yield provider.get_tracer("test")
        provider.shutdown()

    def play(self, tracer, *happened: events.Event) -> None:
        spans = Spans(tracer)
        for event in happened:
            spans(event)

    def test_a_pull(self, exporter, tracer):
        with tracer.start_as_current_span("the user's"):
            self.play(tracer, *PULL)
        spans = exporter.get_finished_spans()
        assert [span.name for span in spans] == [
            "serpentine.download",
            "serpentine.download",
            "serpentine.unpack",
            "serpentine.unpack",
            "serpentine.pull",
            "the user's",
        ]
        first, second, unpack, _, pull, users = spans
        assert pull.parent.span_id == users.context.span_id
        assert {span.parent.span_id for span in spans[:4]} == {pull.context.span_id}
        assert dict(pull.attributes) == {
            "container.image.name": IMAGE,
            "oci.manifest.digest": "sha256:m",
            "serpentine.platform": "linux/amd64",
            "serpentine.bytes_downloaded": 1500,
            "serpentine.layers.total": 2,
            "serpentine.layers.reused": 0,
            "serpentine.registry_requests": 6,
        }
        assert dict(first.attributes) == {
            "serpentine.layer.digest": ONE,
            "serpentine.layer.size": 1000,
            "serpentine.layer.resumed_at": 0,
            "serpentine.hosts": ("example.com", "mirror.example"),
            "serpentine.bytes_downloaded": 1000,
        }
        assert second.attributes["serpentine.layer.resumed_at"] == 500
        assert second.attributes["serpentine.bytes_downloaded"] == 500
        assert unpack.attributes["serpentine.layer.digest"] == ONE
        assert [(e.name, dict(e.attributes)["delay"]) for e in first.events] == [("retry", 0.25)]
        assert "SECRET" not in first.to_json()
        assert [dict(e.attributes)["what"] for e in pull.events] == ["GET blobs/x"]
        assert {span.status.status_code for span in spans} == {StatusCode.UNSET}

    def test_a_failure_ends_all_that_is_open(self, exporter, tracer):
        failed = PullFailed(IMAGE, "TransferError", f"it broke at {URL}", False, 2.0)
        self.play(tracer, *PULL[:7], moved(0, ONE, S.DOWNLOADED), moved(0, ONE, S.APPLYING), failed)
        spans = {span.name: span for span in exporter.get_finished_spans()}
        assert [span.name for span in exporter.get_finished_spans()] == [
            "serpentine.download",
            "serpentine.download",
            "serpentine.unpack",
            "serpentine.pull",
        ]
        for name in ("serpentine.download", "serpentine.unpack", "serpentine.pull"):
            assert spans[name].status.status_code is StatusCode.ERROR
            assert spans[name].status.description == "it broke at https://cdn.example/…"
        assert spans["serpentine.pull"].attributes["error.type"] == "TransferError"

    def test_a_cancellation(self, exporter, tracer):
        self.play(tracer, *PULL[:4], PullFailed(IMAGE, "CancelledError", "", True, 2.0))
        pull = exporter.get_finished_spans()[-1]
        assert (pull.name, pull.status.description) == ("serpentine.pull", "CancelledError")

    def test_one_that_failed_before_it_began_took_its_time(self, exporter, tracer):
        self.play(tracer, PullFailed(IMAGE, "NotFound", "not here", False, 2.0))
        (pull,) = exporter.get_finished_spans()
        assert 2.0 <= (pull.end_time - pull.start_time) / 1e9 < 3.0

    def test_begun_once_more(self, exporter, tracer):
        self.play(tracer, *PULL[:7], *PULL)
        spans = exporter.get_finished_spans()
        assert [span.name for span in spans].count("serpentine.pull") == 1
        assert [span.name for span in spans].count("serpentine.download") == 4
        assert [span.status.description for span in spans[:2]] == ["containerd went away"] * 2

    def test_nothing_was_done(self, exporter, tracer):
        self.play(tracer, DONE)
        assert exporter.get_finished_spans() == ()

    def test_the_same_blob_twice(self, exporter, tracer):
        self.play(
            tracer,
            PullStarted(IMAGE),
            *(moved(index, ONE, S.DOWNLOADING) for index in (0, 1)),
            *(moved(index, ONE, S.DOWNLOADED) for index in (0, 1)),
            *(moved(index, ONE, S.APPLYING) for index in (0, 1)),
            *(moved(index, ONE, S.DONE) for index in (0, 1)),
            DONE,
        )
        names = [span.name for span in exporter.get_finished_spans()]
        assert names == ["serpentine.download", *["serpentine.unpack"] * 2, "serpentine.pull"]


def test_the_listener_gets_all_of_it():
    got: list = []
    tell = watched(got.append)
    for event in PULL:
        tell(event)
    assert got == PULL


def test_without_opentelemetry_the_setting_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    serpentine.connect(settings=load())
    with pytest.raises(InvalidSetting, match="OpenTelemetry") as caught:
        serpentine.connect(settings=load({"traces": True}))
    assert "serpentine[otel]" in caught.value.hint


def test_neither_is_imported_without_need():
    code = (
        "import sys, serpentine\n"
        "serpentine.connect('/x')\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30
    )
    assert done.stdout == "[]\n"


class TestCommandLine:
    def test_the_option_lasts_for_one_command(self, capsys):
        before = list(LOGGER.handlers)
        assert _run(["--log-level", "DEBUG", "version"]) == 0
        assert (LOGGER.handlers, LOGGER.level) == (before, logging.NOTSET)
        assert capsys.readouterr().err == ""

    @pytest.mark.parametrize("how", ["option", "environment"])
    def test_a_level_that_is_none(self, capsys, monkeypatch, how):
        arguments = ["version"]
        if how == "option":
            arguments = ["--log-level", "loud", "version"]
        else:
            monkeypatch.setenv("SERPENTINE_LOG", "loud")
        assert _run(arguments) == 2
        assert "loud" in capsys.readouterr().err
