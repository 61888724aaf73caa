"""The memory of the KV blocks. Who owns which block is the scheduler's business."""

import math
import mmap
from collections.abc import Sequence

import torch

from afd_server.core.attention_spec import KVShape
from afd_server.core.kv_groups import KVGroup
from afd_server.core.model_spec import ModelSpec
from afd_server.kernels.kv_format import stored_size
from afd_server.kernels.table import KVLayer


class KVStore:
    """Keys and values of every layer, zeroed: a masked key must be finite.

    The memory is an anonymous mapping: reserved at once, taken as blocks are first written.

    Args:
        spec: says what each layer caches.
        num_blocks, block_size: of the pool.
        dtype: of keys and values as they are stored (`kernels.kv_format`).
        groups: the first layers of each group are in the same memory, the second ones in the
            next and so on, as a block belongs to one group at a time. None: one group.
    """

    def __init__(
        self,
        spec: ModelSpec,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        groups: Sequence[KVGroup] | None = None,
    ) -> None:
        self.block_size = block_size
        groups = groups or (KVGroup(tuple(range(spec.num_layers)), None),)
        largest = max((group.layers for group in groups), key=len)
        memory = [
            _map_layer(spec.attention[layer].kv, num_blocks, block_size, dtype) for layer in largest
        ]
        place = {
            layer: (number, index)
            for number, group in enumerate(groups)
            for index, layer in enumerate(group.layers)
        }
        self.group_of = tuple(place[layer][0] for layer in range(spec.num_layers))
        self.layers = tuple(memory[place[layer][1]] for layer in range(spec.num_layers))

    def clear(self, block_ids: Sequence[int]) -> None:
        """Write zeros to blocks, which takes their memory."""
        for layer in self.layers:
            for tensor in layer:
                tensor[list(block_ids)] = 0


def _map_layer(kv: KVShape, num_blocks: int, block_size: int, dtype: torch.dtype) -> KVLayer:
    shape = (num_blocks, kv.num_heads, block_size)
    key_size, value_size = stored_size(kv.key_dim, dtype), stored_size(kv.value_dim, dtype)
    size = key_size + (0 if kv.value_in_key else value_size)
    memory = mmap.mmap(-1, math.prod(shape) * size * dtype.itemsize)
    elements = torch.frombuffer(memory, dtype=dtype)
    num_keys = math.prod(shape) * key_size
    keys = elements[:num_keys].view(*shape, key_size)
    if kv.value_in_key:
        return KVLayer(keys, keys[..., :value_size])
    return KVLayer(keys, elements[num_keys:].view(*shape, value_size))
