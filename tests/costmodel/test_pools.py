"""Workers are shared out so that the busier pool is as little busy as can be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afd_server.costmodel.pipeline import StageTimes
from afd_server.costmodel.pools import PoolSizes, choose_pools

ANY = range(1, 1000)
seconds = st.floats(1e-5, 1e-2)


def choose(attention_us, ffn_us, num_workers, num_attention=None, num_ffn=None, sizes=ANY):
    times = StageTimes(attention_us * 1e-6, ffn_us * 1e-6, 0.0)
    return choose_pools(times, num_workers, num_attention, num_ffn, sizes)


@pytest.mark.parametrize(
    ("attention_us", "ffn_us", "num_workers", "expected"),
    [
        (300, 180, 8, (5, 3)),
        (180, 300, 8, (3, 5)),
        (300, 300, 2, (1, 1)),
        (300, 10, 4, (3, 1)),
        (300, 180, 1, (1, 1)),  # there is no smaller server
    ],
)
def test_cores_are_shared_out_by_what_a_layer_takes(attention_us, ffn_us, num_workers, expected):
    assert choose(attention_us, ffn_us, num_workers) == expected


@given(seconds, seconds, st.integers(2, 64))
def test_every_core_has_a_worker_and_no_other_ratio_is_better(attention_s, ffn_s, num_workers):
    times = StageTimes(attention_s, ffn_s, 0.0)
    got = choose_pools(times, num_workers, None, None, ANY)
    assert sum(got) == num_workers
    assert min(got) >= 1

    def busier_s(num_ffn):
        return max(attention_s / (num_workers - num_ffn), ffn_s / num_ffn)

    assert busier_s(got.num_ffn) == min(map(busier_s, range(1, num_workers)))


@given(seconds, seconds, st.integers(2, 64), st.integers(1, 64))
def test_a_given_pool_stays_and_the_other_is_no_larger_than_to_keep_up(
    attention_s, ffn_s, num_workers, given_count
):
    left = max(1, num_workers - given_count)
    times = StageTimes(attention_s, ffn_s, 0.0)
    num_attention, num_ffn = choose_pools(times, num_workers, given_count, None, ANY)
    assert num_attention == given_count
    assert 1 <= num_ffn <= left
    assert num_ffn == 1 or ffn_s / (num_ffn - 1) > attention_s / num_attention
    num_attention, num_ffn = choose_pools(times, num_workers, None, given_count, ANY)
    assert num_ffn == given_count
    assert 1 <= num_attention <= left
    assert num_attention == 1 or attention_s / (num_attention - 1) > ffn_s / num_ffn


def test_a_pool_of_groups_has_whole_groups():
    assert choose(300, 300, 9, sizes=range(4, 10, 2)) == PoolSizes(5, 4)
    assert choose(300, 300, 3, sizes=range(4, 5, 2)) == PoolSizes(1, 4)  # the smallest there is
    assert choose(300, 300, 6, num_attention=3, sizes=range(4, 7, 2)) == PoolSizes(3, 4)
