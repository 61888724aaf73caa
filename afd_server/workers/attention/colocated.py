"""The FFN half beside the attention half: nothing travels."""

from torch import Tensor

from afd_server.core.stage import StageId
from afd_server.models.base import FFNCall, FFNHalf
from afd_server.transport.endpoint import Received
from afd_server.transport.messages import Combine


class ColocatedFFN:
    """Computes a lane's calls at once, in this thread."""

    num_resends = 0

    def __init__(self, model: FFNHalf) -> None:
        self._model = model
        self._sums: dict[int, Tensor] = {}  # by lane

    def dispatch(self, stage: StageId, call: FFNCall) -> bool:
        """Compute a call; its sum is there at once."""
        self._sums[stage.lane] = self._model.partial_sum(call.layer, call.rows)
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
