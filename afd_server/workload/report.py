"""How well requests were served. Keys are those of vLLM's `bench serve` result files.

TTFT: from the intended send to the first token. TPOT of a request: (end − first token) /
(output tokens − 1). ITL: every gap between two chunks, pooled over all requests. E2EL: from the
intended send to the end. Latencies are those of completed requests. A request is *good* if it
was completed within its targets; attainment is the share of good ones among those admitted and
not given up by their client.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from math import sqrt
from statistics import linear_regression
from typing import Any  # Any: a report is JSON

from afd_server.core.request import SLO, time_per_token_s

PERCENTILES = (50, 90, 95, 99)


class Outcome(StrEnum):
    """What became of a request."""

    COMPLETED = "completed"
    REFUSED = "refused"  # answered at once that there is no room
    FAILED = "failed"  # admitted, perhaps begun, and not served
    CANCELLED = "cancelled"  # given up by its client, as planned
    UNFINISHED = "unfinished"  # the measurement ended first


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request as its client saw it; seconds on one clock.

    `intended_s` is when it should have been sent: a late client must not flatter the server.
    `end_s` is when the last token came, which may have had no text and so no time in
    `chunk_times_s`. `reason` says why it was refused or how it failed. `slo` is what the request
    itself asked for.
    """

    intended_s: float
    sent_s: float
    end_s: float
    chunk_times_s: tuple[float, ...]
    num_input_tokens: int
    num_output_tokens: int
    outcome: Outcome = Outcome.COMPLETED
    reason: str = ""
    retry_after_s: float | None = None
    slo: SLO = field(default_factory=SLO)

    @property
    def ttft_s(self) -> float:
        """Return the time to the first token."""
        return self.chunk_times_s[0] - self.intended_s

    @property
    def tpot_s(self) -> float | None:
        """Return the mean time per output token after the first; None for fewer than two."""
        times_s = (*self.chunk_times_s[:1], self.end_s)
        return time_per_token_s(times_s, self.num_output_tokens)

    @property
    def gaps_s(self) -> list[float]:
        """Return the gaps between chunks."""
        times = self.chunk_times_s
        return [later - earlier for earlier, later in zip(times, times[1:], strict=False)]

    def is_good(self, default: SLO) -> bool:
        """Say whether it was completed within its own targets or, without one, the default's.

        Fewer than two tokens keep every TPOT.
        """
        if self.outcome is not Outcome.COMPLETED:
            return False
        slo = SLO(
            default.ttft_s if self.slo.ttft_s is None else self.slo.ttft_s,
            default.tpot_s if self.slo.tpot_s is None else self.slo.tpot_s,
        )
        return slo.is_met(self.ttft_s, self.tpot_s)


def percentile(values: Sequence[float], percent: float) -> float:
    """Return a percentile with linear interpolation, as numpy's default does."""
    assert values, "no values"
    ranked = sorted(values)
    place = (len(ranked) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ranked) - 1)
    return ranked[low] + (ranked[high] - ranked[low]) * (place - low)


def goodput_within(
    records: Iterable[RequestRecord], slo: SLO, begin_s: float, end_s: float
) -> float:
    """Return the good requests whose answer began in a window, per second of it.

    Not those that ended in it: of two servers that both keep up with a load, each has a part of a
    second's arrivals under way at either edge, the slower one more, and which edge has more of
    them is chance.
    """
    firsts_s = [record.chunk_times_s[0] for record in records if record.is_good(slo)]
    return sum(begin_s < first_s <= end_s for first_s in firsts_s) / (end_s - begin_s)


def offered_within(records: Iterable[RequestRecord], begin_s: float, end_s: float) -> float:
    """Return the requests that were due to be sent in a window, per second of it.

    That is the goodput of who answers all of them in time, whatever is under way at the edges.
    """
    times_s = [record.intended_s for record in records]
    return sum(begin_s < time_s <= end_s for time_s in times_s) / (end_s - begin_s)


def summarise(records: Sequence[RequestRecord], slo: SLO) -> dict[str, Any]:
    """Return counts, rates and latencies (milliseconds) of a run, and its `slo` block.

    Args:
        records: of all requests, of whatever outcome.
        slo: the targets of requests that carry none.
    """
    done = [record for record in records if record.outcome is Outcome.COMPLETED]
    counts = Counter(record.outcome for record in records)
    begin_s = min((record.intended_s for record in records), default=0.0)
    duration = max((record.end_s for record in records), default=0.0) - begin_s
    output = sum(record.num_output_tokens for record in done)
    inputs = sum(record.num_input_tokens for record in done)

    def per_second(amount: float) -> float:
        return amount / duration if duration else 0.0

    return {
        "num_prompts": len(records),
        **{outcome.value: counts[outcome] for outcome in Outcome},
        "duration": duration,
        "total_input_tokens": inputs,
        "total_output_tokens": output,
        "request_throughput": per_second(len(done)),
        "request_goodput": per_second(sum(record.is_good(slo) for record in done)),
        "output_throughput": per_second(output),
        "total_token_throughput": per_second(inputs + output),
        "max_output_tokens_per_s": _peak_tokens_per_s(done, begin_s),
        "max_concurrent_requests": _peak_concurrency(records),
        **_milliseconds("ttft", [record.ttft_s for record in done]),
        **_milliseconds("tpot", _tpots_s(done)),
        **_milliseconds("itl", [gap for record in done for gap in record.gaps_s]),
        **_milliseconds("e2el", [record.end_s - record.intended_s for record in done]),
        "slo": _slo_block(records, slo),
    }


