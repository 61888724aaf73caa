"""The oracle: the same `forward`, with the FFN half beside it in one process."""

from collections.abc import Sequence

from torch import Tensor

from afd_server.models.base import AttentionHalf, FFNHalf, MicroBatch
from afd_server.models.forward import add_in_part_order, forward


def run_monolith(attention: AttentionHalf, ffn: Sequence[FFNHalf], batch: MicroBatch) -> Tensor:
    """Run a micro-batch to its logits, [rows, vocab] float32, calling the FFN parts in order."""
    step = forward(attention, batch)
    try:
        call = next(step)
        while True:
            parts = [half.partial_sum(call.layer, call.rows) for half in ffn]
            call = step.send(add_in_part_order(parts))
    except StopIteration as stop:
        logits: Tensor = stop.value
        return logits
