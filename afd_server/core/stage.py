"""The unit that travels, is timed and is simulated."""

from typing import NamedTuple


class StageId(NamedTuple):
    """One layer of one lane's step. Its FFN call is keyed by it (invariant I5)."""

    step: int
    lane: int
    layer: int
