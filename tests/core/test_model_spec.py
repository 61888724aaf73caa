"""config.json: both spellings are read, and every refusal names the field and what is right."""

import json

import pytest

from afd_server.core.attention_spec import (
    GQASpec,
    KVShape,
    Llama3Spec,
    MFASpec,
    MLASpec,
    RopeSpec,
    YarnSpec,
)
from afd_server.core.errors import ModelError
from afd_server.core.model_spec import ModelSpec, parse_model_spec, read_json, read_model_spec

CONFIG = {
    "model_type": "llama",
    "hidden_size": 96,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 259,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 50000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}


def parse(generation=None, without=(), **changes):
    config = {name: value for name, value in CONFIG.items() if name not in without}
    return parse_model_spec({**config, **changes}, generation or {})


def refused(*words, **changes):
    with pytest.raises(ModelError) as caught:
        parse(**changes)
    for word in words:
        assert word in str(caught.value)


def test_a_whole_config_is_read_field_by_field():
    assert parse() == ModelSpec(
        model_type="llama",
        hidden_size=96,
        attention=(GQASpec(6, 2, 16, RopeSpec(16, 50000.0)),) * 3,
        intermediate_size=176,
        vocab_size=259,
        max_position=512,
        rms_norm_eps=1e-5,
        tie_embeddings=True,
        eos_token_ids=(2,),
    )


