"""Health is progress."""

from afd_server.core.clock import ManualClock
from afd_server.core.topology import Member, Role, Topology
from afd_server.gateway.pool_view import SILENT_AFTER_S, STUCK_AFTER_S, PoolView
from afd_server.transport.messages import EMPTY, LoadReport

ATTENTION = Member(Role.ATTENTION, 0, "a0", "", "")
FFN = Member(Role.FFN, 0, "f0", "", "")


def report(steps, running=1):
    return LoadReport(steps, running, 0, 1, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, EMPTY)


def view_of(*members):
    clock = ManualClock()
    view = PoolView(clock)
    view.follow(Topology(1, members))
    return view, clock


def test_a_worker_that_joined_has_as_long_for_its_first_report_as_for_the_next():
    view, clock = view_of(ATTENTION)
    clock.advance(SILENT_AFTER_S)
    view.follow(Topology(2, (ATTENTION, FFN)))
    assert view.trouble() == []
    clock.advance(0.1)
    assert view.trouble() == ["attention/0 has been silent for 3.1 s"]


def test_a_silent_worker_is_trouble():
    view, clock = view_of(ATTENTION)
    view.take_report("a0", report(1))
    assert view.trouble() == []
    clock.advance(SILENT_AFTER_S + 0.1)
    assert "silent" in view.trouble()[0]


def test_a_worker_that_reports_but_does_not_advance_is_trouble():
    view, clock = view_of(ATTENTION, FFN)
    for _ in range(int(STUCK_AFTER_S) + 2):
        view.take_report("a0", report(5))
        view.take_report("f0", report(5, running=0))
        clock.advance(1.0)
    view.take_report("a0", report(5))
    view.take_report("f0", report(5, running=0))
    assert [t.split()[0] for t in view.trouble() if "stuck" in t] == ["attention/0"]
    view.take_report("a0", report(6))
    assert view.trouble() == []


def test_reports_of_workers_that_left_are_forgotten():
    view, _ = view_of(ATTENTION)
    view.take_report("a0", report(1))
    view.follow(Topology(2, (FFN,)))
    assert view.report("a0") is None


def test_what_is_missing_is_counted_by_pool():
    view, _ = view_of(ATTENTION)
    assert view.missing(1, 0) == []
    assert view.missing(2, 1) == [
        "1 of 2 attention workers are there",
        "0 of 1 ffn workers are there",
    ]
