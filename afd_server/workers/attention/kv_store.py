"""The memory of the KV blocks. Who owns which block is the scheduler's business."""

import torch

from afd_server.core.model_spec import ModelSpec
from afd_server.kernels.table import KVLayer


class KVStore:
    """Keys and values of every layer, zeroed: a masked key must be finite.

    The memory is reserved at once and used as blocks are first written.
    """

    def __init__(
        self, spec: ModelSpec, num_blocks: int, block_size: int, dtype: torch.dtype
    ) -> None:
        shape = (num_blocks, block_size, spec.num_kv_heads, spec.head_dim)
        self.block_size = block_size
        self.layers = tuple(
            KVLayer(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype))
            for _ in range(spec.num_layers)
        )
