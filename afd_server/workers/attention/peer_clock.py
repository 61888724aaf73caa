"""How far the clock of an FFN worker is from ours, as its answers tell."""

from math import inf


class PeerClock:
    """Tells the two directions of a call apart though each end reads its own clock.

    A call cannot be taken in before it was sent, nor its answer before it was computed; so each
    answer bounds the offset of the other clock from both sides, and all together bound it best.
    While 0 is possible the clocks are taken for one, as those of processes on one host are.
    Otherwise the middle is taken: it is wrong by at most half of the quickest round trip.
    """

    def __init__(self) -> None:
        self._least_s, self._most_s = -inf, inf  # the other clock minus ours

    def directions(
        self, sent_s: float, taken_s: float, computed_s: float, back_s: float
    ) -> tuple[float, float]:
        """Return the seconds that a call was under way, and its answer.

        Sent and back on our clock, taken in and computed on the other one.
        """
        least_s, most_s = computed_s - back_s, taken_s - sent_s
        self._least_s, self._most_s = max(self._least_s, least_s), min(self._most_s, most_s)
        if self._least_s > self._most_s:  # the clocks drift apart: start over
            self._least_s, self._most_s = least_s, most_s
        offset_s = 0.0
        if not self._least_s <= 0 <= self._most_s:
            offset_s = (self._least_s + self._most_s) / 2
        return max(0.0, most_s - offset_s), max(0.0, offset_s - least_s)
