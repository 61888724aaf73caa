"""The head in any number of parts has the bits of the whole, and only its holder has it.

From five parts on those of the tiny vocabulary are too small to be aligned; torch's own products
then give other bits.
"""

import functools

import pytest
import torch

from afd_server.core.model_spec import read_model_spec
from afd_server.models.base import FFNCall, FFNShare
from afd_server.models.catalogue import ARCHITECTURES
from afd_server.models.forward import join_parts
from afd_server.models.head import Held
from afd_server.weights.checkpoint import Checkpoint
from afd_server.weights.packed import PackedWeights
from afd_server.workers.config import Numerics
from afd_server.workers.runtime import select_kernels
from afd_server.workers.tensors import row_dtype
from support.checkpoints import tiny_llama
from support.pools import EXACT

NOTHING = ((), (), ())  # of the three layers
NUMERICS = [
    EXACT,
    Numerics("reference", "bfloat16", "bfloat16"),
    Numerics("native", "int8", "bfloat16"),
    Numerics("native", "float32", "float32"),
    Numerics("native", "bfloat16", "bfloat16"),
]


@functools.cache
def held(numerics, part, num_parts, head=(0,)):
    directory, _ = tiny_llama(tied=True)
    spec, kernels = read_model_spec(directory), select_kernels(numerics)
    weights = PackedWeights(Checkpoint(directory, row_dtype(numerics)), kernels, None)
    share = FFNShare(part, num_parts, (*NOTHING, head))
    return Held(ARCHITECTURES["llama"], spec, weights, kernels, share)


@pytest.mark.parametrize("numerics", NUMERICS, ids=lambda n: f"{n.kernels}-{n.weights}")
@pytest.mark.parametrize("num_rows", [1, 7, 41])
def test_parts_of_the_vocabulary_side_by_side_have_the_bits_of_the_whole(num_rows, numerics):
    hidden = torch.randn(num_rows, 96, generator=torch.Generator().manual_seed(num_rows))
    rows = select_kernels(numerics).prepare(hidden.to(row_dtype(numerics)))
    call = FFNCall(3, rows, is_head=True)
    whole = held(numerics, 0, 1).answer(3, rows)
    assert (whole.shape, whole.dtype) == ((num_rows, 259), torch.float32)
    for num_parts in (2, 3, 4, *((7, 37) if numerics.kernels == "native" else ())):
        parts = [held(numerics, part, num_parts).answer(3, rows) for part in range(num_parts)]
        assert torch.equal(join_parts(call, parts), whole)


def test_who_does_not_hold_the_head_cannot_answer_for_it():
    with pytest.raises(AssertionError, match="held by others"):
        held(EXACT, 0, 1, head=()).answer(3, torch.ones(1, 96))
