"""Measure whether admitted requests keep their TPOT target at any load, and what that costs.

All in one run, on the demo model with the client beside it:

- loads: multiples of the highest rate that `afd-server bench --find-goodput` finds (Poisson, 32 to
  256 tokens in and out).
- baselines: the same arrivals on the same server without targets: without control, behind the
  best of several caps on concurrency, and behind a limit that additive increase, multiplicative
  decrease finds (`workload.limits.AIMD`, which begins with the best cap). These limits are in the
  client, where requests wait for room, and that counts into TTFT. As nobody is refused, there
  is always somebody to let in: for goodput that is the best that a limit can do. All take turns,
  so that a machine that changes its pace changes it for all, and each begins as often.
- burst: three times the rate for 30 s on a steady 0.7 times, with three seeds.
- long: a prompt of 4,000 tokens beside 16 streams, three times.
- mixed: targets of 20, 50 and 100 ms in one server.
- plots: of the above, by `afd-server bench report`.

**Goodput** is the same for everyone: requests within their target, whose answer began in the
time in which requests arrive, but for its first 13 s (the longest answer at 50 ms a token; half of
a shorter time), per second of it. Those are left out because everybody begins empty, and begins
what the machine cannot end. Nor does it count what begins after the arrivals: a server under
overload always has more to do, so a queue must not count that is worked off when nothing comes any
more, nor the time until the last answer. So a run of a baseline may be cut as soon as all that can
count have ended; ours are waited for, as every admitted request is judged. Who answers all that is
offered within both targets has the goodput that was offered, as there is no more: two who do that
would else differ by what each has under way at the edges. Counting what ends in that time instead
leaves more to chance: runs of the same arrivals on simulated machines of 12 % noise differ by 0.2
requests/s at half the highest rate and by 0.6 at the whole (standard deviations), counted by
beginnings by 0.02 and 0.3.

    python benchmarks/serving/targets.py                       # about 100 minutes
    python benchmarks/serving/targets.py --parts burst,plots   # again; what else there is, stays
    python benchmarks/serving/targets.py --resume              # what is missing

Nothing else may run on the machine. benchmarks/results gets a JSON file, written after every run,
and a directory of the same name with the plots.
"""

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import uvloop
from contenders import Contender, Load, Measured, longest_answer_s, poisson_load, put
from load import Workload, connect, measure
from scenes import LONG_DRAIN_S, PATIENT, after_burst, beside_long, burst_load, long_load
from table import RESULTS, RowFailed, Server, heed_sigterm, serving
from verdicts import OURS, verdicts

from afd_server.core.request import SLO
from afd_server.loadgen.environment import environment
from afd_server.workload.limits import AIMD, FixedLimit

PARTS = ("loads", "baselines", "burst", "long", "mixed", "plots")
ASKED_WITH = {"search": "loads", "sweep": "baselines", **{part: part for part in PARTS}}
LOADS = (0.5, 1.0, 1.5, 2.0, 3.0)  # of the highest rate that is held
OVERLOAD = 2.0
SCENES = 3  # bursts, and long prompts
SEARCH_S = 60.0  # at each rate: an empty server takes more for some 20 s than it keeps up
SHORTER = 0.8  # the duration of each run of the sweep over caps
UNLIMITED = ("--max-num-seqs", "250", "--max-live-requests", "100000")  # a step has 256 tokens
MIX = (0.4, 1.0, 2.0)  # times the target: 20, 50 and 100 ms
RUNS = Path(__file__).parents[2] / "build" / "targets"  # result files that the plots are drawn of
HEAD = ("Server", "Load", "Requests/s", "Offered", "Attainment", "Goodput /s", "with TTFT /s",
        "TPOT p50 / p99 ms", "Gap p99 ms", "TTFT p50 / p99 ms", "Refused",
        "p99 ms until refused")  # fmt: skip


