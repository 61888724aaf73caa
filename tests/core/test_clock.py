"""Time moves forward, and only when it should."""

import pytest

from afd_server.core.clock import ManualClock, MonotonicClock


def test_a_manual_clock_moves_only_when_told_to():
    clock = ManualClock(start_s=5.0)
    assert clock.now() == clock.now() == 5.0
    clock.advance(1.5)
    clock.advance(0)
    assert clock.now() == 6.5


def test_a_manual_clock_starts_at_zero():
    assert ManualClock().now() == 0.0


def test_a_manual_clock_never_goes_back():
    with pytest.raises(AssertionError, match="time cannot go back by 2 s"):
        ManualClock().advance(-2)


def test_the_monotonic_clock_never_goes_back():
    clock = MonotonicClock()
    times = [clock.now() for _ in range(1000)]
    assert times == sorted(times)
