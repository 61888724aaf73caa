"""The memory of the KV blocks. Who owns which block is the scheduler's business."""

import math
import mmap

import torch

from afd_server.core.model_spec import ModelSpec
from afd_server.kernels.table import KVLayer


class KVStore:
    """Keys and values of every layer, zeroed: a masked key must be finite.

    The memory is an anonymous mapping: reserved at once, taken as blocks are first written.
    """

    def __init__(
        self, spec: ModelSpec, num_blocks: int, block_size: int, dtype: torch.dtype
    ) -> None:
        shape = (spec.num_layers, 2, num_blocks, spec.num_kv_heads, block_size, spec.head_dim)
        self.block_size = block_size
        memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
        blocks = torch.frombuffer(memory, dtype=dtype).view(shape)
        self.layers = tuple(KVLayer(layer[0], layer[1]) for layer in blocks)
