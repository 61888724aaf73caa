"""What architectures have in common: the frame around self-attention, and the dense FFN.

Weight names are those of the hub.
"""

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from afd_server.core.attention_spec import GQASpec
from afd_server.core.model_spec import FFNShape, ModelSpec
from afd_server.kernels.table import (
    BoundSwiGLU,
    Kernels,
    KVLayer,
    LinearWeight,
    NativeAttention,
    NativeCall,
    Norms,
)
from afd_server.models.base import FFNCall, FFNShare, MicroBatch, NativeLayers, WeightSource
from afd_server.models.rope import rope_table


class SelfAttention(Protocol):
    """The attention of one layer, from its projections of the rows to that of the output."""

    def attend(self, rows: Tensor, kv: KVLayer, batch: MicroBatch) -> Tensor:
        """Attend for prepared rows, writing their keys and values to `kv`.

        Returns:
            [tokens, hidden], to be added to the residual.
        """
        ...


class WholeAttention(ABC):
    """The attention of one layer with the norms around it.

    Attributes:
        native: the same for code outside of Python, if there is such.
    """

    native: NativeAttention | None = None

    @abstractmethod
    def attend_between(
        self, hidden: Tensor, delta: Tensor | None, kv: KVLayer, batch: MicroBatch
    ) -> tuple[Tensor, Tensor]:
        """Add `delta`, attend, writing keys and values to `kv`, and add that.

        Returns:
            The residual, [tokens, hidden], and its normed rows, prepared.
        """


@dataclass(frozen=True, slots=True)
class LayerSource:
    """What the attention of one layer is made of.

    Attributes:
        rope: its table of angles, [max_model_len, 2, rotated dimensions].
        norms: around it.
    """

    spec: ModelSpec
    layer: int
    weights: WeightSource
    kernels: Kernels
    rope: Tensor
    norms: Norms

    def name(self, tensor: str) -> str:
        """Return the whole name of a tensor of this layer's attention."""
        return f"model.layers.{self.layer}.self_attn.{tensor}"

    def read(self, tensor: str, *shape: int) -> Tensor:
        """Return a tensor of this layer's attention."""
        return self.weights.read(self.name(tensor), shape)

    def pack(self, tensor: str, *shape: int) -> LinearWeight:
        """Return the packed form of one projection of this layer's attention, [out, in]."""
        return self.weights.pack(self.name(tensor), lambda: self.read(f"{tensor}.weight", *shape))


# Makes the attention of one layer.
MakeAttention = Callable[[LayerSource], SelfAttention | WholeAttention]

# Reads a norm's weight of a size as the kernels want it: what is normed is multiplied by it.
ReadNorm = Callable[[WeightSource, str, int], Tensor]


def read_norm(weights: WeightSource, name: str, size: int) -> Tensor:
    """Return a norm's weight as it is."""
    return weights.read(name, (size,))


