"""Llama and its kin (SmolLM2): grouped-query attention, SwiGLU, RMSNorm before each."""

from functools import partial

from torch import Tensor

from afd_server.kernels.table import KVLayer
from afd_server.models.base import Architecture, MicroBatch
from afd_server.models.layers import Decoder, DenseFFN, LayerSource, gqa, pack_qkv


class LlamaAttention:
    """The attention of one layer."""

    def __init__(self, source: LayerSource) -> None:
        shape, hidden = gqa(source), source.spec.hidden_size
        self._num_heads = shape.num_heads
        self._window = shape.window
        self._kernels = source.kernels
        self._rope = source.rope
        self._qkv = pack_qkv(source, shape)
        self._output = source.pack("o_proj", hidden, shape.num_heads * shape.head_dim)

    def attend(self, rows: Tensor, kv: KVLayer, batch: MicroBatch) -> Tensor:
        kernels = self._kernels
        qkv = kernels.linear(rows, self._qkv)
        query = kernels.rope_write_kv(
            qkv, self._num_heads, self._rope, batch.positions, batch.slots, kv
        )
        attended = kernels.paged_attention(query, kv, batch.rows, self._window)
        return kernels.linear(kernels.prepare(attended), self._output)


LLAMA = Architecture(attention=partial(Decoder, LlamaAttention), ffn=DenseFFN)
