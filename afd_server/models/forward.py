"""One micro-batch through all layers. Knows nothing of lanes, workers or wires."""

from collections.abc import Generator

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