class Decoder:
    """The attention half of a decoder: embeddings and norms around its layers' attention.

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
        attention: MakeAttention,
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
        self._layers: list[WholeAttention] = []
        for index, layer in enumerate(spec.attention):
            norms = _read_norms(spec, weights, index, read_norm)
            source = LayerSource(spec, index, weights, kernels, tables[layer.rope], norms)
            made = attention(source)
            if not isinstance(made, WholeAttention):
                made = _Normed(made, kernels, norms)
            self._layers.append(made)
        self._norm = read_norm(weights, "model.norm.weight", spec.hidden_size)
        natives = [layer.native for layer in self._layers if layer.native is not None]
        is_whole = len(natives) == spec.num_layers and len({n.function for n in natives}) == 1
        self._chain = _Chain(natives) if is_whole else None

    def embed(self, token_ids: Tensor) -> Tensor:
        return self._embeddings[token_ids]

    def attend(
        self, layer: int, hidden: Tensor, delta: Tensor | None, batch: MicroBatch
    ) -> tuple[Tensor, FFNCall]:
        kv, seen = batch.kv[layer], batch.of_layer(layer)
        hidden, rows = self._layers[layer].attend_between(hidden, delta, kv, seen)
        return hidden, FFNCall(layer, rows)

    def native_layers(self, batch: MicroBatch) -> NativeLayers | None:
        return None if self._chain is None else self._chain.of(batch)

    def head_call(self, hidden: Tensor, delta: Tensor | None, rows: Tensor) -> FFNCall:
        last = None if delta is None else delta[rows]
        _, normed = self._kernels.add_norm(hidden[rows], last, self._norm, self._eps)
        return FFNCall(self.num_layers, normed, is_head=True)


class _Chain:
    """The layers of a decoder, for code outside of Python that goes from one to the next."""

    def __init__(self, layers: Sequence[NativeAttention]) -> None:
        self._layers = layers
        self._contexts = _addresses(layer.context for layer in layers)
        self._kv: tuple[KVLayer, ...] = ()
        self._blocks: tuple[ctypes.Array[ctypes.c_void_p], list[ctypes.Structure]]

    def of(self, batch: MicroBatch) -> NativeLayers:
        """Return the layers with the blocks of a batch and what its rows see."""
        if batch.kv is not self._kv:  # a worker has the same ones in each batch
            blocks = [a.blocks_of(kv) for a, kv in zip(self._layers, batch.kv, strict=True)]
            self._kv = batch.kv
            self._blocks = _addresses(map(ctypes.addressof, blocks)), blocks
        batches = batch.by_layer or (batch,) * len(self._layers)
        seen_of = self._layers[0].seen_of
        seen = _addresses(ctypes.addressof(seen_of(b.positions, b.slots, b.rows)) for b in batches)
        owner = (self._layers, self._blocks, seen, batch)
        return NativeLayers(
            self._layers[0].function,
            contexts=ctypes.addressof(self._contexts),
            blocks=ctypes.addressof(self._blocks[0]),
            seen=ctypes.addressof(seen),
            owner=owner,
        )


def _addresses(values: Iterable[int]) -> "ctypes.Array[ctypes.c_void_p]":
    addresses = list(values)
    return (ctypes.c_void_p * len(addresses))(*addresses)


class _Normed(WholeAttention):
    """The attention of one layer and the norms around it, one after the other."""

    def __init__(self, attention: SelfAttention, kernels: Kernels, norms: Norms) -> None:
        self._attention = attention
        self._kernels = kernels
        self._norms = norms

    def attend_between(
        self, hidden: Tensor, delta: Tensor | None, kv: KVLayer, batch: MicroBatch
    ) -> tuple[Tensor, Tensor]:
        add_norm, norms = self._kernels.add_norm, self._norms
        hidden, rows = add_norm(hidden, delta, norms.before, norms.eps)
        attended = self._attention.attend(rows, kv, batch)
        return add_norm(hidden, attended, norms.after, norms.eps)


def _read_norms(spec: ModelSpec, weights: WeightSource, layer: int, read: ReadNorm) -> Norms:
    names = ("input_layernorm", "post_attention_layernorm")
    before, after = (
        read(weights, f"model.layers.{layer}.{name}.weight", spec.hidden_size) for name in names
    )
    return Norms(before, after, spec.rms_norm_eps)


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
    """The FFN half: gate, up and down projections of a column shard, for every layer held.

    Memory after loading: its own part of the tensors as the kernels pack them (the compute
    dtype, or a byte an element with int8). While loading, twice one layer's part of the largest
    tensor comes on top.
    """

    def __init__(
        self, spec: ModelSpec, weights: WeightSource, kernels: Kernels, share: FFNShare
    ) -> None:
        self._layers = {
            layer: dense_layer(spec, weights, kernels, layer, share)
            for layer in range(spec.num_layers)
            if share.experts_of(layer, spec)
        }

    def partial_sum(self, layer: int, rows: Tensor) -> Tensor:
        return self._layers[layer].compute(rows)

    def native(self, layer: int) -> NativeCall | None:
        ffn = self._layers.get(layer)
        return None if ffn is None else ffn.compute.native

    def halves(self, layer: int) -> tuple[BoundSwiGLU, BoundSwiGLU] | None:
        ffn = self._layers.get(layer)
        return None if ffn is None else ffn.compute.halves


class FFNTensors(NamedTuple):
    """Where the projections of one FFN are.

    Attributes:
        gate, up: names of tensors [inner, hidden]; if it is one name, of one with gate over up.
        down: name of a tensor [hidden, inner].
        expert, num_experts: which of how many it is in tensors that stack all experts of a layer,
            [experts, …]; None if its tensors are its own.
    """

    gate: str
    up: str
    down: str
    expert: int | None = None
    num_experts: int | None = None

    def read(
        self, weights: WeightSource, name: str, shape: tuple[int, int], place: tuple[slice, slice]
    ) -> Tensor:
        """Return a part of what a tensor holds of this FFN, which is of this shape."""
        if self.expert is None or self.num_experts is None:
            return weights.read_slice(name, shape, place)
        mine = slice(self.expert, self.expert + 1)
        return weights.read_slice(name, (self.num_experts, *shape), (mine, *place))[0]


def tensors_of_module(module: str) -> FFNTensors:
    """Return the tensors of an FFN that is a module of its own."""
    gate, up, down = (f"{module}.{name}_proj.weight" for name in ("gate", "up", "down"))
    return FFNTensors(gate, up, down)


class SwiGLU:
    """A column shard of one FFN: gate over up [2 · columns, hidden], down [hidden, columns].

    Args:
        name: of the packed weights.
        tensors: where they are read from.
        hidden_size, shape: of the whole FFN.
        weights, kernels: read and pack; compute.
        share: which shard it is.

    Attributes:
        compute: gives the shard's share of the output, [rows, hidden], of prepared rows.
    """

    def __init__(
        self,
        name: str,
        tensors: FFNTensors,
        hidden_size: int,
        shape: FFNShape,
        weights: WeightSource,
        kernels: Kernels,
        share: FFNShare,
    ) -> None:
        inner, shard = shape.intermediate_size, share.columns(shape.intermediate_size)
        height = 2 * inner if tensors.gate == tensors.up else inner

        def read_rows(name: str, first: int) -> Tensor:
            rows = slice(first + shard.start, first + shard.stop)
            return tensors.read(weights, name, (height, hidden_size), (rows, slice(None)))

        def read_gate_up() -> Tensor:
            return torch.cat((read_rows(tensors.gate, 0), read_rows(tensors.up, height - inner)))

        def read_down() -> Tensor:
            place = (slice(None), slice(*shard))
            return tensors.read(weights, tensors.down, (hidden_size, inner), place)

        gate_up = weights.pack(f"{name}.gate_up", read_gate_up)
        down = weights.pack(f"{name}.down", read_down)
        self.compute = kernels.swiglu(gate_up, down, shape.limit)


def dense_layer(
    spec: ModelSpec, weights: WeightSource, kernels: Kernels, layer: int, share: FFNShare
) -> SwiGLU:
    """Load the shard of a layer that has one FFN."""
    module = f"model.layers.{layer}.mlp"
    shape = spec.ffn_shape(layer)
    return SwiGLU(
        module, tensors_of_module(module), spec.hidden_size, shape, weights, kernels, share
    )
