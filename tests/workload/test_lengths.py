"""Lengths stay within their bounds and have the distribution that was asked for."""

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afd_server.core.errors import ConfigError
from afd_server.workload.lengths import LogNormalLengths, UniformLengths, parse_lengths


def test_each_form_is_read():
    assert parse_lengths("128", "input_len") == UniformLengths(128, 128)
    assert parse_lengths("64:256", "input_len") == UniformLengths(64, 256)
    assert parse_lengths("lognormal:300:0.8:2048", "x") == LogNormalLengths(300, 0.8, 2048)


@pytest.mark.parametrize("text", ["128", "64:256", "lognormal:300:0.8:2048"])
def test_a_form_is_written_as_it_is_read(text):
    assert str(parse_lengths(text, "input_len")) == text


@given(st.integers(1, 500), st.integers(0, 500), st.integers())
def test_uniform_lengths_stay_in_their_range(shortest, spread, seed):
    lengths = UniformLengths(shortest, shortest + spread)
    assert shortest <= lengths.draw(random.Random(seed)) <= lengths.longest


@given(st.floats(1, 300), st.floats(0.01, 5), st.integers())
def test_lognormal_lengths_are_at_least_one_and_at_most_the_longest(median, sigma, seed):
    assert 1 <= LogNormalLengths(median, sigma, 300).draw(random.Random(seed)) <= 300


def test_lognormal_lengths_have_their_median_and_spread():
    rng = random.Random(0)
    draws = [LogNormalLengths(300, 0.5, 100_000).draw(rng) for _ in range(10_000)]
    assert statistics.median(draws) == pytest.approx(300, rel=0.03)
    assert statistics.pstdev(map(math.log, draws)) == pytest.approx(0.5, rel=0.05)


def test_what_is_above_the_longest_is_drawn_again_and_not_heaped_up_there():
    rng = random.Random(0)
    draws = [LogNormalLengths(300, 1.0, 600).draw(rng) for _ in range(5000)]
    assert draws.count(600) < 50


@pytest.mark.parametrize(
    "text",
    ["", "x", "0", "-5", "10:5", "1:2:3", "normal:1:2:3", "lognormal:9:1:8", "lognormal:9:0:10",
     "lognormal:nan:1:10", "lognormal:9:1", "1.5"],
)  # fmt: skip
def test_other_texts_are_refused_with_the_settings_name(text):
    with pytest.raises(ConfigError, match="input_len is"):
        parse_lengths(text, "input_len")
