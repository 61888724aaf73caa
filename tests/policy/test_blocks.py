"""The block pool under random growth, sharing and release."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afd_server.policy.blocks import BlockPool


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 40)), max_size=60))
def test_without_sharing_a_block_is_never_owned_twice_and_none_is_lost(actions):
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
        assert pool.num_cached == 0


def filled(pool, *names):
    """Return the table of a new sequence that has computed blocks of these names."""
    table: list[int] = []
    assert pool.grow(table, len(names) * pool.block_size)
    return [pool.enter(name, block) for name, block in zip(names, table, strict=True)]


def test_a_full_block_without_owners_is_free_and_keeps_its_content_until_it_is_needed():
    pool = BlockPool(3, 4)
    (block,) = filled(pool, b"a")
    pool.free([block])
    assert (pool.num_free, pool.num_cached) == (3, 1)
    table: list[int] = []
    assert pool.grow(table, 8)
    assert block not in table  # empty ones first
    assert (pool.num_free, pool.num_cached) == (1, 1)
    assert pool.grow(table, 12)
    assert block in table
    assert pool.share(b"a") is None
    assert (pool.num_free, pool.num_cached) == (0, 0)


def test_a_shared_block_is_free_when_its_last_owner_gives_it_back():
    pool = BlockPool(2, 4)
    (block,) = filled(pool, b"a")
    assert pool.share(b"a") == block
    pool.free([block])
    assert (pool.num_free, pool.num_cached) == (1, 0)
    pool.free([block])
    assert (pool.num_free, pool.num_cached) == (2, 1)
    assert pool.share(b"a") == block
    assert (pool.num_free, pool.num_cached) == (1, 0)


def test_who_computes_a_block_second_goes_on_with_the_first_ones():
    pool = BlockPool(4, 4)
    first, second = filled(pool, b"a"), filled(pool, b"a")
    assert first == second
    assert pool.num_free == 3


def test_the_least_recently_used_chain_is_evicted_first_and_its_tail_before_its_head():
    pool = BlockPool(4, 4)
    old, new = filled(pool, b"a", b"ab"), filled(pool, b"c", b"cd")
    pool.free(old)
    pool.free(new)
    pool.free([pool.share(b"a"), pool.share(b"ab")])  # the old one is the newer now
    taken: list[int] = []
    assert pool.grow(taken, 16)
    assert taken == [*reversed(new), *reversed(old)]


def test_freeing_a_block_twice_is_caught():
    pool = BlockPool(2, 4)
    table: list[int] = []
    assert pool.grow(table, 4)
    pool.free(table)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(table)


def test_entering_a_block_that_others_have_is_caught():
    pool = BlockPool(2, 4)
    (block,) = filled(pool, b"a")
    pool.share(b"a")
    with pytest.raises(AssertionError, match="shared before it was full"):
        pool.enter(b"b", block)
