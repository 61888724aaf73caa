"""What config.json says about a model, checked and in our words.

Knows nothing of tensors: the gateway reads it too.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any  # Any: values of a stranger's JSON, checked field by field

from afd_server.core.errors import ModelError

SUPPORTED_MODEL_TYPES = ("llama",)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The shapes and constants of a decoder. Sizes are in elements."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    rms_norm_eps: float
    rope_theta: float
    tie_embeddings: bool
    eos_token_ids: tuple[int, ...]

    @property
    def kv_elements_per_token(self) -> int:
        """Return the keys and values of one token over all layers, in elements."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim


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


def parse_model_spec(config: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelSpec:
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
    hidden_size = _integer(config, "hidden_size")
    num_heads = _integer(config, "num_attention_heads")
    num_kv_heads = _integer(config, "num_key_value_heads", default=num_heads)
    if num_heads % num_kv_heads:
        raise ModelError(
            f"config.json: num_attention_heads {num_heads} is no multiple of "
            f"num_key_value_heads {num_kv_heads}"
        )
    return ModelSpec(
        model_type=str(model_type),
        hidden_size=hidden_size,
        intermediate_size=_integer(config, "intermediate_size"),
        num_layers=_integer(config, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_integer(config, "head_dim", default=hidden_size // num_heads),
        vocab_size=_integer(config, "vocab_size"),
        max_position=_integer(config, "max_position_embeddings"),
        rms_norm_eps=_number(config, "rms_norm_eps"),
        rope_theta=_rope_theta(config),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        eos_token_ids=_eos_token_ids(config, generation),
    )


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    wanted = {"attention_bias": (None, False), "mlp_bias": (None, False), "hidden_act": ("silu",)}
    for field, supported in wanted.items():
        if config.get(field, supported[0]) not in supported:
            raise ModelError(
                f"config.json: {field} {config[field]!r} is not supported; "
                f"expected {supported[-1]!r}"
            )
    if config.get("quantization_config"):
        raise ModelError(
            "config.json: quantization_config is not supported; give an unquantised checkpoint"
        )
    field = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    scaling = config.get(field) or {}
    if not isinstance(scaling, dict):
        raise ModelError(f"config.json: {field} is {scaling!r}, expected a JSON object")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        raise ModelError(f"config.json: rope type {kind!r} is not supported; expected 'default'")


def _integer(config: Mapping[str, Any], field: str, default: int | None = None) -> int:
    value = config.get(field)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(f"config.json: {field} is {value!r}, expected a positive integer")
    return value


def _number(config: Mapping[str, Any], field: str) -> float:
    value = config.get(field)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ModelError(f"config.json: {field} is {value!r}, expected a positive number")
    return float(value)


def _rope_theta(config: Mapping[str, Any]) -> float:
    """Read both spellings: `rope_theta` on the hub, `rope_parameters` from transformers 5."""
    nested = config.get("rope_parameters")
    if isinstance(nested, dict) and "rope_theta" in nested:
        return _number(nested, "rope_theta")
    return _number(config, "rope_theta") if "rope_theta" in config else 10000.0


def _eos_token_ids(config: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    found: set[int] = set()
    for source in (config, generation):
        value = source.get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise ModelError(f"eos_token_id is {value!r}, expected token ids")
        found.update(ids)
    return tuple(sorted(found))
