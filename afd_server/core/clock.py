"""Where time comes from. The only module of the core that reads it."""

import time
from typing import Protocol


class Clock(Protocol):
    """Seconds on a scale of its own: only differences mean anything."""

    def now(self) -> float:
        """Return the seconds since some fixed moment."""
        ...


class MonotonicClock:
    """The machine's monotonic clock."""

    def now(self) -> float:
        """Return `time.monotonic()`."""
        return time.monotonic()


class ManualClock:
    """A clock that moves only when told to; for tests and simulation."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s

    def now(self) -> float:
        """Return the time set so far."""
        return self._now_s

    def advance(self, seconds: float) -> None:
        """Move forward; going back is a bug of the caller."""
        assert seconds >= 0, f"time cannot go back by {-seconds} s"
        self._now_s += seconds
