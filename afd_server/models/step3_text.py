"""Step-3: multi-matrix factorization attention (MFA, arXiv 2412.19255) and experts.

Queries come from a low rank that all heads share, keys and values from one head. In the variant
MFA-KR (`mfa_key_reuse` in config.json) the keys are the values too.
"""

from functools import partial

import torch
from torch import Tensor

from afd_server.core.attention_spec import MFASpec
from afd_server.kernels.table import KVLayer, LinearWeight
from afd_server.models.base import Architecture, MicroBatch
from afd_server.models.experts import ExpertNames, GatedDecoder, RoutedFFN
from afd_server.models.layers import LayerSource, SelfAttention, tensors_of_module


class MFAttention:
    """The attention of one layer."""

    def __init__(self, source: LayerSource) -> None:
        shape = _mfa(source)
        self._kernels = source.kernels
        self._rope = source.rope
        self._sizes = [shape.query_rank, shape.head_dim, shape.head_dim]
        self._down = _pack_stacked(source, ("q_proj", "k_proj", "v_proj"), self._sizes)
        self._query = _Query(source)
        self._output = source.pack(
            "o_proj", source.spec.hidden_size, shape.num_heads * shape.head_dim
        )

    def attend(self, rows: Tensor, kv: KVLayer, batch: MicroBatch) -> Tensor:
        kernels = self._kernels
        latent, keys, values = torch.split(kernels.linear(rows, self._down), self._sizes, dim=1)
        query = self._query.of(latent, batch.positions)
        keys = kernels.rope(keys.unsqueeze(1), self._rope, batch.positions)
        kernels.write_kv(kv, batch.slots, keys, values.unsqueeze(1))
        attended = kernels.paged_attention(query, kv, batch.rows)
        return kernels.linear(kernels.prepare(attended), self._output)


class MFAKeyReuse:
    """The attention of one layer that caches keys only: v = (I + diag(α) N) k.

    The cached key is rotated by its own position; the sum over keys is rotated back by that of
    the query, so that a value depends on the distance alone. What is linear after the sum, I +
    diag(α) N, is folded into the output projection. There is no released model: α and N are the
    tensors `value_gate` [head_dim] and `value_mix.weight` [head_dim, head_dim].
    """

    def __init__(self, source: LayerSource) -> None:
        shape = _mfa(source)
        self._num_heads = shape.num_heads
        self._kernels = source.kernels
        self._rope = source.rope
        self._rope_back = source.rope * torch.tensor([[1.0], [-1.0]])  # the sines of −angles
        self._sizes = [shape.query_rank, shape.head_dim]
        self._down = _pack_stacked(source, ("q_proj", "k_proj"), self._sizes)
        self._query = _Query(source)
        self._output = source.weights.pack(
            source.name("o_proj.folded"), lambda: _folded_output(source, shape)
        )

    def attend(self, rows: Tensor, kv: KVLayer, batch: MicroBatch) -> Tensor:
        kernels, positions = self._kernels, batch.positions
        latent, keys = torch.split(kernels.linear(rows, self._down), self._sizes, dim=1)
        query = self._query.of(latent, positions)
        keys = kernels.rope(keys.unsqueeze(1), self._rope, positions)
        kernels.write_kv(kv, batch.slots, keys, None)
        attended = kernels.paged_attention(query, kv, batch.rows)
        by_head = attended.view(attended.shape[0], self._num_heads, -1)
        relative = kernels.rope(by_head, self._rope_back, positions).flatten(1)
        return kernels.linear(kernels.prepare(relative), self._output)


class _Query:
    """From the shared low rank to rotated heads."""

    def __init__(self, source: LayerSource) -> None:
        shape = _mfa(source)
        self._shape = shape
        self._eps = source.spec.rms_norm_eps
        self._kernels = source.kernels
        self._rope = source.rope
        self._norm = source.read("inter_norm.weight", shape.query_rank)
        self._up = source.pack("wq", shape.num_heads * shape.head_dim, shape.query_rank)

    def of(self, latent: Tensor, positions: Tensor) -> Tensor:
        """Return [tokens, heads, head_dim] for [tokens, query_rank]."""
        _, normed = self._kernels.add_norm(latent, None, self._norm, self._eps)
        query = self._kernels.linear(normed, self._up)
        by_head = query.view(-1, self._shape.num_heads, self._shape.head_dim)
        return self._kernels.rope(by_head, self._rope, positions)


def _attention(source: LayerSource) -> SelfAttention:
    return MFAKeyReuse(source) if _mfa(source).reuses_keys else MFAttention(source)


def _mfa(source: LayerSource) -> MFASpec:
    shape = source.spec.attention[source.layer]
    assert isinstance(shape, MFASpec), f"layer {source.layer} has {shape}"
    return shape


def _pack_stacked(source: LayerSource, names: tuple[str, ...], sizes: list[int]) -> LinearWeight:
    """Stack projections of the hidden rows, [sum of sizes, hidden]."""
    hidden = source.spec.hidden_size
    return source.weights.pack(
        source.name("+".join(names)),
        lambda: torch.cat(
            [
                source.read(f"{name}.weight", size, hidden)
                for name, size in zip(names, sizes, strict=True)
            ]
        ),
    )


def _folded_output(source: LayerSource, shape: MFASpec) -> Tensor:
    """Multiply each head's part of the output projection by I + diag(α) N."""
    dim, hidden = shape.head_dim, source.spec.hidden_size
    gate = source.read("value_gate", dim).float()
    mix = source.read("value_mix.weight", dim, dim).float()
    output = source.read("o_proj.weight", hidden, shape.num_heads * dim)
    values = torch.eye(dim) + gate.unsqueeze(1) * mix
    folded = output.float().view(hidden, shape.num_heads, dim) @ values
    return folded.flatten(1).to(output.dtype)


# The experts are stacked; third parties that quantise them write a tensor for each, either way.
NAMES = ExpertNames(
    gates=("moe.gate.weight",),
    experts=tuple(map(tensors_of_module, ("moe", "moe.experts.{expert}", "moe.{expert}"))),
    bias="moe.router_bias",
    shared="share_expert",
)

STEP3_TEXT = Architecture(
    attention=partial(GatedDecoder, NAMES, _attention), ffn=partial(RoutedFFN, NAMES)
)
