"""How long a lane's step will take, learned from the steps that were taken.

A step's time is close to linear in what it computes, and in what the other lanes compute beside
it, since all lanes share the same two pools. The costs come from a calibration and change slowly:
who fills every step up to the same time sees little of what a row or a token costs. What changes
quickly is the speed of the machine, one factor for all of them.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace

from afd_server.core.batch import StepPlan
from afd_server.core.sequence import Sequence

LEAST_S = 1e-4  # no step is expected to be shorter
LEAST_PACE = 0.1  # of a calibration's costs: nothing is expected to be done in less
MEMORY_STEPS = 2000  # after so many steps an observation counts a third for the costs
SPEED_STEPS = 25  # the same for the speed
LANES_STEPS = 16  # the same for what a number of lanes makes of it
MOST_STRAY = 1.5  # by which a number of lanes is taken to differ from its costs
REFIT_EVERY = 16  # steps
OWN_STEPS = 50.0  # how many observations the calibration is worth for each cost of a step itself
BESIDE_STEPS = 5.0  # the same for what it costs the steps beside it, which is a guess
GUESS_STEPS = 0.02  # how many observations of a calibration the guess before it is worth
STALE_STEPS = 150  # alone, after which nothing is held against lanes beside each other
NUM_RATIOS = 200  # of observed to predicted times; their quantiles are those of the next one
LONG_S = 0.05  # what holds a shorter step up would hold up one of this time no longer
OUTLIER = 2.0  # no step counts as slower than so many times its prediction

# Seconds for each unit of `_features` before any was measured, and how much of what a step costs
# itself it costs the steps beside it.
_GUESS_S = (0.01, 0.015, 0.005, 0.09, 0.005)
_BESIDE = 0.6
_NUM_OWN = len(_GUESS_S)
_PRIOR_WEIGHTS = (OWN_STEPS,) * _NUM_OWN + (BESIDE_STEPS,) * (_NUM_OWN - 1)  # all but `keys`


@dataclass(frozen=True, slots=True)
class StepLoad:
    """What the time of a step depends on.

    Attributes:
        rows: sequences that decode in it; an average may be a fraction.
        keys: positions that these attend to, all together.
        prefill: tokens of prompts in it.
        prefill_keys: positions that these attend to, all together.
        others: steps in other lanes.
        other_rows: as `rows`, of these.
        other_prefill: as `prefill`, of these.
        other_prefill_keys: as `prefill_keys`, of these.
    """

    rows: float = 0
    keys: float = 0
    prefill: float = 0
    prefill_keys: float = 0
    others: float = 0
    other_rows: float = 0
    other_prefill: float = 0
    other_prefill_keys: float = 0


def beside(loads: Iterable[StepLoad]) -> StepLoad:
    """Return an empty load beside the steps of other lanes."""
    others = list(loads)
    return StepLoad(
        others=len(others),
        other_rows=sum(load.rows for load in others),
        other_prefill=sum(load.prefill for load in others),
        other_prefill_keys=sum(load.prefill_keys for load in others),
    )


def beside_those_of(load: StepLoad, others: StepLoad) -> StepLoad:
    """Return a load beside the same steps of other lanes as another one."""
    return replace(
        load,
        others=others.others,
        other_rows=others.other_rows,
        other_prefill=others.other_prefill,
        other_prefill_keys=others.other_prefill_keys,
    )


def with_row(load: StepLoad, sequence: Sequence) -> StepLoad:
    """Return a load with one more sequence that decodes."""
    return replace(load, rows=load.rows + 1, keys=load.keys + len(sequence.token_ids))


def with_prefill(load: StepLoad, start: int, num_tokens: int) -> StepLoad:
    """Return a load with more tokens of a prompt, from a position on."""
    return replace(
        load,
        prefill=load.prefill + num_tokens,
        prefill_keys=load.prefill_keys + num_tokens * (start + num_tokens / 2),
    )


def load_of(plan: StepPlan, others: Iterable[StepLoad]) -> StepLoad:
    """Return what a step has to do, beside those in other lanes."""
    rows = keys = prefill = prefill_keys = 0.0
    for planned in plan.sequences:
        tokens = len(planned.token_ids)
        seen = tokens * (planned.start + tokens / 2)
        if tokens == 1:
            rows, keys = rows + 1, keys + seen
        else:
            prefill, prefill_keys = prefill + tokens, prefill_keys + seen
    load = StepLoad(rows=rows, keys=keys, prefill=prefill, prefill_keys=prefill_keys)
    return beside_those_of(load, beside(others))


def _features(load: StepLoad) -> tuple[float, ...]:
    """Return the load in units of a similar weight, behind a constant."""
    return (
        1.0,
        load.rows / 16,
        load.keys / 8192,
        load.prefill / 128,
        load.prefill_keys / 65536,
        load.others,
        load.other_rows / 16,
        load.other_prefill / 128,
        load.other_prefill_keys / 65536,
    )


class StepTimeModel:
    """Predicts step times as speed · costs · load; no cost is negative.

    The costs are those of a calibration until many steps say otherwise, by least squares; the
    speed follows the latest steps. Steps that only decode have a factor for the number of steps
    beside them: nothing else says so soon in how many lanes a few sequences should be.
    """

    def __init__(self) -> None:
        self._prior = _with_beside(_GUESS_S)
        self._costs = self._prior
        self._speed = 1.0  # above 1: everything takes longer than it did
        self._strays: dict[float, float] = {}  # by the number of others; 1 unless it is there
        size = len(self._prior)
        self._moments = [[0.0] * size for _ in range(size)]  # Σ x xᵀ, fading
        self._products = [0.0] * size  # Σ x · seconds, fading
        self._ratios: deque[float] = deque([0.9, 1.0, 1.1] * 4, NUM_RATIOS)
        self._sorted_ratios = sorted(self._ratios)
        self._delays = self._ratios.copy()  # the same of what took at least `LONG_S`, or might have
        self._sorted_delays = sorted(self._delays)
        self._num_observed = 0
        self._num_alone = 0  # steps since the last one beside others

    @property
    def slowness(self) -> float:
        """Return how long steps take lately, as a multiple of what their costs say."""
        return self._speed

    def predict(self, load: StepLoad, quantile: float = 0.5) -> float:
        """Return the seconds that a step will take at most, with a probability of `quantile`."""
        return self._speed * self._nominal_s(load) * _quantile(self._sorted_ratios, quantile)

    def longest(self, load: StepLoad, quantile: float) -> float:
        """Return the same for a step that may be much longer than most.

        What holds steps up often takes as long whatever they hold: a few milliseconds are twice a
        short step, and little of a long one.
        """
        expected_s = self._speed * self._nominal_s(load)
        delay = _quantile(self._sorted_delays, quantile) - 1
        return expected_s + delay * max(expected_s, LONG_S)

    def _nominal_s(self, load: StepLoad) -> float:
        costs_s = max(LEAST_S, _times(self._costs, load))
        return costs_s * self._strays.get(_num_beside(load), 1.0)

    def calibrate(self, steps: Iterable[tuple[StepLoad, float]]) -> None:
        """Take the costs from steps (and their seconds) that nothing else held up.

        Those of a step itself come from the steps that were alone, those of the steps beside it
        from what others took longer.
        """
        timed = [(_features(load), seconds) for load, seconds in steps]
        alone = [(x, seconds) for x, seconds in timed if not any(x[_NUM_OWN:])]
        own = _fitted([(x[:_NUM_OWN], seconds, seconds) for x, seconds in alone], _GUESS_S)
        together = [(x, seconds) for x, seconds in timed if any(x[_NUM_OWN:])]
        longer = [
            (x[_NUM_OWN:], seconds - _sum(own, x[:_NUM_OWN]), seconds) for x, seconds in together
        ]
        self._prior = self._costs = (*own, *_fitted(longer, _with_beside(own)[_NUM_OWN:]))

    def observe(self, load: StepLoad, seconds: float) -> None:
        """Take in what a step took."""
        expected_s = self._nominal_s(load)
        ratio = seconds / expected_s
        kept = min(ratio, OUTLIER * self._speed)
        self._ratios.append(ratio / self._speed)
        usual_s = self._speed * expected_s
        self._delays.append(1 + (seconds - usual_s) / max(usual_s, LONG_S))
        if (num_beside := _num_beside(load)) >= 0:
            stray = self._strays.get(num_beside, 1.0) * (kept / self._speed) ** (1 / LANES_STEPS)
            self._strays[num_beside] = min(MOST_STRAY, max(1 / MOST_STRAY, stray))
        self._speed += (kept - self._speed) / SPEED_STEPS
        fade = 1 - 1 / MEMORY_STEPS
        _add(self._moments, self._products, _features(load), kept * expected_s, fade=fade)
        self._num_observed += 1
        self._num_alone = 0 if load.others else self._num_alone + 1
        if self._num_observed % REFIT_EVERY == 0:
            self._sorted_ratios = sorted(self._ratios)
            self._sorted_delays = sorted(self._delays)
            self._refit()

    def _refit(self) -> None:
        """Take new costs; the speed is then that of the latest steps under these.

        A calibration says how costs compare; the machine may have had another pace then. Held to
        the costs of a slow calibration, a fit would take too much for what is seldom done, and for
        the rest next to nothing.
        """
        pace = max(LEAST_PACE, _scale(self._moments, self._products, self._prior))
        prior = tuple(pace * cost for cost in self._prior)
        found = _non_negative(self._moments, self._products, prior, _PRIOR_WEIGHTS)
        is_stale = self._num_alone > STALE_STEPS
        costs = _bounded(found, tuple(map(min, prior, self._prior)) if is_stale else found)
        if is_stale:
            self._strays = {others: stray**0.5 for others, stray in self._strays.items()}
        typical = [row[0] for row in self._moments]  # Σ x: the mean load, since x begins with 1
        old = sum(c * x for c, x in zip(self._costs, typical, strict=True))
        new = sum(c * x for c, x in zip(costs, typical, strict=True))
        self._speed *= old / new
        self._costs = costs


def _quantile(ordered: list[float], quantile: float) -> float:
    return ordered[min(len(ordered) - 1, int(quantile * len(ordered)))]


def _num_beside(load: StepLoad) -> float:
    """Return the number of others if all of these only decode, else -1."""
    return -1 if load.prefill or load.other_prefill else load.others


def _fitted(
    steps: Iterable[tuple[tuple[float, ...], float, float]], guess: tuple[float, ...]
) -> tuple[float, ...]:
    """Return costs from features, the seconds they are to explain, and those of the whole step.

    A tenth of a short step is worth as much as a tenth of a long one.
    """
    size = len(guess)
    moments, products = [[0.0] * size for _ in range(size)], [0.0] * size
    for x, seconds, whole_s in steps:
        _add(moments, products, x, seconds, weight=(0.02 / whole_s) ** 2)
    return _non_negative(moments, products, guess, (GUESS_STEPS,) * size)


def _with_beside(own: tuple[float, ...]) -> tuple[float, ...]:
    """Return costs with those of what other lanes do, a share of what the same costs oneself."""
    constant, rows, _, *prefill = own
    return (*own, *(_BESIDE * cost for cost in (constant, rows, *prefill)))


def _bounded(costs: tuple[float, ...], limits: tuple[float, ...]) -> tuple[float, ...]:
    """Return costs under which steps cost others beside them no more than is likely.

    That is no more than their own work: what is above was the machine, and is in the speed, which
    changes back with any step. What lanes cost each other is seen only while several of them run,
    so a belief that they cannot would last. For the same reason there are limits of their own.
    """
    own, beside_s = costs[:_NUM_OWN], costs[_NUM_OWN:]
    constant, rows, _, *prefill = own
    bounds = zip(beside_s, (constant, rows, *prefill), limits[_NUM_OWN:], strict=True)
    return (*own, *map(min, bounds))


def _times(costs: tuple[float, ...], load: StepLoad) -> float:
    return _sum(costs, _features(load))


def _sum(costs: tuple[float, ...], x: tuple[float, ...]) -> float:
    return sum(c * value for c, value in zip(costs, x, strict=True))


def _add(
    moments: list[list[float]],
    products: list[float],
    x: tuple[float, ...],
    seconds: float,
    *,
    weight: float = 1.0,
    fade: float = 1.0,
) -> None:
    """Add an observation to the sums of least squares."""
    for row, (sums, value) in enumerate(zip(moments, x, strict=True)):
        for column, other in enumerate(x):
            sums[column] = fade * sums[column] + weight * value * other
        products[row] = fade * products[row] + weight * value * seconds


def _scale(moments: list[list[float]], products: list[float], costs: tuple[float, ...]) -> float:
    """Return by which factor costs explain best what was observed."""
    explained = sum(c * _sum(costs, tuple(row)) for c, row in zip(costs, moments, strict=True))
    return _sum(costs, tuple(products)) / explained


def _non_negative(
    moments: list[list[float]],
    products: list[float],
    prior: tuple[float, ...],
    weights: tuple[float, ...],
) -> tuple[float, ...]:
    """Solve for the costs; whatever comes out negative is 0 and the rest solved again."""
    kept = list(range(len(prior)))
    while True:
        matrix = [[moments[r][c] + weights[r] * (r == c) for c in kept] for r in kept]
        found = _solve(matrix, [products[r] + weights[r] * prior[r] for r in kept])
        if min(found, default=0.0) >= 0:
            break
        kept = [feature for feature, cost in zip(kept, found, strict=True) if cost > 0]
    costs = dict(zip(kept, found, strict=True))
    return tuple(costs.get(feature, 0.0) for feature in range(len(prior)))


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
