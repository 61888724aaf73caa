"""Step-3.5: as Qwen3, with windows, a gate for each head, norms around 1, and Step-3's experts.

Layers differ: some see all positions and rotate half of a head, the others see a window, with
more heads. Weights of norms are kept as what is added to 1.
"""

from functools import partial

import torch
from torch import Tensor

from afd_server.core.attention_spec import GQASpec
from afd_server.kernels.reference import sigmoid
from afd_server.kernels.table import KVLayer
from afd_server.models.base import Architecture, MicroBatch, WeightSource
from afd_server.models.experts import GatedDecoder, RoutedFFN
from afd_server.models.layers import LayerSource, gqa, split_heads
from afd_server.models.rope import halves
from afd_server.models.step3_text import NAMES


def read_norm(weights: WeightSource, name: str, size: int) -> Tensor:
    """Return a norm's weight as the kernels multiply by it.

    In bfloat16 the sum is rounded; native kernels keep norms in float32.
    """
    return 1.0 + weights.read(name, (size,))


class Step3p5Attention:
    """The attention of one layer."""

    def __init__(self, source: LayerSource) -> None:
        shape, hidden = gqa(source), source.spec.hidden_size
        rope, head_dim = shape.rope, shape.head_dim
        self._shape = shape
        self._eps = source.spec.rms_norm_eps
        self._kernels = source.kernels
        self._rope = source.rope
        self._qkvg = source.weights.pack(source.name("qkvg"), lambda: _read_qkvg(source, shape))
        query_norm = read_norm(source.weights, source.name("q_norm.weight"), head_dim)
        key_norm = read_norm(source.weights, source.name("k_norm.weight"), head_dim)
        self._query_norm, self._key_norm = halves(query_norm, rope), halves(key_norm, rope)
        self._output = source.pack("o_proj", hidden, shape.num_heads * head_dim)

    def attend(self, rows: Tensor, kv: KVLayer, batch: MicroBatch) -> Tensor:
        kernels, shape, eps, positions = self._kernels, self._shape, self._eps, batch.positions
        projected = kernels.linear(rows, self._qkvg)
        qkv, gate = projected[:, : -shape.num_heads], projected[:, -shape.num_heads :]
        query, keys, values = split_heads(qkv, shape)
        query = kernels.rope(kernels.rms_norm(query, self._query_norm, eps), self._rope, positions)
        keys = kernels.rope(kernels.rms_norm(keys, self._key_norm, eps), self._rope, positions)
        kernels.write_kv(kv, batch.slots, keys, values)
        attended = kernels.paged_attention(query, kv, batch.rows, shape.window)
        gate = sigmoid(gate).to(attended.dtype).unsqueeze(2)
        gated = attended.view(-1, shape.num_heads, shape.head_dim) * gate
        return kernels.linear(kernels.prepare(gated.flatten(1)), self._output)


def _read_qkvg(source: LayerSource, shape: GQASpec) -> Tensor:
    """Stack the projections to queries, keys, values and gates, [out, hidden]."""
    hidden, dim = source.spec.hidden_size, shape.head_dim
    query = source.read("q_proj.weight", shape.num_heads * dim, hidden)
    keys = source.read("k_proj.weight", shape.num_kv_heads * dim, hidden)
    rotated = torch.cat((query, keys)).view(-1, dim, hidden).transpose(0, 1)  # [dim, heads, …]
    return torch.cat(
        (
            halves(rotated, shape.rope).transpose(0, 1).flatten(0, 1),
            source.read("v_proj.weight", shape.num_kv_heads * dim, hidden),
            source.read("g_proj.weight", shape.num_heads, hidden),
        )
    )


STEP3P5 = Architecture(
    attention=partial(GatedDecoder, NAMES, Step3p5Attention, read_norm=read_norm),
    ffn=partial(RoutedFFN, NAMES),
)
