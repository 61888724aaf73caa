"""Names of blocks, and which block has which name."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afd_server.policy.prefix import PrefixIndex, extend_chain

tokens = st.lists(st.integers(0, 2**31 - 1), min_size=8, max_size=24)


def chain_of(token_ids, salt="tenant", block_size=4):
    chain: list[bytes] = []
    extend_chain(chain, token_ids, block_size, len(token_ids) // block_size, salt)
    return chain


@given(tokens, st.data())
def test_a_changed_token_changes_the_names_of_its_block_and_of_all_behind_it(ids, data):
    place = data.draw(st.integers(0, len(ids) // 4 * 4 - 1))
    other = [*ids[:place], ids[place] ^ 1, *ids[place + 1 :]]
    same = [a == b for a, b in zip(chain_of(ids), chain_of(other), strict=True)]
    assert same == [index < place // 4 for index in range(len(ids) // 4)]


@given(tokens, st.data())
def test_a_chain_that_grows_is_the_chain_made_at_once(ids, data):
    chain: list[bytes] = []
    for num_blocks in sorted(data.draw(st.lists(st.integers(0, len(ids) // 4)))):
        extend_chain(chain, ids, 4, num_blocks, "tenant")
    assert chain == chain_of(ids)[: len(chain)]


@given(tokens, st.text(), st.text())
def test_tenants_share_all_names_or_none(ids, salt, other):
    shared = set(chain_of(ids, salt)) & set(chain_of(ids, other))
    assert len(shared) == (len(ids) // 4 if salt == other else 0)


def test_names_are_long_enough_that_nobody_finds_two_runs_with_the_same():
    assert {len(digest) for digest in chain_of(range(16))} == {32}


def test_a_block_is_found_by_its_name_until_it_is_forgotten():
    index, (first, second) = PrefixIndex(), chain_of(range(8))
    index.enter(first, 7)
    assert (index.find(first), index.find(second)) == (7, None)
    assert 7 in index
    index.forget(7)
    assert index.find(first) is None
    assert 7 not in index


def test_two_blocks_of_one_name_or_two_names_of_one_block_are_caught():
    index, (first, second) = PrefixIndex(), chain_of(range(8))
    index.enter(first, 7)
    with pytest.raises(AssertionError, match="computed twice"):
        index.enter(first, 8)
    with pytest.raises(AssertionError, match="has a name already"):
        index.enter(second, 7)