class Results:
    """The points so far, written to a file after each."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Keep the points of parts that are not asked for; to resume, all."""
        self.path: Path = options.output
        about = {name: str(value) for name, value in vars(options).items()}
        found = environment()
        self._about = {"options": about, "environment": found}
        self._commit = found["commit"]
        self._points: list[dict] = []
        if self.path.exists():
            again = () if options.resume else options.parts
            kept = {part for part, asked in ASKED_WITH.items() if asked not in again}
            points = json.loads(self.path.read_text("utf-8"))["points"]
            self._points = [point for point in points if point.get("part") in kept]

    def find(self, part: str, label: str, load: float, seed: int) -> dict | None:
        """Return a point that was measured already."""
        keys = ("part", "label", "load", "seed")
        found = (p for p in self._points if [p[k] for k in keys] == [part, label, load, seed])
        return next(found, None)

    def add(self, point: dict) -> None:
        self._points.append(point | {"commit": self._commit})
        judged = [vars(verdict) for verdict in self.verdicts()]
        result = {**self._about, "verdicts": judged, "points": self._points}
        self.path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")

    def verdicts(self) -> list:
        return verdicts(self._points)


class Bench:
    """Puts loads on contenders, unless that was done already."""

    def __init__(self, options: argparse.Namespace, results: Results, server: Server) -> None:
        self._options = options
        self._results = results
        self._ours = Contender(OURS, server.url)
        self._rate_per_s = options.rate or self._search()

    def loads(self, baselines: Sequence[Contender]) -> None:
        """Offer every load to all in turn, once with each seed; each time another one begins.

        A machine that changes its pace over the hour so changes it for all loads.
        """
        options, turn = self._options, 0
        for seed in range(options.seeds):
            for load in LOADS:
                if seed >= self._num_seeds(load):
                    continue
                takers = [self._ours] if "loads" in options.parts else []
                takers += baselines if seed < options.baseline_seeds else []
                for number in range(len(takers)):
                    taker = takers[(number + turn) % len(takers)]
                    part = "loads" if taker is self._ours else "baselines"
                    self._poisson(part, taker, load, seed, options.duration_s)
                turn += 1

    def _num_seeds(self, load: float) -> int:
        """Return more at overload: who is let in of many is chance, and goodput with it."""
        options = self._options
        return options.seeds if load > 1 else min(options.seeds, options.baseline_seeds)

    def baselines(self, server: Server) -> list[Contender]:
        """Return those to compare with; the cap is the best of a sweep under overload."""

        drain_s = longest_answer_s(self._options.tpot_slo_ms)

        def capped(label: str, cap: int) -> Contender:
            return Contender(label, server.url, lambda: FixedLimit(cap), drain_s)

        rates = {}
        for cap in self._options.caps:
            taker, duration_s = capped(f"cap {cap}", cap), SHORTER * self._options.duration_s
            rates[cap] = self._poisson("sweep", taker, OVERLOAD, 0, duration_s)["goodput"]
        best = max(rates, key=lambda cap: rates[cap])
        target = SLO(tpot_s=self._options.tpot_slo_ms / 1000)
        return [
            Contender("no control", server.url, drain_s=drain_s),
            capped(f"best cap ({best})", best),
            Contender("AIMD", server.url, lambda: AIMD(best, target), drain_s),
        ]

    def burst(self) -> None:
        for seed in range(SCENES):
            load = burst_load(self._rate_per_s, seed, self._options.tpot_slo_ms)
            self._measure("burst", self._ours, 3.0, load,
                          lambda measured: {"burst": after_burst(measured)})  # fmt: skip

    def long(self) -> None:
        for seed in range(SCENES):
            load = long_load(seed, self._options.tpot_slo_ms)
            self._measure("long", replace(self._ours, drain_s=LONG_DRAIN_S), 0.0, load,
                          lambda measured: {"long": beside_long(measured)}, PATIENT)  # fmt: skip

    def mixed(self) -> None:
        mix = ",".join(f"{share * self._options.tpot_slo_ms:g}:1" for share in MIX)
        for seed in range(self._num_seeds(1.0)):
            self._poisson("mixed", self._ours, 1.0, seed, self._options.duration_s, mix)

    def _search(self) -> float:
        """Return the highest rate that is held, as an operator finds it."""
        found = self._results.find("search", OURS, 0.0, 0)
        if found is None:
            search = find_goodput(self._ours.url, self._options)
            tried = {f"{p['request_rate']:.3f}": p["holds"] for p in search["points"]}
            found = {"part": "search", "label": OURS, "load": 0.0, "seed": 0,
                     "rate_per_s": search["goodput_rate"], "tried": tried}  # fmt: skip
            self._results.add(found)
        return found["rate_per_s"]

    def _poisson(
        self, part: str, taker: Contender, load: float, seed: int, duration_s: float, mix: str = ""
    ) -> dict:
        rate_per_s, target_ms = load * self._rate_per_s, self._options.tpot_slo_ms
        offered = poisson_load(rate_per_s, duration_s, seed, target_ms, mix)
        return self._measure(part, taker, load, offered)

    def _measure(
        self,
        part: str,
        taker: Contender,
        load: float,
        offered: Load,
        look: Callable[[Measured], dict] = lambda _measured: {},
        headers: Mapping[str, str] | None = None,
    ) -> dict:
        """Return the point of a load; `look` adds what it finds in the records."""
        seed = offered.config.seed
        found = self._results.find(part, taker.label, load, seed)
        if found is not None:
            return found
        measured = uvloop.run(put(taker, offered, headers))
        point = {"part": part, "load": load, **measured.point, **look(measured)}
        print(row(point), flush=True)
        keep_for_plots(part, load, seed, measured.result)
        self._results.add(point)
        return point


