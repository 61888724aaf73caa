"""What config.json says about the attention of each layer, checked and in our words.

Knows nothing of tensors, nor of the rest of the model.
"""

from dataclasses import dataclass

from afd_server.core.config_fields import Config, integer, number, refuse_unless
from afd_server.core.errors import ModelError


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


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """How queries and keys are rotated: `dim` elements, by angles that fall from 1 to 1/theta."""

    dim: int
    theta: float


@dataclass(frozen=True, slots=True)
class GQASpec:
    """Grouped-query attention: `num_heads` query heads share `num_kv_heads` keys and values."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeSpec

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


AttentionSpec = GQASpec | MFASpec


def parse_llama(config: Config) -> tuple[AttentionSpec, ...]:
    """Read the attention of every layer of `llama`."""
    return (_gqa(config),) * integer(config, "num_hidden_layers")


def parse_qwen2(config: Config) -> tuple[AttentionSpec, ...]:
    """Read the attention of every layer of `qwen2`."""
    _refuse_windows(config)
    return (_gqa(config),) * integer(config, "num_hidden_layers")


def parse_qwen3(config: Config) -> tuple[AttentionSpec, ...]:
    """Read the attention of every layer of `qwen3`."""
    _refuse_windows(config)
    # 128 where transformers' own default was not written
    return (_gqa(config, head_dim=128),) * integer(config, "num_hidden_layers")


def parse_mixtral(config: Config) -> tuple[AttentionSpec, ...]:
    """Read the attention of every layer of `mixtral`."""
    refuse_unless(config, "sliding_window", None)
    return (_gqa(config),) * integer(config, "num_hidden_layers")


def parse_qwen3_moe(config: Config) -> tuple[AttentionSpec, ...]:
    """Read the attention of every layer of `qwen3_moe`."""
    _refuse_windows(config)
    return (_gqa(config),) * integer(config, "num_hidden_layers")


def parse_step3_text(config: Config) -> tuple[AttentionSpec, ...]:
    """Read the attention of every layer of `step3_text`."""
    refuse_unless(config, "num_attention_groups", 1)
    refuse_unless(config, "mfa_key_reuse", False, True)
    head_dim = integer(config, "head_dim")
    attention = MFASpec(
        num_heads=integer(config, "num_attention_heads"),
        head_dim=head_dim,
        query_rank=integer(config, "share_q_dim"),
        rope=RopeSpec(head_dim, _rope_theta(config)),
        reuses_keys=config.get("mfa_key_reuse", False),
    )
    return (attention,) * integer(config, "num_hidden_layers")


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
    return GQASpec(num_heads, num_kv_heads, head_dim, RopeSpec(head_dim, _rope_theta(config)))


def _refuse_windows(config: Config) -> None:
    """Refuse sliding windows; a `sliding_window` that is not used is of no account."""
    refuse_unless(config, "use_sliding_window", None, False)
    for kind in config.get("layer_types") or ():
        if kind != "full_attention":
            raise ModelError(
                f"config.json: layer_types has {kind!r}, which is not supported; "
                "expected 'full_attention'"
            )


def _rope_theta(config: Config) -> float:
    """Read both spellings: `rope_theta` on the hub, `rope_parameters` from transformers 5."""
    field = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    scaling = config.get(field) or {}
    if not isinstance(scaling, dict):
        raise ModelError(f"config.json: {field} is {scaling!r}, expected a JSON object")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        raise ModelError(f"config.json: rope type {kind!r} is not supported; expected 'default'")
    nested = config.get("rope_parameters")
    if isinstance(nested, dict) and "rope_theta" in nested:
        return number(nested, "rope_theta")
    return number(config, "rope_theta") if "rope_theta" in config else 10000.0
