"""Two clocks, and only round trips to compare them by."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afd_server.workers.attention.peer_clock import PeerClock

delays = st.floats(1e-5, 0.01)


def ask(clock, ahead_s, there_s, held_s, back_s, now_s=50.0):
    taken_s = now_s + there_s + ahead_s
    end_s = now_s + there_s + held_s + back_s
    return clock.directions(now_s, taken_s, taken_s + held_s, end_s)


@given(st.lists(st.tuples(delays, delays, delays), min_size=1, max_size=8))
def test_on_one_clock_both_directions_are_exact(calls):
    clock = PeerClock()
    for there_s, held_s, back_s in calls:
        assert ask(clock, 0.0, there_s, held_s, back_s) == pytest.approx((there_s, back_s))


@given(
    st.floats(1.0, 1e5) | st.floats(-1e5, -1.0),
    st.lists(st.tuples(delays, delays, delays), min_size=1, max_size=8),
)
def test_on_two_clocks_the_sum_is_exact_and_each_is_off_by_half_the_quickest_trip(ahead_s, calls):
    clock, quickest_s = PeerClock(), 1.0
    for there_s, held_s, back_s in calls:
        quickest_s = min(quickest_s, there_s + back_s)
        to_f, to_a = ask(clock, ahead_s, there_s, held_s, back_s)
        assert to_f + to_a == pytest.approx(there_s + back_s, abs=1e-9)
        assert abs(to_f - there_s) <= quickest_s / 2 + 1e-9
        assert to_f >= 0 <= to_a


def test_clocks_that_drift_apart_are_compared_anew():
    clock = PeerClock()
    for hour in range(5):
        to_f, to_a = ask(clock, 100 + 0.1 * hour, 0.001, 0.002, 0.001)
        assert (to_f, to_a) == pytest.approx((0.001, 0.001))
