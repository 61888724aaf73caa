"""Between plans, payloads and tensors."""

import torch
from torch import Tensor

from afd_server.core.batch import StepPlan
from afd_server.core.errors import ProtocolError
from afd_server.kernels.reference import PagedRun, plan_paged_rows
from afd_server.kernels.table import KVLayer
from afd_server.models.base import MicroBatch
from afd_server.telemetry.timeline import EVENT_BYTES, Timeline
from afd_server.transport.messages import DType, Payload
from afd_server.workers.config import Numerics

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

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
    data = tensor.view(torch.uint8).numpy().data.cast("B")
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


def micro_batch(plan: StepPlan, kv: tuple[KVLayer, ...], block_size: int) -> MicroBatch:
    """Lay a plan out as tensors; rows come sequence by sequence, tokens in order."""
    positions, slots, runs, logit_rows = [], [], [], []
    for planned in plan.sequences:
        runs.append(PagedRun(planned.start, len(planned.token_ids), planned.block_ids))
        for position in range(planned.start, planned.start + len(planned.token_ids)):
            block = planned.block_ids[position // block_size]
            positions.append(position)
            slots.append(block * block_size + position % block_size)
        if planned.samples:
            logit_rows.append(len(positions) - 1)
    token_ids = [token for planned in plan.sequences for token in planned.token_ids]
    return MicroBatch(
        token_ids=torch.tensor(token_ids, dtype=torch.int64),
        positions=torch.tensor(positions, dtype=torch.int64),
        slots=torch.tensor(slots, dtype=torch.int64),
        rows=plan_paged_rows(runs),
        logit_rows=torch.tensor(logit_rows, dtype=torch.int64),
        kv=kv,
    )
