"""Those who are compared, how a load is put on one of them, and what is kept of a run."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from math import ceil

from load import connect
from table import RowFailed

from afd_server.loadgen.config import BenchConfig
from afd_server.loadgen.http import find_origin, get_json
from afd_server.loadgen.plan import Plan, Point
from afd_server.loadgen.results import ServerFacts, make_result
from afd_server.loadgen.run import Limit, Run, run_load
from afd_server.workload.lengths import UniformLengths
from afd_server.workload.offers import Clients, Offer, parse_targets
from afd_server.workload.report import Outcome, RequestRecord, goodput_within, offered_within

LENGTHS = UniformLengths(32, 256)
TTFT_S = 4.0  # the target that servers have unless told otherwise
PATIENCE_S = 60.0  # after the last arrival, where all are to be answered: far beyond any answer
IDLE_S = 30.0


@dataclass(frozen=True)
class Contender:
    """A server and the limit in front of it, a new one for each run.

    `drain_s` is how long after the last arrival its run is cut.
    """

    label: str
    url: str
    make_limit: Callable[[], Limit | None] = lambda: None
    drain_s: float = PATIENCE_S


@dataclass(frozen=True)
class Load:
    """Offers that arrive in `duration_s`, and the settings that `afd-server bench` has for them."""

    config: BenchConfig
    rate_per_s: float
    duration_s: float
    offers: Sequence[Offer]


@dataclass(frozen=True)
class Measured:
    """A run: its records, what is kept of it, and the result file as `bench` writes it."""

    begin_s: float
    records: list[RequestRecord]
    point: dict
    result: dict


def poisson_load(
    rate_per_s: float, duration_s: float, seed: int, tpot_slo_ms: float, mix: str = ""
) -> Load:
    """Return what `afd-server bench --request-rate` would send with this seed."""
    config = bench_config(seed, duration_s, tpot_slo_ms, mix)
    offers, count = Plan(config).offers(Point(0, rate_per_s, None))
    return Load(config, rate_per_s, count / rate_per_s, list(offers))


def longest_answer_s(tpot_slo_ms: float) -> float:
    """Return how long the longest answer takes that keeps its target, in whole seconds."""
    return ceil(LENGTHS.longest * tpot_slo_ms / 1000)


def bench_config(seed: int, duration_s: float, tpot_slo_ms: float, mix: str = "") -> BenchConfig:
    """Return the settings that the loads have in common."""
    clients = Clients(parse_targets(mix, "slo_mix")) if mix else Clients()
    return BenchConfig(duration_s=duration_s, input_len=LENGTHS, output_len=LENGTHS, seed=seed,
                       tpot_slo_ms=tpot_slo_ms, clients=clients, save_detailed=True)  # fmt: skip


async def put(
    contender: Contender, load: Load, headers: Mapping[str, str] | None = None
) -> Measured:
    """Put a load on a contender, wait until its server is idle, and return what was measured.

    Prompts are salted anew for each run: none finds in a prefix cache what another run, of the
    same seed and so with the same prompts, has left there.
    """
    client = await connect(contender.url, headers)
    limit = contender.make_limit()
    limit_s = load.duration_s + contender.drain_s
    run = await run_load(client, load.offers, limit=limit, limit_s=limit_s)
    if run.interrupted:
        raise KeyboardInterrupt
    await _wait_until_idle(contender.url)
    first = run.records[0]
    begin_s = first.intended_s - (load.offers[0].at_s or 0.0)
    result = await _result(contender, load, run)
    slo, length_s = load.config.slo, load.duration_s
    both = replace(slo, ttft_s=TTFT_S)
    # Until then who began when all was empty has ended; of a short load half has to do.
    warm_s = min(longest_answer_s(load.config.tpot_slo_ms), length_s / 2)
    window = begin_s + warm_s, begin_s + length_s
    keeps_up = len(run.records) == len(load.offers) and all(r.is_good(both) for r in run.records)
    offered = offered_within(run.records, *window) if keeps_up else None
    point = {
        "label": contender.label,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "request_rate": load.rate_per_s,
        "seed": load.config.seed,
        "offered": len(load.offers),  # more than were sent, where the run was cut
        "keeps_up": keeps_up,
        "goodput": offered if keeps_up else goodput_within(run.records, slo, *window),
        "goodput_with_ttft": offered if keeps_up else goodput_within(run.records, both, *window),
        "goodput_of_one": 1 / (length_s - warm_s),
        "tpot_slo_ms": load.config.tpot_slo_ms,
        **({} if limit is None else {"last_width": limit.width}),
        **_kept(result),
        "refused_after_ms": sorted(
            round((record.end_s - record.sent_s) * 1000, 1)
            for record in run.records
            if record.outcome is Outcome.REFUSED
        ),
    }
    # The plots draw this one: the rate until the last answer is another thing where runs are cut.
    result["request_goodput"] = point["goodput"]
    return Measured(begin_s, run.records, point, result)


async def _result(contender: Contender, load: Load, run: Run) -> dict:
    status = await get_json(find_origin(contender.url, {}), "/status")
    server = ServerFacts(status["model"], None, status["topology"], None)
    result = make_result(load.config, server, Point(0, load.rate_per_s, None), load.rate_per_s, run)
    return result | {"label": contender.label}


def _kept(result: dict) -> dict:
    slo = result["slo"]
    judged = result["completed"] + result["failed"]
    names = ("p50_tpot_ms", "p99_tpot_ms", "p99_itl_ms", "p50_ttft_ms", "p99_ttft_ms")
    return {
        **{key: result[key] for key in ("completed", "failed", "refused", "unfinished")},
        "good": slo["good"],
        "judged": judged,
        "attainment": slo["attainment"],
        **{name: result.get(name) for name in names},
        "output_throughput": result["output_throughput"],
        "duration_s": result["duration"],
        "refusals": slo["refusals"],
        "classes": slo["classes"],
        "failures": result["failures"],
        "client": result["client"],
    }


async def _wait_until_idle(url: str) -> None:
    """Wait until nothing is left of a run: what was cut would slow the next one down."""
    origin, begin_s = find_origin(url, {}), time.monotonic()
    while (await get_json(origin, "/status"))["live_requests"]:
        if time.monotonic() - begin_s > IDLE_S:
            raise RowFailed(f"{url} still has requests {IDLE_S:g} s after all were given up")
        await asyncio.sleep(0.1)
