"""How keys and values are stored: as they are, rounded to bfloat16, or int8 with a scale.

In int8 a head's key or value of a token is a float32 scale, then the values in bytes. It is
written once and never quantised again, so its bits depend on that token alone.
"""

import torch
from torch import Tensor

from afd_server.core.attention_spec import KV_SCALE_BYTES


def stored_size(head_dim: int, dtype: torch.dtype) -> int:
    """Return the elements of a stored head."""
    return head_dim + (KV_SCALE_BYTES if dtype is torch.int8 else 0)


def stored_dim(blocks: Tensor) -> int:
    """Return the size of the heads that blocks [..., stored_size(head_dim)] hold."""
    return blocks.shape[-1] - stored_size(0, blocks.dtype)


def store(heads: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn heads [..., head_dim] into what is stored: in int8 the scale is amax / 127."""
    if dtype is not torch.int8:
        return heads.to(dtype)
    wide = heads.float()
    highest = wide.abs().amax(-1, keepdim=True)
    # torch would compute 127 / x as the reciprocal of x times 127, which rounds twice
    inverse = torch.where(highest > 0, torch.full_like(highest, 127) / highest, 0.0)
    values = (wide * inverse).round().to(torch.int8)
    return torch.cat(((highest / 127).view(torch.int8), values), -1)


def restore(stored: Tensor) -> Tensor:
    """Turn what is stored into heads [..., head_dim] float32."""
    if stored.dtype is not torch.int8:
        return stored.float()
    scales, values = scales_and_values(stored)
    return values * scales


def scales_and_values(stored: Tensor) -> tuple[Tensor, Tensor]:
    """Take apart what is stored in int8: scales [..., 1] and whole numbers [..., head_dim]."""
    scales = stored[..., :KV_SCALE_BYTES].contiguous().view(torch.float32)
    return scales, stored[..., KV_SCALE_BYTES:].float()
