"""What config.json says about the attention of each layer, checked and in our words.

Knows nothing of tensors, nor of the rest of the model.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

from afd_server.core.config_fields import Config, by_layer, integer, number, refuse_unless
from afd_server.core.errors import ModelError

KVFormat = Literal["float32", "bfloat16", "int8"]

# int8 keeps a float32 scale before each head's key and value.
KV_SCALE_BYTES = 4
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one layer caches of a token: keys and values of some heads. Sizes are in elements.

    Attributes:
        value_in_key: a value is the first `value_dim` elements of its key and takes no memory.
    """

    num_heads: int
    key_dim: int
    value_dim: int
    value_in_key: bool = False

    @property
    def elements(self) -> int:
        """Return the memory of one token in one layer."""
        return self.num_heads * (self.key_dim + (0 if self.value_in_key else self.value_dim))

    def num_bytes(self, kv_format: KVFormat) -> int:
        """Return the same in bytes of a format, with its scales."""
        num_scales = self.num_heads * (1 if self.value_in_key else 2) * (kv_format == "int8")
        return self.elements * _ITEM_BYTES[kv_format] + num_scales * KV_SCALE_BYTES


@dataclass(frozen=True, slots=True)
class YarnSpec:
    """How a model was stretched to `factor` times its original context (YaRN, arXiv 2309.00071).

    Attributes:
        original_max_position: the context before.
        beta_fast, beta_slow: pairs that turn at least `beta_fast` times in it are left alone,
            those that turn at most `beta_slow` times are slowed by the whole factor.
        magnitude: multiplies what is rotated.
    """

    factor: float
    original_max_position: int
    beta_fast: float
    beta_slow: float
    magnitude: float


@dataclass(frozen=True, slots=True)
class Llama3Spec:
    """How Llama 3.1 was stretched to `factor` times its original context.

    Attributes:
        original_max_position: the context before.
        least_turns, most_turns: pairs that turn fewer times in it than the first are slowed by
            the whole factor, those that turn more often than the second are left alone.
    """

    factor: float
    original_max_position: int
    least_turns: float
    most_turns: float


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """How queries and keys are rotated: `dim` elements, by angles that fall from 1 to 1/theta.

    Attributes:
        scaling: how that is stretched to a longer context, if it is.
        num_still: elements behind them that are not rotated.
    """

    dim: int
    theta: float
    scaling: YarnSpec | Llama3Spec | None = None
    num_still: int = 0


@dataclass(frozen=True, slots=True)
class GQASpec:
    """Grouped-query attention: `num_heads` query heads share `num_kv_heads` keys and values.

    Attributes:
        window: how many positions a token sees, the latest and its own among them; None for all.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeSpec
    window: int | None = None

    @property
    def kv(self) -> KVShape:
        """Return what is cached."""
        return KVShape(self.num_kv_heads, self.head_dim, self.head_dim)


@dataclass(frozen=True, slots=True)
class MFASpec:
    """Multi-matrix factorization attention: low-rank queries over one key and value head.

    Attributes:
        query_rank: elements between the two query projections.
        reuses_keys: values are made of the cached keys (MFA-KR).
    """

    num_heads: int
    head_dim: int
    query_rank: int
    rope: RopeSpec
    reuses_keys: bool

    @property
    def kv(self) -> KVShape:
        """Return what is cached."""
        return KVShape(1, self.head_dim, self.head_dim, self.reuses_keys)


@dataclass(frozen=True, slots=True)
class MLASpec:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    Attributes:
        query_rank: elements between the two query projections.
        latent_dim: of what keys and values of all heads are made of.
        plain_dim: elements of a head's query and key that are not rotated.
        value_dim: elements of a head's value.
        rope: of the rest of each query, and of a key that all heads share.
        scale: of the scores.
    """

    num_heads: int
    query_rank: int
    latent_dim: int
    plain_dim: int
    value_dim: int
    rope: RopeSpec
    scale: float

    @property
    def kv(self) -> KVShape:
        """Return what is cached: the latent, which is key and value, and the rotated key."""
        return KVShape(1, self.latent_dim + self.rope.dim, self.latent_dim, value_in_key=True)


AttentionSpec = GQASpec | MFASpec | MLASpec


def parse_llama(config: Config) -> tuple[AttentionSpec, ...]:
    """Read the attention of every layer of `llama`."""
    return (_gqa(config),) * integer(config, "num_hidden_layers")


def parse_qwen2(config: Config) -> tuple[AttentionSpec, ...]:
    """Read the attention of every layer of `qwen2`: the later ones may have a window."""
    return _with_windows(config, _gqa(config))