def test_what_is_left_out_has_the_values_of_the_first_llama():
    optional = ("num_key_value_heads", "rope_theta", "tie_word_embeddings", "eos_token_id")
    spec = parse(without=optional)
    assert spec.attention[0] == GQASpec(6, 6, 96 // 6, RopeSpec(16, 10000.0))
    assert not spec.tie_embeddings
    assert spec.eos_token_ids == ()


def test_null_is_as_good_as_left_out():
    spec = parse(num_key_value_heads=None, head_dim=None, eos_token_id=None, rope_scaling=None)
    assert (spec.attention, spec.eos_token_ids) == (parse(num_key_value_heads=6).attention, ())


def test_a_head_may_be_wider_than_its_share_of_the_hidden_size():
    assert parse(head_dim=32).attention[0].head_dim == 32


def test_qwen3s_heads_are_128_wide_where_the_config_does_not_say():
    assert parse(model_type="qwen3").attention[0].head_dim == 128
    assert parse(model_type="qwen3", head_dim=16).attention == parse().attention


def test_a_window_that_is_switched_off_is_of_no_account():
    off = {"use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 28}
    spec = parse(model_type="qwen2", **off, layer_types=["full_attention"] * 3)
    assert spec.attention == parse().attention


def windows(**changes):
    return [layer.window for layer in parse(**changes).attention]


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_qwens_later_layers_have_the_window_unless_the_config_lists_the_layers(model_type):
    used = {"model_type": model_type, "use_sliding_window": True, "sliding_window": 8}
    assert windows(**used, max_window_layers=2) == [None, None, 8]
    assert windows(**used, max_window_layers=7) == [None] * 3
    assert windows(**used) == [None] * 3
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    assert windows(**used, max_window_layers=3, layer_types=kinds) == [8, None, 8]


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_windows_that_are_not_said_in_full_are_refused(model_type):
    refused("sliding_window is None", model_type=model_type, use_sliding_window=True)
    refused("use_sliding_window 'yes'", model_type=model_type, use_sliding_window="yes")
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    refused("layer_types", "'sliding_attention'", model_type=model_type, layer_types=kinds)
    used = {"model_type": model_type, "use_sliding_window": True, "sliding_window": 8}
    refused("'chunked'", "'sliding_attention'", layer_types=["chunked"] * 3, **used)
    refused("an entry for each of 3", layer_types=["sliding_attention"] * 2, **used)


def test_the_kv_cache_of_a_token_is_counted_over_all_layers():
    assert parse().kv_elements_per_token == 2 * 3 * 2 * 16


@pytest.mark.parametrize(
    ("without", "changes", "theta"),
    [
        ((), {}, 50000.0),
        ((), {"rope_theta": 10000}, 10000.0),
        (("rope_theta",), {"rope_parameters": {"rope_theta": 7e5, "rope_type": "default"}}, 7e5),
        ((), {"rope_parameters": {"rope_theta": 7e5}}, 7e5),  # the newer spelling wins
        ((), {"rope_parameters": {"rope_type": "default"}}, 50000.0),
        ((), {"rope_parameters": None}, 50000.0),
        ((), {"rope_scaling": {"type": "default"}}, 50000.0),
    ],
)
def test_both_spellings_of_rope_are_read(without, changes, theta):
    assert parse(without=without, **changes).attention[0].rope.theta == theta


@pytest.mark.parametrize(
    ("config_ids", "generation_ids", "expected"),
    [
        (2, None, (2,)),
        (None, 7, (7,)),
        ([2, 0], 7, (0, 2, 7)),
        (2, [2, 9], (2, 9)),
        ([], [], ()),
    ],
)
def test_end_tokens_of_both_files_count(config_ids, generation_ids, expected):
    spec = parse({"eos_token_id": generation_ids}, eos_token_id=config_ids)
    assert spec.eos_token_ids == expected


STEP3 = {
    "model_type": "step3_text", "hidden_size": 7168, "intermediate_size": 18432,
    "num_hidden_layers": 61, "num_attention_heads": 64, "num_attention_groups": 1,
    "head_dim": 256, "share_q_dim": 2048, "moe_layers_enum": "", "rms_norm_eps": 1e-5,
    "rope_theta": 500000, "rope_scaling": None, "max_position_embedding": 65536,
    "vocab_size": 128815,
}  # fmt: skip


def test_step_3_caches_a_key_and_a_value_of_one_head_or_the_key_alone():
    spec = parse_model_spec(STEP3, {})
    attention = MFASpec(64, 256, 2048, RopeSpec(256, 500000.0), reuses_keys=False)
    assert spec.attention == (attention,) * 61
    assert (spec.max_position, spec.kv_elements_per_token) == (65536, 61 * 512)
    reusing = parse_model_spec(STEP3 | {"mfa_key_reuse": True}, {})
    assert reusing.kv_elements_per_token == 61 * 256


DEEPSEEK_V3 = {
    "model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432,
    "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128,
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "first_k_dense_replace": 61, "rms_norm_eps": 1e-6, "rope_theta": 10000,
    "max_position_embeddings": 163840, "vocab_size": 129280,
    "rope_scaling": {
        "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096,
        "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
    },
}  # fmt: skip


def test_deepseek_v3_caches_576_elements_for_a_token_and_layer():
    spec = parse_model_spec(DEEPSEEK_V3, {})
    attention = spec.attention[0]
    assert isinstance(attention, MLASpec)
    assert spec.kv_elements_per_token == 61 * 576
    assert attention.kv == KVShape(1, 576, 512, value_in_key=True)
    assert attention.rope == RopeSpec(64, 10000.0, YarnSpec(40.0, 4096, 32.0, 1.0, 1.0))
    assert attention.scale == pytest.approx(192**-0.5 * 1.3689**2, rel=1e-4)


def test_deepseek_v3_may_not_be_stretched_at_all():
    attention = parse_model_spec(DEEPSEEK_V3 | {"rope_scaling": None}, {}).attention[0]
    assert attention.rope == RopeSpec(64, 10000.0)
    assert attention.scale == 192**-0.5


# the released layers: all positions, then three with a window, again and again
STEP3P5 = {
    "model_type": "step3p5", "hidden_size": 4096, "intermediate_size": 11264,
    "num_hidden_layers": 45, "num_attention_heads": 64, "num_attention_groups": 8, "head_dim": 128,
    "attention_other_setting": {"num_attention_heads": 96, "num_attention_groups": 8,
                                "head_dim": 128, "attention_type": "sliding_attention"},
    "sliding_window": 512, "layer_types": (["full_attention"] + ["sliding_attention"] * 3) * 12,
    "rope_theta": [5e6, 1e4, 1e4, 1e4] * 12, "partial_rotary_factors": [0.5, 1, 1, 1] * 12,
    "rope_scaling": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0,
                     "high_freq_factor": 32.0, "original_max_position_embeddings": 131072},
    "yarn_only_types": ["full_attention"], "max_position_embeddings": 262144,
    "vocab_size": 128896, "rms_norm_eps": 1e-5, "moe_layers_enum": "",
    "swiglu_limits_shared": [0.0] * 48,
}  # fmt: skip


def test_the_layers_of_step_3_5_differ_and_those_of_drafts_do_not_count():
    attention = parse_model_spec(STEP3P5, {}).attention
    stretched = Llama3Spec(2.0, 131072, 1.0, 32.0)
    assert len(attention) == 45
    assert (
        attention[0]
        == attention[44]
        == (GQASpec(64, 8, 128, RopeSpec(64, 5e6, stretched, num_still=64)))
    )
    assert attention[1] == attention[43] == GQASpec(96, 8, 128, RopeSpec(128, 1e4), window=512)


# -- refusals


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_qk_norm", False), ("use_head_wise_attn_gate", False), ("zero_centered", False),
        ("sink", True), ("use_rope_layers", [1]), ("layer_types", ["full_attention"]),
        ("rope_theta", 1e4), ("sliding_window", None),
    ],
)  # fmt: skip
def test_what_our_step_3_5_does_not_do_is_refused(field, value):
    with pytest.raises(ModelError) as caught:
        parse_model_spec(STEP3P5 | {field: value}, {})
    assert f"{field} {value!r}" in str(caught.value) or f"{field} is {value!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"layer_types": ["linear_attention"] * 45}, "layer_types has 'linear_attention'"),
        ({"num_attention_groups": 7}, "64 is no multiple of num_attention_groups 7"),
        ({"partial_rotary_factors": [0.3] * 45}, "38.4 rotated elements of 128"),
        ({"partial_rotary_factors": [1.5] * 45}, "192.0 rotated elements of 128"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type 'yarn' is not supported"),
    ],
)
def test_layers_of_step_3_5_that_make_no_sense_are_refused(change, complaint):
    with pytest.raises(ModelError, match=complaint):
        parse_model_spec(STEP3P5 | change, {})


