"""The search for the highest rate that a server holds."""

from collections.abc import Iterator
from math import sqrt
from typing import Any  # Any: a report is JSON

MOST_REFUSED = 0.01  # a share: with more, the server did not serve what was offered
MOST_TTFT_GROWTH = 0.05  # the server keeps up with all but a twentieth of what is offered


class RateSearch:
    """Doubles or halves a rate until the limit is bracketed, then halves the bracket.

    Bisects in the logarithm, until what holds and what does not are within `precision` of each
    other. Gives up if `most_points` rates have not bracketed the limit.

    Attributes:
        best: the highest rate that was held; None if there was none.
        lowest_missed: the lowest rate that was not; None if all were.
    """

    def __init__(self, first_per_s: float, precision: float = 0.05, most_points: int = 16) -> None:
        assert first_per_s > 0, f"first rate is {first_per_s}, must be positive"
        self.best: float | None = None
        self.lowest_missed: float | None = None
        self._next = first_per_s
        self._precision = precision
        self._points_left = most_points

    def next_rate(self) -> float | None:
        """Return the rate to try now, or None at the end."""
        if self.best is None or self.lowest_missed is None:
            return self._next if self._points_left else None
        return self._next if self.lowest_missed / self.best > 1 + self._precision else None

    def note(self, rate_per_s: float, holds: bool) -> None:
        """Say whether the rate of `next_rate` was held."""
        self._points_left -= 1
        if holds:
            self.best = rate_per_s
        else:
            self.lowest_missed = rate_per_s
        if self.best is None:
            self._next = rate_per_s / 2
        elif self.lowest_missed is None:
            self._next = rate_per_s * 2
        else:
            self._next = sqrt(self.best * self.lowest_missed)


def missed_targets(report: dict[str, Any]) -> Iterator[str]:
    """Say what a run of `summarise` did not hold; nothing if the server held its rate.

    p99 TPOT counts, by class where requests carry targets. Refusing requests or letting them
    queue keeps TPOT good at any rate, so neither may take more than a small share.
    """
    slo = report["slo"]
    for part in slo["classes"] or [report | {"tpot_ms": slo["tpot_ms"]}]:
        target = part["tpot_ms"]
        if target is not None and part.get("p99_tpot_ms", 0.0) > target:
            yield f"p99 TPOT {part['p99_tpot_ms']:.1f} ms, target {target:g}"
    if slo["ttft_ms"] is not None and report.get("p99_ttft_ms", 0.0) > slo["ttft_ms"]:
        yield f"p99 TTFT {report['p99_ttft_ms']:.0f} ms, target {slo['ttft_ms']:g}"
    if slo["refusals"]["share"] > MOST_REFUSED:
        yield f"{slo['refusals']['share']:.1%} refused"
    if (slo["ttft_growth"] or 0.0) > MOST_TTFT_GROWTH:
        yield f"TTFT grows by {slo['ttft_growth']:.2f} s a second"
    for outcome in ("failed", "unfinished"):
        if report[outcome]:
            yield f"{report[outcome]} {outcome}"
    if not report["completed"]:
        yield "nothing completed"
