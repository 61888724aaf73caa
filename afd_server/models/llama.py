"""Llama and its kin (SmolLM2): grouped-query attention, SwiGLU, RMSNorm before each.

Weight names are those of `LlamaForCausalLM` on the hub.
"""

import torch
from torch import Tensor

from afd_server.core.model_spec import ModelSpec
from afd_server.kernels.reference import rope_table
from afd_server.kernels.table import Kernels
from afd_server.models.base import Architecture, ColumnShard, FFNCall, MicroBatch, WeightSource


class LlamaAttention:
    """The attention half: embeddings, norms, attention and the head.

    Memory after loading: its own tensors as the kernels pack them (the compute dtype, or a byte
    an element with int8), the embeddings in the compute dtype, and a rotary table of
    max_model_len · 2 · head_dim fp32. While loading, twice the largest tensor comes on top.
    """

    def __init__(
        self, spec: ModelSpec, weights: WeightSource, kernels: Kernels, max_model_len: int
    ) -> None:
        self.num_layers = spec.num_layers
        self._spec = spec
        self._kernels = kernels
        self._rope_table = rope_table(spec.head_dim, spec.rope_theta, max_model_len)
        vocabulary = (spec.vocab_size, spec.hidden_size)
        self._embeddings = weights.read("model.embed_tokens.weight", vocabulary)
        self._layers = [_AttentionLayer(spec, weights, layer) for layer in range(spec.num_layers)]
        self._norm = weights.read("model.norm.weight", (spec.hidden_size,))
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
        kernels, spec, weights = self._kernels, self._spec, self._layers[layer]
        _, normed = kernels.add_norm(hidden, None, weights.input_norm, spec.rms_norm_eps)
        qkv = kernels.linear(normed, weights.qkv)
        kv, table = batch.kv[layer], self._rope_table
        query = kernels.rope_write_kv(qkv, spec.num_heads, table, batch.positions, batch.slots, kv)
        attended = kernels.prepare(kernels.paged_attention(query, kv, batch.rows))
        hidden, normed = kernels.add_norm(
            hidden,
            kernels.linear(attended, weights.output),
            weights.post_attention_norm,
            spec.rms_norm_eps,
        )
        return hidden, FFNCall(layer, normed)

    def logits(self, hidden: Tensor, rows: Tensor) -> Tensor:
        _, normed = self._kernels.add_norm(hidden[rows], None, self._norm, self._spec.rms_norm_eps)
        return self._kernels.linear(normed, self._head).float()


class _AttentionLayer:
    """The weights of one layer; query, key and value projections stacked, [out, hidden]."""

    def __init__(self, spec: ModelSpec, weights: WeightSource, layer: int) -> None:
        prefix = f"model.layers.{layer}"
        hidden, query = spec.hidden_size, spec.num_heads * spec.head_dim
        key_value = (spec.num_kv_heads * spec.head_dim, hidden)
        attention = f"{prefix}.self_attn"
        self.input_norm = weights.read(f"{prefix}.input_layernorm.weight", (hidden,))
        self.post_attention_norm = weights.read(
            f"{prefix}.post_attention_layernorm.weight", (hidden,)
        )
        self.qkv = weights.pack(
            f"{attention}.qkv",
            lambda: torch.cat(
                (
                    weights.read(f"{attention}.q_proj.weight", (query, hidden)),
                    weights.read(f"{attention}.k_proj.weight", key_value),
                    weights.read(f"{attention}.v_proj.weight", key_value),
                )
            ),
        )
        self.output = weights.pack(
            f"{attention}.o", lambda: weights.read(f"{attention}.o_proj.weight", (hidden, query))
        )


class LlamaFFN:
    """The FFN half: gate, up and down projections of a column shard, for every layer.

    Memory after loading: its own part of the tensors as the kernels pack them (the compute
    dtype, or a byte an element with int8). While loading, twice one layer's part of the largest
    tensor comes on top.
    """

    def __init__(
        self, spec: ModelSpec, weights: WeightSource, kernels: Kernels, shard: ColumnShard
    ) -> None:
        self._kernels = kernels
        self._layers = [_FFNLayer(spec, weights, layer, shard) for layer in range(spec.num_layers)]

    def partial_sum(self, layer: int, rows: Tensor) -> Tensor:
        weights = self._layers[layer]
        inner = self._kernels.silu_mul(self._kernels.linear(rows, weights.gate_up))
        return self._kernels.linear(inner, weights.down)


class _FFNLayer:
    """One layer's shard: gate over up [2 · columns, hidden], down [hidden, columns]."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: WeightSource,
        layer: int,
        shard: ColumnShard,
    ) -> None:
        prefix = f"model.layers.{layer}.mlp"
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


LLAMA = Architecture(attention=LlamaAttention, ffn=LlamaFFN)
