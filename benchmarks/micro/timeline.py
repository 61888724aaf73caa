"""What the stage timeline costs, in microseconds for each event.

python benchmarks/micro/timeline.py
"""

import timeit
from dataclasses import fields

from afd_server.core.clock import MonotonicClock
from afd_server.core.stage import StageId
from afd_server.core.topology import Member, Role
from afd_server.gateway.stage_view import StageView
from afd_server.telemetry.metrics import GatewayMetrics
from afd_server.telemetry.timeline import EventKind, Timeline
from afd_server.transport.messages import LoadReport
from afd_server.workers.tensors import events_payload

NUM_EVENTS = 1000  # about a quarter of a second of a busy worker
ROUNDS = 50


def main() -> None:
    clock, timeline = MonotonicClock(), Timeline()
    stage = StageId(7, 1, 12)

    def record() -> None:
        for _ in range(NUM_EVENTS):
            timeline.record(EventKind.ATTENTION, 1.0, 1.0003, stage, 16)

    def read_clock() -> None:
        for _ in range(NUM_EVENTS):
            clock.now()

    record()
    payload = events_payload(timeline)
    counts = [0] * (len(fields(LoadReport)) - 2)
    report = LoadReport(*counts, clock_us=int(clock.now() * 1e6), events=payload)
    view = StageView(clock, GatewayMetrics("m"))
    worker = Member(Role.ATTENTION, 0, "a0", "", "")

    def aggregate() -> None:
        view.take(worker, report, clock.now())

    for name, action in (("record", record), ("read the clock", read_clock),
                         ("count and keep in the gateway", aggregate)):  # fmt: skip
        seconds = min(timeit.repeat(action, number=1, repeat=ROUNDS))
        print(f"{name:<32}{seconds / NUM_EVENTS * 1e6:.2f} us")


if __name__ == "__main__":
    main()
