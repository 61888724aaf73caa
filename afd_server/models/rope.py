"""From what config.json says about rotation to a table of angles."""

import math

import torch
from torch import Tensor

from afd_server.core.attention_spec import RopeSpec, YarnSpec
from afd_server.kernels import reference


def rope_table(rope: RopeSpec, num_positions: int) -> Tensor:
    """Tabulate cosines and sines: [num_positions, 2, dim] fp32, as the kernels want them."""
    if rope.yarn is None:
        return reference.rope_table(rope.dim, rope.theta, num_positions)
    frequencies = _yarn_frequencies(rope, rope.yarn)
    return reference.angle_table(frequencies, num_positions) * rope.yarn.magnitude


def _yarn_frequencies(rope: RopeSpec, yarn: YarnSpec) -> Tensor:
    """Slow the pairs that do not turn often in the original context (YaRN, section 3.2)."""

    def pair_turning(times: float) -> float:
        """Return which pair turns so many times in the original context, as a fraction."""
        per_turn = yarn.original_max_position / (2 * math.pi * times)
        return rope.dim * math.log(per_turn) / (2 * math.log(rope.theta))

    first = max(math.floor(pair_turning(yarn.beta_fast)), 0)
    last = min(math.ceil(pair_turning(yarn.beta_slow)), rope.dim - 1)
    pairs = torch.arange(rope.dim // 2, dtype=torch.float32)
    frequencies = rope.theta ** (-2 * pairs / rope.dim)
    slowed = ((pairs - first) / max(last - first, 0.001)).clamp(0, 1)
    return frequencies * (1 - slowed) + frequencies / yarn.factor * slowed


def pairs_apart(rows: Tensor) -> Tensor:
    """Reorder rows [dim, …] from pairs side by side to those the kernels rotate, dim/2 apart."""
    return torch.cat((rows[0::2], rows[1::2]))
