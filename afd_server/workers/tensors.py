"""Between plans, payloads and tensors."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from afd_server.core.batch import StepPlan
from afd_server.core.errors import ProtocolError
from afd_server.kernels.reference import PagedRun, plan_paged_rows
from afd_server.kernels.table import KVLayer, PagedRows
from afd_server.models.base import MicroBatch
from afd_server.telemetry.timeline import EVENT_BYTES, Timeline
from afd_server.transport.messages import DType, Payload
from afd_server.workers.config import Numerics

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}

_WIRE = {
    torch.uint8: DType.UINT8,
    torch.float32: DType.FLOAT32,
    torch.bfloat16: DType.BFLOAT16,
    torch.int32: DType.INT32,
    torch.int64: DType.INT64,
}
_TORCH = {wire: dtype for dtype, wire in _WIRE.items()}


def row_dtype(numerics: Numerics) -> torch.dtype:
    """Return the dtype of activations: native kernels compute in float32 whatever is stored."""
    return torch.float32 if numerics.kernels == "native" else TORCH_DTYPES[numerics.weights]


def to_payload(tensor: Tensor) -> Payload:
    """Lay a contiguous CPU tensor open as bytes; the payload shares its memory."""
    tensor = tensor.contiguous()
    plain = tensor.view(torch.uint8) if tensor.dtype is torch.bfloat16 else tensor  # numpy has none
    data = plain.numpy().data.cast("B")
    return Payload(_WIRE[tensor.dtype], tuple(tensor.shape), data)


def events_payload(timeline: Timeline) -> Payload:
    """Take a timeline's new events for a report."""
    data = timeline.drain()
    return Payload(DType.UINT8, (len(data) // EVENT_BYTES, EVENT_BYTES), data)


def to_tensor(payload: Payload, dtype: torch.dtype) -> Tensor:
    """Copy a payload into a tensor of its shape.

    Raises:
        ProtocolError: the payload is of another dtype, or empty.
    """
    if _TORCH.get(payload.dtype) is not dtype:
        raise ProtocolError(f"payload of {payload.dtype.name}, expected {dtype}", "dtype")
    if payload.nbytes == 0:
        raise ProtocolError(f"an empty payload of shape {payload.shape}", "shape")
    return torch.frombuffer(bytearray(payload.data), dtype=dtype).view(payload.shape)


def micro_batch(
    plan: StepPlan, kv: tuple[KVLayer, ...], group_of: Sequence[int], block_size: int
) -> MicroBatch:
    """Lay a plan out as tensors; rows come sequence by sequence, tokens in order.

    Args:
        plan: what a lane must do.
        kv: the blocks of every layer.
        group_of: each layer's KV group.
        block_size: token positions in a block.
    """
    positions: list[int] = []
    logit_rows = []
    for planned in plan.sequences:
        positions += range(planned.start, planned.start + len(planned.token_ids))
        if planned.samples:
            logit_rows.append(len(positions) - 1)
    token_ids = [token for planned in plan.sequences for token in planned.token_ids]
    slots, rows = _paging(plan, 0, block_size)
    batch = MicroBatch(
        token_ids=torch.tensor(token_ids, dtype=torch.int64),
        positions=torch.tensor(positions, dtype=torch.int64),
        slots=slots,
        rows=rows,
        logit_rows=torch.tensor(logit_rows, dtype=torch.int64),
        kv=kv,
    )
    if not any(group_of):
        return batch
    others = [_paging(plan, group, block_size) for group in range(1, max(group_of) + 1)]
    batches = [batch, *(replace(batch, slots=slots, rows=rows) for slots, rows in others)]
    return replace(batch, by_layer=tuple(batches[group] for group in group_of))


def _paging(plan: StepPlan, group: int, block_size: int) -> tuple[Tensor, PagedRows]:
    """Return where a plan's rows go in the blocks of a KV group, and which keys they see there."""
    slots, runs = [], []
    for planned in plan.sequences:
        table = planned.block_tables[group]
        runs.append(PagedRun(planned.start, len(planned.token_ids), table))
        for position in range(planned.start, planned.start + len(planned.token_ids)):
            slots.append(table[position // block_size] * block_size + position % block_size)
    return torch.tensor(slots, dtype=torch.int64), plan_paged_rows(runs)
