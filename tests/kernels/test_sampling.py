"""The filters that count tokens, against their published formulas over the sorted vocabulary."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from afd_server.kernels.sampling import num_before_cliff, num_within_sigma

logits_of_any_kind = st.lists(
    st.floats(-50, 50, width=32) | st.sampled_from([0.0, 1.0]), min_size=2, max_size=400
)


def min_k(logits, tau):
    """Algorithm of arXiv 2604.11012, word for word."""
    ranked = sorted(logits, reverse=True)
    spread = ranked[0] - ranked[-1]
    if spread == 0:
        return len(ranked)
    weights = [(a - b) / i for i, (a, b) in enumerate(zip(ranked, ranked[1:], strict=False), 1)]
    cliff = weights.index(max(weights)) + 1
    return max(cliff, min(len(ranked), math.floor(tau / spread)))


@given(logits_of_any_kind, st.floats(0.1, 100))
def test_min_k_is_the_published_formula(values, tau):
    logits = torch.tensor(values)
    assert num_before_cliff(logits, tau) == min_k(logits.double().tolist(), tau)


@pytest.mark.parametrize("place", [1, 63, 64, 65, 300, 2047])
def test_a_cliff_is_found_at_any_rank(place):
    ranked = torch.arange(2048, 0, -1) * 1e-6
    ranked[:place] += 50.0
    assert num_before_cliff(ranked[torch.randperm(2048)], 0.1) == place


def test_a_flat_vocabulary_has_as_many_candidates_as_tau_says():
    flat = torch.linspace(0, 0.125, 500)
    assert num_before_cliff(flat, 3.75) == 30
    assert num_before_cliff(flat, 1e300) == 500
    assert num_before_cliff(torch.zeros(500), 3.0) == 500


@given(logits_of_any_kind, st.floats(0.1, 5))
def test_top_n_sigma_is_the_published_formula(values, num_sigmas):
    logits = torch.tensor(values).double()
    mean = sum(values) / len(values)
    sigma = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    found = num_within_sigma(logits.float(), num_sigmas)
    cut, margin = max(values) - num_sigmas * sigma, 1e-9
    assert max(1, int((logits >= cut + margin).sum())) <= found
    assert found <= max(1, int((logits >= cut - margin).sum()))


@pytest.mark.parametrize(
    "count", [lambda x: num_within_sigma(x, 1.0), lambda x: num_before_cliff(x, 3.0)]
)
def test_banned_tokens_are_not_part_of_the_vocabulary(count):
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(3)) * 3
    banned = torch.full((1700,), -math.inf)
    assert count(torch.cat((banned, logits))) == count(logits)
    assert count(banned.index_fill(0, torch.tensor([5]), 1.0)) == 1
    assert count(banned) == count(banned * math.nan) == 1
