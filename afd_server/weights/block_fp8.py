"""Block-FP8 weights: float8 values, and a factor for every block of 128 by 128."""

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
BLOCK = 128  # rows and columns of a block; those at an edge are cut off


def scale_name(name: str) -> str:
    """Return the name of the factors that belong to a tensor."""
    return f"{name}_scale_inv"


def block_sizes(rank: int) -> tuple[int, ...]:
    """Return a block's size along each dimension; of stacked experts, one is never shared."""
    return (1,) * (rank - 2) + (BLOCK, BLOCK)


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a tensor's factors."""
    sizes = block_sizes(len(shape))
    return tuple(-(-length // size) for length, size in zip(shape, sizes, strict=True))


def scale_part(part: tuple[slice, ...], rank: int) -> tuple[slice, ...]:
    """Return which factors a part of a tensor needs; slices have a start and a stop."""
    sizes = block_sizes(rank)
    return tuple(
        slice(piece.start // size, -(-piece.stop // size))
        for piece, size in zip(part, sizes, strict=True)
    )


def dequantise(values: Tensor, scales: Tensor, first_row: int, first_column: int) -> Tensor:
    """Multiply float8 values by the factors of their blocks, in float32.

    Args:
        values: [..., rows, columns].
        scales: [..., blocks of rows, blocks of columns], of all blocks that the values touch.
        first_row: where in its block the first row is.
        first_column: where in its block the first column is.

    Returns:
        [..., rows, columns] float32.
    """
    wide = values.float()
    columns = slice(first_column, first_column + wide.shape[-1])
    by_column = scales.float().repeat_interleave(BLOCK, -1)[..., columns]
    for block in range(scales.shape[-2]):
        rows = slice(max(0, block * BLOCK - first_row), (block + 1) * BLOCK - first_row)
        wide[..., rows, :] *= by_column[..., block : block + 1, :]
    return wide
