"""Experts as config.json of each family describes them."""

import pytest

from afd_server.core.errors import ModelError
from afd_server.core.expert_spec import GateSpec
from afd_server.core.model_spec import FFNShape, parse_model_spec

COMMON = {
    "hidden_size": 96, "intermediate_size": 112, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_experts_per_tok": 2, "hidden_act": "silu",
}  # fmt: skip
MIXTRAL = {**COMMON, "model_type": "mixtral", "num_local_experts": 8, "sliding_window": None}
QWEN3_MOE = {
    **COMMON, "model_type": "qwen3_moe", "num_experts": 16, "moe_intermediate_size": 80,
    "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "head_dim": 32,
    "use_sliding_window": False, "sliding_window": None, "attention_bias": False,
}  # fmt: skip


STEP3 = {
    **COMMON, "model_type": "step3_text", "num_attention_groups": 1, "head_dim": 32,
    "share_q_dim": 64, "moe_num_experts": 12, "moe_top_k": 3, "moe_intermediate_size": 80,
    "share_expert_dim": 48, "moe_layers_enum": "1,2", "norm_expert_weight": False,
}  # fmt: skip
STEP3P5 = {
    **STEP3, "model_type": "step3p5", "layer_types": ["full_attention"] * 5,
    "rope_theta": [1e4] * 5, "partial_rotary_factors": [1.0] * 5, "moe_layers_enum": "1,2,3",
    "moe_router_activation": "sigmoid", "use_moe_router_bias": True, "need_fp32_gate": True,
    "moe_router_scaling_factor": 3.0, "norm_expert_weight": True,
    "swiglu_limits": [0.0, 0.0, None, 7.0, 0.0], "swiglu_limits_shared": [2, 0, 0.0, 16.0, 0.0],
}  # fmt: skip
DEEPSEEK_V3 = {
    **COMMON, "model_type": "deepseek_v3", "q_lora_rank": 64, "kv_lora_rank": 32,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "n_routed_experts": 32,
    "moe_intermediate_size": 80, "n_shared_experts": 2, "n_group": 8, "topk_group": 4,
    "first_k_dense_replace": 1, "moe_layer_freq": 1, "scoring_func": "sigmoid",
    "topk_method": "noaux_tc", "norm_topk_prob": True, "routed_scaling_factor": 2.5,
}  # fmt: skip


def parse(config, **changes):
    return parse_model_spec({**config, **changes}, {})


def test_mixtrals_experts_have_the_size_of_the_ffn_and_weights_that_sum_to_one():
    experts = parse(MIXTRAL).experts
    assert (experts.num_experts, experts.num_chosen, experts.intermediate_size) == (8, 2, 112)
    assert experts.gate == GateSpec("softmax", renormalises=True)
    assert experts.is_routed == (True,) * 4


def test_qwen3_moes_experts_have_a_size_of_their_own():
    experts = parse(QWEN3_MOE).experts
    assert (experts.num_experts, experts.num_chosen, experts.intermediate_size) == (16, 2, 80)
    assert experts.gate == GateSpec("softmax", renormalises=True)


def test_qwen3_moe_is_understood_in_the_spelling_of_transformers_5():
    config = {k: v for k, v in QWEN3_MOE.items() if k not in ("num_experts", "norm_topk_prob")}
    experts = parse(config, num_local_experts=12).experts
    assert experts.num_experts == 12
    assert not experts.gate.renormalises


def test_layers_without_experts_are_dense_and_count_as_one_expert():
    spec = parse(QWEN3_MOE, mlp_only_layers=[3], decoder_sparse_step=2)
    assert spec.experts.is_routed == (False, True, False, False)
    assert spec.experts_by_layer == (1, 16, 1, 1)
    assert [spec.num_chosen(layer) for layer in range(4)] == [0, 2, 0, 0]


def test_a_model_without_experts_is_dense_throughout():
    spec = parse(COMMON, model_type="llama")
    assert spec.experts is None
    assert spec.experts_by_layer == (1, 1, 1, 1)
    assert spec.num_chosen(0) == 0
    assert spec.smallest_intermediate_size == 112


def test_step_3s_weights_are_not_renormalised_and_its_first_and_last_layers_are_dense():
    spec = parse(STEP3)
    experts = spec.experts
    assert experts.gate == GateSpec("softmax", renormalises=False)
    assert experts.is_routed == (False, True, True, False)
    assert (experts.num_experts, experts.num_chosen, experts.shared_size) == (12, 3, 48)


def test_step_3_5s_gate_is_of_biased_sigmoids_and_scaled():
    experts = parse(STEP3P5).experts
    assert experts.gate == GateSpec("sigmoid", True, scale=3.0, is_biased=True)
    assert experts.is_routed == (False, True, True, True)


def test_deepseeks_gate_is_grouped_and_shared_experts_are_one():
    experts = parse(DEEPSEEK_V3).experts
    assert experts.gate == GateSpec("sigmoid", True, 2.5, True, num_groups=8, num_kept_groups=4)
    assert (experts.num_experts, experts.num_chosen, experts.shared_size) == (32, 2, 160)
    assert experts.is_routed == (False, True, True, True)
    assert parse(DEEPSEEK_V3, n_shared_experts=None).experts.shared_size is None
    assert parse(DEEPSEEK_V3, first_k_dense_replace=0).experts.is_routed == (True,) * 4


