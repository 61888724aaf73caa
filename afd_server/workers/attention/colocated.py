"""The FFN half beside the attention half: nothing travels."""

from torch import Tensor

from afd_server.core.clock import Clock
from afd_server.core.stage import StageId
from afd_server.models.base import FFNCall, FFNHalf
from afd_server.telemetry.timeline import EventKind, Timeline
from afd_server.transport.endpoint import Received
from afd_server.transport.messages import Combine


class ColocatedFFN:
    """Computes a lane's calls at once, in this thread.

    Args:
        model: the whole FFN half.
        clock, timeline: date and take what is computed.
    """

    num_resends = 0

    def __init__(self, model: FFNHalf, clock: Clock, timeline: Timeline) -> None:
        self._model = model
        self._clock = clock
        self._timeline = timeline
        self._sums: dict[int, Tensor] = {}  # by lane

    def dispatch(self, stage: StageId, call: FFNCall, live_since_s: float) -> bool:
        """Compute a call; its sum is there at once."""
        begin_s = self._clock.now()
        self._sums[stage.lane] = self._model.partial_sum(call.layer, call.rows)
        rows = call.rows.shape[0]
        self._timeline.record(EventKind.FFN, begin_s, self._clock.now(), stage, rows)
        return True

    def accept(self, received: Received, combine: Combine) -> int | None:
        """Ignore an answer: nobody was asked."""
        return None

    def take(self, lane: int) -> Tensor:
        """Return the output of a lane's call, [tokens, hidden], and forget it."""
        return self._sums.pop(lane)

    def reassign(self) -> None:
        """Do nothing: no call waits for anybody."""

    def resend_due(self) -> None:
        """Do nothing: see `reassign`."""

    def next_resend_s(self) -> float | None:
        """Return None: see `reassign`."""
        return None
