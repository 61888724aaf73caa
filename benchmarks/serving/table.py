"""Measure the demo model on this machine and print a table of figures.

Starts each server itself and stops it again. 128 random tokens in, 128 out, closed loop, through
HTTP, unless a row says otherwise. "Best" is the most output tokens/s of a sweep over concurrency
among the points whose p99 TPOT keeps the target.

    python benchmarks/serving/table.py                   # all rows, about 20 minutes
    python benchmarks/serving/table.py --rows 1,3,5
    python benchmarks/serving/table.py --quick           # does the script work? two minutes

Nothing else may run on the machine. A JSON file goes to benchmarks/results (not with --quick).
"""

import argparse
import contextlib
import json
import os
import re
import select
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import psutil
import uvloop
from load import Workload, connect, measure, show

from afd_server.config import ENV_PREFIX, process_environment
from afd_server.loadgen.client import Client
from afd_server.loadgen.environment import environment

RESULTS = Path(__file__).parents[1] / "results"
READY = re.compile(r"^ready: (\S+) .*\n", re.MULTILINE)
START_S, STOP_S = 300.0, 60.0

SHM = ("--transport", "shm")
ZMQ = ("--transport", "zmq")
COLOCATED_1 = ("--attention-workers", "1", "--ffn-workers", "0")
COLOCATED_2 = ("--attention-workers", "2", "--ffn-workers", "0")


class RowFailed(Exception):
    """A row has no figure: its server did not start, or no point kept the target."""


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    widths: tuple[int, ...] = (8, 12, 14, 16, 18, 20, 24, 28, 32, 40, 48, 56, 64)
    rates_per_s: tuple[float, ...] = (1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0, 8.0, 10.0)
    output_len: int = 128
    least_requests: int = 32
    requests_per_stream: int = 4
    single_requests: int = 6
    rounds: int = 5
    rate_point_s: float = 20.0
    prefills: int = 9


QUICK = Scale((2, 4), (4.0,), 16, 4, 1, 2, 1, 1.0, 2)


@dataclass
class Row:
    """One line of the table. `runs` are the points it was taken from, as `measure` gives them."""

    number: int
    figure: str
    value: float | None
    unit: str
    at: str = ""
    runs: list[dict] = field(default_factory=list)
    best: dict = field(default_factory=dict)  # the point that gave the value, if one did


class Server:
    """A running `afd-server serve`."""

    def __init__(self, process: subprocess.Popen, url: str, ready_s: float) -> None:
        self.process = process
        self.url = url
        self.ready_s = ready_s

    def pss_mb(self) -> dict[str, float]:
        """Return the proportional set size of every process of the server, in MiB, by its name."""
        sizes: dict[str, float] = {}
        parent = psutil.Process(self.process.pid)
        for process in [parent, *parent.children(recursive=True)]:
            rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text("utf-8")
            kilobytes = int(re.search(r"^Pss:\s+(\d+)", rollup, re.MULTILINE)[1])
            sizes[f"{process.name()} {process.pid}"] = kilobytes / 1024
        return sizes


