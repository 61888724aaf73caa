"""One micro-batch through all layers. Knows nothing of lanes, workers or wires."""

from collections.abc import Generator, Sequence

from torch import Tensor

from afd_server.models.base import AttentionHalf, FFNCall, MicroBatch

Forward = Generator[FFNCall, Tensor, Tensor]


def forward(model: AttentionHalf, batch: MicroBatch) -> Forward:
    """Run one micro-batch through every layer, yielding at each A→F boundary.

    Yields:
        The layer's FFN call; resumed with the summed FFN output, [tokens, hidden].

    Returns:
        Logits of the rows that asked for them, [rows, vocab], float32.
    """
    hidden = model.embed(batch.token_ids)  # [tokens, hidden]
    for layer in range(model.num_layers):
        hidden, call = model.attend(layer, hidden, batch)
        hidden = hidden + (yield call)
    return model.logits(hidden, batch.logit_rows)


def add_in_part_order(parts: Sequence[Tensor]) -> Tensor:
    """Add partial sums [tokens, hidden] by part index, in float32; return them in their dtype.

    The order is fixed so that the result does not depend on which reply came first.
    """
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(parts[0].dtype)