def parse_qwen3(config: Config) -> tuple[AttentionSpec, ...]:
    """Read the attention of every layer of `qwen3`: the later ones may have a window."""
    # 128 where transformers' own default was not written
    return _with_windows(config, _gqa(config, head_dim=128))


def parse_mixtral(config: Config) -> tuple[AttentionSpec, ...]:
    """Read the attention of every layer of `mixtral`."""
    window = None if config.get("sliding_window") is None else integer(config, "sliding_window")
    attention = replace(_gqa(config), window=window)
    return (attention,) * integer(config, "num_hidden_layers")


def parse_qwen3_moe(config: Config) -> tuple[AttentionSpec, ...]:
    """Read the attention of every layer of `qwen3_moe`: all have the window, if there is one."""
    attention = replace(_gqa(config), window=_window_in_use(config))
    return (attention,) * integer(config, "num_hidden_layers")


def parse_step3_text(config: Config) -> tuple[AttentionSpec, ...]:
    """Read the attention of every layer of `step3_text`."""
    refuse_unless(config, "num_attention_groups", 1)
    refuse_unless(config, "mfa_key_reuse", False, True)
    head_dim = integer(config, "head_dim")
    attention = MFASpec(
        num_heads=integer(config, "num_attention_heads"),
        head_dim=head_dim,
        query_rank=integer(config, "share_q_dim"),
        rope=_plain_rope(config, head_dim),
        reuses_keys=config.get("mfa_key_reuse", False),
    )
    return (attention,) * integer(config, "num_hidden_layers")


def parse_deepseek_v3(config: Config) -> tuple[AttentionSpec, ...]:
    """Read the attention of every layer of `deepseek_v3`."""
    refuse_unless(config, "rope_interleave", None, True)
    plain_dim, rope_dim = integer(config, "qk_nope_head_dim"), integer(config, "qk_rope_head_dim")
    rope, stretch = _yarn_rope(config, rope_dim)
    attention = MLASpec(
        num_heads=integer(config, "num_attention_heads"),
        query_rank=integer(config, "q_lora_rank"),
        latent_dim=integer(config, "kv_lora_rank"),
        plain_dim=plain_dim,
        value_dim=integer(config, "v_head_dim"),
        rope=rope,
        scale=(plain_dim + rope_dim) ** -0.5 * stretch**2,
    )
    return (attention,) * integer(config, "num_hidden_layers")


def parse_step3p5(config: Config) -> tuple[AttentionSpec, ...]:
    """Read the attention of every layer of `step3p5`: some see all, some a window."""
    for field in ("use_qk_norm", "use_head_wise_attn_gate", "zero_centered"):
        refuse_unless(config, field, None, True)
    refuse_unless(config, "sink", None, False)
    refuse_unless(config, "use_rope_layers", None, [])
    kinds = by_layer(config, "layer_types")
    return tuple(_step3p5_layer(config, layer, kind) for layer, kind in enumerate(kinds))


def _step3p5_layer(config: Config, layer: int, kind: object) -> GQASpec:
    if kind not in ("full_attention", "sliding_attention"):
        raise ModelError(
            f"config.json: layer_types has {kind!r}, which is not supported; "
            "expected 'full_attention' or 'sliding_attention'"
        )
    slides = kind == "sliding_attention"
    other = config.get("attention_other_setting") if slides else None
    shape = {**config, **other} if isinstance(other, dict) else config
    num_heads = integer(shape, "num_attention_heads")
    num_kv_heads = integer(shape, "num_attention_groups")
    if num_heads % num_kv_heads:
        raise ModelError(
            f"config.json: num_attention_heads {num_heads} is no multiple of "
            f"num_attention_groups {num_kv_heads}"
        )
    head_dim = integer(shape, "head_dim")
    return GQASpec(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rope=_step3p5_rope(config, layer, kind, head_dim),
        window=integer(config, "sliding_window") if slides else None,
    )


def _step3p5_rope(config: Config, layer: int, kind: object, head_dim: int) -> RopeSpec:
    """Read the layer's entries of the lists; only some kinds of layers are stretched."""
    theta = number({"rope_theta": by_layer(config, "rope_theta")[layer]}, "rope_theta")
    field = "partial_rotary_factors"
    rotated = head_dim * number({field: by_layer(config, field)[layer]}, field)
    dim = int(rotated)
    if dim != rotated or dim % 2 or dim > head_dim:
        raise ModelError(
            f"config.json: {field} make {rotated} rotated elements of {head_dim} in a head, "
            "expected an even number"
        )
    fields = _rope_fields(config)
    scaling = None
    if fields and kind in config.get("yarn_only_types", ()):
        refuse_unless(fields, "rope_type", "llama3")
        scaling = Llama3Spec(
            factor=number(fields, "factor"),
            original_max_position=integer(fields, "original_max_position_embeddings"),
            least_turns=number(fields, "low_freq_factor"),
            most_turns=number(fields, "high_freq_factor"),
        )
    return RopeSpec(dim, theta, scaling, num_still=head_dim - dim)


