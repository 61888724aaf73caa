"""How many requests may be under way: what is put in front of a server that does not limit itself.

Values only: who waits for room, and where, is the business of whoever asks for a limit.
"""

from dataclasses import dataclass

from afd_server.core.request import SLO
from afd_server.workload.report import RequestRecord

INCREASE = 1.0  # a window of answers; of congestion avoidance, RFC 5681, section 3.1
DECREASE = 0.9  # as AIMDLimit of Netflix's concurrency-limits; Clipper (NSDI '17), section 4.3.1


@dataclass(frozen=True, slots=True)
class FixedLimit:
    """The same number of requests whatever their answers are like."""

    width: int

    def note(self, record: RequestRecord, num_under_way: int) -> None:
        """Take no notice."""


class AIMD:
    """Additive increase, multiplicative decrease: looks for the widest limit that keeps targets.

    A window is as many answers as the limit is wide. One that met the target throughout makes it
    wider by INCREASE; an answer that missed it, by DECREASE times as wide. As TCP, it shrinks once
    for what went wrong in one round trip: answers to requests that were sent before it last shrank
    say nothing of the new width. Neither does one that was good while there was room to spare
    (RFC 7661): a limit that nobody reaches would grow without end.

    The decrease is a small one, as in systems that limit requests and not packets: the half of
    RFC 5681 would leave much of a server idle for a long time, with answers that take seconds.
    """

    def __init__(self, start: int, slo: SLO) -> None:
        """Begin with a limit of `start`; requests that carry no targets are judged by `slo`."""
        assert start >= 1, f"a limit begins at {start}, must be at least 1"
        self._slo = slo
        self._limit = float(start)
        self._shrunk_s = float("-inf")

    @property
    def width(self) -> int:
        """Return how many may be under way now."""
        return int(self._limit)

    def note(self, record: RequestRecord, num_under_way: int) -> None:
        """Learn from an answer that has just ended; `num_under_way` still counts it."""
        if record.sent_s < self._shrunk_s:
            return
        if not record.is_good(self._slo):
            self._limit = max(1.0, DECREASE * self._limit)
            self._shrunk_s = record.end_s
        elif num_under_way >= self.width:
            self._limit += INCREASE / self._limit
