"""What config.json says about routed experts, checked and in our words.

Knows nothing of tensors, nor of the rest of the model.
"""

from dataclasses import dataclass

from afd_server.core.config_fields import Config, integer
from afd_server.core.errors import ModelError


@dataclass(frozen=True, slots=True)
class ExpertSpec:
    """The routed FFNs of a decoder.

    Attributes:
        num_experts: of every routed layer.
        num_chosen: experts that a token goes to.
        intermediate_size: of one expert.
        renormalises: whether a token's weights are divided by their sum.
        is_routed: for each layer, whether it has experts; the others are dense.
    """

    num_experts: int
    num_chosen: int
    intermediate_size: int
    renormalises: bool
    is_routed: tuple[bool, ...]


def mixtral_experts(config: Config) -> ExpertSpec:
    """Read the experts of `mixtral`."""
    num_layers = integer(config, "num_hidden_layers")
    num_experts = integer(config, "num_local_experts")
    return ExpertSpec(
        num_experts=num_experts,
        num_chosen=_num_chosen(config, num_experts, "num_local_experts"),
        intermediate_size=integer(config, "intermediate_size"),
        renormalises=True,
        is_routed=(True,) * num_layers,
    )


def qwen3_moe_experts(config: Config) -> ExpertSpec:
    """Read the experts of `qwen3_moe`; transformers 5 spells their number as Mixtral does."""
    field = "num_experts" if "num_experts" in config else "num_local_experts"
    num_experts = integer(config, field)
    return ExpertSpec(
        num_experts=num_experts,
        num_chosen=_num_chosen(config, num_experts, field),
        intermediate_size=integer(config, "moe_intermediate_size"),
        renormalises=bool(config.get("norm_topk_prob", False)),
        is_routed=_qwen3_moe_layers(config),
    )


def _num_chosen(config: Config, num_experts: int, field: str) -> int:
    num_chosen = integer(config, "num_experts_per_tok")
    if num_chosen > num_experts:
        raise ModelError(
            f"config.json: num_experts_per_tok is {num_chosen}, more than {field} ({num_experts})"
        )
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
