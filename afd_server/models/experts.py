"""What families with routed experts share: the gate beside attention, the experts' weights."""

from collections.abc import Callable

import torch
from torch import Tensor

from afd_server.core.expert_spec import ExpertSpec
from afd_server.core.model_spec import ModelSpec
from afd_server.kernels import reference
from afd_server.kernels.table import Kernels, LinearWeight
from afd_server.models.base import (
    ColumnShard,
    FFNCall,
    FFNShare,
    MicroBatch,
    WeightSource,
)
from afd_server.models.layers import Decoder, DenseFFNLayer, LayerSource, SelfAttention
from afd_server.models.routing import RoutedRows, choose_experts, compute_routed, join, split


class ExpertNames:
    """Where a family keeps its experts' tensors.

    Args:
        block: the module of a layer that holds gate and experts, such as `mlp`.
        gate, up, down: the projections within `{block}.experts.{expert}`.
    """

    def __init__(self, block: str, gate: str, up: str, down: str) -> None:
        self._block = block
        self._projections = {"gate": gate, "up": up, "down": down}

    def router(self, layer: int) -> str:
        """Return the gate's weight."""
        return f"model.layers.{layer}.{self._block}.gate.weight"

    def projection(self, layer: int, expert: int, kind: str) -> str:
        """Return an expert's `gate`, `up` or `down`, as the hub has them: one tensor for each."""
        name = self._projections[kind]
        return f"model.layers.{layer}.{self._block}.experts.{expert}.{name}.weight"

    def stacked(self, layer: int, kind: str) -> str:
        """Return `gate_up` or `down` of all experts, as transformers 5 has them in memory."""
        return f"model.layers.{layer}.mlp.experts.{kind}_proj"


class GatedDecoder:
    """An attention half whose calls of routed layers say which experts each row goes to.

    The gate sees the normed rows as they were before they were prepared: quantised ones could
    choose other experts. It is float32 or bfloat16 in any format of weights.

    Args:
        names: of the gate's tensors.
        attention, spec, weights, kernels, max_model_len: as for `Decoder`, which does the rest.
    """

    def __init__(
        self,
        names: ExpertNames,
        attention: Callable[[LayerSource], SelfAttention],
        spec: ModelSpec,
        weights: WeightSource,
        kernels: Kernels,
        max_model_len: int,
    ) -> None:
        self.num_layers = spec.num_layers
        self._inner = Decoder(attention, spec, weights, kernels, max_model_len)
        self._kernels = kernels
        self._eps = spec.rms_norm_eps
        self._experts = experts_of_spec(spec)
        self._gates = [
            _Gate(spec, weights, layer, names) if spec.num_chosen(layer) else None
            for layer in range(spec.num_layers)
        ]

    def embed(self, token_ids: Tensor) -> Tensor:
        return self._inner.embed(token_ids)

    def attend(self, layer: int, hidden: Tensor, batch: MicroBatch) -> tuple[Tensor, FFNCall]:
        hidden, call = self._inner.attend(layer, hidden, batch)
        gate = self._gates[layer]
        if gate is None:
            return hidden, call
        normed = self._kernels.rms_norm(hidden, gate.norm, self._eps)
        logits = reference.linear(normed, gate.weight)  # of fixed shape: a row's bits are its own
        chosen = self._experts.num_chosen
        routing = choose_experts(logits, chosen, self._experts.renormalises)
        return hidden, FFNCall(layer, join(RoutedRows(call.rows, *routing)), chosen)

    def logits(self, hidden: Tensor, rows: Tensor) -> Tensor:
        return self._inner.logits(hidden, rows)


class _Gate:
    """A layer's gate [experts, hidden], and once more the norm before it [hidden]."""

    def __init__(
        self, spec: ModelSpec, weights: WeightSource, layer: int, names: ExpertNames
    ) -> None:
        norm = f"model.layers.{layer}.post_attention_layernorm.weight"
        self.norm = weights.read(norm, (spec.hidden_size,))
        shape = (experts_of_spec(spec).num_experts, spec.hidden_size)
        self.weight = weights.read(names.router(layer), shape)


