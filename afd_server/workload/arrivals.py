"""When requests arrive. Nothing here waits for answers: a slow server cannot slow its load down."""

import random
from collections.abc import Iterator, Sequence
from math import inf


def arrival_times(rate_per_s: float, burstiness: float, seed: str) -> Iterator[float]:
    """Yield arrival times in seconds from 0, without end.

    The gaps are independent and follow a gamma distribution whose shape is `burstiness`, as in
    vLLM's `bench serve`: 1 is a Poisson process, less comes in bursts (the gaps' coefficient of
    variation is 1/√burstiness), infinity is one request every 1/rate seconds.
    """
    assert 0 < rate_per_s < inf, f"rate is {rate_per_s} requests/s, must be positive and finite"
    assert burstiness > 0, f"burstiness is {burstiness}, must be positive"
    rng = random.Random(seed)
    now_s = 0.0
    while True:
        if burstiness == inf:
            now_s += 1 / rate_per_s
        else:
            now_s += rng.gammavariate(burstiness, 1 / (rate_per_s * burstiness))
        yield now_s


def stretch(times_s: Sequence[float], rate_per_s: float) -> list[float]:
    """Return recorded times, from 0, stretched so that their mean rate is `rate_per_s`."""
    recorded_s = times_s[-1] - times_s[0]
    assert recorded_s > 0, "times at one moment have no rate"
    factor = (len(times_s) - 1) / rate_per_s / recorded_s
    return [(time_s - times_s[0]) * factor for time_s in times_s]
