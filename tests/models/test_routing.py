"""The gate's choice, and how it travels."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from afd_server.models.routing import (
    ELSEWHERE,
    RoutedRows,
    answers_of,
    choose_experts,
    experts_of,
    join,
    split,
)


def logits_of(tokens, experts, seed):
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 40), st.integers(1, 20), st.data())
def test_the_gate_chooses_what_torchs_top_k_chooses_in_order_of_experts(tokens, experts, data):
    chosen = data.draw(st.integers(1, experts))
    logits = logits_of(tokens, experts, tokens)
    expected = torch.topk(torch.softmax(logits, -1), chosen)
    order = expected.indices.argsort(-1)
    found, weights = choose_experts(logits, chosen, renormalises=False)
    assert torch.equal(found.long(), expected.indices.gather(-1, order))
    assert torch.equal(weights, expected.values.gather(-1, order))


def test_of_equal_experts_the_lower_id_is_chosen():
    found, weights = choose_experts(torch.zeros(3, 9), 4, renormalises=True)
    assert found.tolist() == [[0, 1, 2, 3]] * 3
    assert weights.tolist() == [[0.25] * 4] * 3


@given(st.integers(1, 70), st.integers(2, 130), st.booleans())
def test_a_rows_choice_has_the_same_bits_alone_and_in_company(tokens, experts, renormalises):
    logits, chosen = logits_of(tokens, experts, 1), min(experts, 8)
    found, weights = choose_experts(logits, chosen, renormalises)
    for row in {0, tokens // 2, tokens - 1}:
        alone = choose_experts(logits[row : row + 1], chosen, renormalises)
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
