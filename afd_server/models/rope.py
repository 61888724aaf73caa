"""From what config.json says about rotation to a table of angles."""

import math

import torch
from torch import Tensor

from afd_server.core.attention_spec import Llama3Spec, RopeSpec, YarnSpec
from afd_server.kernels.reference import angle_table


def rope_table(rope: RopeSpec, num_positions: int) -> Tensor:
    """Tabulate cosines and sines, [num_positions, 2, dim + num_still] fp32, for the kernels.

    Elements that are not rotated belong to pairs of frequency 0; see `halves`.
    """
    frequencies, magnitude = _frequencies(rope), 1.0
    match rope.scaling:
        case YarnSpec() as yarn:
            frequencies, magnitude = _yarn(rope, yarn, frequencies), yarn.magnitude
        case Llama3Spec() as llama3:
            frequencies = _llama3(llama3, frequencies)
    still = torch.zeros(rope.num_still // 2)
    return angle_table(torch.cat((frequencies, still)), num_positions) * magnitude


def halves(rows: Tensor, rope: RopeSpec) -> Tensor:
    """Reorder rows [dim + num_still, …] so that pairs are half of all rows apart.

    Checkpoints have the pairs of the rotated rows dim/2 apart, and then the others. Queries and
    keys in another order, the same for both, have the same products.
    """
    rotated, still = rows[: rope.dim], rows[rope.dim :]
    first, second = rope.dim // 2, rope.num_still // 2
    return torch.cat((rotated[:first], still[:second], rotated[first:], still[second:]))


def pairs_apart(rows: Tensor) -> Tensor:
    """Reorder rows [dim, …] from pairs side by side to pairs half of all rows apart."""
    return torch.cat((rows[0::2], rows[1::2]))


def _frequencies(rope: RopeSpec) -> Tensor:
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.int64).float() / rope.dim
    return 1.0 / rope.theta**exponents


def _llama3(scaling: Llama3Spec, frequencies: Tensor) -> Tensor:
    turns = scaling.original_max_position * frequencies / (2 * math.pi)
    kept = (turns - scaling.least_turns) / (scaling.most_turns - scaling.least_turns)
    kept = kept.clamp(0, 1)
    return frequencies * kept + frequencies / scaling.factor * (1 - kept)


def _yarn(rope: RopeSpec, yarn: YarnSpec, frequencies: Tensor) -> Tensor:
    """Slow the pairs that do not turn often in the original context (YaRN, section 3.2)."""

    def pair_turning(times: float) -> float:
        """Return which pair turns so many times in the original context, as a fraction."""
        per_turn = yarn.original_max_position / (2 * math.pi * times)
        return rope.dim * math.log(per_turn) / (2 * math.log(rope.theta))

    first = max(math.floor(pair_turning(yarn.beta_fast)), 0)
    last = min(math.ceil(pair_turning(yarn.beta_slow)), rope.dim - 1)
    pairs = torch.arange(rope.dim // 2, dtype=torch.float32)
    slowed = ((pairs - first) / max(last - first, 0.001)).clamp(0, 1)
    return frequencies * (1 - slowed) + frequencies / yarn.factor * slowed
