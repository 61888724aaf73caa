"""What config.json says about experts and what clamps FFNs, checked and in our words.

Knows nothing of tensors, nor of the rest of the model.
"""

from dataclasses import dataclass
from typing import Literal

from afd_server.core.config_fields import Config, by_layer, integer, number, refuse_unless
from afd_server.core.errors import ModelError


@dataclass(frozen=True, slots=True)
class GateSpec:
    """How a gate's logits become a token's experts and their weights.

    Attributes:
        activation: what makes scores of logits.
        renormalises: whether a token's weights are divided by their sum.
        scale: multiplies the weights.
        is_biased: whether each expert has a bias on its score, of account for the choice only.
        num_groups: of neighbouring experts; the sum of a group's two best scores ranks it.
        num_kept_groups: the best of them, from which experts are chosen.
    """

    activation: Literal["softmax", "sigmoid"]
    renormalises: bool
    scale: float = 1.0
    is_biased: bool = False
    num_groups: int = 1
    num_kept_groups: int = 1


@dataclass(frozen=True, slots=True)
class ExpertSpec:
    """The routed FFNs of a decoder.

    A shared expert is one more, which every token goes to with weight 1. Its number is
    `num_experts`, so that its contribution is the last that is added.

    Attributes:
        num_experts: of every routed layer, that the gate chooses from.
        num_chosen: experts that the gate chooses for a token.
        intermediate_size: of one expert.
        gate: how they are chosen.
        is_routed: for each layer, whether it has experts; the others are dense.
        shared_size: the intermediate size of the shared expert; None if there is none.
    """

    num_experts: int
    num_chosen: int
    intermediate_size: int
    gate: GateSpec
    is_routed: tuple[bool, ...]
    shared_size: int | None = None

    @property
    def num_shared(self) -> int:
        """Return 1 with a shared expert, else 0."""
        return 0 if self.shared_size is None else 1


@dataclass(frozen=True, slots=True)
class SwiGLULimits:
    """What the two factors of a SwiGLU are clamped to, by layer; None where they are not.

    Attributes:
        routed: for the experts that a gate chooses.
        others: for the shared expert and for dense FFNs.
    """

    routed: tuple[float | None, ...]
    others: tuple[float | None, ...]


def swiglu_limits(config: Config) -> SwiGLULimits | None:
    """Read `swiglu_limits` and `swiglu_limits_shared`; 0 and null mean none."""
    if not config.get("swiglu_limits") and not config.get("swiglu_limits_shared"):
        return None
    return SwiGLULimits(_limits(config, "swiglu_limits"), _limits(config, "swiglu_limits_shared"))


def mixtral_experts(config: Config) -> ExpertSpec:
    """Read the experts of `mixtral`."""
    num_experts = integer(config, "num_local_experts")
    return ExpertSpec(
        num_experts=num_experts,
        num_chosen=_num_chosen(config, "num_experts_per_tok", num_experts, "num_local_experts"),
        intermediate_size=integer(config, "intermediate_size"),
        gate=GateSpec("softmax", renormalises=True),
        is_routed=(True,) * integer(config, "num_hidden_layers"),
    )


def qwen3_moe_experts(config: Config) -> ExpertSpec:
    """Read the experts of `qwen3_moe`; transformers 5 spells their number as Mixtral does."""
    field = "num_experts" if "num_experts" in config else "num_local_experts"
    num_experts = integer(config, field)
    return ExpertSpec(
        num_experts=num_experts,
        num_chosen=_num_chosen(config, "num_experts_per_tok", num_experts, field),
        intermediate_size=integer(config, "moe_intermediate_size"),
        gate=GateSpec("softmax", bool(config.get("norm_topk_prob", False))),
        is_routed=_qwen3_moe_layers(config),
    )


def step3_text_experts(config: Config) -> ExpertSpec | None:
    """Read the experts of `step3_text`; None if all layers are dense."""
    gate = GateSpec("softmax", bool(config.get("norm_expert_weight", False)))
    return _step3_experts(config, gate) if _enumerated_layers(config) else None


def step3p5_experts(config: Config) -> ExpertSpec | None:
    """Read the experts of `step3p5`; None if all layers are dense."""
    if not _enumerated_layers(config):
        return None
    refuse_unless(config, "moe_router_activation", "sigmoid")
    for field in ("use_moe_router_bias", "need_fp32_gate"):
        refuse_unless(config, field, True)
    gate = GateSpec(
        "sigmoid",
        renormalises=bool(config.get("norm_expert_weight", True)),
        scale=number(config, "moe_router_scaling_factor"),
        is_biased=True,
    )
    return _step3_experts(config, gate)


