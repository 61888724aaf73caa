"""When requests arrive."""

import random
from collections.abc import Iterator


def poisson_arrivals(rate_per_s: float, count: int, seed: int) -> Iterator[float]:
    """Yield `count` arrival times in seconds from 0: independent exponential gaps.

    They do not wait for answers, so a slow server cannot slow its own load down.
    """
    assert rate_per_s > 0, f"rate is {rate_per_s} requests/s, must be positive"
    rng = random.Random(seed)
    now_s = 0.0
    for _ in range(count):
        now_s += rng.expovariate(rate_per_s)
        yield now_s
