"""Plots of result files, as PNG. matplotlib is imported when one is drawn, and only here."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any  # Any: JSON

from afd_server.core.errors import ConfigError
from afd_server.loadgen.results import unique_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Result = dict[str, Any]

TOPOLOGY = re.compile(r"(\d+)A(\d+)F")
NEEDED = (
    "request_rate", "output_throughput", "slo", "label", "completed", "max_concurrency",
    "request_goodput",
)  # fmt: skip


def draw_report(paths: Sequence[Path], directory: Path) -> list[Path]:
    """Draw what the result files have data for.

    pareto.png: throughput against speed for one user. rate.png: TPOT, goodput and refusals
    against the offered rate. compare.png: labels side by side at the same rates. Of results with
    details also cdf.png, of TPOT and gaps, and timeline-NAME.png, a run second by second.

    Returns:
        The files written.

    Raises:
        ConfigError: matplotlib is missing, a file is no result or cannot be written, or nothing
            can be drawn.
    """
    runs = [run for path in paths for run in _read(path)]
    if not runs:
        raise ConfigError(f"there is no completed request in {', '.join(map(str, paths))}")
    results = [run for _, run in runs]
    figures: dict[str, Figure] = {}
    if fast := [run for run in results if run.get("p50_tpot_ms")]:
        figures["pareto"] = _pareto(fast)
    if rated := [run for run in results if _rate(run) is not None]:
        figures["rate"] = _against_rate(rated)
    if rates := _rates_in_common(results):
        figures["compare"] = _comparison(results, rates)
    if spread := [run for run in results if "tpots" in run and "p50_tpot_ms" in run]:
        figures["cdf"] = _cdfs(spread)
    for name, (_, run) in zip(unique_names([name for name, _ in runs]), runs, strict=True):
        if "tpots" in run:
            figures[f"timeline-{name}"] = _timeline(run)
    if not figures:
        raise ConfigError(f"there is no TPOT and no rate in {', '.join(map(str, paths))}")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            figure.savefig(directory / f"{name}.png", dpi=120)
    except OSError as error:
        raise ConfigError(f"{directory} cannot be written: {error.strerror}") from error
    return [directory / f"{name}.png" for name in figures]


def _read(path: Path) -> Iterator[tuple[str, Result]]:
    """Yield the runs of a file, each with a name: one, or the points of a search."""
    try:
        result = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    has_points = isinstance(result, dict) and "points" in result
    points = result["points"] if has_points else [result]
    for number, run in enumerate(points if isinstance(points, list) else [points]):
        if not isinstance(run, dict) or not all(key in run for key in NEEDED):
            raise ConfigError(f"{path} is no result of afd-server bench")
        if run["completed"]:
            yield (f"{path.stem}-{number}" if has_points else path.stem), run


def _figure(rows: int, columns: int) -> "tuple[Figure, list[Axes]]":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "plots need matplotlib: pip install 'afd-server[bench]', or matplotlib"
        ) from error
    figure = Figure(figsize=(6.4 * columns, 3.6 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for each in axes:
        each.grid(alpha=0.3)
    return figure, axes


def _by_label(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Group results by what they measured, each group in order of its load."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result["label"] or "run", []).append(result)
    for group in groups.values():
        group.sort(key=lambda r: (_rate(r) or 0.0, r["max_concurrency"] or 0))
    return groups


def _pareto(results: Sequence[Result]) -> "Figure":
    """Each point is a load: to the right a user is served faster, above a worker serves more."""
    figure, (axes,) = _figure(1, 1)
    workers = [_num_workers(result) for result in results]
    per_worker = all(workers)
    for label, group in _by_label(results).items():
        points = sorted(
            (1000 / result["p50_tpot_ms"], result["output_throughput"]
             / (_num_workers(result) if per_worker else 1))
            for result in group
        )  # fmt: skip
        (line,) = axes.plot(*zip(*points, strict=True), "o", label=label)
        front = [p for n, p in enumerate(points) if p[1] >= max(y for _, y in points[n:])]
        axes.plot(*zip(*front, strict=True), "-", color=line.get_color())
    _target_line(axes.axvline, [1000 / ms for ms in _targets_ms(results)])
    axes.set(xlabel="output tokens/s of one user (1 / median TPOT)",
             ylabel=f"output tokens/s of {'a worker' if per_worker else 'the server'}",
             title="Throughput against speed")  # fmt: skip
    axes.legend()
    return figure


def _against_rate(results: Sequence[Result]) -> "Figure":
    figure, (tpot, goodput, attainment) = _figure(1, 3)
    for label, group in _by_label(results).items():
        rates = [float(result["request_rate"]) for result in group]
        for percent, style in ((50, ":"), (90, "--"), (99, "-")):
            values = [result.get(f"p{percent}_tpot_ms", nan) for result in group]
            tpot.plot(rates, values, style, marker="o", label=f"{label} p{percent}")
        goodput.plot(rates, [r["request_goodput"] for r in group], "o-", label=label)
        for key, style in (("attainment", "-"), ("refused", "--")):
            shares = [
                r["slo"]["refusals"]["share"] if key == "refused" else r["slo"][key] for r in group
            ]
            attainment.plot(rates, shares, style, marker="o", label=f"{label}: {key}")
    _target_line(tpot.axhline, _targets_ms(results))
    tpot.set(ylabel="TPOT (ms)", title="TPOT")
    goodput.axline((0, 0), slope=1, color="grey", linestyle=":", label="offered")
    goodput.set(ylabel="good requests/s", title="Goodput")
    attainment.set(ylabel="share", title="SLO attainment of admitted requests; refused",
                   ylim=(-0.02, 1.02))  # fmt: skip
    for axes in (tpot, goodput, attainment):
        axes.set_xlabel("offered requests/s")
        axes.legend()
    return figure


def _comparison(results: Sequence[Result], rates: Sequence[float]) -> "Figure":
    """Draw labels beside each other: with and without a controller, say, at twice the load."""
    figure, (tpot, goodput) = _figure(1, 2)
    groups = _by_label(results)
    width = 0.8 / len(groups)
    for index, (label, group) in enumerate(groups.items()):
        at = {_rate(result): result for result in group}
        places = [n + (index - (len(groups) - 1) / 2) * width for n in range(len(rates))]
        p99 = [at[rate].get("p99_tpot_ms", 0.0) for rate in rates]
        tpot.bar(places, p99, width, label=label)
        goodput.bar(places, [at[rate]["request_goodput"] for rate in rates], width, label=label)
    _target_line(tpot.axhline, _targets_ms(results))
    tpot.set(ylabel="p99 TPOT (ms)")
    goodput.set(ylabel="good requests/s")
    for axes in (tpot, goodput):
        axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
        axes.set_xlabel("offered requests/s")
        axes.legend()
    return figure


def _cdfs(results: Sequence[Result]) -> "Figure":
    figure, (tpot, gaps) = _figure(1, 2)
    for result in results:
        label = f"{result['label'] or 'run'} at {result['request_rate']}"
        done = [
            (own, own_gaps)
            for own, own_gaps in zip(result["tpots"], result["itls"], strict=True)
            if own is not None
        ]
        tpot.ecdf([own * 1000 for own, _ in done], label=label)
        if gaps_ms := [gap * 1000 for _, own_gaps in done for gap in own_gaps]:
            gaps.ecdf(gaps_ms, label=label)
    for axes, title in ((tpot, "TPOT of requests"), (gaps, "Single gaps (ITL)")):
        _target_line(axes.axvline, _targets_ms(results))
        axes.set(xlabel="ms", ylabel="share", title=title)
        if axes.get_legend_handles_labels()[0]:  # answers in one piece have no gaps
            axes.legend()
    return figure


def _timeline(result: Result) -> "Figure":
    figure, (flow, under_way, tpot) = _figure(3, 1)
    ends = list(zip(result["end_times"], result["outcomes"], strict=True))
    flow.step(*_per_second(result["intended_times"]), where="post", label="offered")
    for outcome in sorted(set(result["outcomes"])):
        times = [time_s for time_s, ended in ends if ended == outcome]
        flow.step(*_per_second(times), where="post", label=outcome)
    flow.set(ylabel="requests/s", title=result["label"] or "run")
    changes = sorted(
        [(time_s, 1) for time_s in result["start_times"]] + [(time_s, -1) for time_s, _ in ends]
    )
    counts = list(accumulate(change for _, change in changes))
    under_way.step([time_s for time_s, _ in changes], counts, where="post")
    under_way.set(ylabel="requests under way")
    tpots = [
        (end_s, own * 1000)
        for end_s, own in zip(result["end_times"], result["tpots"], strict=True)
        if own is not None
    ]
    tpot.plot([end_s for end_s, _ in tpots], [own for _, own in tpots], ".")
    _target_line(tpot.axhline, _targets_ms([result]))
    tpot.set(ylabel="TPOT (ms)", xlabel="end of the request (s)")
    for axes in (flow, under_way, tpot):
        axes.set_xlim(0, max(result["end_times"]))
    flow.legend()
    return figure


def _rates_in_common(results: Sequence[Result]) -> list[float]:
    """Return the rates at which each of several labels was measured."""
    groups = [{_rate(result) for result in group} for group in _by_label(results).values()]
    shared = set.intersection(*groups) if len(groups) > 1 else set()
    return sorted(rate for rate in shared if rate is not None)


def _per_second(times_s: Sequence[float]) -> tuple[list[int], list[int]]:
    counts = Counter(int(time_s) for time_s in times_s)
    seconds = list(range(max(counts, default=0) + 2))
    return seconds, [counts[second] for second in seconds]


def _target_line(draw: Any, targets: Sequence[float]) -> None:  # Any: axhline or axvline
    for target in targets:
        draw(target, color="crimson", linestyle="--", linewidth=1)


def _targets_ms(results: Sequence[Result]) -> list[float]:
    targets = set()
    for result in results:
        classes = [part["tpot_ms"] for part in result["slo"]["classes"]]
        targets |= set(classes or [result["slo"]["tpot_ms"]])
    return sorted(targets - {None})


def _rate(result: Result) -> float | None:
    rate = result["request_rate"]
    return None if rate == "inf" else float(rate)


def _num_workers(result: Result) -> int:
    """Return the workers behind a result; 0 if its server does not say."""
    found = TOPOLOGY.fullmatch((result.get("server") or {}).get("topology") or "")
    return int(found[1]) + int(found[2]) if found else 0