@pytest.mark.parametrize(
    ("field", "value"),
    [("rope_interleave", False), ("q_lora_rank", None)],
)
def test_what_our_deepseek_does_not_do_is_refused(field, value):
    with pytest.raises(ModelError, match=f"{field} (is )?{value!r}"):
        parse_model_spec(DEEPSEEK_V3 | {field: value}, {})


@pytest.mark.parametrize(
    ("field", "value"),
    [("type", "linear"), ("truncate", False), ("attention_factor", 1.5), ("beta_fast", None),
     ("mscale", 0)],
)  # fmt: skip
def test_what_our_yarn_does_not_do_is_refused(field, value):
    scaling = DEEPSEEK_V3["rope_scaling"] | {field: value}
    with pytest.raises(ModelError, match=f"(rope )?{field} (is )?{value!r}"):
        parse_model_spec(DEEPSEEK_V3 | {"rope_scaling": scaling}, {})


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_attention_groups", 2), ("mfa_key_reuse", "yes")],
)
def test_what_our_step_3_does_not_do_is_refused(field, value):
    with pytest.raises(ModelError, match=f"{field} {value!r} is not supported"):
        parse_model_spec(STEP3 | {field: value}, {})


@pytest.mark.parametrize("model_type", ["mamba", None, "", ["llama"], {}])
def test_another_kind_of_model_is_refused_with_the_supported_ones(model_type):
    refused(f"model_type {model_type!r}", "supported: llama, qwen2", model_type=model_type)


@pytest.mark.parametrize(
    "field",
    [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        "max_position_embeddings",
    ],
)
def test_a_size_must_be_there_and_be_a_positive_integer(field):
    refused(f"{field} is None", "expected a positive integer", without=(field,))
    for value in (0, -1, 1.5, "96", True, [96]):
        refused(f"{field} is {value!r}", "expected a positive integer", **{field: value})


@pytest.mark.parametrize("field", ["num_key_value_heads", "head_dim"])
def test_an_optional_size_must_be_right_if_it_is_there(field):
    for value in (0, False, "2"):
        refused(f"{field} is {value!r}", "expected a positive integer", **{field: value})


