"""Loads with something happening in the middle: a burst, a long prompt. And what came of it."""

from itertools import chain, pairwise
from statistics import mean, median

from contenders import LENGTHS, Load, Measured, bench_config

from afd_server.core.request import SLO
from afd_server.workload.arrivals import arrival_times
from afd_server.workload.offers import (
    Clients,
    Offer,
    PromptPart,
    Shape,
    make_offers,
    synthetic_shapes,
)
from afd_server.workload.report import Outcome, RequestRecord, percentile

BURST = ((0.7, 20.0), (3.0, 30.0), (0.7, 30.0))  # multiples of the rate, and for how long
UNUSUAL = 2.0  # times the p99 of TTFT before the burst: above, a request waits longer than usual

NUM_STREAMS, EVERY_S = 16, 0.25
# In and out. With more they would outlast the prompt wherever it is read slowly, but 16 streams of
# 1,400 tokens read 0.5 GB of keys and values a step: too much for 50 ms on a small machine.
STREAM_TOKENS = (64, 900)
LONG_TOKENS, LONG_AT_S = (4000, 32), 8.0
LONG_DRAIN_S = 150.0  # after the prompt was sent, until all of it is cut
PATIENT = {"x-slo-ttft-ms": "60000"}  # so long a prompt needs more than the usual 4 s


def burst_load(rate_per_s: float, seed: int, tpot_slo_ms: float) -> Load:
    """Return Poisson arrivals at the multiples of a rate."""
    times_s: list[float] = []
    begin_s = 0.0
    for number, (multiple, lasts_s) in enumerate(BURST):
        rate = multiple * rate_per_s
        drawn = arrival_times(rate, 1.0, max(1, round(rate * lasts_s)), f"{seed} burst {number}")
        times_s += [begin_s + at_s for at_s in drawn]
        begin_s += lasts_s
    shapes = synthetic_shapes(LENGTHS, LENGTHS, f"{seed} burst")
    offers = list(make_offers(times_s, shapes, Clients(), ""))
    return Load(bench_config(seed, begin_s, tpot_slo_ms), len(offers) / begin_s, begin_s, offers)


def after_burst(measured: Measured) -> dict:
    """Return how long it took until everything was as before, and what the timeline shows."""
    begin_s, end_s = BURST[0][1], BURST[0][1] + BURST[1][1]
    arrived = [(record.intended_s - measured.begin_s, record) for record in measured.records]
    before = _ttfts_ms([record for at_s, record in arrived if at_s < begin_s])
    usual_ms = UNUSUAL * percentile(before, 99)
    after = [(at_s - end_s, record) for at_s, record in arrived if at_s >= end_s]
    unusual_s = [at_s for at_s, record in after if not _is_usual(record, usual_ms)]
    calm_ms = _ttfts_ms([record for at_s, record in after if at_s > max(unusual_s, default=0.0)])
    names = ("intended_times", "start_times", "end_times", "outcomes", "ttfts", "tpots")
    return {
        "begin_s": begin_s,
        "end_s": end_s,
        "usual_ttft_ms": usual_ms,
        "recovery_s": max(unusual_s, default=0.0),
        "ttft_before_ms": median(before),
        "ttft_after_ms": median(calm_ms) if calm_ms else None,
        "requests": {name: [_short(v) for v in measured.result[name]] for name in names},
    }


def long_load(seed: int, tpot_slo_ms: float) -> Load:
    """Return 16 streams, and in their midst a prompt of 4,000 tokens."""
    streams = [
        _offer(EVERY_S * number, f"stream {number}", *STREAM_TOKENS)
        for number in range(NUM_STREAMS)
    ]
    offers = [*streams, _offer(LONG_AT_S, "long", *LONG_TOKENS)]
    config = bench_config(seed, LONG_AT_S, tpot_slo_ms)
    return Load(config, len(offers) / LONG_AT_S, LONG_AT_S, offers)


def beside_long(measured: Measured) -> dict:
    """Return the gaps of the streams while the long prompt waited and was read, and their TPOT."""
    *streams, long = measured.records
    until_s = long.chunk_times_s[0] if long.chunk_times_s else long.end_s
    times = chain.from_iterable(pairwise(stream.chunk_times_s) for stream in streams)
    gaps_ms = [1000 * (b - a) for a, b in times if b > long.intended_s and a < until_s]
    tpots_ms = [1000 * stream.tpot_s for stream in streams if stream.tpot_s is not None]
    return {
        "num_streams": len(streams),
        "all_served": all(r.outcome is Outcome.COMPLETED for r in measured.records),
        "num_prompt_tokens": long.num_input_tokens,
        "read_s": until_s - long.intended_s,
        "num_gaps": len(gaps_ms),
        "p99_gap_ms": percentile(gaps_ms, 99),
        "longest_gap_ms": max(gaps_ms),
        "mean_tpot_ms": mean(tpots_ms),
        "worst_tpot_ms": max(tpots_ms),
        "all_to_the_end": all(stream.end_s >= until_s for stream in streams),
    }


def _offer(at_s: float, key: str, num_in: int, num_out: int) -> Offer:
    return Offer(at_s, Shape((PromptPart(key, num_in),), num_out), SLO())


def _is_usual(record: RequestRecord, usual_ms: float) -> bool:
    return record.outcome is Outcome.COMPLETED and 1000 * record.ttft_s <= usual_ms


def _ttfts_ms(records: list[RequestRecord]) -> list[float]:
    return [1000 * record.ttft_s for record in records if record.outcome is Outcome.COMPLETED]


def _short(value: float | str | None) -> float | str | None:
    """Round seconds to what can be seen in a plot."""
    return round(value, 4) if isinstance(value, float) else value
