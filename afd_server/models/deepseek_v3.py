"""DeepSeek-V3: multi-head latent attention (MLA, arXiv 2405.04434, section 2.1) and experts.

All tokens, of prefill as of decoding, attend in the absorbed form: a head's key projection is
moved to its query and its value projection behind the sum, so that scores and sums are taken
over what is cached, the latent. One form for all keeps a token's bits independent of chunking.
"""

import math
from functools import partial

import torch
from torch import Tensor

from afd_server.core.attention_spec import MLASpec
from afd_server.kernels.table import KVLayer, LinearWeight
from afd_server.models.base import Architecture, MicroBatch
from afd_server.models.experts import STACKED, ExpertNames, GatedDecoder, RoutedFFN
from afd_server.models.layers import LayerSource, tensors_of_module
from afd_server.models.rope import pairs_apart


class MLAttention:
    """The attention of one layer.

    Its cache has one head, whose keys are [latent | rotated key] and whose values are the latent.
    """

    def __init__(self, source: LayerSource) -> None:
        shape = source.spec.attention[source.layer]
        assert isinstance(shape, MLASpec), f"layer {source.layer} has {shape}"
        self._shape = shape
        self._eps = source.spec.rms_norm_eps
        self._kernels = source.kernels
        self._rope = source.rope
        self._down = source.weights.pack(source.name("down"), lambda: _read_down(source, shape))
        self._query_norm = source.read("q_a_layernorm.weight", shape.query_rank)
        self._latent_norm = source.read("kv_a_layernorm.weight", shape.latent_dim)
        self._query = source.weights.pack(source.name("q_b"), lambda: _read_query(source, shape))
        self._keys = [_pack_keys(source, shape, head) for head in range(shape.num_heads)]
        self._values = [_pack_values(source, shape, head) for head in range(shape.num_heads)]
        self._output = source.pack(
            "o_proj", source.spec.hidden_size, shape.num_heads * shape.value_dim
        )
        # attention scales by the size of a cached key
        self._scale = shape.scale * math.sqrt(shape.latent_dim + shape.rope.dim)

    def attend(self, rows: Tensor, kv: KVLayer, batch: MicroBatch) -> Tensor:
        kernels, shape, positions = self._kernels, self._shape, batch.positions
        sizes = [shape.query_rank, shape.latent_dim, shape.rope.dim]
        low_rank, latent, key = torch.split(kernels.linear(rows, self._down), sizes, dim=1)
        latent = kernels.rms_norm(latent, self._latent_norm, self._eps)
        key = kernels.rope(key.unsqueeze(1), self._rope, positions)
        kernels.write_kv(kv, batch.slots, torch.cat((latent.unsqueeze(1), key), dim=2), None)
        query = self._absorbed_query(low_rank, positions)
        attended = kernels.paged_attention(query, kv, batch.rows)
        by_head = attended.view(-1, shape.num_heads, shape.latent_dim)
        values = self._each_head(by_head, self._values).flatten(1)
        return kernels.linear(kernels.prepare(values), self._output)

    def _absorbed_query(self, low_rank: Tensor, positions: Tensor) -> Tensor:
        """Return scaled queries over cached keys, [tokens, heads, latent_dim + rope.dim]."""
        kernels, shape = self._kernels, self._shape
        _, normed = kernels.add_norm(low_rank, None, self._query_norm, self._eps)
        query = kernels.linear(normed, self._query).view(low_rank.shape[0], shape.num_heads, -1)
        plain, rotated = torch.split(query, [shape.plain_dim, shape.rope.dim], dim=2)
        absorbed = self._each_head(plain, self._keys)
        return torch.cat((absorbed, kernels.rope(rotated, self._rope, positions)), 2) * self._scale

    def _each_head(self, x: Tensor, weights: list[LinearWeight]) -> Tensor:
        """Multiply each head by its own weight: [tokens, heads, in] → [tokens, heads, out]."""
        linear, prepare = self._kernels.linear, self._kernels.prepare
        heads = x.transpose(0, 1).contiguous()
        products = [linear(prepare(h), weight) for h, weight in zip(heads, weights, strict=True)]
        return torch.stack(products, dim=1)


def _read_down(source: LayerSource, shape: MLASpec) -> Tensor:
    """Stack the projections to the query's rank, the latent and the rotated key."""
    hidden, latent = source.spec.hidden_size, shape.latent_dim
    query = source.read("q_a_proj.weight", shape.query_rank, hidden)
    cached = source.read("kv_a_proj_with_mqa.weight", latent + shape.rope.dim, hidden)
    return torch.cat((query, cached[:latent], pairs_apart(cached[latent:])))


def _read_query(source: LayerSource, shape: MLASpec) -> Tensor:
    width = shape.plain_dim + shape.rope.dim
    weight = source.read("q_b_proj.weight", shape.num_heads * width, shape.query_rank)
    by_row = weight.view(shape.num_heads, width, shape.query_rank).transpose(0, 1)
    rotated = pairs_apart(by_row[shape.plain_dim :])
    return torch.cat((by_row[: shape.plain_dim], rotated)).transpose(0, 1).flatten(0, 1)


def _pack_keys(source: LayerSource, shape: MLASpec, head: int) -> LinearWeight:
    """Pack a head's key projection as its query meets it: [latent_dim, plain_dim]."""
    return source.weights.pack(
        source.name(f"k_b.{head}"),
        lambda: _read_head(source, shape, head)[: shape.plain_dim].T.contiguous(),
    )


def _pack_values(source: LayerSource, shape: MLASpec, head: int) -> LinearWeight:
    """Pack a head's value projection, [value_dim, latent_dim]."""
    return source.weights.pack(
        source.name(f"v_b.{head}"),
        lambda: _read_head(source, shape, head)[shape.plain_dim :].contiguous(),
    )


def _read_head(source: LayerSource, shape: MLASpec, head: int) -> Tensor:
    width = shape.plain_dim + shape.value_dim
    whole = (shape.num_heads * width, shape.latent_dim)
    name = source.name("kv_b_proj.weight")
    return source.weights.read_rows(name, whole, head * width, (head + 1) * width)


_NAMES = ExpertNames(
    gates=("mlp.gate.weight",),
    experts=(tensors_of_module("mlp.experts.{expert}"), STACKED),
    bias="mlp.gate.e_score_correction_bias",
    shared="mlp.shared_experts",
)

DEEPSEEK_V3 = Architecture(
    attention=partial(GatedDecoder, _NAMES, MLAttention), ffn=partial(RoutedFFN, _NAMES)
)
