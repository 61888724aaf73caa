"""How long a lane's step will take, learned from the steps that were taken.

A step's time is close to linear in what it computes, and in what the other lanes compute beside
it, since all lanes share the same two pools.
"""

from bisect import bisect_left
from collections import deque
from dataclasses import dataclass

MEMORY_STEPS = 400  # after so many steps an observation counts a third
REFIT_EVERY = 8  # steps
PRIOR_STEPS = 0.02  # how many observations the prior is worth, in each direction
NUM_RATIOS = 200  # of observed to predicted times; their quantiles are those of the next one
OUTLIER = 4.0  # a residual counts at most as so many typical ones

# Seconds for each unit of `_features`: what a step costs before any was seen, on the slow side.
_PRIOR_S = (0.01, 0.01, 0.004, 0.15, 0.02, 0.005, 0.07)


@dataclass(frozen=True, slots=True)
class StepLoad:
    """What the time of a step depends on.

    Attributes:
        rows: sequences that decode in it; an average may be a fraction.
        keys: positions that these attend to, all together.
        prefill: tokens of prompts in it.
        prefill_keys: positions that these attend to, all together.
        other_rows: as `rows`, of the steps in the other lanes.
        other_prefill: as `prefill`, of the steps in the other lanes.
    """

    rows: float = 0
    keys: float = 0
    prefill: float = 0
    prefill_keys: float = 0
    other_rows: float = 0
    other_prefill: float = 0


def _features(load: StepLoad) -> tuple[float, ...]:
    """Return the load in units of a similar weight, behind a constant."""
    return (
        1.0,
        load.rows / 16,
        load.keys / 8192,
        load.prefill / 128,
        load.prefill_keys / 65536,
        load.other_rows / 16,
        load.other_prefill / 128,
    )


class StepTimeModel:
    """Predicts step times by least squares over recent steps, none of whose costs is negative.

    Old observations fade, far outliers count little, and what was never seen is as in the prior.
    """

    def __init__(self) -> None:
        size = len(_PRIOR_S)
        self._moments = [[0.0] * size for _ in range(size)]  # Σ x xᵀ, fading
        self._products = [0.0] * size  # Σ x · seconds, fading
        self._costs = list(_PRIOR_S)
        self._typical_s = 0.02  # size of a residual
        self._ratios: deque[float] = deque([0.8, 1.0, 1.2] * 4, NUM_RATIOS)
        self._sorted_ratios = sorted(self._ratios)
        self._num_observed = 0

    def predict(self, load: StepLoad, quantile: float = 0.5) -> float:
        """Return the seconds that a step will take at most, with a probability of `quantile`."""
        mean = sum(c * x for c, x in zip(self._costs, _features(load), strict=True))
        place = min(len(self._sorted_ratios) - 1, int(quantile * len(self._sorted_ratios)))
        return mean * self._sorted_ratios[place]

    def observe(self, load: StepLoad, seconds: float) -> None:
        """Take in what a step took."""
        x = _features(load)
        expected = sum(c * v for c, v in zip(self._costs, x, strict=True))
        residual = seconds - expected
        bound = OUTLIER * self._typical_s
        self._typical_s += (min(abs(residual), bound) - self._typical_s) / 50
        kept = expected + max(-bound, min(bound, residual))
        fade = 1 - 1 / MEMORY_STEPS
        for row, (moments, value) in enumerate(zip(self._moments, x, strict=True)):
            for column, other in enumerate(x):
                moments[column] = fade * moments[column] + value * other
            self._products[row] = fade * self._products[row] + value * kept
        self._ratios.append(seconds / expected)
        self._num_observed += 1
        if self._num_observed % REFIT_EVERY == 0:
            self._costs = self._fit()
            self._sorted_ratios = sorted(self._ratios)

    def share_within(self, ratio: float) -> float:
        """Return which share of recent steps took at most `ratio` times the prediction."""
        return bisect_left(self._sorted_ratios, ratio) / len(self._sorted_ratios)

    def _fit(self) -> list[float]:
        """Solve for the costs; whatever comes out negative is 0 and the rest solved again."""
        kept = list(range(len(_PRIOR_S)))
        while True:
            moments = [[self._moments[r][c] for c in kept] for r in kept]
            products = [self._products[r] + PRIOR_STEPS * _PRIOR_S[r] for r in kept]
            for place, row in enumerate(moments):
                row[place] += PRIOR_STEPS
            found = _solve(moments, products)
            if min(found) >= 0:
                break
            kept = [feature for feature, cost in zip(kept, found, strict=True) if cost > 0]
        costs = [0.0] * len(_PRIOR_S)
        for feature, cost in zip(kept, found, strict=True):
            costs[feature] = cost
        return costs


def _solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Solve a positive definite system by elimination; both arguments are used up."""
    size = len(right)
    for pivot in range(size):
        for row in range(pivot + 1, size):
            factor = matrix[row][pivot] / matrix[pivot][pivot]
            for column in range(pivot, size):
                matrix[row][column] -= factor * matrix[pivot][column]
            right[row] -= factor * right[pivot]
    for row in reversed(range(size)):
        known = sum(matrix[row][c] * right[c] for c in range(row + 1, size))
        right[row] = (right[row] - known) / matrix[row][row]
    return right
