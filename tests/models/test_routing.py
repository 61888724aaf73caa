"""The gate's choice, and how it travels."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from afd_server.core.expert_spec import ExpertSpec, GateSpec
from afd_server.models.routing import (
    ELSEWHERE,
    RoutedRows,
    answers_of,
    choose_experts,
    experts_of,
    join,
    split,
)

PLAIN = GateSpec("softmax", renormalises=False)
GROUPED = GateSpec("sigmoid", True, scale=2.5, is_biased=True, num_groups=4, num_kept_groups=2)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spec_of(experts, chosen, gate, shared_size=None):
    return ExpertSpec(experts, chosen, 64, gate, (True,), shared_size)


@given(st.integers(1, 40), st.integers(1, 20), st.data())
def test_a_gate_of_softmax_chooses_what_torchs_top_k_chooses_in_order_of_experts(
    tokens, experts, data
):
    chosen = data.draw(st.integers(1, experts))
    logits = draw(tokens, experts, seed=tokens)
    expected = torch.topk(torch.softmax(logits, -1), chosen)
    order = expected.indices.argsort(-1)
    found, weights = choose_experts(logits, spec_of(experts, chosen, PLAIN))
    assert torch.equal(found.long(), expected.indices.gather(-1, order))
    assert torch.equal(weights, expected.values.gather(-1, order))


@given(
    st.sampled_from([(1, 1), (2, 1), (4, 2), (4, 4)]),
    st.integers(2, 6),
    st.integers(1, 4),
    st.booleans(),
)
def test_a_gate_of_sigmoids_in_groups_chooses_what_deepseeks_gate_chooses(
    groups, group_size, chosen, renormalises
):
    experts, chosen = groups[0] * group_size, min(chosen, groups[1] * group_size)
    config = DeepseekV3Config(
        hidden_size=experts, n_routed_experts=experts, num_experts_per_tok=chosen,
        n_group=groups[0], topk_group=groups[1], norm_topk_prob=renormalises,
        routed_scaling_factor=2.5,
    )  # fmt: skip
    router, logits, bias = DeepseekV3TopkRouter(config), draw(50, experts), draw(experts, seed=1)
    router.weight.copy_(torch.eye(experts))
    router.e_score_correction_bias.copy_(bias)
    _, expected, indices = router(logits)
    order = indices.argsort(-1)
    gate = GateSpec("sigmoid", renormalises, 2.5, True, *groups)
    found, weights = choose_experts(logits, spec_of(experts, chosen, gate), bias)
    assert torch.equal(found.long(), indices.gather(-1, order))
    assert torch.allclose(weights, expected.gather(-1, order), rtol=1e-6)


@pytest.mark.parametrize("gate", [PLAIN, GROUPED])
def test_of_equal_experts_and_groups_those_with_lower_ids_are_chosen(gate):
    spec = spec_of(12, 4, gate)
    found, weights = choose_experts(torch.zeros(3, 12), spec, torch.zeros(12))
    assert found.tolist() == [[0, 1, 2, 3]] * 3
    assert weights.tolist() == [[2.5 / 4 if gate is GROUPED else pytest.approx(1 / 12)] * 4] * 3


def test_a_bias_decides_over_the_choice_and_not_over_the_weight():
    gate = GateSpec("sigmoid", renormalises=False, is_biased=True)
    bias = torch.tensor([0.0, 9.0, 0.0, 5.0])
    found, weights = choose_experts(torch.zeros(1, 4), spec_of(4, 2, gate), bias)
    assert (found.tolist(), weights.tolist()) == ([[1, 3]], [[0.5, 0.5]])


def test_scores_that_vanish_give_no_weight_rather_than_none_at_all():
    _, weights = choose_experts(torch.full((1, 12), -1e4), spec_of(12, 4, GROUPED), torch.zeros(12))
    assert weights.tolist() == [[0.0] * 4]


@pytest.mark.parametrize("gate", [PLAIN, GROUPED])
def test_every_row_goes_to_the_shared_expert_last_and_with_weight_one(gate):
    logits, bias = draw(5, 12), draw(12, seed=1)
    alone = choose_experts(logits, spec_of(12, 3, gate), bias)
    found, weights = choose_experts(logits, spec_of(12, 3, gate, shared_size=80), bias)
    assert torch.equal(found[:, :3], alone[0])
    assert torch.equal(weights[:, :3], alone[1])
    assert found[:, 3].tolist() == [12] * 5
    assert weights[:, 3].tolist() == [1.0] * 5


@given(
    st.integers(1, 70),
    st.integers(1, 32),
    st.sampled_from([PLAIN, GateSpec("softmax", renormalises=True), GROUPED]),
)
def test_a_rows_choice_has_the_same_bits_alone_and_in_company(tokens, group_size, gate):
    experts = 4 * group_size + 4
    logits, bias = draw(tokens, experts, seed=1), draw(experts, seed=2)
    spec = spec_of(experts, min(experts // 2, 8), gate, shared_size=1)
    found, weights = choose_experts(logits, spec, bias)
    for row in {0, tokens // 2, tokens - 1}:
        alone = choose_experts(logits[row : row + 1], spec, bias)
        assert torch.equal(alone[0], found[row : row + 1])
        assert torch.equal(alone[1], weights[row : row + 1])


@given(
    st.integers(1, 5),
    st.integers(1, 8),
    st.sampled_from([torch.float32, torch.bfloat16, torch.uint8]),
)
def test_rows_and_choices_come_out_of_the_bytes_as_they_went_in(tokens, chosen, dtype):
    rows = torch.randn(tokens, 68).to(dtype) if dtype.is_floating_point else None
    rows = torch.randint(0, 256, (tokens, 68), dtype=dtype) if rows is None else rows
    experts = torch.arange(tokens * chosen, dtype=torch.int32).view(tokens, chosen)
    routed = RoutedRows(rows, experts, torch.rand(tokens, chosen))
    joined = join(routed)
    assert joined.shape == (tokens, 68 * dtype.itemsize + 8 * chosen)
    assert torch.equal(experts_of(joined, chosen), experts)
    for got, given_ in zip(split(joined, chosen, dtype), routed, strict=True):
        assert torch.equal(got, given_)


def test_a_row_with_all_of_its_experts_here_is_answered_once_any_other_for_each_of_them():
    experts = torch.tensor([[0, 3], [ELSEWHERE, 3], [2, ELSEWHERE], [1, 2]])
    assert answers_of(experts).tolist() == [
        [True, False], [False, True], [True, False], [True, False],
    ]  # fmt: skip
