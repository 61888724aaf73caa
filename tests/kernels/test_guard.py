"""GUARD against its published formulas, written out in torch as they stand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from afd_server.kernels.guard import REACH, entropy, guard_step

EPS, GAMMA = 1e-4, 0.95
VOCAB = 1000
entropies_so_far = st.lists(st.floats(0, math.log(VOCAB)), min_size=1, max_size=40)


def published(entropies, window):
    """The candidates and the penalty at step t, from the definitions; medians are lower ones."""
    h, t = torch.tensor(entropies, dtype=torch.float64), len(entropies)
    fading = GAMMA ** torch.arange(t - 1, -1, -1, dtype=torch.float64)
    overall = (fading * h).sum() / fading.sum()
    recent, last = h[-window:].median(), h[-(window - 1) :].median()
    change = (h[-1] - h[-2]).abs() / (h[-2] + EPS) if t > 1 else torch.tensor(0.0)
    drift = (last - overall).abs() / (last + EPS) if t >= window else torch.tensor(0.0)
    q = 0.9 + 0.1 * (1 + change.clip(0, 1) + drift.clip(0, 1))

    def steered(scale):
        local = (h[-1] - (recent if t >= window else h.median())) / scale
        trend = (last - overall) / scale if t >= window else torch.tensor(0.0).double()
        d, g = (q * torch.atanh(x.clip(EPS - 1, 1 - EPS)) for x in (local, trend))
        weight = d.abs() / (g.abs() + d.abs() + EPS)
        return torch.sigmoid(weight * d + (1 - weight) * g)

    candidates = 10 * steered(math.log(VOCAB)) + 5
    return float(candidates), float(steered(math.log(candidates + EPS)))


@given(entropies_so_far, st.integers(2, 9))
def test_a_step_is_the_published_formula(entropies, window):
    candidates, penalty = published(entropies, window)
    step = guard_step(entropies, window, VOCAB)
    assert step.penalty == pytest.approx(penalty, rel=1e-9)
    assert step.num_candidates in {int(candidates - 1e-9), int(candidates + 1e-9)}
    assert 5 <= step.num_candidates <= 14
    assert 0 < step.penalty < 1


def test_the_first_token_has_ten_candidates_and_half_the_probability_for_each_repetition():
    assert guard_step([2.5], 7, VOCAB) == (10, 0.5)


def test_more_uncertainty_than_lately_means_more_candidates_and_less_penalty():
    steady, calm, lost = (guard_step([2.0] * 9 + [now], 4, VOCAB) for now in (2.0, 0.1, 6.0))
    assert calm.num_candidates < steady.num_candidates < lost.num_candidates
    assert calm.penalty < steady.penalty < lost.penalty


def test_entropies_out_of_reach_change_nothing():
    late = [1 + (i % 7) / 3 for i in range(REACH)]
    assert guard_step([9.0] * 500 + late, 5, VOCAB) == guard_step(late, 5, VOCAB)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_entropy_is_that_of_the_scaled_distribution_as_a_float32(temperature):
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1))
    logits[3] = -math.inf
    exps = [math.exp(value / temperature) for value in logits.tolist()]
    shares = [value / sum(exps) for value in exps]
    expected = -sum(share * math.log(share + 1e-5) for share in shares)
    found = entropy(logits, temperature)
    assert found == pytest.approx(expected, rel=1e-6)
    assert found == torch.tensor(found, dtype=torch.float32).item()
