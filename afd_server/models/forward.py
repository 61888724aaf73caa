"""One micro-batch through all layers. Knows nothing of lanes, workers or wires."""

from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from afd_server.models.base import AttentionHalf, FFNCall, MicroBatch, Progress, Reached, Way

Forward = Generator[FFNCall, Tensor | Reached, Tensor | None]


def forward(model: AttentionHalf, batch: MicroBatch, progress: Progress | None = None) -> Forward:
    """Run one micro-batch through every layer, yielding at each A→F boundary.

    Who answers a call, this worker or others, is not known here.

    Args:
        model: the attention half.
        batch: its rows.
        progress: with it calls say how to go on with their answers, where that is possible.

    Yields:
        The layer's FFN call; resumed with the summed FFN output, [tokens, hidden], of that layer
        or of one that was `Reached`. At the end, if a row asked for logits, the head's call;
        resumed with them.

    Returns:
        Logits of the rows that asked for them, [rows, vocab], float32; None if no row did.
    """
    layers = None if progress is None else model.native_layers(batch)
    hidden, delta = model.embed(batch.token_ids), None  # [tokens, hidden]
    layer = 0
    while layer < model.num_layers:
        hidden, call = model.attend(layer, hidden, delta, batch)
        if layers is not None and progress is not None:
            call = call._replace(way=Way(layers, hidden, progress))
        answer = yield call
        layer, delta = answer if isinstance(answer, Reached) else (layer, answer)
        layer += 1
    if len(batch.logit_rows) == 0:
        return None
    logits = yield model.head_call(hidden, delta, batch.logit_rows)
    assert isinstance(logits, Tensor), "nothing is behind the head"
    return logits


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
