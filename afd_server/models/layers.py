"""What architectures have in common: the frame around self-attention, and the dense FFN.

Weight names are those of the hub.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from afd_server.core.attention_spec import GQASpec
from afd_server.core.model_spec import ModelSpec
from afd_server.kernels.table import Kernels, KVLayer, LinearWeight
from afd_server.models.base import FFNCall, FFNShare, MicroBatch, WeightSource
from afd_server.models.rope import rope_table


class SelfAttention(Protocol):
    """The attention of one layer, from its projections of the rows to that of the output."""

    def attend(self, rows: Tensor, kv: KVLayer, batch: MicroBatch) -> Tensor:
        """Attend for prepared rows, writing their keys and values to `kv`.

        Returns:
            [tokens, hidden], to be added to the residual.
        """
        ...


@dataclass(frozen=True, slots=True)
class LayerSource:
    """What the attention of one layer is made of.

    Attributes:
        rope: its table of angles, [max_model_len, 2, rotated dimensions].
    """

    spec: ModelSpec
    layer: int
    weights: WeightSource
    kernels: Kernels
    rope: Tensor

    def name(self, tensor: str) -> str:
        """Return the whole name of a tensor of this layer's attention."""
        return f"model.layers.{self.layer}.self_attn.{tensor}"

    def read(self, tensor: str, *shape: int) -> Tensor:
        """Return a tensor of this layer's attention."""
        return self.weights.read(self.name(tensor), shape)

    def pack(self, tensor: str, *shape: int) -> LinearWeight:
        """Return the packed form of one projection of this layer's attention, [out, in]."""
        return self.weights.pack(self.name(tensor), lambda: self.read(f"{tensor}.weight", *shape))


# Reads a norm's weight of a size as the kernels want it: what is normed is multiplied by it.
ReadNorm = Callable[[WeightSource, str, int], Tensor]


def read_norm(weights: WeightSource, name: str, size: int) -> Tensor:
    """Return a norm's weight as it is."""
    return weights.read(name, (size,))


class Decoder:
    """The attention half of a decoder: embeddings, norms and head around its layers' attention.

    Memory after loading: its own tensors as the kernels pack them (the compute dtype, or a byte
    an element with int8), the embeddings in the compute dtype, and for each way to rotate a table
    of max_model_len · 2 · head_dim fp32. While loading, twice the largest tensor comes on top.

    Args:
        attention: makes the attention of one layer.
        spec, weights, kernels, max_model_len: as for every `Architecture`.
        read_norm: for architectures whose weights of norms mean something else.
    """

    def __init__(
        self,
        attention: Callable[[LayerSource], SelfAttention],
        spec: ModelSpec,
        weights: WeightSource,
        kernels: Kernels,
        max_model_len: int,
        read_norm: ReadNorm = read_norm,
    ) -> None:
        self.num_layers = spec.num_layers
        self._eps = spec.rms_norm_eps
        self._kernels = kernels
        ropes = {layer.rope for layer in spec.attention}
        tables = {rope: rope_table(rope, max_model_len) for rope in ropes}
        vocabulary = (spec.vocab_size, spec.hidden_size)
        self._embeddings = weights.read("model.embed_tokens.weight", vocabulary)
        self._attention = [
            attention(LayerSource(spec, index, weights, kernels, tables[layer.rope]))
            for index, layer in enumerate(spec.attention)
        ]
        self._norms = [
            _LayerNorms(spec.hidden_size, weights, layer, read_norm)
            for layer in range(spec.num_layers)
        ]
        self._norm = read_norm(weights, "model.norm.weight", spec.hidden_size)
        self._head = weights.pack(
            "lm_head",
            lambda: (
                self._embeddings
                if spec.tie_embeddings
                else weights.read("lm_head.weight", vocabulary)
            ),
        )

    def embed(self, token_ids: Tensor) -> Tensor:
        return self._embeddings[token_ids]

    def attend(self, layer: int, hidden: Tensor, batch: MicroBatch) -> tuple[Tensor, FFNCall]:
        kernels, norms = self._kernels, self._norms[layer]
        _, normed = kernels.add_norm(hidden, None, norms.input, self._eps)
        attended = self._attention[layer].attend(normed, batch.kv[layer], batch.of_layer(layer))
        hidden, normed = kernels.add_norm(hidden, attended, norms.post_attention, self._eps)
        return hidden, FFNCall(layer, normed)

    def logits(self, hidden: Tensor, rows: Tensor) -> Tensor:
        _, normed = self._kernels.add_norm(hidden[rows], None, self._norm, self._eps)
        return self._kernels.linear(normed, self._head).float()


