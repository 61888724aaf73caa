"""Every architecture: its monolith is an independent model; each half has its own tensors."""

import pytest
import torch
from safetensors import safe_open

from afd_server.core.model_spec import read_model_spec
from afd_server.kernels.reference import REFERENCE, PagedRun, plan_paged_rows
from afd_server.models.base import FFNShare, MicroBatch
from afd_server.models.catalogue import ARCHITECTURES
from afd_server.models.head import Held
from afd_server.models.monolith import run_monolith
from afd_server.weights.checkpoint import Checkpoint
from afd_server.weights.packed import PackedWeights
from afd_server.workers.attention.kv_store import KVStore
from support.families import WRITERS, family

NUM_BLOCKS, BLOCK = 12, 16


class Monolith:
    """Both halves over one checkpoint, and the blocks of one sequence."""

    def __init__(self, directory, num_parts=1, reader=None):
        self.spec = read_model_spec(directory)
        reader = reader or Checkpoint(directory, torch.float32)
        weights = PackedWeights(reader, REFERENCE, None)
        architecture = ARCHITECTURES[self.spec.model_type]
        self.attention = architecture.attention(self.spec, weights, REFERENCE, 256)
        shares = [FFNShare(part, num_parts) for part in range(num_parts)]
        self.held = [Held(architecture, self.spec, weights, REFERENCE, share) for share in shares]
        self.kv = KVStore(self.spec, NUM_BLOCKS, BLOCK, torch.float32).layers

    def logits(self, ids, start=0):
        positions = torch.arange(start, start + len(ids))
        rows = plan_paged_rows([PagedRun(start, len(ids), range(NUM_BLOCKS))])
        every = torch.arange(len(ids))
        batch = MicroBatch(torch.tensor(ids), positions, positions, rows, every, self.kv)
        return run_monolith(self.attention, self.held, batch)


def some_ids(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 259, (count,), generator=generator).tolist()


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("num_parts", [1, 3])
def test_the_monolith_is_the_independent_model(name, num_parts):
    directory, reference = family(name)
    ids = some_ids(150, seed=1)
    logits, expected = Monolith(directory, num_parts).logits(ids), reference(ids)
    assert expected.std() > 0.1  # the comparison means something
    assert (logits - expected).abs().max() < 1e-4


@pytest.mark.parametrize("name", WRITERS)
def test_chunks_and_single_tokens_give_the_bits_of_one_prefill(name):
    directory, ids = family(name).directory, some_ids(90, seed=2)
    chunked, parts, start = Monolith(directory), [], 0
    for size in (1, 30, 16, 3, 1, 1, 38):
        parts.append(chunked.logits(ids[start : start + size], start))
        start += size
    assert start == len(ids)
    assert torch.equal(torch.cat(parts), Monolith(directory).logits(ids))


class RecordingReader(Checkpoint):
    """A checkpoint that remembers what was asked of it."""

    def __init__(self, directory):
        super().__init__(directory, torch.float32)
        self.names = set()

    def _read(self, name, shape, place, dtype):
        self.names.add(name)
        return super()._read(name, shape, place, dtype)


@pytest.mark.parametrize("name", WRITERS)
def test_every_tensor_of_the_checkpoint_is_used(name):
    directory = family(name).directory
    reader = RecordingReader(directory)
    Monolith(directory, reader=reader)
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        assert reader.names == set(file.keys())
