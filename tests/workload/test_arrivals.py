"""Arrivals: the rate asked for, the burstiness asked for, the same again with the same seed."""

import statistics
from itertools import pairwise
from math import inf, sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afd_server.workload.arrivals import arrival_times, stretch


def gaps(rate, burstiness, count=20000, seed="0"):
    times = arrival_times(rate, burstiness, count, seed)
    return [later - earlier for earlier, later in pairwise([0.0, *times])]


@pytest.mark.parametrize("burstiness", [0.1, 0.5, 1.0, 4.0])
def test_gaps_vary_as_burstiness_says(burstiness):
    found = gaps(4.0, burstiness)
    variation = statistics.pstdev(found) / statistics.mean(found)
    assert variation == pytest.approx(1 / sqrt(burstiness), rel=0.06)


@pytest.mark.parametrize("burstiness", [0.5, 1.0, inf])
def test_even_few_arrivals_have_the_rate_that_was_asked_for(burstiness):
    spans = [arrival_times(4.0, burstiness, 10, str(seed))[-1] for seed in range(400)]
    assert statistics.mean(spans) == pytest.approx(2.5, rel=0.02)
    assert all(span <= 2.75 for span in spans)


def test_a_poisson_process_has_as_many_gaps_above_the_mean_as_an_exponential():
    found = gaps(1.0, 1.0)
    assert sum(gap > 1.0 for gap in found) / len(found) == pytest.approx(0.368, abs=0.01)


def test_infinite_burstiness_is_evenly_spaced():
    assert gaps(4.0, inf, count=8) == [0.25] * 8


@given(st.floats(0.01, 1000), st.floats(0.05, 20), st.text(max_size=5))
def test_a_seed_repeats_its_arrivals_and_they_never_go_back(rate, burstiness, seed):
    times = arrival_times(rate, burstiness, 50, seed)
    assert len(times) == 50
    assert times == sorted(times)
    assert times == arrival_times(rate, burstiness, 50, seed)
    assert times != arrival_times(rate, burstiness, 50, f"{seed} other")


def test_recorded_times_are_stretched_to_a_mean_rate_from_zero():
    assert stretch([10.0, 11.0, 14.0], rate_per_s=1.0) == [0.0, 0.5, 2.0]
