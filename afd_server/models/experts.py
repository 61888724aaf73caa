"""What families with routed experts share: the gate beside attention, the experts' weights."""

from dataclasses import dataclass

from torch import Tensor

from afd_server.core.expert_spec import ExpertSpec
from afd_server.core.model_spec import ModelSpec
from afd_server.kernels import reference
from afd_server.kernels.table import BoundSwiGLU, Kernels, NativeCall
from afd_server.models.base import FFNCall, FFNShare, MicroBatch, NativeLayers, WeightSource
from afd_server.models.layers import (
    Decoder,
    FFNTensors,
    MakeAttention,
    ReadNorm,
    SwiGLU,
    dense_layer,
    read_norm,
    tensors_of_module,
)
from afd_server.models.routing import RoutedRows, choose_experts, compute_routed, join, split

# As transformers 5 keeps the experts of every family.
STACKED = FFNTensors(
    "mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
)


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """Where a family keeps its gates and experts, within a layer.

    Of several spellings the hub's is the first, and taken if the checkpoint has none of the others.

    Attributes:
        gates: of the gate's weight [experts, hidden].
        experts: of those that it chooses from. Names with `{expert}` are of a tensor for each
            expert, others of tensors that stack all of them.
        bias: of its bias [experts], if the family has one.
        shared: the module of the shared expert, if the family has one.
    """

    gates: tuple[str, ...]
    experts: tuple[FFNTensors, ...]
    bias: str | None = None
    shared: str | None = None

    def gate(self, weights: WeightSource, layer: int) -> str:
        """Return the name of a layer's gate."""
        first, *others = (f"model.layers.{layer}.{name}" for name in self.gates)
        return next(filter(weights.has, others), first)

    def tensors(
        self, weights: WeightSource, layer: int, expert: int, experts: ExpertSpec
    ) -> FFNTensors:
        """Return where one expert is."""
        if expert == experts.num_experts:
            assert self.shared is not None, "the family has no shared expert"
            return tensors_of_module(f"model.layers.{layer}.{self.shared}")
        first, *others = (
            _tensors_of_expert(spelling, layer, expert, experts.num_experts)
            for spelling in self.experts
        )
        return next((tensors for tensors in others if weights.has(tensors.gate)), first)


def _tensors_of_expert(
    spelling: FFNTensors, layer: int, expert: int, num_experts: int
) -> FFNTensors:
    gate, up, down = (
        f"model.layers.{layer}.{name.format(expert=expert)}"
        for name in (spelling.gate, spelling.up, spelling.down)
    )
    if "{expert}" in spelling.gate:
        return FFNTensors(gate, up, down)
    return FFNTensors(gate, up, down, expert, num_experts)


class GatedDecoder:
    """An attention half whose calls of routed layers say which experts each row goes to.

    The gate sees the normed rows as they were before they were prepared: quantised ones could
    choose other experts. It is float32 or bfloat16 in any format of weights; one of sigmoids is
    float32.

    Args:
        names: of the gate's tensors.
        attention, spec, weights, kernels, max_model_len, read_norm: as for `Decoder`, which does
            the rest.
    """

    def __init__(
        self,
        names: ExpertNames,
        attention: MakeAttention,
        spec: ModelSpec,
        weights: WeightSource,
        kernels: Kernels,
        max_model_len: int,
        read_norm: ReadNorm = read_norm,
    ) -> None:
        self.num_layers = spec.num_layers
        self._inner = Decoder(attention, spec, weights, kernels, max_model_len, read_norm)
        self._kernels = kernels
        self._eps = spec.rms_norm_eps
        self._gates = [
            _Gate(spec, weights, layer, names, read_norm) if spec.num_chosen(layer) else None
            for layer in range(spec.num_layers)
        ]

    def embed(self, token_ids: Tensor) -> Tensor:
        return self._inner.embed(token_ids)

    def attend(
        self, layer: int, hidden: Tensor, delta: Tensor | None, batch: MicroBatch
    ) -> tuple[Tensor, FFNCall]:
        hidden, call = self._inner.attend(layer, hidden, delta, batch)
        gate = self._gates[layer]
        if gate is None:
            return hidden, call
        experts, weights = gate.choose(self._kernels.rms_norm(hidden, gate.norm, self._eps))
        joined = join(RoutedRows(call.rows, experts, weights))
        return hidden, FFNCall(layer, joined, experts.shape[1])

    def native_layers(self, batch: MicroBatch) -> NativeLayers | None:
        return None  # a gate chooses in between

    def head_call(self, hidden: Tensor, delta: Tensor | None, rows: Tensor) -> FFNCall:
        return self._inner.head_call(hidden, delta, rows)


class _Gate:
    """A layer's gate [experts, hidden], its bias, and once more the norm before it [hidden]."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: WeightSource,
        layer: int,
        names: ExpertNames,
        read_norm: ReadNorm,
    ) -> None:
        self._experts = _experts(spec)
        gate, prefix = self._experts.gate, f"model.layers.{layer}"
        self.norm = read_norm(
            weights, f"{prefix}.post_attention_layernorm.weight", spec.hidden_size
        )
        read = weights.read_float32 if gate.activation == "sigmoid" else weights.read
        num_experts = self._experts.num_experts
        self._weight = read(names.gate(weights, layer), (num_experts, spec.hidden_size))
        self._bias: Tensor | None = None
        if gate.is_biased:
            assert names.bias is not None, "the family's gates have no bias"
            self._bias = weights.read_float32(f"{prefix}.{names.bias}", (num_experts,))

    def choose(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """Return the experts of normed rows and their weights, as `choose_experts` does."""
        # of fixed shape: a row's bits are its own
        logits = reference.linear(normed.to(self._weight.dtype), self._weight)
        return choose_experts(logits.float(), self._experts, self._bias)


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
        self._ffns = {  # by layer and expert
            (layer, expert): _load_expert(names, spec, weights, kernels, layer, expert, share)
            if spec.num_chosen(layer)
            else dense_layer(spec, weights, kernels, layer, share)
            for layer in range(spec.num_layers)
            for expert in share.experts_of(layer, spec)
        }

    def partial_sum(self, layer: int, rows: Tensor) -> Tensor:
        num_chosen = self._spec.num_chosen(layer)
        if not num_chosen:
            return self._ffns[layer, 0].compute(rows)
        return compute_routed(
            split(rows, num_chosen, self._kernels.row_format.dtype),
            lambda expert, some: self._ffns[layer, expert].compute(some),
            self._spec.hidden_size,
        )

    def native(self, layer: int) -> NativeCall | None:
        ffn = None if self._spec.num_chosen(layer) else self._ffns.get((layer, 0))
        return None if ffn is None else ffn.compute.native

    def halves(self, layer: int) -> tuple[BoundSwiGLU, BoundSwiGLU] | None:
        ffn = None if self._spec.num_chosen(layer) else self._ffns.get((layer, 0))
        return None if ffn is None else ffn.compute.halves


def _load_expert(
    names: ExpertNames,
    spec: ModelSpec,
    weights: WeightSource,
    kernels: Kernels,
    layer: int,
    expert: int,
    share: FFNShare,
) -> SwiGLU:
    tensors = names.tensors(weights, layer, expert, _experts(spec))
    name, shape = f"model.layers.{layer}.experts.{expert}", spec.ffn_shape(layer, expert)
    return SwiGLU(name, tensors, spec.hidden_size, shape, weights, kernels, share)


def _experts(spec: ModelSpec) -> ExpertSpec:
    assert spec.experts is not None, f"model_type {spec.model_type} was parsed without experts"
    return spec.experts
