"""The trace file: whole JSON, a process for each worker, spans that nest."""

import json

from afd_server.telemetry.timeline import Event, EventKind
from afd_server.telemetry.trace import CLOSING, OPENING, ChromeTrace, summarise_trace


def event(kind, begin_s, end_s, lane=0, layer=0, peer=0):
    return Event(begin_s, end_s, 7, 16, lane, kind, layer, peer)


def spans_of(*batches, begin_s=100.0):
    trace = ChromeTrace(begin_s)
    pieces = [trace.add(*batch) for batch in batches]
    return json.loads("".join([OPENING, *pieces, CLOSING]))["traceEvents"]


def test_a_trace_of_nothing_is_valid():
    assert spans_of() == []


def test_every_span_has_time_duration_process_and_thread():
    rows = spans_of(
        ("attention/0", "aa", [event(EventKind.ATTENTION, 100.5, 100.75, layer=3)]),
        ("attention/0", "aa", []),
        ("ffn/0", "ff", [event(kind, 100.0, 101.0) for kind in EventKind]),
    )
    assert {row["ph"] for row in rows} == {"M", "X"}
    assert all({"name", "ts", "pid", "tid"} <= row.keys() for row in rows)
    spans = [row for row in rows if row["ph"] == "X"]
    assert len(spans) == 1 + len(EventKind)
    assert spans[0]["name"] == "attention"
    assert (spans[0]["ts"], spans[0]["dur"]) == (500_000, 250_000)
    assert spans[0]["args"] == {"step": 7, "layer": 3, "rows": 16}


def test_each_worker_is_a_process_and_each_lane_a_thread_named_once():
    lanes = [event(EventKind.STEP, 100, 101, lane) for lane in (0, 1, 0)]
    rows = spans_of(("attention/0", "aa", lanes), ("ffn/0", "ff", []), ("attention/0", "aa", lanes))
    names = [(r["name"], r["pid"], r["args"]["name"]) for r in rows if r["ph"] == "M"]
    assert names == [
        ("process_name", 1, "attention/0"),
        ("thread_name", 1, "lane 0"),
        ("thread_name", 1, "lane 1"),
        ("process_name", 2, "ffn/0"),
    ]
    tids = [row["tid"] for row in rows if row["ph"] == "X"]
    assert tids == [tids[0], tids[1], tids[0]] * 2


def test_calls_to_two_ffn_workers_at_once_are_on_two_threads():
    calls = [event(EventKind.A_TO_F, 100, 101 + peer, peer=peer) for peer in (0, 1)]
    rows = spans_of(("attention/0", "aa", calls))
    assert len({row["tid"] for row in rows if row["ph"] == "X"}) == 2


def test_a_summary_counts_by_worker_and_kind():
    waits = [event(EventKind.WAIT, 100, 100 + ms / 1000) for ms in (1, 2, 6)]
    rows = spans_of(("ffn/0", "ff", waits), ("attention/0", "aa", waits[:1]))
    head, first, second = summarise_trace(rows)
    assert head.split()[:2] == ["worker", "spent"]
    assert first.split() == ["attention/0", "bubble", "1", "1.0", "1000"]
    assert second.split() == ["ffn/0", "bubble", "3", "9.0", "2000"]
