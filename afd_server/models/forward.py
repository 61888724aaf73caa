"""One micro-batch through all layers. Knows nothing of lanes, workers or wires."""

from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from afd_server.models.base import AttentionHalf, FFNCall, MicroBatch

Forward = Generator[FFNCall, Tensor, Tensor | None]


def forward(model: AttentionHalf, batch: MicroBatch) -> Forward:
    """Run one micro-batch through every layer, yielding at each A→F boundary.

    Who answers a call, this worker or others, is not known here.

    Yields:
        The layer's FFN call; resumed with the summed FFN output, [tokens, hidden]. At the end, if
        a row asked for logits, the head's call; resumed with them.

    Returns:
        Logits of the rows that asked for them, [rows, vocab], float32; None if no row did.
    """
    hidden, delta = model.embed(batch.token_ids), None  # [tokens, hidden]
    for layer in range(model.num_layers):
        hidden, call = model.attend(layer, hidden, delta, batch)
        delta = yield call
    if len(batch.logit_rows) == 0:
        return None
    return (yield model.head_call(hidden, delta, batch.logit_rows))


def join_parts(call: FFNCall, parts: Sequence[Tensor]) -> Tensor:
    """Join what the column shards answered to a call, in part order.

    Partial sums are added; the logits of a part of the vocabulary each are put side by side.
    """
    if call.is_head and len(parts) > 1:
        return torch.cat(list(parts), 1)
    return add_in_part_order(parts)


def add_in_part_order(parts: Sequence[Tensor]) -> Tensor:
    """Add partial sums [tokens, hidden] by part index, in float32; return them in their dtype.

    The order is fixed so that the result does not depend on which reply came first.
    """
    if len(parts) == 1:
        return parts[0]
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(parts[0].dtype)
