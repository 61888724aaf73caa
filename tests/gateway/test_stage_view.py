"""What the gateway makes of the workers' timelines."""

import json

import pytest

from afd_server.core.clock import ManualClock
from afd_server.core.errors import ProtocolError
from afd_server.core.stage import StageId
from afd_server.core.topology import Member, Role, Topology
from afd_server.gateway.stage_view import KEPT_S, StageView
from afd_server.telemetry.metrics import GatewayMetrics
from afd_server.telemetry.timeline import EVENT_BYTES, EventKind, Timeline
from afd_server.transport.messages import DType, LoadReport, Payload

ATTENTION = Member(Role.ATTENTION, 0, "a0", "", "")
OTHER = Member(Role.ATTENTION, 1, "a1", "", "")
FFN = Member(Role.FFN, 0, "f0", "", "")


class Bench:
    """A view at a gateway whose clock says 1000."""

    def __init__(self):
        self.clock = ManualClock(1000.0)
        self.metrics = GatewayMetrics("m")
        self.view = StageView(self.clock, self.metrics)
        self.view.follow(Topology(1, (ATTENTION, OTHER, FFN)))

    def report(self, member, *events, delay_s=0.0, ahead_s=0.0):
        """Take a report with (kind, begin, end) on the gateway's clock; the worker's is ahead."""
        timeline = Timeline()
        for kind, begin_s, end_s in events:
            timeline.record(kind, begin_s + ahead_s, end_s + ahead_s, StageId(1, 0, 2), 4)
        data = timeline.drain()
        payload = Payload(DType.UINT8, (len(events), EVENT_BYTES), memoryview(data))
        now_s = self.clock.now()
        clock_us = int((now_s - delay_s + ahead_s) * 1e6)
        self.view.take(member, LoadReport(*[0] * 13, clock_us, 0, 0, 0, 0, payload), now_s)

    def spans(self, seconds):
        rows = json.loads("".join(self.view.trace(seconds)))["traceEvents"]
        return [row for row in rows if row["ph"] == "X"]

    def value(self, name, **labels):
        return self.metrics.registry.get_sample_value(name, labels)


def test_events_are_counted_by_kind_and_direction():
    bench = Bench()
    bench.report(
        ATTENTION,
        (EventKind.ATTENTION, 999.0, 999.1),
        (EventKind.ATTENTION, 999.2, 999.3),
        (EventKind.A_TO_F, 999.0, 999.25),
        (EventKind.STEP, 999.0, 999.5),
        (EventKind.EXPECTED, 999.0, 999.25),
        (EventKind.GATHERED, 999.0, 999.5),
    )
    assert bench.value("afd_attention_seconds_count") == 2
    assert bench.value("afd_attention_seconds_sum") == pytest.approx(0.2)
    assert bench.value("afd_transfer_seconds_sum", direction="a_to_f") == 0.25
    assert bench.value("afd_transfer_seconds_count", direction="f_to_a") == 0
    assert bench.value("afd_lane_step_seconds_count") == 1
    assert bench.value("afd_expected_lane_step_seconds_sum") == 0.25
    assert bench.value("afd_ffn_seconds_count") == 0


def test_a_pool_is_as_busy_as_its_workers_computed():
    bench = Bench()
    bench.report(ATTENTION)
    bench.report(OTHER)
    assert bench.value("afd_pool_busy_ratio", pool="attention") is None
    bench.clock.advance(1.0)
    now = bench.clock.now()
    spans = [(EventKind.ATTENTION, now - 1, now - 0.5), (EventKind.SAMPLE, now - 0.5, now - 0.25)]
    bench.report(ATTENTION, *spans, (EventKind.STEP, now - 1, now), (EventKind.WAIT, now - 1, now))
    assert bench.value("afd_pool_busy_ratio", pool="attention") == pytest.approx(0.75)
    bench.report(OTHER)
    assert bench.value("afd_pool_busy_ratio", pool="attention") == pytest.approx(0.375)
    bench.view.follow(Topology(2, (OTHER,)))
    bench.clock.advance(1.0)
    bench.report(OTHER)
    assert bench.value("afd_pool_busy_ratio", pool="attention") == 0


def test_a_trace_holds_the_last_seconds_of_every_worker():
    bench = Bench()
    bench.report(ATTENTION, (EventKind.ATTENTION, 994, 995), (EventKind.ATTENTION, 998.5, 999.0))
    bench.report(FFN, (EventKind.FFN, 999.25, 999.5))
    spans = bench.spans(5)
    assert [(s["name"], s["ts"], s["dur"]) for s in spans] == [
        ("attention", 3_500_000, 500_000),
        ("ffn", 4_250_000, 250_000),
    ]
    assert len(bench.spans(10)) == 3
    bench.clock.advance(20)
    assert bench.spans(5) == []


def test_a_worker_that_left_stays_in_the_trace():
    bench = Bench()
    bench.report(FFN, (EventKind.FFN, 999, 1000))
    bench.view.follow(Topology(2, (ATTENTION,)))
    assert len(bench.spans(5)) == 1


def test_old_reports_are_forgotten():
    bench = Bench()
    for _ in range(200):
        bench.report(FFN, (EventKind.FFN, 999, 1000))
        bench.clock.advance(0.25)
    assert len(bench.view._reports) == KEPT_S / 0.25 + 1


def test_another_hosts_clock_is_set_by_its_quickest_report():
    bench = Bench()
    event = (EventKind.FFN, 999.0, 999.5)
    bench.report(FFN, event, ahead_s=5000.0, delay_s=0.2)
    assert bench.spans(2)[0]["ts"] == 1_200_000
    bench.report(FFN, event, ahead_s=5000.0, delay_s=0.001)
    assert [span["ts"] for span in bench.spans(2)] == [1_001_000] * 2


def test_on_one_host_the_delay_of_a_report_shifts_nothing():
    bench = Bench()
    bench.report(FFN, (EventKind.FFN, 999.0, 999.5), delay_s=0.001)
    assert bench.spans(2)[0]["ts"] == 1_000_000
    local = Member(Role.FFN, 1, "f1", "ipc:///run/f1", "")
    bench.report(local, (EventKind.FFN, 999.0, 999.5), delay_s=0.2)  # nothing more is known of it
    assert bench.spans(2)[1]["ts"] == 1_000_000


@pytest.mark.parametrize(
    "payload",
    [
        Payload(DType.INT64, (1, 5), bytes(40)),
        Payload(DType.UINT8, (40,), bytes(40)),
        Payload(DType.UINT8, (1, 39), bytes(39)),
        Payload(DType.UINT8, (1, 40), bytes(40)),
    ],
)
def test_events_that_are_none_are_refused(payload):
    bench = Bench()
    with pytest.raises(ProtocolError):
        bench.view.take(FFN, LoadReport(*[0] * 18, payload), 1000.0)
