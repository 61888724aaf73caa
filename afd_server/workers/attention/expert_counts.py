"""How many tokens the gates of an attention worker sent to each expert."""

import torch

from afd_server.models.base import FFNCall
from afd_server.models.routing import experts_of
from afd_server.transport.messages import DType, ExpertLoad, Payload


class ExpertCounts:
    """Counts each call once, however often it is sent and whoever computes it.

    A shared expert is not counted: it has all tokens, which no gate chose.

    Args:
        num_layers: of the model; dense ones get no tokens here.
        num_experts: that a gate chooses from; 0 if there are none.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._tokens = torch.zeros(num_layers, num_experts, dtype=torch.int64)

    def count(self, call: FFNCall) -> None:
        """Count a call's tokens."""
        if call.num_chosen:
            experts = experts_of(call.rows, call.num_chosen).flatten()
            num_experts = self._tokens.shape[1]
            self._tokens[call.layer] += torch.bincount(experts, minlength=num_experts)[:num_experts]

    def report(self) -> ExpertLoad | None:
        """Return what was counted since the start; None for a model without experts."""
        if not self._tokens.numel():
            return None
        data = self._tokens.numpy().tobytes()
        return ExpertLoad(Payload(DType.INT64, tuple(self._tokens.shape), data))
