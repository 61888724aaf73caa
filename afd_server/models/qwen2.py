"""Qwen2 and Qwen2.5: as Llama, with a bias on queries, keys and values."""

from functools import partial

import torch
from torch import Tensor

from afd_server.kernels.table import KVLayer
from afd_server.models.base import Architecture, MicroBatch
from afd_server.models.layers import Decoder, DenseFFN, LayerSource, gqa, pack_qkv


class Qwen2Attention:
    """The attention of one layer."""

    def __init__(self, source: LayerSource) -> None:
        shape, hidden = gqa(source), source.spec.hidden_size
        query, key_value = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self._num_heads = shape.num_heads
        self._window = shape.window
        self._kernels = source.kernels
        self._rope = source.rope
        self._qkv = pack_qkv(source, shape)
        self._bias = torch.cat(
            (
                source.read("q_proj.bias", query),
                source.read("k_proj.bias", key_value),
                source.read("v_proj.bias", key_value),
            )
        )
        self._output = source.pack("o_proj", hidden, query)

    def attend(self, rows: Tensor, kv: KVLayer, batch: MicroBatch) -> Tensor:
        kernels = self._kernels
        qkv = kernels.linear(rows, self._qkv) + self._bias
        query = kernels.rope_write_kv(
            qkv, self._num_heads, self._rope, batch.positions, batch.slots, kv
        )
        attended = kernels.paged_attention(query, kv, batch.rows, self._window)
        return kernels.linear(kernels.prepare(attended), self._output)


QWEN2 = Architecture(attention=partial(Decoder, Qwen2Attention), ffn=DenseFFN)