class _LayerNorms:
    """The norms before attention and before the FFN, [hidden] each."""

    def __init__(self, size: int, weights: WeightSource, layer: int, read: ReadNorm) -> None:
        prefix = f"model.layers.{layer}"
        self.input = read(weights, f"{prefix}.input_layernorm.weight", size)
        self.post_attention = read(weights, f"{prefix}.post_attention_layernorm.weight", size)


def gqa(source: LayerSource) -> GQASpec:
    """Return the shape of a layer of grouped-query attention."""
    shape = source.spec.attention[source.layer]
    assert isinstance(shape, GQASpec), f"layer {source.layer} has {shape}"
    return shape


def pack_qkv(source: LayerSource, shape: GQASpec) -> LinearWeight:
    """Stack the query, key and value projections of grouped-query attention, [out, hidden]."""
    hidden = source.spec.hidden_size
    query, key_value = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    return source.weights.pack(
        source.name("qkv"),
        lambda: torch.cat(
            (
                source.read("q_proj.weight", query, hidden),
                source.read("k_proj.weight", key_value, hidden),
                source.read("v_proj.weight", key_value, hidden),
            )
        ),
    )


def split_heads(qkv: Tensor, shape: GQASpec) -> tuple[Tensor, Tensor, Tensor]:
    """Return views of stacked projections: queries, keys, values [tokens, heads, head_dim]."""
    heads = qkv.view(qkv.shape[0], -1, shape.head_dim)
    num_heads = [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads]
    query, keys, values = torch.split(heads, num_heads, dim=1)
    return query, keys, values


class DenseFFN:
    """The FFN half: gate, up and down projections of a column shard, for every layer.

    Memory after loading: its own part of the tensors as the kernels pack them (the compute
    dtype, or a byte an element with int8). While loading, twice one layer's part of the largest
    tensor comes on top.
    """

    def __init__(
        self, spec: ModelSpec, weights: WeightSource, kernels: Kernels, share: FFNShare
    ) -> None:
        self._kernels = kernels
        self._layers = {
            layer: DenseFFNLayer(spec, weights, layer, share)
            for layer in range(spec.num_layers)
            if share.experts_of(layer, spec)
        }

    def partial_sum(self, layer: int, rows: Tensor) -> Tensor:
        return self._layers[layer].compute(rows, self._kernels)


class DenseFFNLayer:
    """One layer's shard: gate over up [2 · columns, hidden], down [hidden, columns]."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: WeightSource,
        layer: int,
        share: FFNShare,
    ) -> None:
        prefix = f"model.layers.{layer}.mlp"
        shard = share.columns(spec.intermediate_size)
        up = (spec.intermediate_size, spec.hidden_size)
        down = (spec.hidden_size, spec.intermediate_size)
        self.gate_up = weights.pack(
            f"{prefix}.gate_up",
            lambda: torch.cat(
                (
                    weights.read_rows(f"{prefix}.gate_proj.weight", up, *shard),
                    weights.read_rows(f"{prefix}.up_proj.weight", up, *shard),
                )
            ),
        )
        self.down = weights.pack(
            f"{prefix}.down",
            lambda: weights.read_columns(f"{prefix}.down_proj.weight", down, *shard),
        )

    def compute(self, rows: Tensor, kernels: Kernels) -> Tensor:
        """Return the shard's share of the output, [rows, hidden], of prepared rows."""
        inner = kernels.silu_mul(kernels.linear(rows, self.gate_up))
        return kernels.linear(inner, self.down)
