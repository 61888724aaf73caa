"""A model in one process, one request and one token at a time: what the split one must equal."""

import torch

from afd_server.core.model_spec import read_model_spec
from afd_server.kernels.reference import PagedRun, plan_paged_rows
from afd_server.models.base import FFNShare, MicroBatch
from afd_server.models.catalogue import ARCHITECTURES
from afd_server.models.head import Held
from afd_server.models.monolith import run_monolith
from afd_server.weights.checkpoint import Checkpoint
from afd_server.weights.packed import PackedWeights
from afd_server.workers.attention.kv_store import KVStore
from afd_server.workers.runtime import select_kernels
from afd_server.workers.tensors import row_dtype


def load_halves(directory, numerics, num_parts=1):
    """Return spec, attention half and what the holder of each column shard holds."""
    spec, kernels = read_model_spec(directory), select_kernels(numerics)
    weights = PackedWeights(Checkpoint(directory, row_dtype(numerics)), kernels, None)
    architecture = ARCHITECTURES[spec.model_type]
    held = [
        Held(architecture, spec, weights, kernels, FFNShare(part, num_parts))
        for part in range(num_parts)
    ]
    return spec, architecture.attention(spec, weights, kernels, 256), held


def logits_in_chunks(spec, attention, held, ids, sizes):
    """Prefill in chunks of these sizes; return the logits of every token."""
    kv, start, parts = KVStore(spec, 16, 16, torch.float32).layers, 0, []
    for size in sizes:
        positions = torch.arange(start, start + size)
        rows = plan_paged_rows([PagedRun(start, size, range(16))])
        chunk = torch.tensor(ids[start : start + size])
        batch = MicroBatch(chunk, positions, positions, rows, torch.arange(size), kv)
        parts.append(run_monolith(attention, held, batch))
        start += size
    assert start == len(ids)
    return torch.cat(parts)
