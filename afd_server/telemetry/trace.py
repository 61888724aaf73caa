"""The timeline as a file: Chrome's trace-event format, which Perfetto reads as well."""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any  # Any: values of JSON

from afd_server.core.stage import AHEAD
from afd_server.telemetry.timeline import Event, EventKind

OPENING, CLOSING = '{"displayTimeUnit": "ms", "traceEvents": [', "]}\n"

_NAMES = {
    EventKind.ATTENTION: "attention",
    EventKind.SAMPLE: "sampling",
    EventKind.STEP: "step",
    EventKind.A_TO_F: "a_to_f",
    EventKind.F_TO_A: "f_to_a",
    EventKind.FFN: "ffn",
    EventKind.GATHERED: "gathered",
    EventKind.WAIT: "bubble",
    EventKind.EXPECTED: "expected",
}


class ChromeTrace:
    """Lays events out as a JSON object, piece by piece: a process for each worker.

    Lanes, the ways of their calls, FFN computation and waiting are threads: within one of them
    spans lie beside or inside of each other, as the format asks for.

    Args:
        begin_s: is 0 in the file, on the clock of the events.
    """

    def __init__(self, begin_s: float) -> None:
        self._begin_s = begin_s
        self._pids: dict[str, int] = {}
        self._tids: dict[tuple[int, str], int] = {}
        self._has_rows = False

    def add(self, worker: str, incarnation: str, events: Iterable[Event]) -> str:
        """Return the JSON of some events of a worker, to follow on what was returned before."""
        rows: list[dict[str, Any]] = []
        pid = self._pids.get(incarnation)
        if pid is None:
            pid = self._pids[incarnation] = len(self._pids) + 1
            rows.append(_name("process_name", pid, 0, worker))
        for event in events:
            track = _track(event)
            tid = self._tids.get((pid, track))
            if tid is None:
                tid = self._tids[pid, track] = len(self._tids) + 1
                rows.append(_name("thread_name", pid, tid, track))
            rows.append(self._span(event, pid, tid))
        text = ",\n".join(map(json.dumps, rows))
        lead = ",\n" if self._has_rows and rows else ""
        self._has_rows |= bool(rows)
        return lead + text

    def _span(self, event: Event, pid: int, tid: int) -> dict[str, Any]:
        return {
            "name": _NAMES[EventKind(event.kind)],
            "ph": "X",
            "ts": round((event.begin_s - self._begin_s) * 1e6, 1),
            "dur": round((event.end_s - event.begin_s) * 1e6, 1),
            "pid": pid,
            "tid": tid,
            "args": {"step": event.step, "layer": event.layer, "rows": event.rows},
        }


def summarise_trace(spans: Sequence[dict[str, Any]]) -> list[str]:
    """Return a table of a trace's events: for each worker and kind how many and how long."""
    workers = {row["pid"]: row["args"]["name"] for row in spans if row["name"] == "process_name"}
    durations: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for row in spans:
        if row["ph"] == "X":
            durations[workers[row["pid"]], row["name"]].append(row["dur"])
    lines = [f"{'worker':<14}{'spent on':<12}{'times':>8}{'total ms':>11}{'median us':>11}"]
    for (worker, name), values in sorted(durations.items()):
        median = sorted(values)[len(values) // 2]
        total = sum(values) / 1000
        lines.append(f"{worker:<14}{name:<12}{len(values):>8}{total:>11.1f}{median:>11.0f}")
    return lines


def _name(what: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "ts": 0, "pid": pid, "tid": tid, "args": {"name": name}}


def _track(event: Event) -> str:
    lane = f"lane {event.lane % AHEAD}{' ahead' if event.lane >= AHEAD else ''}"
    match event.kind:
        case EventKind.A_TO_F | EventKind.F_TO_A:
            return f"{lane}, ffn/{event.peer}"
        case EventKind.FFN | EventKind.GATHERED:
            return "ffn"
        case EventKind.WAIT:
            return "bubbles"
        case EventKind.EXPECTED:
            return f"{lane}, expected"
    return lane
