"""How many lanes an attention worker should have, from what its stages were measured to take."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

CONTEXT_TOKENS = 192  # of a decoding sequence: the middle of an answer of 128 to a prompt of 128
MOST_LANES = 8  # two stages and two transfers of equal length ask for four
ROUNDING = 1e-9
LEAST_GAIN = 0.05  # what lanes more must save of the time: they are measured no better


@dataclass(frozen=True, slots=True)
class StageTimes:
    """What one micro-batch takes in one layer, in seconds.

    Attributes:
        attention_s: an attention worker is occupied, T_a; its share of sampling is in it.
        ffn_s: an FFN worker is occupied, T_f.
        transfer_s: one way between the two, T_c.
    """

    attention_s: float
    ffn_s: float
    transfer_s: float

    @property
    def round_trip_s(self) -> float:
        """Return the time of a micro-batch that never waits for another one."""
        return self.attention_s + self.ffn_s + 2 * self.transfer_s


class LayerTimes(NamedTuple):
    """What a step that ran alone took, in seconds; by layer where it can be told.

    Attributes:
        attention_s: the attention worker was occupied, in all layers together.
        ffn_s: an FFN worker was.
        transfer_s: one way between the two.
    """

    attention_s: float
    ffn_s: Sequence[float]
    transfer_s: Sequence[float]


def quickest(measured: Sequence[LayerTimes]) -> StageTimes:
    """Return the mean layer of the least that each took: what nothing else on the cores held up.

    Layer by layer, as hardly a step of many stages is held up nowhere.
    """
    num_layers = len(measured[0].ffn_s)
    ffn_s = map(min, zip(*(times.ffn_s for times in measured), strict=True))
    transfer_s = map(min, zip(*(times.transfer_s for times in measured), strict=True))
    return StageTimes(
        min(times.attention_s for times in measured) / num_layers,
        sum(ffn_s) / num_layers,
        sum(transfer_s) / num_layers,
    )


@dataclass(frozen=True, slots=True)
class MeasuredStages:
    """Stage times of two micro-batches, and so of any: T(rows) = fixed + rows · slope.

    A fixed part is what every lane pays again, most of all for reading the weights.
    """

    few_rows: int
    few: StageTimes
    many_rows: int
    many: StageTimes

    def at(self, rows: float) -> StageTimes:
        """Return the stage times of a micro-batch of so many rows."""

        def line(few_s: float, many_s: float) -> float:
            slope = (many_s - few_s) / max(1, self.many_rows - self.few_rows)
            slope = min(max(0.0, slope), many_s / self.many_rows)  # what is fixed is not negative
            return many_s + slope * (rows - self.many_rows)

        return StageTimes(
            line(self.few.attention_s, self.many.attention_s),
            line(self.few.ffn_s, self.many.ffn_s),
            line(self.few.transfer_s, self.many.transfer_s),
        )


def layer_s(times: StageTimes, num_lanes: int, num_sharing: float = 1.0) -> float:
    """Return the time in which every lane comes one layer further.

    Either the slower side is always busy, with one lane after the other, or each lane waits for
    nothing but its own way there and back. The fewest lanes for which the first holds are those
    of MegaScale-Infer (arXiv 2504.02263), eq. 3: m ≥ (T_a + T_f + 2 · T_c) / max(T_a, T_f).

    Args:
        times: of a lane's micro-batch.
        num_lanes: of each attention worker.
        num_sharing: attention workers whose calls an FFN worker computes one after the other.
    """
    busy_s = max(times.attention_s, num_sharing * times.ffn_s)
    return max(num_lanes * busy_s, times.round_trip_s)


@dataclass(frozen=True, slots=True)
class LaneChoice:
    """A number of lanes, and the `layer_s` expected with 1, 2, … of them."""

    num_lanes: int
    layer_s: Sequence[float]


def choose_lanes(
    measured: MeasuredStages,
    num_streams: int,
    num_sharing: float,
    least_gain: float = LEAST_GAIN,
) -> LaneChoice:
    """Choose the fewest lanes that bring so many streams through a layer soonest, or nearly so.

    Without fixed parts these are the lanes of eq. 3; with them a lane more has to save more
    waiting than it costs.

    Args:
        measured: at this worker.
        num_streams: sequences that decode, spread evenly over the lanes.
        num_sharing: as for `layer_s`.
        least_gain: the share of the time by which more lanes have to be quicker.
    """
    expected = [
        layer_s(measured.at(num_streams / num_lanes), num_lanes, num_sharing)
        for num_lanes in range(1, min(MOST_LANES, num_streams) + 1)
    ]
    good_enough = min(expected) * (1 + max(least_gain, ROUNDING))
    chosen = next(n for n, seconds in enumerate(expected, 1) if seconds <= good_enough)
    return LaneChoice(chosen, expected)
