"""What the workers did lately: feeds the stage metrics, and keeps enough for a trace."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from afd_server.core.clock import Clock
from afd_server.core.errors import ProtocolError
from afd_server.core.topology import Member, Topology
from afd_server.telemetry.metrics import GatewayMetrics
from afd_server.telemetry.timeline import EVENT_BYTES, Event, EventKind, read_events
from afd_server.telemetry.trace import CLOSING, OPENING, ChromeTrace
from afd_server.transport.messages import DType, LoadReport

KEPT_S = 30.0  # some 12 MB for a busy 1A1F
BUSY_REPORTS = 20  # make a busy ratio: 5 s, less than between two scrapes
# Clocks of one host are the same clock. Whoever can be reached by TCP may be on another: clocks of
# two hosts count from their starts, which are further apart than a report takes.
SAME_CLOCK_S = 0.005

COMPUTES = frozenset({EventKind.ATTENTION, EventKind.SAMPLE, EventKind.FFN})


@dataclass(slots=True)
class _Worker:
    """`behind_s` is the least that its reports' clock was behind ours at their receipt."""

    member: Member
    clock_us: int
    behind_s: float
    busy: deque[tuple[float, float]] = field(  # seconds computed, seconds passed
        default_factory=lambda: deque(maxlen=BUSY_REPORTS)
    )


@dataclass(frozen=True, slots=True)
class _Report:
    worker: _Worker
    received_s: float
    events: bytes


class StageView:
    """Takes the timelines out of load reports.

    Args:
        clock: says what is old.
        metrics: told of every event.
    """

    def __init__(self, clock: Clock, metrics: GatewayMetrics) -> None:
        self._clock = clock
        self._metrics = metrics
        self._workers: dict[str, _Worker] = {}  # by incarnation
        self._reports: deque[_Report] = deque()

    def follow(self, topology: Topology) -> None:
        """Forget workers that left; what they did stays for as long as a trace may want it."""
        self._workers = {inc: w for inc, w in self._workers.items() if topology.find(inc)}

    def take(self, member: Member, report: LoadReport, received_s: float) -> None:
        """Count and keep the events of a report.

        Raises:
            ProtocolError: they are none.
        """
        payload = report.events
        if payload.dtype is not DType.UINT8 or payload.shape[1:] != (EVENT_BYTES,):
            raise ProtocolError(f"events of shape {payload.shape}", "shape")
        events = bytes(payload.data)
        pool, busy_s = member.role.name.lower(), 0.0
        series = self._metrics.spans(pool)
        for event in read_events(events):
            duration_s = event.end_s - event.begin_s
            if event.kind in series:
                series[event.kind].observe(duration_s)
            if event.kind in COMPUTES:
                busy_s += duration_s
        worker = self._note(member, report.clock_us, received_s, busy_s)
        self._reports.append(_Report(worker, received_s, events))
        while self._reports[0].received_s < received_s - KEPT_S:
            self._reports.popleft()
        self._show_busy(pool)

    def trace(self, seconds: float) -> Iterator[str]:
        """Yield the pieces of a Chrome trace of the last seconds, one for each report."""
        begin_s = self._clock.now() - seconds
        trace = ChromeTrace(begin_s)
        yield OPENING
        for report in list(self._reports):
            if report.received_s >= begin_s:
                member = report.worker.member
                events = (event for event in _on_our_clock(report) if event.begin_s >= begin_s)
                yield trace.add(member.name, member.incarnation, events)
        yield CLOSING

    def _note(self, member: Member, clock_us: int, received_s: float, busy_s: float) -> _Worker:
        behind_s = received_s - clock_us / 1e6
        worker = self._workers.get(member.incarnation)
        if worker is None:
            worker = self._workers[member.incarnation] = _Worker(member, clock_us, behind_s)
            return worker
        worker.busy.append((busy_s, (clock_us - worker.clock_us) / 1e6))
        worker.clock_us = clock_us
        worker.behind_s = min(worker.behind_s, behind_s)
        return worker

    def _show_busy(self, pool: str) -> None:
        spans = [
            span
            for worker in self._workers.values()
            if worker.member.role.name.lower() == pool
            for span in worker.busy
        ]
        passed_s = sum(passed for _, passed in spans)
        if passed_s > 0:
            busy_s = sum(busy for busy, _ in spans)
            self._metrics.busy_ratio(pool, min(1.0, busy_s / passed_s))


def _on_our_clock(report: _Report) -> Iterator[Event]:
    behind_s = report.worker.behind_s
    is_same = report.worker.member.is_on_one_host or 0 <= behind_s < SAME_CLOCK_S
    shift_s = 0.0 if is_same else behind_s
    for event in read_events(report.events):
        begin_s, end_s = event.begin_s + shift_s, event.end_s + shift_s
        yield event._replace(begin_s=begin_s, end_s=end_s)