def find_goodput(url: str, options: argparse.Namespace) -> dict:
    """Run `afd-server bench --find-goodput` and return its result."""
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "search.json"
        command = [
            sys.executable, "-m", "afd_server", "bench", "--url", url, "--find-goodput",
            "--request-rate", "2", "--duration-s", f"{max(SEARCH_S, options.duration_s):g}",
            "--tpot-slo-ms", f"{options.tpot_slo_ms:g}", "--input-len", "32:256",
            "--output-len", "32:256", "--output", str(output),
        ]  # fmt: skip
        subprocess.run(command, check=False, stdout=sys.stderr)
        search = json.loads(output.read_text("utf-8"))
    if search["goodput_rate"] is None:
        raise RowFailed("no rate is held")
    return search


async def warm_up(server: Server) -> None:
    """Let every worker have computed something, at some width."""
    await measure(await connect(server.url), Workload(64, 16, 0), width=4, count=4, tpot_slo_s=1.0)


def row(point: dict) -> str:
    """Return a line of the table."""

    def two(name: str) -> str:
        values = [point[f"{p}_{name}_ms"] for p in ("p50", "p99")]
        return " / ".join("none" if value is None else f"{value:.1f}" for value in values)

    attainment = point["attainment"]
    label = point["label"] if point["part"] in ("loads", "baselines") else (
        f"{point['part']}: {point['label']}"
    )  # fmt: skip
    cells = [
        label, f"{point['load']:g}", f"{point['request_rate']:.3g}", point["offered"],
        "none" if attainment is None else f"{attainment:.3f}", f"{point['goodput']:.2f}",
        f"{point['goodput_with_ttft']:.2f}", two("tpot"), f"{point['p99_itl_ms'] or 0:.0f}",
        two("ttft"), point["refused"], f"{point['refusals'].get('p99_ms', 0):.0f}",
    ]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def keep_for_plots(part: str, load: float, seed: int, result: dict) -> None:
    """Keep the result files of the first seed, and where single requests are drawn, theirs."""
    kinds = []
    if part in ("loads", "baselines") and seed == 0:
        kinds = ["all", *(["ours"] if part == "loads" else [])]
        kinds += ["overload"] if load == OVERLOAD else []
    elif part == "burst" and seed == 0:
        kinds = ["burst"]
    for kind in kinds:
        directory = RUNS / kind
        directory.mkdir(parents=True, exist_ok=True)
        single = ("tpots", "itls", "ttfts") if kind in ("all", "ours") else ()
        kept = {key: value for key, value in result.items() if key not in single}
        order = 0 if result["label"] == OURS else 1
        path = directory / f"{order} {part} {load:g} {result['label'].split(' (')[0]}.json"
        path.write_text(json.dumps(kept), "utf-8")