def deepseek_v3_experts(config: Config) -> ExpertSpec | None:
    """Read the experts of `deepseek_v3`; None if all layers are dense."""
    num_layers = integer(config, "num_hidden_layers")
    num_dense = integer(config, "first_k_dense_replace", least=0)
    if num_dense >= num_layers:
        return None
    refuse_unless(config, "moe_layer_freq", None, 1)
    refuse_unless(config, "scoring_func", None, "sigmoid")
    refuse_unless(config, "topk_method", None, "noaux_tc")
    num_experts = integer(config, "n_routed_experts")
    size = integer(config, "moe_intermediate_size")
    num_shared = integer(config, "n_shared_experts", default=0, least=0)
    num_chosen = _num_chosen(config, "num_experts_per_tok", num_experts, "n_routed_experts")
    return ExpertSpec(
        num_experts=num_experts,
        num_chosen=num_chosen,
        intermediate_size=size,
        gate=_grouped_gate(config, num_experts, num_chosen),
        is_routed=(False,) * num_dense + (True,) * (num_layers - num_dense),
        shared_size=size * num_shared or None,  # several are stored as one
    )


def _limits(config: Config, field: str) -> tuple[float | None, ...]:
    num_layers = integer(config, "num_hidden_layers")
    entries = by_layer(config, field) if config.get(field) else [None] * num_layers
    return tuple(number({field: entry}, field) if entry else None for entry in entries)


def _num_chosen(config: Config, field: str, num_experts: int, of: str) -> int:
    num_chosen = integer(config, field)
    if num_chosen > num_experts:
        raise ModelError(f"config.json: {field} is {num_chosen}, more than {of} ({num_experts})")
    return num_chosen


def _qwen3_moe_layers(config: Config) -> tuple[bool, ...]:
    """Every `decoder_sparse_step`-th layer is routed, unless `mlp_only_layers` lists it."""
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise ModelError(f"config.json: mlp_only_layers is {dense!r}, expected layer numbers")
    step = integer(config, "decoder_sparse_step", default=1)
    return tuple(
        layer not in dense and (layer + 1) % step == 0
        for layer in range(integer(config, "num_hidden_layers"))
    )


def _step3_experts(config: Config, gate: GateSpec) -> ExpertSpec:
    """Read what Step-3 and Step-3.5 spell alike."""
    routed, num_experts = _enumerated_layers(config), integer(config, "moe_num_experts")
    return ExpertSpec(
        num_experts=num_experts,
        num_chosen=_num_chosen(config, "moe_top_k", num_experts, "moe_num_experts"),
        intermediate_size=integer(config, "moe_intermediate_size"),
        gate=gate,
        is_routed=tuple(n in routed for n in range(integer(config, "num_hidden_layers"))),
        shared_size=integer(config, "share_expert_dim"),
    )


def _enumerated_layers(config: Config) -> frozenset[int]:
    """Return the layers with experts, which Step-3 lists in a string: `4,5,6`."""
    text, num_layers = config.get("moe_layers_enum"), integer(config, "num_hidden_layers")
    numbers = text.split(",") if isinstance(text, str) and text else []
    valid = all(n.strip().isdecimal() and int(n) < num_layers for n in numbers)
    if not isinstance(text, str) or not valid:
        raise ModelError(
            f"config.json: moe_layers_enum is {text!r}, expected a string of layer numbers below "
            f"{num_layers} with commas between them, or ''"
        )
    return frozenset(map(int, numbers))


def _grouped_gate(config: Config, num_experts: int, num_chosen: int) -> GateSpec:
    """Read DeepSeek-V3's gate (arXiv 2412.19437, section 2.1.2)."""
    num_groups, num_kept = integer(config, "n_group"), integer(config, "topk_group")
    group_size, rest = divmod(num_experts, num_groups)
    if rest or group_size < 2:
        raise ModelError(
            f"config.json: n_group is {num_groups}, expected groups of at least two of "
            f"{num_experts} experts"
        )
    if num_kept > num_groups or num_kept * group_size < num_chosen:
        raise ModelError(
            f"config.json: topk_group is {num_kept}, expected at most n_group ({num_groups}) and "
            f"enough for {num_chosen} experts of {group_size} in each group"
        )
    return GateSpec(
        "sigmoid",
        renormalises=bool(config.get("norm_topk_prob", True)),
        scale=number(config, "routed_scaling_factor"),
        is_biased=True,
        num_groups=num_groups,
        num_kept_groups=num_kept,
    )
