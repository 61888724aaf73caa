"""The oracle: the same `forward`, with FFNs and head beside it in one process."""

from collections.abc import Sequence

from torch import Tensor

from afd_server.models.base import AttentionHalf, MicroBatch
from afd_server.models.forward import forward, join_parts
from afd_server.models.head import Held


def run_monolith(attention: AttentionHalf, held: Sequence[Held], batch: MicroBatch) -> Tensor:
    """Run a micro-batch to its logits, [rows, vocab] float32, calling the parts in order."""
    step = forward(attention, batch)
    try:
        call = next(step)
        while True:
            parts = [part.answer(call.layer, call.rows) for part in held]
            call = step.send(join_parts(call, parts))
    except StopIteration as stop:
        logits: Tensor = stop.value
        return logits
