"""Sampling is a pure function, and the distribution is the one asked for."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from afd_server.core.request import Request, SamplingParams
from afd_server.core.sequence import History
from afd_server.kernels.cpu import available_builds, native_kernels
from afd_server.kernels.guard import entropy, guard_step
from afd_server.kernels.reference import REFERENCE
from afd_server.kernels.sampling import gumbel_noise, noise_key
from afd_server.workers.attention.sampler import Sampler

BUILDS = available_builds()
KERNELS = {"reference": REFERENCE} | {name: native_kernels("int8", name) for name in BUILDS}
LOGITS = torch.tensor([1.0, 3.0, 2.0, 0.0, -1.0, 2.5])


@pytest.fixture(params=KERNELS)
def sampler(request):
    return Sampler(KERNELS[request.param])


@pytest.fixture
def sample(sampler):
    return sampler.sample


def draw(sample, count=4000, **params):
    sampling = SamplingParams(max_tokens=1, seed=11, **params)
    return Counter(sample(LOGITS, sampling, position) for position in range(count))


def test_temperature_zero_takes_the_highest_and_the_lowest_id_among_equals(sample):
    greedy = SamplingParams(max_tokens=1, temperature=0.0)
    assert sample(LOGITS, greedy, 0) == 1
    assert sample(torch.tensor([0.0, 2.0, 2.0]), greedy, 5) == 1
    assert sample(torch.full((40,), -1e30), greedy, 5) == 0


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_softmax_at_the_temperature(sample, temperature):
    counts = draw(sample, temperature=temperature)
    expected = torch.softmax(LOGITS.double() / temperature, 0)
    for token, share in enumerate(expected.tolist()):
        deviation = 5 * math.sqrt(share * (1 - share) / 4000) + 1e-3
        assert counts[token] / 4000 == pytest.approx(share, abs=deviation)


def test_top_k_leaves_the_k_highest(sample):
    assert set(draw(sample, top_k=2)) == {1, 5}


def test_top_p_leaves_the_smallest_set_of_that_mass(sample):
    probabilities = torch.softmax(LOGITS, 0).sort(descending=True).values.cumsum(0)
    just_two = float(probabilities[1]) - 1e-6
    assert set(draw(sample, top_p=just_two)) == {1, 5}
    assert set(draw(sample, top_p=just_two + 1e-3)) == {1, 5, 2}
    assert set(draw(sample, top_p=1e-9)) == {1}


def test_min_p_leaves_what_is_near_the_best(sample):
    assert set(draw(sample, min_p=math.exp(-0.6))) == {1, 5}
    assert set(draw(sample, min_p=1.0)) == {1}


def test_top_n_sigma_leaves_what_is_within_n_deviations_of_the_best(sample):
    deviation = float(LOGITS.std())  # 1.497
    for num_sigmas, left in [(0.3, {1}), (0.5, {1, 5}), (1.0, {1, 2, 5}), (9.0, set(range(6)))]:
        assert {i for i in range(6) if LOGITS[i] >= 3 - num_sigmas * deviation} == left
        assert set(draw(sample, 1000, top_n_sigma=num_sigmas)) == left
        assert set(draw(sample, 1000, top_n_sigma=num_sigmas, temperature=2.0)) <= left


def test_min_k_leaves_what_is_before_the_cliff_but_no_fewer_than_tau_over_the_range(sample):
    assert set(draw(sample, 1000, min_k=0.1)) == {1}  # gaps by rank: .5, .5/2, 1/3, 1/4, 1/5
    for temperature in (1.0, 2.0):
        assert set(draw(sample, 1000, min_k=8.0, temperature=temperature)) == {1, 5}  # ⌊8 / 4⌋
    assert set(draw(sample, 1000, min_k=16.0, top_k=3)) == {1, 2, 5}
    assert set(draw(sample, 1000, min_k=1e9)) == set(range(6))


def test_filters_apply_together(sample):
    assert set(draw(sample, top_k=3, min_p=math.exp(-0.6), top_p=0.999)) == {1, 5}


def test_guard_draws_from_its_candidates_each_damped_for_every_occurrence(sampler):
    """Against the distribution of the published formula, in frequencies."""
    logits = torch.randn(50, generator=torch.Generator().manual_seed(8)) * 2
    favourite = int(logits.argmax())
    params = SamplingParams(max_tokens=9, seed=3, guard_window=3, temperature=1.5)
    history = History(Request(1, (favourite, 4), params, 1, (favourite, 9), (3.0, 2.0)))
    now = entropy(logits, 1.5)
    step = guard_step([3.0, 2.0, now], 3, 50)
    expected = torch.softmax(logits.double() / 1.5, 0)
    candidates = expected.topk(step.num_candidates).indices
    for token, times in {favourite: 2, 4: 1, 9: 1}.items():
        expected[token] *= step.penalty**times
    kept = torch.zeros(50, dtype=torch.float64)
    kept[candidates] = expected[candidates] / expected[candidates].sum()
    drawn = [sampler.sample_guarded(logits, params, position, history) for position in range(4000)]
    assert {token.entropy for token in drawn} == {now}
    counts = Counter(token.token_id for token in drawn)
    for token, share in enumerate(kept.tolist()):
        assert counts[token] / 4000 == pytest.approx(
            share, abs=5 * math.sqrt(share * (1 - share) / 4000)
        )


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0, 50.0])
@pytest.mark.parametrize("vocab", [5, 16, 1000, 49152])
def test_the_native_sampler_takes_the_references_tokens(build, vocab, scale):
    native, exact = Sampler(KERNELS[build]), Sampler(REFERENCE)
    generator = torch.Generator().manual_seed(vocab)
    choices = [
        {}, {"temperature": 0.3}, {"temperature": 3.0}, {"top_k": 1}, {"top_k": 40},
        {"top_k": vocab}, {"top_p": 0.1}, {"top_p": 0.9}, {"top_p": 0.9999}, {"min_p": 0.05},
        {"top_k": 50, "top_p": 0.8, "min_p": 0.01, "temperature": 0.7}, {"top_n_sigma": 1.0},
        {"min_k": 3.0}, {"top_n_sigma": 1.5, "min_k": 9.0, "top_p": 0.9, "temperature": 1.5},
    ]  # fmt: skip
    for position in range(4):
        logits = torch.randn(vocab, generator=generator) * scale
        logits[vocab // 2] = logits.max()  # a tie at the top
        for choice in choices:
            params = SamplingParams(1, seed=position, **choice)
            assert native.sample(logits, params, 9) == exact.sample(logits, params, 9)


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("params", [(1.0, 40, 1.0, 0.0), (0.7, 0, 0.9, 0.0), (1.0, 0, 1.0, 0.1)])
def test_the_native_sampler_leaves_the_references_tokens(build, params):
    logits = torch.randn(3000, generator=torch.Generator().manual_seed(1)) * 3
    logits[5:9] = logits.sort().values[-20]  # ties at the edge of top-k
    assert torch.equal(KERNELS[build].select(logits, *params), REFERENCE.select(logits, *params))


@given(st.integers(0, 2**63 - 1), st.integers(0, 100), st.integers(0, 10_000))
def test_noise_is_a_function_of_seed_choice_position_and_token_alone(seed, choice, position):
    whole = gumbel_noise(noise_key(seed, choice, position), 100)
    assert torch.equal(whole[:37], gumbel_noise(noise_key(seed, choice, position), 37))
    assert torch.isfinite(whole).all()


def test_every_input_of_the_noise_matters():
    base = gumbel_noise(noise_key(1, 0, 0), 64)
    for other in ((2, 0, 0), (1, 1, 0), (1, 0, 1), (1 + 2**40, 0, 0)):
        assert not torch.isclose(base, gumbel_noise(noise_key(*other), 64)).any()


def test_noise_is_standard_gumbel():
    noise = gumbel_noise(noise_key(3, 0, 0), 200_000)
    assert noise.mean().item() == pytest.approx(0.57722, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.03)


def test_the_hash_is_splitmix64():
    """Against the recurrence in plain integers."""
    mask, golden = 2**64 - 1, 0x9E3779B97F4A7C15

    def mix(value):
        value &= mask
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & mask
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB & mask
        return value ^ (value >> 31)

    key = mix(mix(mix(5 + golden) ^ 2) ^ 9)
    uniform = [((mix(token * golden + key) >> 11) + 0.5) * 2.0**-53 for token in range(50)]
    expected = torch.tensor([-math.log(-math.log(u)) for u in uniform], dtype=torch.float64)
    assert torch.allclose(gumbel_noise(noise_key(5, 2, 9), 50), expected, rtol=1e-12)
