"""The int8 format of weights and activations: quantise and multiply, in plain torch.

Both carry a scale for each row and group of 64 columns, and each group is rotated before it is
rounded: multiplied by the Hadamard matrix of order 64 over 8, which is orthonormal, so products
stay what they were, and which spreads a channel far above the others over its whole group instead
of letting it coarsen that group's scale (the idea is QuaRot's, arXiv 2404.00456, section 4).
Products are exact in a group (64 · 127² < 2²⁴) and groups are added in order, so a row's result
depends on that row alone.

Quantised rows are bytes, [rows, groups · (4 + 64)]: the float32 scales of the groups, then the
int8 values, padded with zeros to whole groups. They travel as they are.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 64


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """A weight of shape [out, in] in int8.

    Attributes:
        values: [out, groups, 64] int8, columns padded with zeros to whole groups.
        scales: [out, groups] float32; a rotated weight is about values · scales.
    """

    values: Tensor
    scales: Tensor


def num_groups(width: int) -> int:
    """Return the groups of a row of `width` columns."""
    return -(-width // GROUP)


def quantised_row_bytes(width: int) -> int:
    """Return the bytes of a quantised row of `width` columns."""
    return num_groups(width) * (4 + GROUP)


def pack_int8(weight: Tensor) -> Int8Weight:
    """Quantise a weight [out, in] symmetrically: scale = amax / 127 of the rotated group."""
    return Int8Weight(*_quantise(weight))


def quantise_rows(x: Tensor) -> Tensor:
    """Quantise activations: [rows, in] → [rows, quantised_row_bytes(in)] uint8."""
    values, scales = _quantise(x)
    scale_bytes = scales.flatten().view(torch.uint8).view(x.shape[0], 4 * scales.shape[1])
    return torch.cat((scale_bytes, values.flatten(1).view(torch.uint8)), 1)


def split_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Take quantised rows apart: values [rows, groups, 64] int8, scales [rows, groups] float32."""
    groups = rows.shape[1] // (4 + GROUP)
    scales = rows[:, : 4 * groups].flatten().view(torch.float32).view(-1, groups)
    return rows[:, 4 * groups :].contiguous().view(torch.int8).view(-1, groups, GROUP), scales


def linear_int8(rows: Tensor, weight: Int8Weight) -> Tensor:
    """Multiply quantised rows by an int8 weight: [rows, …] → [rows, out] float32."""
    values, scales = split_rows(rows)
    total = torch.zeros(rows.shape[0], weight.values.shape[0])
    for group in range(values.shape[1]):
        columns = weight.values[:, group].float()
        exact = values[:, group].float() @ columns.T  # integers below 2²⁴: exact in any order
        total = total + exact * (weight.scales[:, group] * scales[:, group, None])
    return total


def rotate(groups: Tensor) -> Tensor:
    """Multiply [..., 64] by the Hadamard matrix in Sylvester's order: 64 times itself undone.

    Six stages of sums and differences in a fixed order, which the native kernels keep.
    """
    for step in (1, 2, 4, 8, 16, 32):
        pairs = groups.reshape(*groups.shape[:-1], GROUP // step // 2, 2, step)
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        groups = torch.stack((low + high, low - high), -2).flatten(-3)
    return groups


def _quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    padded = F.pad(x.float(), (0, -x.shape[1] % GROUP))
    groups = rotate(padded.view(x.shape[0], num_groups(x.shape[1]), GROUP))
    highest = groups.abs().amax(-1)
    # torch would compute 127 / x as the reciprocal of x times 127, which rounds twice
    inverse = torch.where(highest > 0, torch.full_like(highest, 127) / highest, 0.0)
    values = (groups * inverse.unsqueeze(-1)).round().to(torch.int8)
    return values, highest / 127 * 0.125  # an eighth on each side makes the rotation orthonormal
