"""What config.json says about a model, checked and in our words.

Knows nothing of tensors: the gateway reads it too.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal  # Any: values of a stranger's JSON, checked field by field

from afd_server.core.attention_spec import (
    AttentionSpec,
    KVFormat,
    parse_deepseek_v3,
    parse_llama,
    parse_mixtral,
    parse_qwen2,
    parse_qwen3,
    parse_qwen3_moe,
    parse_step3_text,
    parse_step3p5,
)
from afd_server.core.config_fields import Config, integer, number, refuse_unless
from afd_server.core.errors import ModelError
from afd_server.core.expert_spec import (
    ExpertSpec,
    SwiGLULimits,
    deepseek_v3_experts,
    mixtral_experts,
    qwen3_moe_experts,
    step3_text_experts,
    step3p5_experts,
    swiglu_limits,
)
from afd_server.core.kv_groups import KVGroup, kv_groups

_ATTENTION: dict[str, Callable[[Config], tuple[AttentionSpec, ...]]] = {
    "llama": parse_llama,
    "qwen2": parse_qwen2,
    "qwen3": parse_qwen3,
    "step3_text": parse_step3_text,
    "step3p5": parse_step3p5,
    "deepseek_v3": parse_deepseek_v3,
    "mixtral": parse_mixtral,
    "qwen3_moe": parse_qwen3_moe,
}

_EXPERTS: dict[str, Callable[[Config], ExpertSpec | None]] = {
    "step3_text": step3_text_experts,
    "step3p5": step3p5_experts,
    "deepseek_v3": deepseek_v3_experts,
    "mixtral": mixtral_experts,
    "qwen3_moe": qwen3_moe_experts,
}

SUPPORTED_MODEL_TYPES = tuple(_ATTENTION)

LoadFormat = Literal["auto", "dummy"]  # a checkpoint's weights, or random ones


@dataclass(frozen=True, slots=True)
class FFNShape:
    """One FFN of one layer: dense, of a routed expert or of the shared one.

    Attributes:
        intermediate_size: its columns.
        limit: what the factors of its SwiGLU are clamped to; None if they are not.
    """

    intermediate_size: int
    limit: float | None


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The shapes and constants of a decoder. Sizes are in elements.

    Attributes:
        attention: one for each layer.
        intermediate_size: of every dense FFN.
        experts: of the routed FFNs; None if all are dense.
        limits: of all FFNs; None if nothing is clamped.
    """

    model_type: str
    hidden_size: int
    attention: tuple[AttentionSpec, ...]
    intermediate_size: int
    vocab_size: int
    max_position: int
    rms_norm_eps: float
    tie_embeddings: bool
    eos_token_ids: tuple[int, ...]
    experts: ExpertSpec | None = None
    limits: SwiGLULimits | None = None

    def num_chosen(self, layer: int) -> int:
        """Return the experts that a token goes to in a layer; 0 if the layer is dense.

        A shared expert counts.
        """
        experts = self.experts
        if experts is None or not experts.is_routed[layer]:
            return 0
        return experts.num_chosen + experts.num_shared

    @property
    def experts_by_layer(self) -> tuple[int, ...]:
        """Return the experts of each layer, the shared one among them.

        A dense layer counts as one that everybody chooses.
        """
        experts = self.experts
        if experts is None:
            return (1,) * self.num_layers
        return tuple(
            experts.num_experts + experts.num_shared if r else 1 for r in experts.is_routed
        )

    def ffn_shape(self, layer: int, expert: int = 0) -> FFNShape:
        """Return the shape of an expert of a layer; a dense layer has one."""
        experts, limits = self.experts, self.limits
        routed, others = (limits.routed[layer], limits.others[layer]) if limits else (None, None)
        if experts is None or not experts.is_routed[layer]:
            return FFNShape(self.intermediate_size, others)
        if expert < experts.num_experts:
            return FFNShape(experts.intermediate_size, routed)
        assert experts.shared_size is not None, f"there are only {experts.num_experts} experts"
        return FFNShape(experts.shared_size, others)

    @property
    def smallest_intermediate_size(self) -> int:
        """Return the columns of the FFN that has the fewest."""
        return min(
            self.ffn_shape(layer, expert).intermediate_size
            for layer, num_experts in enumerate(self.experts_by_layer)
            for expert in (0, num_experts - 1)  # the last may be shared, of another size
        )

    @property
    def num_layers(self) -> int:
        """Return the number of decoder layers."""
        return len(self.attention)

    @property
    def placed_by_layer(self) -> tuple[int, ...]:
        """Return how many experts of each layer have holders; behind the last layer the head: 1."""
        return (*self.experts_by_layer, 1)

    @property
    def kv_elements_per_token(self) -> int:
        """Return the keys and values of one token over all layers, in elements."""
        return sum(layer.kv.elements for layer in self.attention)

    @property
    def kv_groups(self) -> tuple[KVGroup, ...]:
        """Return which layers share block tables."""
        return kv_groups(self.attention)

    def kv_slot_bytes(self, kv_format: KVFormat) -> int:
        """Return what one position takes in a block: of the layers of the largest group."""
        return max(
            sum(self.attention[layer].kv.num_bytes(kv_format) for layer in group.layers)
            for group in self.kv_groups
        )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ModelError: there is no such file, or it holds no JSON object.
    """
    if not path.is_file():
        raise ModelError(f"{path.parent} lacks {path.name}; a Hugging Face model directory has it")
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds {type(content).__name__}, expected a JSON object")
    return content


def read_model_spec(directory: Path) -> ModelSpec:
    """Read and check config.json and generation_config.json of a model directory.

    Raises:
        ModelError: a file or field is missing, of the wrong kind, or not supported.
    """
    config = read_json(directory / "config.json")
    generation_path = directory / "generation_config.json"
    generation = read_json(generation_path) if generation_path.is_file() else {}
    return parse_model_spec(config, generation)


def parse_model_spec(config: Config, generation: Config) -> ModelSpec:
    """Turn config.json's fields into a `ModelSpec`.

    Raises:
        ModelError: a field is missing, of the wrong kind, or asks for what we do not do.
    """
    model_type = config.get("model_type")
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise ModelError(
            f"config.json: model_type {model_type!r} is not supported; "
            f"supported: {', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    _refuse_unsupported(config)
    return ModelSpec(
        model_type=model_type,
        hidden_size=integer(config, "hidden_size"),
        attention=_ATTENTION[model_type](config),
        intermediate_size=integer(config, "intermediate_size"),
        vocab_size=integer(config, "vocab_size"),
        max_position=_max_position(config),
        rms_norm_eps=number(config, "rms_norm_eps"),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        eos_token_ids=_eos_token_ids(config, generation),
        experts=_EXPERTS[model_type](config) if model_type in _EXPERTS else None,
        limits=swiglu_limits(config),
    )


def _refuse_unsupported(config: Config) -> None:
    refuse_unless(config, "attention_bias", None, False)
    refuse_unless(config, "mlp_bias", None, False)
    refuse_unless(config, "hidden_act", "silu")
    _refuse_quantisation(config.get("quantization_config") or {})


def _refuse_quantisation(quantisation: object) -> None:
    """Accept float8 weights with a factor for each block; which tensors are, their files say."""
    wanted: dict[str, tuple[object, ...]] = {
        "quant_method": ("fp8",),
        "weight_block_size": ([128, 128],),
        "fmt": ("e4m3", None),
        "activation_scheme": ("dynamic", None),
    }
    if not isinstance(quantisation, dict):
        raise ModelError(
            f"config.json: quantization_config is {quantisation!r}, expected a JSON object"
        )
    for field, supported in wanted.items() if quantisation else ():
        if quantisation.get(field) not in supported:
            raise ModelError(
                f"config.json: quantization_config.{field} {quantisation.get(field)!r} is not "
                f"supported; expected {supported[0]!r}"
            )


def _max_position(config: Config) -> int:
    """Read both spellings; that of Step-3 is the singular."""
    singular = "max_position_embedding"
    return integer(config, singular if singular in config else f"{singular}s")


def _eos_token_ids(config: Config, generation: Config) -> tuple[int, ...]:
    found: set[int] = set()
    for source in (config, generation):
        value = source.get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise ModelError(f"eos_token_id is {value!r}, expected token ids")
        found.update(ids)
    return tuple(sorted(found))
