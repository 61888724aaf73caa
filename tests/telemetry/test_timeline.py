"""The ring: what was recorded comes back, and what does not fit is counted."""

import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afd_server.core.errors import ProtocolError
from afd_server.core.stage import StageId
from afd_server.telemetry.timeline import (
    EVENT_BYTES,
    LONGEST_S,
    EventKind,
    Timeline,
    read_events,
)


def steps_of(timeline):
    return [event.step for event in read_events(timeline.drain())]


def test_an_event_comes_back_as_it_was_recorded():
    timeline = Timeline()
    stage = StageId(2**40, 3, 29)
    timeline.record(EventKind.A_TO_F, 100.25, 100.5, stage, rows=256, peer=7)
    (event,) = read_events(timeline.drain())
    assert event._asdict() == {
        "begin_s": 100.25, "end_s": 100.5, "step": 2**40, "rows": 256, "lane": 3,
        "kind": EventKind.A_TO_F, "layer": 29, "peer": 7,
    }  # fmt: skip


def test_what_was_drained_does_not_come_again():
    timeline = Timeline()
    timeline.record(EventKind.WAIT, 1.0, 2.0)
    assert len(timeline.drain()) == EVENT_BYTES
    assert timeline.drain() == b""


@given(st.integers(1, 7), st.lists(st.integers(0, 20), max_size=6))
def test_a_drain_gives_the_latest_events_in_order_and_counts_the_rest(capacity, batches):
    timeline, step, num_dropped = Timeline(capacity), 0, 0
    for size in batches:
        first = step
        for _ in range(size):
            timeline.record(EventKind.STEP, 0.0, 1.0, StageId(step, 0, 0))
            step += 1
        kept = min(size, capacity)
        assert steps_of(timeline) == list(range(first, step))[size - kept :]
        num_dropped += size - kept
    assert timeline.num_dropped == num_dropped


def test_events_since_a_moment_come_whether_or_not_they_were_drained():
    timeline = Timeline(3)
    timeline.record(EventKind.STEP, 0.0, 1.0, StageId(1, 0, 0))
    mark = timeline.num_recorded
    assert timeline.since(mark) == b""
    for step in (2, 3):
        timeline.record(EventKind.STEP, 0.0, 1.0, StageId(step, 0, 0))
    for _ in range(2):
        assert [event.step for event in read_events(timeline.since(mark))] == [2, 3]
        timeline.drain()
    for step in (4, 5):
        timeline.record(EventKind.STEP, 0.0, 1.0, StageId(step, 0, 0))
    assert [event.step for event in read_events(timeline.since(mark))] == [3, 4, 5]  # all it holds
    assert steps_of(timeline) == [4, 5]
    assert timeline.num_dropped == 0


def test_bytes_that_are_no_whole_events_are_refused():
    with pytest.raises(ProtocolError, match="whole number"):
        list(read_events(bytes(EVENT_BYTES + 1)))


@pytest.mark.parametrize(
    ("begin_s", "end_s", "kind"),
    [
        (2.0, 1.0, EventKind.WAIT),
        (0.0, LONGEST_S + 1, EventKind.WAIT),
        (math.nan, 1.0, EventKind.WAIT),
        (-math.inf, 1.0, EventKind.WAIT),
        (0.0, 1.0, 0),
        (0.0, 1.0, max(EventKind) + 1),
    ],
)
def test_what_no_worker_records_is_refused(begin_s, end_s, kind):
    data = struct.pack("<ddQIIIHH", begin_s, end_s, 0, 0, 0, kind, 0, 0)
    with pytest.raises(ProtocolError, match="no event"):
        list(read_events(data))
