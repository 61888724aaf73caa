"""The unit that travels, is timed and is simulated."""

from typing import NamedTuple

# Stands before the lane's number where a part of its step goes ahead of the rest. It is odd, so
# that where two workers take turns by this number, the parts go to different ones.
AHEAD = 65_537


class StageId(NamedTuple):
    """One layer of one lane's step. Its FFN call is keyed by it (invariant I5)."""

    step: int
    lane: int
    layer: int
