"""Qwen3 without experts: as Llama, with each head of queries and keys normed before rope."""

from functools import partial

from torch import Tensor

from afd_server.kernels.table import KVLayer
from afd_server.models.base import Architecture, MicroBatch
from afd_server.models.layers import Decoder, DenseFFN, LayerSource, gqa, pack_qkv, split_heads


class Qwen3Attention:
    """The attention of one layer."""

    def __init__(self, source: LayerSource) -> None:
        shape, hidden = gqa(source), source.spec.hidden_size
        self._shape = shape
        self._eps = source.spec.rms_norm_eps
        self._kernels = source.kernels
        self._rope = source.rope
        self._qkv = pack_qkv(source, shape)
        self._query_norm = source.read("q_norm.weight", shape.head_dim)
        self._key_norm = source.read("k_norm.weight", shape.head_dim)
        self._output = source.pack("o_proj", hidden, shape.num_heads * shape.head_dim)

    def attend(self, rows: Tensor, kv: KVLayer, batch: MicroBatch) -> Tensor:
        kernels, eps, positions = self._kernels, self._eps, batch.positions
        query, keys, values = split_heads(kernels.linear(rows, self._qkv), self._shape)
        query = kernels.rope(kernels.rms_norm(query, self._query_norm, eps), self._rope, positions)
        keys = kernels.rope(kernels.rms_norm(keys, self._key_norm, eps), self._rope, positions)
        kernels.write_kv(kv, batch.slots, keys, values)
        attended = kernels.paged_attention(query, kv, batch.rows, self._shape.window)
        return kernels.linear(kernels.prepare(attended), self._output)


QWEN3 = Architecture(attention=partial(Decoder, Qwen3Attention), ffn=DenseFFN)