class RoutedFFN:
    """The FFN half: a column shard of some experts of each layer, and of dense layers.

    Memory after loading: its own part of the tensors as the kernels pack them. While loading,
    twice an expert's part of its largest tensor comes on top.
    """

    def __init__(
        self,
        names: ExpertNames,
        spec: ModelSpec,
        weights: WeightSource,
        kernels: Kernels,
        share: FFNShare,
    ) -> None:
        self._spec = spec
        self._kernels = kernels
        self._dense: dict[int, DenseFFNLayer] = {}
        self._experts: dict[tuple[int, int], _Expert] = {}  # by layer and expert
        for layer in range(spec.num_layers):
            for expert in share.experts_of(layer, spec):
                if spec.num_chosen(layer):
                    columns = share.columns(experts_of_spec(spec).intermediate_size)
                    loaded = _Expert(spec, weights, layer, expert, columns, names)
                    self._experts[layer, expert] = loaded
                else:
                    self._dense[layer] = DenseFFNLayer(spec, weights, layer, share)

    def partial_sum(self, layer: int, rows: Tensor) -> Tensor:
        num_chosen = self._spec.num_chosen(layer)
        if not num_chosen:
            return self._dense[layer].compute(rows, self._kernels)
        return compute_routed(
            split(rows, num_chosen, self._kernels.row_format.dtype),
            lambda expert, some: self._experts[layer, expert].compute(some, self._kernels),
            self._spec.hidden_size,
        )


class _Expert:
    """One expert's shard: gate over up [2 · columns, hidden], down [hidden, columns]."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: WeightSource,
        layer: int,
        expert: int,
        shard: ColumnShard,
        names: ExpertNames,
    ) -> None:
        reader = _ExpertReader(spec, weights, layer, expert, shard, names)
        prefix = f"model.layers.{layer}.experts.{expert}"
        self.gate_up: LinearWeight = weights.pack(f"{prefix}.gate_up", reader.gate_up)
        self.down: LinearWeight = weights.pack(f"{prefix}.down", reader.down)

    def compute(self, rows: Tensor, kernels: Kernels) -> Tensor:
        """Return the expert's output, [rows, hidden], of prepared rows."""
        inner = kernels.silu_mul(kernels.linear(rows, self.gate_up))
        return kernels.linear(inner, self.down)


class _ExpertReader:
    """Reads one expert's shard from either form of a checkpoint: a tensor each, or stacked."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: WeightSource,
        layer: int,
        expert: int,
        shard: ColumnShard,
        names: ExpertNames,
    ) -> None:
        experts = experts_of_spec(spec)
        self._inner, self._hidden = experts.intermediate_size, spec.hidden_size
        self._num_experts = experts.num_experts
        self._weights = weights
        self._layer, self._expert = layer, expert
        self._shard = shard
        self._names = names

    def gate_up(self) -> Tensor:
        """Return the rows of gate, then those of up."""
        return torch.cat([self._up("gate", 0), self._up("up", self._inner)])

    def down(self) -> Tensor:
        """Return the columns of down."""
        stacked = self._names.stacked(self._layer, "down")
        if self._weights.has(stacked):
            shape = (self._num_experts, self._hidden, self._inner)
            place = (slice(self._expert, self._expert + 1), slice(None), slice(*self._shard))
            return self._weights.read_slice(stacked, shape, place)[0]
        name = self._names.projection(self._layer, self._expert, "down")
        return self._weights.read_columns(name, (self._hidden, self._inner), *self._shard)

    def _up(self, kind: str, offset: int) -> Tensor:
        stacked = self._names.stacked(self._layer, "gate_up")
        start, stop = self._shard
        if self._weights.has(stacked):
            shape = (self._num_experts, 2 * self._inner, self._hidden)
            rows = slice(offset + start, offset + stop)
            place = (slice(self._expert, self._expert + 1), rows)
            return self._weights.read_slice(stacked, shape, place)[0]
        name = self._names.projection(self._layer, self._expert, kind)
        return self._weights.read_rows(name, (self._inner, self._hidden), start, stop)


def experts_of_spec(spec: ModelSpec) -> ExpertSpec:
    """Return the experts of a family that always has them."""
    assert spec.experts is not None, f"model_type {spec.model_type} was parsed without experts"
    return spec.experts
