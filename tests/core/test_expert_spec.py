"""Experts as config.json of each family describes them."""

import pytest

from afd_server.core.errors import ModelError
from afd_server.core.model_spec import parse_model_spec

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


def parse(config, **changes):
    return parse_model_spec({**config, **changes}, {})


def test_mixtrals_experts_have_the_size_of_the_ffn_and_weights_that_sum_to_one():
    experts = parse(MIXTRAL).experts
    assert (experts.num_experts, experts.num_chosen, experts.intermediate_size) == (8, 2, 112)
    assert experts.renormalises
    assert experts.is_routed == (True,) * 4


def test_qwen3_moes_experts_have_a_size_of_their_own():
    experts = parse(QWEN3_MOE).experts
    assert (experts.num_experts, experts.num_chosen, experts.intermediate_size) == (16, 2, 80)
    assert experts.renormalises


def test_qwen3_moe_is_understood_in_the_spelling_of_transformers_5():
    config = {k: v for k, v in QWEN3_MOE.items() if k not in ("num_experts", "norm_topk_prob")}
    experts = parse(config, num_local_experts=12).experts
    assert experts.num_experts == 12
    assert not experts.renormalises


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
        (MIXTRAL, {"model_type": "switch"}, "model_type 'switch' is not supported"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_with_the_field(config, change, complaint):
    with pytest.raises(ModelError, match=complaint):
        parse(config, **change)