def test_more_heads_than_elements_are_refused():
    refused("head_dim is 0", num_attention_heads=192)


@pytest.mark.parametrize("field", ["rms_norm_eps", "rope_theta"])
@pytest.mark.parametrize("value", [0, -1e-5, "1e-5", True, None, float("nan"), float("inf")])
def test_a_number_must_be_positive_and_finite(field, value):
    refused(f"{field} is {value!r}", "expected a positive number", **{field: value})


def test_the_nested_rope_theta_is_checked_too():
    refused("rope_theta is -1", "positive number", rope_parameters={"rope_theta": -1})


def test_query_heads_must_share_key_heads_evenly():
    refused("num_attention_heads 6", "num_key_value_heads 4", num_key_value_heads=4)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("attention_bias", True, "False"),
        ("mlp_bias", True, "False"),
        ("hidden_act", "gelu", "'silu'"),
        ("hidden_act", None, "'silu'"),
    ],
)
def test_what_our_layers_do_not_do_is_refused(field, value, expected):
    refused(f"{field} {value!r} is not supported", f"expected {expected}", **{field: value})


def test_what_our_layers_do_may_be_said():
    assert parse(attention_bias=False, mlp_bias=None, hidden_act="silu", quantization_config=None)


BLOCK_FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def test_a_block_fp8_checkpoint_has_the_shape_of_an_unquantised_one():
    spoken = {"fmt": "e4m3", "activation_scheme": "dynamic", "modules_to_not_convert": ["lm_head"]}
    for quantisation in (BLOCK_FP8, BLOCK_FP8 | spoken, {}, None):
        assert parse(quantization_config=quantisation) == parse()


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("quant_method", "gptq", "'fp8'"),
        ("quant_method", None, "'fp8'"),
        ("weight_block_size", None, "[128, 128]"),
        ("weight_block_size", [64, 128], "[128, 128]"),
        ("fmt", "e5m2", "'e4m3'"),
        ("activation_scheme", "static", "'dynamic'"),
    ],
)
def test_another_quantisation_is_refused_by_its_field(field, value, expected):
    quantisation = BLOCK_FP8 | {field: value}
    words = (f"quantization_config.{field} {value!r}", f"expected {expected}")
    refused(*words, quantization_config=quantisation)


def test_a_quantisation_that_is_no_object_is_refused():
    refused("quantization_config is 'fp8'", "JSON object", quantization_config="fp8")


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "linear"}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}},
    ],
)
def test_scaled_rope_is_refused(changes):
    refused("rope type 'linear' is not supported", "expected 'default'", **changes)


@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("value", ["linear", [1], 2.0])
def test_rope_settings_that_are_no_object_are_refused(field, value):
    refused(f"{field} is {value!r}", "expected a JSON object", **{field: value})


@pytest.mark.parametrize("ids", [-1, "2", True, 2.0, [2, -1], [2, None], ["</s>"], {"id": 2}])
def test_end_tokens_must_be_token_ids(ids):
    refused(f"eos_token_id is {ids!r}", "expected token ids", eos_token_id=ids)
    refused(f"eos_token_id is {ids!r}", "expected token ids", generation={"eos_token_id": ids})


# -- files


def test_a_model_directory_is_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert read_model_spec(tmp_path) == parse()
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    assert read_model_spec(tmp_path).eos_token_ids == (2, 5)


def test_a_directory_without_a_config_is_named(tmp_path):
    with pytest.raises(ModelError, match=rf"{tmp_path} lacks config\.json"):
        read_model_spec(tmp_path)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"{", "is not valid JSON"),
        (b"", "is not valid JSON"),
        (b'{"a": "\xff"}', "is not valid JSON"),
        (b"[1]", "holds list, expected a JSON object"),
        (b"null", "holds NoneType, expected a JSON object"),
    ],
)
def test_a_file_that_is_no_json_object_is_named(tmp_path, content, complaint):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=complaint) as caught:
        read_json(path)
    assert str(path) in str(caught.value)