def heed_sigterm() -> None:
    """Let SIGTERM do what Ctrl-C does, also where a shell began this in the background.

    There SIGINT is ignored, and SIGTERM would leave the servers behind.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))


@contextlib.contextmanager
def serving(
    options: argparse.Namespace, *flags: str, launcher: str = "", slo_mode: str = "off"
) -> Iterator[Server]:
    """Start a server on a free port; stop it whatever happens."""
    command = [
        sys.executable, "-m", "afd_server", "serve", options.model, "--port", "0",
        "--launcher", launcher or options.launcher, "--slo-mode", slo_mode, *flags,
        *shlex.split(options.server_flags),
    ]  # fmt: skip
    known = process_environment()
    kept = {name: value for name, value in known.items() if not name.startswith(ENV_PREFIX)}
    begin_s = time.monotonic()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=kept)
        try:
            output = b""
            while not (found := READY.search(output.decode())):
                left_s = begin_s + START_S - time.monotonic()
                readable, _, _ = select.select([process.stdout], [], [], max(0.0, left_s))
                part = os.read(process.stdout.fileno(), 65536) if readable else b""
                if not part:
                    errors.seek(0)
                    last = errors.read().decode(errors="replace").strip().splitlines()[-1:]
                    raise RowFailed(f"the server did not start: {' '.join(last)}")
                output += part
            yield Server(process, found[1], time.monotonic() - begin_s)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.communicate(timeout=STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()


class Bench:
    """Measures points on servers; remembers each server's sweep."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.scale = QUICK if options.quick else Scale()
        self.slo_s = options.tpot_slo_ms / 1000
        self._workload = Workload(options.input_len, self.scale.output_len, options.seed)
        self._sweeps: dict[tuple[str, ...], list[dict]] = {}

    def on(self, flags: tuple[str, ...], loads: Iterable[dict], runs: list[dict]) -> None:
        """Start a server, put loads on it one after the other, stop it.

        `loads` are arguments of `measure`, taken one by one: they may depend on `runs`, to which
        what was measured is added.
        """
        with serving(self.options, *flags) as server:
            uvloop.run(self.load(server, loads, runs))

    async def load(self, server: Server, loads: Iterable[dict], runs: list[dict]) -> None:
        client = await connect(server.url)
        await self._warm_up(client)
        for load in loads:
            arguments = {"workload": self._workload, "tpot_slo_s": self.slo_s, **load}
            runs.append(await measure(client, **arguments))
            show(runs[-1])

    def once(self, flags: tuple[str, ...], load: dict) -> dict:
        """Measure one point; it must succeed."""
        runs: list[dict] = []
        self.on(flags, [load], runs)
        if runs[0]["failed"]:
            raise RowFailed(f"{runs[0]['failed']} requests failed: {runs[0]['errors'][0]}")
        return runs[0]

    def sweep(self, flags: tuple[str, ...]) -> list[dict]:
        """Return the points over concurrency; stops after two that miss the target."""
        if flags not in self._sweeps:
            runs: list[dict] = []
            self.on(flags, self._widths(runs), runs)
            self._sweeps[flags] = runs
        return self._sweeps[flags]

    def _widths(self, runs: list[dict]) -> Iterator[dict]:
        for width in self.scale.widths:
            if len(runs) < 2 or any(map(self.keeps_target, runs[-2:])):
                yield self.closed(width)

    def best(self, flags: tuple[str, ...]) -> dict:
        """Return the point of a sweep with the most output tokens/s within the target."""
        good = [run for run in self.sweep(flags) if self.keeps_target(run)]
        if not good:
            raise RowFailed(f"no point keeps p99 TPOT ≤ {self.options.tpot_slo_ms:g} ms")
        return max(good, key=lambda run: run["output_throughput"])

    def keeps_target(self, run: dict) -> bool:
        return not run["failed"] and run["p99_tpot_ms"] <= self.options.tpot_slo_ms

    def closed(self, width: int) -> dict:
        count = max(self.scale.least_requests, self.scale.requests_per_stream * width)
        return {"width": width, "count": count}

    def open(self, rate_per_s: float) -> dict:
        count = max(self.scale.least_requests, int(self.scale.rate_point_s * rate_per_s))
        return {"rate_per_s": rate_per_s, "count": count}

    async def _warm_up(self, client: Client) -> None:
        """Let every worker have computed something, at some width."""
        warm = Workload(self.options.input_len, 8, self.options.seed - 1)
        run = await measure(client, warm, width=4, count=4, tpot_slo_s=self.slo_s)
        if run["failed"]:
            raise RowFailed(f"the warm-up failed: {run['errors'][0]}")


def best_throughput(bench: Bench, number: int, name: str, flags: tuple[str, ...]) -> Row:
    best = bench.best(flags)
    target = f"p99 TPOT ≤ {bench.options.tpot_slo_ms:g} ms"
    return Row(number, f"{name}: best output with {target}", best["output_throughput"], "tokens/s",
               f"c={best['max_concurrency']}", bench.sweep(flags), best)  # fmt: skip


def single_stream(bench: Bench, number: int, name: str, flags: tuple[str, ...]) -> Row:
    run = bench.once(flags, {"width": 1, "count": bench.scale.single_requests})
    return Row(number, f"{name}: TPOT p50 of one stream", run["p50_tpot_ms"], "ms", "c=1", [run],
               run)  # fmt: skip


def ratio(bench: Bench) -> Row:
    """Compare the two at their best concurrency, in turns, so that the machine's mood is shared."""
    runs: dict[tuple[str, ...], list[dict]] = {SHM: [], COLOCATED_2: []}
    widths = {flags: bench.best(flags)["max_concurrency"] for flags in runs}
    for _ in range(bench.scale.rounds):
        for flags, width in widths.items():
            runs[flags].append(bench.once(flags, bench.closed(width)))
    medians = [statistics.median(r["output_throughput"] for r in runs[flags]) for flags in runs]
    kept = [sum(map(bench.keeps_target, runs[flags])) for flags in runs]
    at = "; ".join(
        f"c={width}: {median:.0f} tokens/s, {num} rounds within the target"
        for width, median, num in zip(widths.values(), medians, kept, strict=True)
    )
    both = [run for of_one in runs.values() for run in of_one]
    figure = f"best 1A1F / best colocated, medians of {bench.scale.rounds} rounds in turns"
    return Row(5, figure, medians[0] / medians[1], "", at, both)


def time_to_first_token(bench: Bench) -> Row:
    load = {"rate_per_s": 1.0, "count": bench.scale.least_requests}
    run = bench.once(SHM, load)
    return Row(6, "1A1F: TTFT p50, Poisson arrivals", run["p50_ttft_ms"], "ms", "1 request/s",
                [run], run)  # fmt: skip


def prefill(bench: Bench) -> Row:
    prompts = Workload(512, 1, bench.options.seed)
    load = {"width": 1, "count": bench.scale.prefills, "workload": prompts}
    run = bench.once(SHM, load)
    rate = prompts.input_len / run["p50_ttft_ms"] * 1000
    return Row(7, "1A1F: prefill of one 512-token prompt, from its median TTFT", rate, "tokens/s",
                "c=1", [run], run)  # fmt: skip