def details(records: Sequence[RequestRecord], slo: SLO) -> dict[str, list[Any]]:
    """Return what each request did, in seconds from the first intended send, as lists."""
    begin_s = min((record.intended_s for record in records), default=0.0)
    begun = [record.chunk_times_s[:1] for record in records]
    pairs = list(zip(records, begun, strict=True))
    return {
        "input_lens": [record.num_input_tokens for record in records],
        "output_lens": [record.num_output_tokens for record in records],
        "ttfts": [first[0] - r.intended_s if first else 0.0 for r, first in pairs],
        "itls": [record.gaps_s for record in records],
        "start_times": [record.sent_s - begin_s for record in records],
        "errors": [record.reason for record in records],
        "intended_times": [record.intended_s - begin_s for record in records],
        "end_times": [record.end_s - begin_s for record in records],
        "outcomes": [record.outcome.value for record in records],
        "tpots": [r.tpot_s if r.outcome is Outcome.COMPLETED else None for r in records],
        "good": [record.is_good(slo) for record in records],
    }


def _slo_block(records: Sequence[RequestRecord], slo: SLO) -> dict[str, Any]:
    targets = sorted({record.slo.tpot_s for record in records if record.slo.tpot_s is not None})
    return {
        "tpot_ms": _in_ms(slo.tpot_s),
        "ttft_ms": _in_ms(slo.ttft_s),
        **_attainment(records, slo),
        "ttft_growth": _ttft_growth(records),
        "refusals": _refusals(records),
        "classes": [
            {"tpot_ms": target * 1000}
            | _class_block([record for record in records if record.slo.tpot_s == target], slo)
            for target in targets
        ],
    }


def _class_block(records: Sequence[RequestRecord], slo: SLO) -> dict[str, Any]:
    done = [record for record in records if record.outcome is Outcome.COMPLETED]
    counts = Counter(record.outcome.value for record in records)
    return (
        {"num_prompts": len(records), **counts}
        | _attainment(records, slo)
        | _milliseconds("ttft", [record.ttft_s for record in done])
        | _milliseconds("tpot", _tpots_s(done))
    )


def _attainment(records: Sequence[RequestRecord], slo: SLO) -> dict[str, Any]:
    judged = [r for r in records if r.outcome in (Outcome.COMPLETED, Outcome.FAILED)]
    good = sum(record.is_good(slo) for record in judged)
    return {
        "admitted": sum(record.outcome is not Outcome.REFUSED for record in records),
        "good": good,
        "attainment": good / len(judged) if judged else None,
    }


def _refusals(records: Sequence[RequestRecord]) -> dict[str, Any]:
    refused = [record for record in records if record.outcome is Outcome.REFUSED]
    waits_ms = [(record.end_s - record.sent_s) * 1000 for record in refused]
    return {
        "count": len(refused),
        "share": len(refused) / len(records) if records else 0.0,
        "by_reason": dict(Counter(record.reason for record in refused).most_common()),
        "with_retry_after": sum(record.retry_after_s is not None for record in refused),
        **({f"p{p}_ms": percentile(waits_ms, p) for p in (50, 99)} if refused else {}),
    }


def _ttft_growth(records: Iterable[RequestRecord]) -> float | None:
    """Return by how many seconds TTFT grew in each second of the run.

    Where a server serves a share x less than is offered and refuses nothing, its queue grows for
    as long as the load lasts, and this is x / (1 − x): the sign of a rate that cannot be held,
    however good TPOT still is. None if fewer than three moments say anything.
    """
    done = [record for record in records if record.outcome is Outcome.COMPLETED]
    times = [record.intended_s for record in done]
    if len(set(times)) < 3:
        return None
    return linear_regression(times, [record.ttft_s for record in done]).slope


def _peak_tokens_per_s(done: Iterable[RequestRecord], begin_s: float) -> float:
    """Return the most output tokens in a whole second; a chunk has its share of them."""
    seconds: Counter[int] = Counter()
    tokens: dict[int, float] = {}
    for record in done:
        share = record.num_output_tokens / len(record.chunk_times_s)
        seconds.clear()
        seconds.update(int(time_s - begin_s) for time_s in record.chunk_times_s)
        for second, chunks in seconds.items():
            tokens[second] = tokens.get(second, 0.0) + chunks * share
    return max(tokens.values(), default=0.0)


def _peak_concurrency(records: Iterable[RequestRecord]) -> int:
    """Return the most requests that were under way at once."""
    changes = sorted(
        change for record in records for change in ((record.sent_s, 1), (record.end_s, -1))
    )  # at equal times an end comes first
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def _tpots_s(done: Iterable[RequestRecord]) -> list[float]:
    return [record.tpot_s for record in done if record.tpot_s is not None]


def _in_ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1000


def _milliseconds(name: str, values_s: Sequence[float]) -> dict[str, float]:
    if not values_s:
        return {}
    milliseconds = sorted(value * 1000 for value in values_s)
    mean = sum(milliseconds) / len(milliseconds)
    variance = sum((value - mean) ** 2 for value in milliseconds) / len(milliseconds)
    result = {
        f"mean_{name}_ms": mean,
        f"median_{name}_ms": percentile(milliseconds, 50),
        f"std_{name}_ms": sqrt(variance),
    }
    return result | {f"p{p}_{name}_ms": percentile(milliseconds, p) for p in PERCENTILES}