def draw(directory: Path) -> None:
    """Draw ours against the rate, all beside each other, gaps under overload and the burst."""
    wanted = {
        "ours": {"rate.png": "rate.png"},
        "all": {"compare.png": "compare.png", "pareto.png": "pareto.png"},
        "overload": {"cdf.png": "cdf.png"},
        "burst": {"timeline-0 burst 3 targets enforced.png": "timeline.png"},
    }
    directory.mkdir(parents=True, exist_ok=True)
    for kind, names in wanted.items():
        files = sorted((RUNS / kind).glob("*.json"))
        if not files:
            continue
        with tempfile.TemporaryDirectory() as drawn:
            command = [sys.executable, "-m", "afd_server", "bench", "report", *files, "-d", drawn]
            subprocess.run(list(map(str, command)), check=True, stdout=sys.stderr)
            for name, new_name in names.items():
                if (Path(drawn) / name).exists():
                    shutil.copy(Path(drawn) / name, directory / new_name)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--launcher", default="local")
    parser.add_argument("--server-flags", default="", help="for both servers")
    parser.add_argument("--duration-s", type=float, default=60.0, help="arrivals of a load")
    parser.add_argument("--seeds", type=int, default=6, help="of ours at overload")
    parser.add_argument(
        "--baseline-seeds",
        type=int,
        default=3,
        help="the first of them, for baselines, and for all below overload",
    )
    parser.add_argument(
        "--tpot-slo-ms",
        type=float,
        default=50.0,
        help="another one for a machine that needs longer for a token",
    )
    parser.add_argument(
        "--caps",
        type=lambda text: tuple(map(int, text.split(","))),
        default=(8, 12, 16, 20, 24),
        help="of the sweep (default: 8,12,16,20,24)",
    )
    parser.add_argument("--rate", type=float, help="the highest that is held, if it is known")
    parser.add_argument("--parts", type=lambda text: tuple(text.split(",")), default=PARTS,
                        help=f"of {','.join(PARTS)} (default: all)")  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="measure only what is missing")
    parser.add_argument("--output", type=Path, default=RESULTS / "targets.json")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"there are no parts {sorted(unknown)}; choose among {PARTS}")
    return options


def measure_parts(options: argparse.Namespace, results: Results) -> None:
    """Start the servers, which idle while others are under load, and measure."""
    target = ("--tpot-slo-ms", f"{options.tpot_slo_ms:g}")
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(serving(options, *target, slo_mode="enforce"))
        uvloop.run(warm_up(ours))
        bench = Bench(options, results, ours)
        print(f"| {' | '.join(HEAD)} |\n{'| --- ' * len(HEAD)}|", flush=True)
        baselines: list[Contender] = []
        if "baselines" in options.parts:
            server = stack.enter_context(serving(options, *UNLIMITED))
            uvloop.run(warm_up(server))
            baselines = bench.baselines(server)
        if baselines or "loads" in options.parts:
            bench.loads(baselines)
        for part, run in (("burst", bench.burst), ("long", bench.long), ("mixed", bench.mixed)):
            if part in options.parts:
                run()


def main() -> None:
    options = parse()
    heed_sigterm()
    begin_s = time.monotonic()
    results = Results(options)
    if set(options.parts) != {"plots"}:
        measure_parts(options, results)
    if "plots" in options.parts:
        draw(options.output.with_suffix(""))
    judged = results.verdicts()
    print(f"\n{(time.monotonic() - begin_s) / 60:.0f} minutes; written to {options.output}\n")
    print("\n".join(map(str, judged)))
    sys.exit(not all(verdict.is_held for verdict in judged))


if __name__ == "__main__":
    main()
