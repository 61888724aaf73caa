"""How many tokens the gates of an attention worker sent to each expert."""

from collections.abc import Sequence

import torch

from afd_server.models.base import FFNCall
from afd_server.models.routing import experts_of
from afd_server.transport.messages import DType, ExpertLoad, Payload


class ExpertCounts:
    """Counts each call once, however often it is sent and whoever computes it.

    Args:
        experts_by_layer: a dense layer counts as one expert, which gets no tokens here.
    """

    def __init__(self, experts_by_layer: Sequence[int]) -> None:
        self._tokens = torch.zeros(len(experts_by_layer), max(experts_by_layer), dtype=torch.int64)

    def count(self, call: FFNCall) -> None:
        """Count a call's tokens."""
        if call.num_chosen:
            experts = experts_of(call.rows, call.num_chosen).flatten()
            self._tokens[call.layer] += torch.bincount(experts, minlength=self._tokens.shape[1])

    def report(self) -> ExpertLoad | None:
        """Return what was counted since the start; None for a model without experts."""
        if self._tokens.shape[1] == 1:
            return None
        data = self._tokens.numpy().tobytes()
        return ExpertLoad(Payload(DType.INT64, tuple(self._tokens.shape), data))
