"""The block pool under random growth and release."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afd_server.policy.blocks import BlockPool


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 40)), max_size=60))
def test_a_block_is_never_owned_twice_and_none_is_lost(actions):
    pool = BlockPool(num_blocks=12, block_size=4)
    tables: dict[int, list[int]] = {}
    for owner, num_tokens in actions:
        if owner in tables and num_tokens % 3 == 0:
            pool.free(tables.pop(owner))
            continue
        table = tables.setdefault(owner, [])
        before = list(table)
        if pool.grow(table, num_tokens):
            assert len(table) * 4 >= num_tokens
            assert table[: len(before)] == before
        else:
            assert table == before
            assert pool.blocks_for(num_tokens) - len(before) > pool.num_free
        owned = [block for blocks in tables.values() for block in blocks]
        assert len(owned) == len(set(owned))
        assert len(owned) + pool.num_free == 12


def test_freeing_a_block_twice_is_caught():
    pool = BlockPool(2, 4)
    table: list[int] = []
    assert pool.grow(table, 4)
    pool.free(table)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(table)
