"""What families with routed experts share: the gate beside attention, the experts' weights."""

from collections.abc import Callable

import torch
from torch import Tensor

from afd_server.core.expert_spec import ExpertSpec
from afd_server.core.model_spec import ModelSpec
from afd_server.core.topology import ColumnShard
from afd_server.kernels import reference
from afd_server.kernels.table import Kernels
from afd_server.models.base import (
    FFNCall,
    FFNShare,
    MicroBatch,
    WeightSource,
)
from afd_server.models.layers import Decoder, DenseFFNLayer, LayerSource, SelfAttention
from afd_server.models.routing import RoutedRows, choose_experts, compute_routed, join, split


class ExpertNames:
    """Where a family keeps its experts' tensors: as on the hub, or stacked as in transformers 5.

    Args:
        block: the module of a layer that holds gate and experts, such as `mlp`.
        gate, up, down: the projections within `{block}.experts.{expert}`.
    """

    def __init__(self, block: str, gate: str, up: str, down: str) -> None:
        self._block = block
        self._projections = {"gate": gate, "up": up, "down": down}

    def gates(self, layer: int) -> tuple[str, str]:
        """Return the gate's weight [experts, hidden], on the hub and beside stacked experts."""
        prefix = f"model.layers.{layer}"
        return f"{prefix}.{self._block}.gate.weight", f"{prefix}.mlp.gate.weight"

    def projection(self, layer: int, expert: int, kind: str) -> str:
        """Return an expert's `gate`, `up` or `down`, each a tensor of its own."""
        name = self._projections[kind]
        return f"model.layers.{layer}.{self._block}.experts.{expert}.{name}.weight"

    def stacked(self, layer: int, kind: str) -> str:
        """Return `gate_up` or `down` of all experts of a layer."""
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

    def head_call(self, hidden: Tensor, rows: Tensor) -> FFNCall:
        return self._inner.head_call(hidden, rows)


class _Gate:
    """A layer's gate [experts, hidden], and once more the norm before it [hidden]."""

    def __init__(
        self, spec: ModelSpec, weights: WeightSource, layer: int, names: ExpertNames
    ) -> None:
        norm = f"model.layers.{layer}.post_attention_layernorm.weight"
        self.norm = weights.read(norm, (spec.hidden_size,))
        on_hub, beside_stacked = names.gates(layer)
        name = beside_stacked if weights.has(beside_stacked) else on_hub
        self.weight = weights.read(name, (experts_of_spec(spec).num_experts, spec.hidden_size))


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
        stacked = weights.has(names.stacked(layer, "gate_up"))
        reader = _read_stacked if stacked else _read_single
        gate_up, down = reader(spec, weights, layer, expert, shard, names)
        prefix = f"model.layers.{layer}.experts.{expert}"
        self.gate_up = weights.pack(f"{prefix}.gate_up", gate_up)
        self.down = weights.pack(f"{prefix}.down", down)

    def compute(self, rows: Tensor, kernels: Kernels) -> Tensor:
        """Return the expert's output, [rows, hidden], of prepared rows."""
        inner = kernels.silu_mul(kernels.linear(rows, self.gate_up))
        return kernels.linear(inner, self.down)


def _read_single(
    spec: ModelSpec,
    weights: WeightSource,
    layer: int,
    expert: int,
    shard: ColumnShard,
    names: ExpertNames,
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Return what reads an expert's shard, as on the hub: a tensor for each projection."""
    inner, hidden = experts_of_spec(spec).intermediate_size, spec.hidden_size
    gate, up, down = (names.projection(layer, expert, kind) for kind in ("gate", "up", "down"))

    def gate_up() -> Tensor:
        return torch.cat([weights.read_rows(name, (inner, hidden), *shard) for name in (gate, up)])

    return gate_up, lambda: weights.read_columns(down, (hidden, inner), *shard)


def _read_stacked(
    spec: ModelSpec,
    weights: WeightSource,
    layer: int,
    expert: int,
    shard: ColumnShard,
    names: ExpertNames,
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Return what reads an expert's shard from the tensors of all experts of its layer.

    They are gate over up, [experts, 2 · inner, hidden], and down, [experts, hidden, inner].
    """
    experts = experts_of_spec(spec)
    num_experts, inner, hidden = experts.num_experts, experts.intermediate_size, spec.hidden_size
    mine, columns = slice(expert, expert + 1), slice(*shard)
    both, down = names.stacked(layer, "gate_up"), names.stacked(layer, "down")

    def gate_up() -> Tensor:
        shape = (num_experts, 2 * inner, hidden)
        starts = (shard.start, inner + shard.start)
        width = shard.stop - shard.start
        places = [(mine, slice(start, start + width)) for start in starts]
        return torch.cat([weights.read_slice(both, shape, place)[0] for place in places])

    shape = (num_experts, hidden, inner)
    return gate_up, lambda: weights.read_slice(down, shape, (mine, slice(None), columns))[0]


def experts_of_spec(spec: ModelSpec) -> ExpertSpec:
    """Return the experts of a family that always has them."""
    assert spec.experts is not None, f"model_type {spec.model_type} was parsed without experts"
    return spec.experts