def goodput(bench: Bench) -> Row:
    runs: list[dict] = []
    rates = (rate for rate in bench.scale.rates_per_s if all(map(bench.keeps_target, runs)))
    bench.on(SHM, map(bench.open, rates), runs)
    good = [run for run in runs if bench.keeps_target(run)]
    if not good:
        raise RowFailed(f"even {runs[0]['request_rate']} requests/s miss the target")
    target = f"p99 TPOT ≤ {bench.options.tpot_slo_ms:g} ms"
    return Row(8, f"1A1F: highest Poisson rate with {target}", good[-1]["request_rate"],
                "requests/s", f"{len(runs)} rates", runs, good[-1])  # fmt: skip


def start_time(bench: Bench) -> Row:
    with serving(bench.options, launcher="ray"):
        pass
    with serving(bench.options, launcher="ray") as server:
        return Row(9, "start to ready, second start, Ray", server.ready_s, "s", "1A1F")


def memory(bench: Bench) -> Row:
    runs: list[dict] = []
    with serving(bench.options, launcher="ray") as server:
        uvloop.run(bench.load(server, [bench.closed(bench.scale.widths[-1] // 2)], runs))
        sizes = server.pss_mb()
    at = f"1A1F, {len(sizes)} processes"
    figure = "memory (sum of PSS) after load, Ray"
    return Row(10, figure, sum(sizes.values()), "MiB", at, [*runs, {"pss_mb": sizes}], runs[0])


ROWS: dict[int, list[Callable[[Bench], Row]]] = {
    1: [lambda bench: best_throughput(bench, 1, "1A1F, shared memory", SHM)],
    2: [lambda bench: best_throughput(bench, 2, "1A1F, ZeroMQ", ZMQ)],
    3: [
        lambda bench: single_stream(bench, 3, "1A1F, shared memory", SHM),
        lambda bench: single_stream(bench, 3, "1A1F, ZeroMQ", ZMQ),
    ],
    4: [
        lambda bench: best_throughput(bench, 4, "colocated, 2 workers", COLOCATED_2),
        lambda bench: single_stream(bench, 4, "colocated, 1 worker", COLOCATED_1),
    ],
    5: [ratio],
    6: [time_to_first_token],
    7: [prefill],
    8: [goodput],
    9: [start_time],
    10: [memory],
}


def markdown(rows: list[Row], about: dict) -> str:
    """Return the table, with what it depends on above it."""
    lines = [
        f"{about['model']}, {about['cpu']}, {about['cores']} cores, commit {about['commit']}, "
        f"{about['date']}, launcher {about['launcher']}",
        "",
        "| | Figure | Value | At | Requests | TPOT p50 / p99 | TTFT p50 / p99 | Client CPU |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        best = row.best
        value = "failed" if row.value is None else f"{row.value:.4g} {row.unit}".strip()
        latencies = [
            f"{best[f'p50_{name}_ms']:.1f} / {best[f'p99_{name}_ms']:.1f} ms"
            if f"p50_{name}_ms" in best
            else ""
            for name in ("tpot", "ttft")
        ]
        requests = sum(run.get("num_prompts", 0) for run in row.runs)
        shares = [run["client_cpu_share"] for run in row.runs if "client_cpu_share" in run]
        share = f"{max(shares):.0%}" if shares else ""
        cells = [row.number, row.figure, value, row.at, requests or "", *latencies, share]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=lambda text: [int(n) for n in text.split(",")],
                        default=list(ROWS), help="such as 1,3 (default: all)")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="a few short requests for each row")
    parser.add_argument("--launcher", choices=("local", "ray"), default="local",
                        help="of rows 1 to 8 (default: local)")  # fmt: skip
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--server-flags", default="", help="for every server, such as '--lanes 3'")
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--tpot-slo-ms", type=float, default=50.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="of the JSON file")
    options = parser.parse_args()
    heed_sigterm()
    unknown = sorted(set(options.rows) - set(ROWS))
    if unknown:
        parser.error(f"there are no rows {unknown}; choose among {list(ROWS)}")
    about = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **environment(),
        "model": options.model,
        "launcher": options.launcher,
        "load_before": os.getloadavg()[0],
        "options": {name: str(value) for name, value in vars(options).items()},
    }
    bench, rows, begin_s = Bench(options), [], time.monotonic()
    for number in options.rows:
        for row in ROWS[number]:
            print(f"-- row {number}", flush=True)
            try:
                rows.append(row(bench))
            except RowFailed as error:
                rows.append(Row(number, str(error), None, ""))
                print(error, flush=True)
    about["seconds"] = time.monotonic() - begin_s
    print(f"\n{markdown(rows, about)}")
    name = f"table-{about['date'][:10]}-{about['commit']}.json"
    output = options.output or (None if options.quick else RESULTS / name)
    if output is not None:
        table = [vars(row) for row in rows]
        output.write_text(json.dumps({"about": about, "rows": table}, indent=1) + "\n")
        print(f"\nwritten to {output}")
    sys.exit(any(row.value is None for row in rows))


if __name__ == "__main__":
    main()
