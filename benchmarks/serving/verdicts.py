"""What was promised of targets under load, and whether the points of a run hold it."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf, sqrt
from statistics import mean, median, stdev

from afd_server.workload.report import percentile

OURS = "targets enforced"
LEAST_ATTAINMENT = 0.99
LEAST_OF_BEST = 0.95  # of the best goodput, at overload
OVERLOADED = 2.0  # times the highest rate that is held, and more
REFUSED_WITHIN_MS = 50.0
NORMAL_AGAIN_S = 5.0
LONGEST_GAP = 2.0  # targets, beside a long prompt


@dataclass(frozen=True)
class Verdict:
    """A promise with what was measured of it."""

    number: str
    promise: str
    measured: str
    is_held: bool

    def __str__(self) -> str:
        held = "held    " if self.is_held else "NOT HELD"
        return f"{held}  {self.number:4} {self.promise}: {self.measured}"


def verdicts(points: Sequence[dict]) -> list[Verdict]:
    """Judge what there is; a promise without points has no verdict."""
    parts: dict[str, list[dict]] = defaultdict(list)
    for point in points:
        parts[point["part"]].append(point)
    loads, baselines, mixed = parts["loads"], parts["baselines"], parts["mixed"]
    found: list[Verdict] = []
    if loads:
        found += _with_commits(_loads(_by_load(loads)), loads)
    if baselines:
        judged = _baselines(_by_load(loads), _by_load(baselines))
        found += _with_commits(judged, [*loads, *baselines])
    if parts["burst"]:
        found += _with_commits(_burst(parts["burst"]), parts["burst"])
    if parts["long"]:
        found += _with_commits(_long(parts["long"]), parts["long"])
    if mixed:
        found += _with_commits(_mixed(mixed), mixed)
    return found


def _with_commits(found: Iterable[Verdict], points: Sequence[dict]) -> Iterator[Verdict]:
    """Let verdicts say so where their points are of several commits."""
    commits = sorted({point.get("commit") or "unknown" for point in points})
    doubt = f"; points of several commits: {', '.join(commits)}" if len(commits) > 1 else ""
    return (replace(verdict, measured=verdict.measured + doubt) for verdict in found)


def _loads(loads: dict[float, list[dict]]) -> Iterator[Verdict]:
    shares = {load: _attainment(points) for load, points in loads.items()}
    yield Verdict(
        "1a", f"at least {LEAST_ATTAINMENT:.0%} of the admitted keep their target at each load",
        ", ".join(f"{share:.1%} at {load:g}" for load, share in shares.items()),
        all(share >= LEAST_ATTAINMENT for share in shares.values()),
    )  # fmt: skip
    rates = {load: mean(_column(points, "goodput")) for load, points in loads.items()}
    best = max(rates.values())
    ratios = {load: rate / best for load, rate in rates.items() if load >= OVERLOADED and best}
    if ratios:
        yield Verdict(
            "1b", f"goodput under overload is at least {LEAST_OF_BEST:.0%} of the best",
            f"{', '.join(f'{ratio:.1%} at {load:g}' for load, ratio in ratios.items())} of "
            f"{best:.2f}/s",
            all(ratio >= LEAST_OF_BEST for ratio in ratios.values()),
        )  # fmt: skip
    waits = [wait for points in loads.values() for p in points for wait in p["refused_after_ms"]]
    p99 = percentile(waits, 99) if waits else 0.0
    yield Verdict(
        "1c", f"refusals are answered within {REFUSED_WITHIN_MS:g} ms (p99)",
        f"{p99:.1f} ms, of {len(waits)}", p99 <= REFUSED_WITHIN_MS,
    )  # fmt: skip


def _baselines(
    ours: dict[float, list[dict]], baselines: dict[float, list[dict]]
) -> Iterator[Verdict]:
    """Compare at each load what had the same arrivals.

    Two are equal if they differ by no more than chance: one request a run, or the standard error
    of the differences between runs of the same seed.
    """
    for key, name in (("goodput", "TPOT target"), ("goodput_with_ttft", "both targets")):
        for load, theirs in baselines.items():
            seeds = set(_column(theirs, "seed"))
            shared = [point for point in ours.get(load, ()) if point["seed"] in seeds]
            if not shared:
                continue
            own = mean(_column(shared, key))
            rates: dict[str, list[float]] = defaultdict(list)
            for point in theirs:
                rates[point["label"]].append(point[key])
            best = max(rates, key=lambda label: mean(rates[label]))
            behind = mean(rates[best]) - own
            by_seed = {point["seed"]: point[key] for point in shared}
            compared = [p for p in theirs if p["label"] == best and p["seed"] in by_seed]
            apart = [point[key] - by_seed[point["seed"]] for point in compared]
            error = stdev(apart) / sqrt(len(apart)) if len(apart) > 1 else 0.0
            chance = max(mean(_column(shared, "goodput_of_one")), error)
            is_held = behind <= chance
            equal = ", equal" if 0 < behind <= chance else ""
            yield Verdict(
                "2" if key == "goodput" else "2+",
                f"goodput by {name} at {load:g} is at least that of the best baseline",
                f"{own:.2f}/s against {', '.join(f'{mean(r):.2f} {n}' for n, r in rates.items())} "
                f"({-behind:+.2f}, standard error {error:.2f}{equal})",
                is_held,
            )


def _burst(points: Sequence[dict]) -> Iterator[Verdict]:
    """Judge bursts together: whether the last wait is an unusual one is chance in each."""
    share = _attainment(points)
    yield Verdict(
        "3a", f"at least {LEAST_ATTAINMENT:.0%} keep their target throughout a burst",
        f"{share:.1%} of {sum(_column(points, 'judged'))}", share >= LEAST_ATTAINMENT,
    )  # fmt: skip
    bursts = [point["burst"] for point in points]
    last_s = [inf if b["ttft_after_ms"] is None else b["recovery_s"] for b in bursts]
    names = ("usual_ttft_ms", "ttft_before_ms", "ttft_after_ms")
    usual, before, after = (", ".join(f"{b[name] or inf:.0f}" for b in bursts) for name in names)
    yield Verdict(
        "3b", f"{NORMAL_AGAIN_S:g} s after it nobody is refused or waits unusually long (median)",
        f"the last such request came {', '.join(f'{s:.1f}' for s in last_s)} s after it (usual: up "
        f"to {usual} ms; median TTFT {before} ms before, {after} after)",
        median(last_s) <= NORMAL_AGAIN_S,
    )  # fmt: skip


def _long(points: Sequence[dict]) -> Iterator[Verdict]:
    """Judge runs together: the machine stops all streams for 0.1 s now and then."""
    longs, target_ms = [point["long"] for point in points], points[0]["tpot_slo_ms"]
    longest_ms = LONGEST_GAP * target_ms
    to_the_end, served = (all(_column(longs, n)) for n in ("all_to_the_end", "all_served"))
    doubts = "" if to_the_end else "; some streams had ended before it was read"
    doubts += "" if served else "; not all were served"
    p99s_ms, tpots_ms = _column(longs, "p99_gap_ms"), _column(longs, "mean_tpot_ms")
    reads_s = ", ".join(f"{read_s:.1f}" for read_s in _column(longs, "read_s"))
    yield Verdict(
        "4a",
        f"streams beside a long prompt have gaps of at most {longest_ms:g} ms (median of p99)",
        f"{', '.join(f'{p99:.0f}' for p99 in p99s_ms)} ms of {sum(_column(longs, 'num_gaps'))} "
        f"gaps until the first token of the prompt of {longs[0]['num_prompt_tokens']} (TTFT "
        f"{reads_s} s){doubts}",
        to_the_end and served and median(p99s_ms) <= longest_ms,
    )
    yield Verdict(
        "4b", f"their mean TPOT keeps {target_ms:g} ms",
        f"{', '.join(f'{tpot:.1f}' for tpot in tpots_ms)} ms, worst "
        f"{max(_column(longs, 'worst_tpot_ms')):.1f}, of {longs[0]['num_streams']} streams",
        to_the_end and served and max(tpots_ms) <= target_ms,
    )  # fmt: skip


def _mixed(points: Sequence[dict]) -> Iterator[Verdict]:
    classes: dict[float, list[dict]] = defaultdict(list)
    for point in points:
        for part in point["classes"]:
            classes[part["tpot_ms"]].append(part)
    for target_ms, parts in sorted(classes.items()):
        judged = sum(part.get("completed", 0) + part.get("failed", 0) for part in parts)
        share = sum(part["good"] for part in parts) / judged if judged else 0.0
        yield Verdict(
            "5", f"at least {LEAST_ATTAINMENT:.0%} of those with {target_ms:g} ms keep it beside "
            "the others", f"{share:.1%} of {judged}", share >= LEAST_ATTAINMENT,
        )  # fmt: skip


def _attainment(points: Sequence[dict]) -> float:
    return sum(_column(points, "good")) / max(1, sum(_column(points, "judged")))


def _by_load(points: Sequence[dict]) -> dict[float, list[dict]]:
    loads: dict[float, list[dict]] = defaultdict(list)
    for point in points:
        loads[point["load"]].append(point)
    return dict(sorted(loads.items()))


def _column(points: Sequence[dict], key: str) -> list:
    return [point[key] for point in points]
