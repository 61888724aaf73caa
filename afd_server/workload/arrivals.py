"""When requests arrive. Nothing here waits for answers: a slow server cannot slow its load down."""

import random
from collections.abc import Sequence
from itertools import accumulate
from math import inf


def arrival_times(rate_per_s: float, burstiness: float, count: int, seed: str) -> list[float]:
    """Return `count` arrival times in seconds from 0.

    The gaps are independent and follow a gamma distribution whose shape is `burstiness`, as in
    vLLM's `bench serve`: 1 is a Poisson process, less comes in bursts (the gaps' coefficient of
    variation is 1/√burstiness), infinity is one request every 1/rate seconds.

    The next request after the last would come at (count + 1)/rate: fifty draws alone would miss
    the asked rate by 14 %, and a search would compare luck. A Poisson process of which one knows
    the number of arrivals is still one: its times are uniform.
    """
    assert 0 < rate_per_s < inf, f"rate is {rate_per_s} requests/s, must be positive and finite"
    assert burstiness > 0, f"burstiness is {burstiness}, must be positive"
    if burstiness == inf:
        return [number / rate_per_s for number in range(1, count + 1)]
    rng = random.Random(seed)
    gaps = (rng.gammavariate(burstiness, 1.0) for _ in range(count + 1))
    *times, end = accumulate(gaps)
    factor = (count + 1) / rate_per_s / end
    return [time * factor for time in times]


def stretch(times_s: Sequence[float], rate_per_s: float) -> list[float]:
    """Return recorded times, from 0, stretched so that their mean rate is `rate_per_s`."""
    recorded_s = times_s[-1] - times_s[0]
    assert recorded_s > 0, "times at one moment have no rate"
    factor = (len(times_s) - 1) / rate_per_s / recorded_s
    return [(time_s - times_s[0]) * factor for time_s in times_s]
