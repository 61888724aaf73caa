"""The memory of the KV blocks. Who owns which block is the scheduler's business."""

import mmap

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


def _map_layer(kv: KVShape, num_blocks: int, block_size: int, dtype: torch.dtype) -> KVLayer:
    slots = num_blocks * kv.num_heads * block_size
    memory = mmap.mmap(-1, slots * (kv.key_dim + kv.value_dim) * dtype.itemsize)
    elements = torch.frombuffer(memory, dtype=dtype)
    keys, values = torch.split(elements, [slots * kv.key_dim, slots * kv.value_dim])
    shape = (num_blocks, kv.num_heads, block_size, -1)
    return KVLayer(keys.view(shape), values.view(shape))
