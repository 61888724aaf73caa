"""Llama and its kin (SmolLM2): grouped-query attention, SwiGLU, RMSNorm before each."""

from functools import partial

from torch import Tensor

from afd_server.kernels.table import GQAWeights, KVLayer
from afd_server.models.base import Architecture, MicroBatch
from afd_server.models.layers import Decoder, DenseFFN, LayerSource, WholeAttention, gqa, pack_qkv


class LlamaAttention(WholeAttention):
    """The attention of one layer."""

    def __init__(self, source: LayerSource) -> None:
        shape, hidden = gqa(source), source.spec.hidden_size
        output = source.pack("o_proj", hidden, shape.num_heads * shape.head_dim)
        qkv = pack_qkv(source, shape)
        self._gqa = source.kernels.gqa(
            GQAWeights(qkv, output, source.rope, source.norms, shape.num_heads, shape.window)
        )
        self.native = self._gqa.native

    def attend_between(
        self, hidden: Tensor, delta: Tensor | None, kv: KVLayer, batch: MicroBatch
    ) -> tuple[Tensor, Tensor]:
        return self._gqa(hidden, delta, batch.positions, batch.slots, batch.rows, kv)


LLAMA = Architecture(attention=partial(Decoder, LlamaAttention), ffn=DenseFFN)
