"""Time round trips between two processes: ZeroMQ over ipc against shared memory.

A dispatch goes out and is answered by a combine of the same size, through both endpoints with all
their checks. The two transports take turns, so that a busy machine is unfair to neither. With
--work-us each side computes that long before it answers, as workers do: what sleeps meanwhile must
be woken.

    python benchmarks/transport/hops.py --output benchmarks/results/hops.json
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path

from afd_server.core.clock import MonotonicClock
from afd_server.core.topology import Member, Role, Topology
from afd_server.loadgen.environment import environment
from afd_server.transport.base import Link
from afd_server.transport.endpoint import Endpoint, Identity
from afd_server.transport.messages import Combine, Dispatch, DType, Payload
from afd_server.transport.shm import SharedMemoryLink
from afd_server.transport.zeromq import ZeroMQLink

HIDDEN = 576  # of the demo model; a row is 2,304 bytes
ROWS = (1, 16)
TRANSPORTS = ("zmq", "shm")
PATIENCE_S = 10.0


def topology(directory: str) -> Topology:
    members = (
        Member(Role.ATTENTION, 0, "attention", f"ipc://{directory}/attention.ipc", "numerics"),
        Member(Role.FFN, 0, "ffn", f"ipc://{directory}/ffn.ipc", "numerics"),
    )
    return Topology(1, members)


def endpoint_of(slot: int, transport: str, directory: str) -> Endpoint:
    known = topology(directory)
    member = known.members[slot]
    link: Link = ZeroMQLink(member.incarnation, member.address)
    if transport == "shm":
        link = SharedMemoryLink(link)
    identity = Identity(member.incarnation, "model", member.fingerprint)
    made = Endpoint(link, identity, MonotonicClock(), with_crc=False)
    made.topology = known
    return made


def compute(work_us: int) -> None:
    until = time.perf_counter_ns() + 1000 * work_us
    while time.perf_counter_ns() < until:
        pass


def answer(transport: str, directory: str, work_us: int) -> None:
    """Be the FFN worker as long as there is somebody to answer."""
    parent = os.getppid()
    endpoint = endpoint_of(1, transport, directory)
    print("listening", flush=True)
    while os.getppid() == parent:
        for received in endpoint.receive(0.25):
            call = received.message
            compute(work_us)
            key = (call.step, call.lane, call.layer, call.part)
            partial = Combine(*key, received.envelope.epoch, 0, 0, "", call.activations)
            endpoint.send(received.envelope.source, partial)


class Pair:
    """The attention side of two processes."""

    def __init__(self, transport: str, work_us: int) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="hops-")
        arguments = ["--answer", transport, self._directory.name, str(work_us)]
        self._process = subprocess.Popen(
            [sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True
        )
        self._process.stdout.readline()
        self._endpoint = endpoint_of(0, transport, self._directory.name)
        ffn = self._endpoint.topology.members[1]
        self._endpoint.link.connect(ffn.incarnation, ffn.address)
        self._work_us = work_us
        self._step = 0

    def round_trip(self, rows: int) -> float:
        """Return the seconds from the dispatch to its combine, the other side's work aside."""
        self._step += 1
        payload = Payload(DType.FLOAT32, (rows, HIDDEN), bytes(4 * rows * HIDDEN))
        compute(self._work_us)
        began = time.perf_counter()
        while not self._endpoint.try_send("ffn", Dispatch(self._step, 0, 0, 0, 0, payload)):
            self._endpoint.link.receive(0.01)  # not connected yet
        while time.perf_counter() - began < PATIENCE_S:
            for received in self._endpoint.receive(0.25):
                assert received.message.step == self._step
                return time.perf_counter() - began - 1e-6 * self._work_us
        raise TimeoutError(f"call {self._step} was not answered")

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._endpoint.link.close()
        self._directory.cleanup()


def measure(work_us: int, rounds: int, turns: int) -> list[dict]:
    """Let the transports take turns of so many round trips."""
    pairs = {name: Pair(name, work_us) for name in TRANSPORTS}
    times: defaultdict[tuple[str, int], list[float]] = defaultdict(list)
    for turn in range(turns):
        for name, pair in pairs.items():
            for rows in ROWS:
                taken = [pair.round_trip(rows) for _ in range(rounds)]
                if turn:  # the first turn warms up
                    times[name, rows] += taken[rounds // 10 :]
    for pair in pairs.values():
        pair.close()
    return [
        {
            "transport": name,
            "payload_bytes": 4 * rows * HIDDEN,
            "work_us": work_us,
            "round_trips": len(taken),
            "mean_us": round(1e6 * statistics.fmean(taken), 1),
            "p50_us": round(1e6 * statistics.median(taken), 1),
            "p99_us": round(1e6 * statistics.quantiles(taken, n=100)[98], 1),
        }
        for (name, rows), taken in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work-us", type=lambda text: [int(n) for n in text.split(",")],
                        default=[0, 150], help="computed before each message")  # fmt: skip
    parser.add_argument("--round-trips", type=int, default=500, help="in a turn")
    parser.add_argument("--turns", type=int, default=11, help="of each transport; the first warms")
    parser.add_argument("--output", type=Path, help="write a JSON result file")
    parser.add_argument("--answer", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.answer:
        transport, directory, work_us = options.answer
        answer(transport, directory, int(work_us))
        return
    runs = []
    for work_us in options.work_us:
        for run in measure(work_us, options.round_trips, options.turns):
            runs.append(run)
            print("  ".join(f"{key} {value}" for key, value in run.items()), flush=True)
    if options.output:
        result = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "environment": environment(),
            "runs": runs,
        }
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
