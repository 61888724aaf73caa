"""Block-FP8 tensors, made and multiplied out the plain way."""

import torch


def quantise(weight):
    """Return float8 values and their factors, block by block."""
    *lead, rows, columns = weight.shape
    scales = torch.empty(*lead, -(-rows // 128), -(-columns // 128))
    values = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    for i in range(scales.shape[-2]):
        for j in range(scales.shape[-1]):
            block = (..., slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
            scales[..., i, j] = weight[block].abs().amax((-2, -1)) / 448
            values[block] = (weight[block] / scales[..., i, j, None, None]).to(values.dtype)
    return values, scales


def plain(values, scales):
    """Return the product, with every factor spread over its block."""
    spread = scales.repeat_interleave(128, -2).repeat_interleave(128, -1)
    return values.float() * spread[..., : values.shape[-2], : values.shape[-1]]
