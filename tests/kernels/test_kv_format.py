"""What keys and values are stored as."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from afd_server.kernels.kv_format import restore, store, stored_dim, stored_size
from afd_server.kernels.reference import REFERENCE, PagedRun, plan_paged_rows
from afd_server.kernels.table import KVLayer


def heads_of(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float32, 20), (torch.bfloat16, 20), (torch.int8, 24)]
)
def test_a_stored_head_has_its_values_and_in_int8_a_scale(dtype, size):
    stored = store(heads_of(3, 2, 20), dtype)
    assert stored.dtype is dtype
    assert stored.shape == (3, 2, size)
    assert stored_size(20, dtype) == size
    assert stored_dim(stored) == 20
    assert restore(stored).shape == (3, 2, 20)


@given(st.integers(1, 200), st.floats(1e-20, 1e20))
@settings(max_examples=40, deadline=None)
def test_in_int8_each_element_is_within_half_a_step_of_its_head(head_dim, scale):
    heads = heads_of(5, 3, head_dim, seed=head_dim) * scale
    step = heads.abs().amax(-1, keepdim=True) / 127
    assert ((restore(store(heads, torch.int8)) - heads).abs() <= 0.5001 * step).all()


def test_a_head_of_zeros_is_restored_as_zeros():
    assert torch.equal(restore(store(torch.zeros(2, 16), torch.int8)), torch.zeros(2, 16))


def test_a_heads_bytes_depend_on_that_head_alone():
    heads = heads_of(9, 4, 48)
    together = store(heads, torch.int8)
    for token in range(9):
        for head in range(4):
            assert torch.equal(store(heads[token, head], torch.int8), together[token, head])


def test_attention_over_int8_is_near_attention_over_floats():
    keys, values, query = (heads_of(6, 2, 16, 64, seed=seed) for seed in (1, 2, 3))
    query = query.view(-1, 6, 64)[:20].contiguous()
    rows = plan_paged_rows([PagedRun(70, 20, [3, 1, 4, 0, 5, 2])])
    outputs = [
        REFERENCE.paged_attention(query, KVLayer(store(keys, d), store(values, d)), rows)
        for d in (torch.float32, torch.int8)
    ]
    assert 0 < (outputs[1] - outputs[0]).norm() / outputs[0].norm() < 0.013


def test_values_that_are_the_first_elements_of_keys_have_their_scale():
    stored = store(heads_of(4, 1, 16, 56), torch.int8)
    narrow = stored[..., : stored_size(40, torch.int8)]
    assert torch.equal(restore(narrow), restore(stored)[..., :40])
