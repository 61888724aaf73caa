"""The shipped model shapes: well formed, and the small ones true to the large ones."""

import json
from pathlib import Path

import pytest

from afd_server.core.model_spec import read_model_spec

CONFIGS = Path(__file__).parents[1] / "configs"
SHIPPED = {path.parent.name: json.loads(path.read_text()) for path in CONFIGS.glob("*/config.json")}
PAIRS = [(name, f"{name}-mini") for name in SHIPPED if f"{name}-mini" in SHIPPED]

DIVISORS = {
    "hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 16,
    "share_expert_dim": 16, "share_q_dim": 16, "q_lora_rank": 16, "kv_lora_rank": 16,
    "num_attention_heads": 4, "num_key_value_heads": 4, "num_attention_groups": 4, "head_dim": 4,
    "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4, "sliding_window": 4,
}  # fmt: skip
SMALLER = {
    "num_hidden_layers", "first_k_dense_replace", "vocab_size", "max_position_embeddings",
    "max_position_embedding", "max_seq_len", "original_max_position_embeddings",
}  # fmt: skip
# What speaks of each layer, of the vocabulary's ids, or of how the original is stored.
BY_LAYER = {"layer_types", "rope_theta", "partial_rotary_factors", "swiglu_limits",
            "swiglu_limits_shared", "moe_layers_enum"}  # fmt: skip
OTHER = {"bos_token_id", "eos_token_id", "quantization_config"}


def assert_narrowed(large, small):
    """Check field by field that `small` is `large` with its widths divided."""
    assert large.keys() - OTHER == small.keys() - OTHER
    for field, value in small.items():
        original = large[field]
        if field in DIVISORS:
            divided, rest = divmod(original, DIVISORS[field])
            assert value == original == 1 or (value, 0) == (divided, rest), field
        elif field in SMALLER:
            assert 1 <= value < original, field
        elif isinstance(value, dict):
            assert_narrowed(original, value)
        elif field in BY_LAYER and not isinstance(value, int | float):
            assert {*value} == {*original} or field == "moe_layers_enum", field
        elif field not in OTHER:
            assert value == original, field


def test_every_directory_holds_one_shape():
    assert {path.name for path in CONFIGS.iterdir() if path.is_dir()} == SHIPPED.keys()
    assert {path.name for path in CONFIGS.glob("*/*")} == {"config.json"}
    assert {name for pair in PAIRS for name in pair} == SHIPPED.keys() - {"llama-mini"}


@pytest.mark.parametrize(("large", "small"), PAIRS, ids=[small for _, small in PAIRS])
def test_a_mini_has_the_ratios_of_its_original(large, small):
    assert_narrowed(SHIPPED[large], SHIPPED[small])


def test_llama_mini_is_a_third_of_smollm2():
    smollm2 = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
               "num_key_value_heads": 3}  # fmt: skip
    mini = SHIPPED["llama-mini"]
    assert {field: 3 * mini[field] for field in smollm2} == smollm2
    assert (mini["head_dim"], mini["rope_theta"], mini["rms_norm_eps"]) == (64, 1e5, 1e-5)


@pytest.mark.parametrize("name", SHIPPED)
def test_what_is_said_of_each_layer_is_said_of_all(name):
    config = SHIPPED[name]
    count = config["num_hidden_layers"] + config.get("num_nextn_predict_layers", 0)
    for field in BY_LAYER - {"moe_layers_enum"}:
        assert not isinstance(config.get(field), list) or len(config[field]) == count, field
    with_experts = [int(layer) for layer in config.get("moe_layers_enum", "0").split(",")]
    assert with_experts == sorted({*with_experts})
    assert with_experts[-1] < config["num_hidden_layers"]


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shape_is_read(name):
    spec = read_model_spec(CONFIGS / name)
    assert (spec.model_type, spec.num_layers, spec.hidden_size) == tuple(
        SHIPPED[name][field] for field in ("model_type", "num_hidden_layers", "hidden_size")
    )


def test_every_shape_is_listed():
    lines = (CONFIGS / "README.md").read_text()
    assert [name for name in SHIPPED if f"`{name}`" not in lines] == []
