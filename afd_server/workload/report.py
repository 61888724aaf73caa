"""How well requests were served. Keys are those of vLLM's `bench serve` result files.

TTFT: from the intended send to the first token. TPOT of a request: (end − first token) /
(output tokens − 1). ITL: every gap between two chunks, pooled over all requests. E2EL: from the
intended send to the end.
"""

from collections.abc import Sequence
from dataclasses import dataclass

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request as its client saw it; seconds on one clock.

    `intended_s` is when it should have been sent: a late client must not flatter the server.
    `error` is None if it succeeded.
    """

    intended_s: float
    sent_s: float
    chunk_times_s: tuple[float, ...]
    num_input_tokens: int
    num_output_tokens: int
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        """Return the time to the first token."""
        return self.chunk_times_s[0] - self.intended_s

    @property
    def tpot_s(self) -> float | None:
        """Return the mean time per output token after the first; None for fewer than two."""
        if self.num_output_tokens < 2:
            return None
        return (self.chunk_times_s[-1] - self.chunk_times_s[0]) / (self.num_output_tokens - 1)

    @property
    def gaps_s(self) -> list[float]:
        """Return the gaps between chunks."""
        times = self.chunk_times_s
        return [later - earlier for earlier, later in zip(times, times[1:], strict=False)]


def percentile(values: Sequence[float], percent: float) -> float:
    """Return a percentile with linear interpolation, as numpy's default does."""
    assert values, "no values"
    ranked = sorted(values)
    place = (len(ranked) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ranked) - 1)
    return ranked[low] + (ranked[high] - ranked[low]) * (place - low)


def summarise(records: Sequence[RequestRecord], tpot_slo_s: float) -> dict[str, float]:
    """Return counts, rates and latencies (milliseconds) of a run.

    Failed requests count in `failed` and nowhere else. Goodput counts the completed requests
    whose TPOT is within `tpot_slo_s`; one with fewer than two tokens meets it.
    """
    done = [record for record in records if record.error is None and record.chunk_times_s]
    if not done:
        return {"completed": 0, "failed": len(records)}
    begin = min(record.intended_s for record in records)
    duration = max(record.chunk_times_s[-1] for record in done) - begin
    tpots = [record.tpot_s for record in done if record.tpot_s is not None]
    good = sum(record.tpot_s is None or record.tpot_s <= tpot_slo_s for record in done)
    output = sum(record.num_output_tokens for record in done)
    inputs = sum(record.num_input_tokens for record in done)
    summary = {
        "completed": len(done),
        "failed": len(records) - len(done),
        "duration": duration,
        "total_input_tokens": inputs,
        "total_output_tokens": output,
        "request_throughput": len(done) / duration,
        "request_goodput": good / duration,
        "output_throughput": output / duration,
        "total_token_throughput": (inputs + output) / duration,
    }
    summary |= _milliseconds("ttft", [record.ttft_s for record in done])
    summary |= _milliseconds("tpot", tpots)
    summary |= _milliseconds("itl", [gap for record in done for gap in record.gaps_s])
    ends = [record.chunk_times_s[-1] - record.intended_s for record in done]
    return summary | _milliseconds("e2el", ends)


def _milliseconds(name: str, values_s: Sequence[float]) -> dict[str, float]:
    if not values_s:
        return {}
    milliseconds = [value * 1000 for value in values_s]
    result = {f"mean_{name}_ms": sum(milliseconds) / len(milliseconds)}
    return result | {f"p{p}_{name}_ms": percentile(milliseconds, p) for p in PERCENTILES}