def test_a_shared_expert_is_one_more_that_every_token_goes_to():
    spec = parse(STEP3)
    assert spec.experts_by_layer == (1, 13, 13, 1)
    assert [spec.num_chosen(layer) for layer in range(4)] == [0, 4, 4, 0]
    assert spec.ffn_shape(0) == FFNShape(112, None)
    assert spec.ffn_shape(1, 11) == FFNShape(80, None)
    assert spec.ffn_shape(1, 12) == FFNShape(48, None)
    assert spec.smallest_intermediate_size == 48


def test_limits_are_of_a_layers_experts_or_of_its_shared_and_dense_ffns():
    spec = parse(STEP3P5)
    assert spec.ffn_shape(0) == FFNShape(112, 2.0)
    assert [spec.ffn_shape(layer, 0).limit for layer in (1, 2, 3)] == [None, None, 7.0]
    assert [spec.ffn_shape(layer, 12).limit for layer in (1, 2, 3)] == [None, None, 16.0]
    assert parse(STEP3P5, swiglu_limits=None).ffn_shape(3, 0).limit is None
    assert parse(STEP3P5, swiglu_limits=None).ffn_shape(3, 12).limit == 16.0


@pytest.mark.parametrize(
    ("config", "dense"),
    [
        (STEP3, {"moe_layers_enum": ""}),
        (STEP3P5, {"moe_layers_enum": ""}),
        (DEEPSEEK_V3, {"first_k_dense_replace": 4}),
    ],
)
def test_a_model_of_a_family_with_experts_may_have_none(config, dense):
    assert parse(config, **dense).experts is None


@pytest.mark.parametrize(
    ("config", "change", "complaint"),
    [
        (MIXTRAL, {"num_local_experts": None}, "num_local_experts is None, expected a positive"),
        (MIXTRAL, {"num_experts_per_tok": 9}, r"num_experts_per_tok is 9.*num_local_experts \(8\)"),
        (MIXTRAL, {"sliding_window": 0}, "sliding_window is 0"),
        (QWEN3_MOE, {"num_experts": "many"}, "num_experts is 'many'"),
        (QWEN3_MOE, {"moe_intermediate_size": 0}, "moe_intermediate_size is 0"),
        (QWEN3_MOE, {"use_sliding_window": True}, "sliding_window is None"),
        (QWEN3_MOE, {"mlp_only_layers": "0"}, "mlp_only_layers is '0', expected layer numbers"),
        (QWEN3_MOE, {"attention_bias": True}, "attention_bias True is not supported"),
        (STEP3, {"moe_layers_enum": "1,4"}, "moe_layers_enum is '1,4', expected .* below 4"),
        (STEP3, {"moe_layers_enum": "1,,2"}, "moe_layers_enum is '1,,2'"),
        (STEP3, {"moe_layers_enum": [1, 2]}, r"moe_layers_enum is \[1, 2\], expected a string"),
        (STEP3, {"moe_layers_enum": None}, "moe_layers_enum is None"),
        (STEP3, {"moe_top_k": 13}, r"moe_top_k is 13, more than moe_num_experts \(12\)"),
        (STEP3, {"share_expert_dim": None}, "share_expert_dim is None"),
        (STEP3P5, {"moe_router_activation": "softmax"}, "moe_router_activation 'softmax' is not"),
        (STEP3P5, {"use_moe_router_bias": False}, "use_moe_router_bias False is not supported"),
        (STEP3P5, {"need_fp32_gate": False}, "need_fp32_gate False is not supported"),
        (STEP3P5, {"moe_router_scaling_factor": 0}, "moe_router_scaling_factor is 0"),
        (STEP3P5, {"swiglu_limits": [7.0]}, r"swiglu_limits is \[7.0\], expected an entry"),
        (STEP3P5, {"swiglu_limits_shared": [-1] * 4}, "swiglu_limits_shared is -1, expected a pos"),
        (DEEPSEEK_V3, {"first_k_dense_replace": -1}, "-1, expected an integer from 0 on"),
        (DEEPSEEK_V3, {"first_k_dense_replace": None}, "first_k_dense_replace is None"),
        (DEEPSEEK_V3, {"moe_layer_freq": 2}, "moe_layer_freq 2 is not supported; expected 1"),
        (DEEPSEEK_V3, {"scoring_func": "softmax"}, "scoring_func 'softmax' is not supported"),
        (DEEPSEEK_V3, {"topk_method": "greedy"}, "topk_method 'greedy' is not supported"),
        (DEEPSEEK_V3, {"n_group": 5}, "n_group is 5, expected groups of at least two of 32"),
        (DEEPSEEK_V3, {"n_group": 32}, "n_group is 32, expected groups of at least two of 32"),
        (DEEPSEEK_V3, {"topk_group": 9}, r"topk_group is 9, expected at most n_group \(8\)"),
        (DEEPSEEK_V3, {"topk_group": 1, "num_experts_per_tok": 5}, "enough for 5 experts of 4"),
        (MIXTRAL, {"model_type": "switch"}, "model_type 'switch' is not supported"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_with_the_field(config, change, complaint):
    with pytest.raises(ModelError, match=complaint):
        parse(config, **change)