def _gqa(config: Config, head_dim: int | None = None) -> GQASpec:
    num_heads = integer(config, "num_attention_heads")
    num_kv_heads = integer(config, "num_key_value_heads", default=num_heads)
    if num_heads % num_kv_heads:
        raise ModelError(
            f"config.json: num_attention_heads {num_heads} is no multiple of "
            f"num_key_value_heads {num_kv_heads}"
        )
    default = head_dim or integer(config, "hidden_size") // num_heads
    head_dim = integer(config, "head_dim", default=default)
    return GQASpec(num_heads, num_kv_heads, head_dim, _plain_rope(config, head_dim))


def _window_in_use(config: Config) -> int | None:
    """Return Qwen's window; a `sliding_window` that is not used is of no account."""
    refuse_unless(config, "use_sliding_window", None, False, True)
    return integer(config, "sliding_window") if config.get("use_sliding_window") else None


def _with_windows(config: Config, attention: GQASpec) -> tuple[AttentionSpec, ...]:
    """Give the layers that slide their window: as `layer_types` says, else the later ones."""
    window, num_layers = _window_in_use(config), integer(config, "num_hidden_layers")
    sliding = replace(attention, window=window)
    if config.get("layer_types") is None:
        # 28 where transformers' own default was not written
        num_full = min(num_layers, integer(config, "max_window_layers", default=28))
        return (attention,) * num_full + (sliding,) * (num_layers - num_full)
    by_kind = {"full_attention": attention, "sliding_attention": sliding}
    if window is None:
        del by_kind["sliding_attention"]
    return tuple(_of_kind(kind, by_kind) for kind in by_layer(config, "layer_types"))


def _of_kind(kind: object, by_kind: dict[str, GQASpec]) -> GQASpec:
    if not isinstance(kind, str) or kind not in by_kind:
        raise ModelError(
            f"config.json: layer_types has {kind!r}, which is not supported; "
            f"expected {' or '.join(map(repr, by_kind))}"
        )
    return by_kind[kind]


def _plain_rope(config: Config, dim: int) -> RopeSpec:
    kind = _rope_kind(_rope_fields(config))
    if kind != "default":
        raise ModelError(f"config.json: rope type {kind!r} is not supported; expected 'default'")
    return RopeSpec(dim, _rope_theta(config))


def _yarn_rope(config: Config, dim: int) -> tuple[RopeSpec, float]:
    """Return how to rotate, and by how much a stretched model multiplies queries and keys."""
    fields = _rope_fields(config)
    kind = _rope_kind(fields)
    if kind not in ("default", "yarn"):
        raise ModelError(
            f"config.json: rope type {kind!r} is not supported; expected 'default' or 'yarn'"
        )
    if kind == "default":
        return RopeSpec(dim, _rope_theta(config)), 1.0
    refuse_unless(fields, "attention_factor", None)
    refuse_unless(fields, "truncate", None, True)
    factor = number(fields, "factor")
    stretch = _yarn_magnitude(factor, number(fields, "mscale_all_dim"))
    yarn = YarnSpec(
        factor=factor,
        original_max_position=integer(fields, "original_max_position_embeddings"),
        beta_fast=number(fields, "beta_fast"),
        beta_slow=number(fields, "beta_slow"),
        magnitude=_yarn_magnitude(factor, number(fields, "mscale")) / stretch,
    )
    return RopeSpec(dim, _rope_theta(config), yarn), stretch


def _yarn_magnitude(factor: float, weight: float) -> float:
    """Return what makes up for the flatter softmax of a longer context (YaRN, section 3.4)."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _rope_fields(config: Config) -> Config:
    """Read both spellings: `rope_scaling` on the hub, `rope_parameters` from transformers 5."""
    field = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    fields = config.get(field) or {}
    if not isinstance(fields, dict):
        raise ModelError(f"config.json: {field} is {fields!r}, expected a JSON object")
    return fields


def _rope_kind(fields: Config) -> object:
    return fields.get("rope_type", fields.get("type", "default"))


def _rope_theta(config: Config) -> float:
    nested = config.get("rope_parameters")
    if isinstance(nested, dict) and "rope_theta" in nested:
        return number(nested, "rope_theta")
    return number(config, "rope_theta") if "rope_theta" in config else 10000.0
