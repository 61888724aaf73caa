"""The memory of the KV blocks. Who owns which block is the scheduler's business."""

import math
import mmap
from collections.abc import Sequence

import torch

from afd_server.core.attention_spec import KVShape
from afd_server.core.model_spec import ModelSpec
from afd_server.kernels.table import KVLayer


class KVStore:
    """Keys and values of every layer, zeroed: a masked key must be finite.

    The memory is an anonymous mapping: reserved at once, taken as blocks are first written.
    """

    def __init__(
        self, spec: ModelSpec, num_blocks: int, block_size: int, dtype: torch.dtype
    ) -> None:
        self.block_size = block_size
        self.layers = tuple(
            _map_layer(layer.kv, num_blocks, block_size, dtype) for layer in spec.attention
        )

    def clear(self, block_ids: Sequence[int]) -> None:
        """Write zeros to blocks, which takes their memory."""
        for layer in self.layers:
            for tensor in layer:
                tensor[list(block_ids)] = 0


def _map_layer(kv: KVShape, num_blocks: int, block_size: int, dtype: torch.dtype) -> KVLayer:
    memory = mmap.mmap(-1, num_blocks * block_size * kv.elements * dtype.itemsize)
    elements = torch.frombuffer(memory, dtype=dtype)
    shape = (num_blocks, kv.num_heads, block_size)
    num_keys = math.prod(shape) * kv.key_dim
    keys = elements[:num_keys].view(*shape, kv.key_dim)
    if kv.value_in_key:
        return KVLayer(keys, keys[..., : kv.value_dim])
    return KVLayer(keys, elements[num_keys:].view(*shape, kv.value_dim))
