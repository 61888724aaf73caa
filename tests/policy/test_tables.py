"""Block tables of several KV groups over one pool."""

import pytest

from afd_server.core.sequence import BlockTable
from afd_server.policy.blocks import BlockPool, longest_fitting
from afd_server.policy.tables import BlockTables

CHAIN = [bytes([index]) * 32 for index in range(16)]


class Groups:
    """Tables of a pool with blocks of 4; a sequence is computed and given back by hand."""

    def __init__(self, *windows, num_blocks=40, max_batch_tokens=8):
        self.pool = BlockPool(num_blocks, 4)
        self.tables = BlockTables(self.pool, windows, max_batch_tokens)
        self.num_groups = len(windows)

    def sequence(self):
        return [BlockTable() for _ in range(self.num_groups)]

    def computed(self, num_blocks, step=2):
        """Return the tables of a sequence that has computed and left so many blocks."""
        tables = self.sequence()
        for first in range(0, num_blocks, step):
            stop = min(first + step, num_blocks)
            assert self.tables.grow(tables, 4 * stop)
            self.tables.hand_on(tables, CHAIN, first, stop)
            self.tables.leave(tables, 4 * stop)
        return tables

    def give_back(self, tables):
        for table in tables:
            self.pool.free(table.owned)

    def evict(self, group, index):
        """Let one block be overwritten, as happens to the least recently used."""
        name = CHAIN[index] + (group.to_bytes(2, "big") if group else b"")
        block = self.pool.share(name)
        self.pool.free([block])
        self.pool._cached.move_to_end(block, last=False)
        self.pool._empty.append(self.pool._evict())


def owned(tables):
    return [len(table.owned) for table in tables]


@pytest.mark.parametrize(
    ("window", "num_computed", "num_left"),
    [(1, 4, 1), (2, 4, 0), (4, 15, 2), (4, 16, 3), (5, 16, 3), (6, 16, 2), (6, 19, 2), (40, 32, 0)],
)
def test_blocks_are_left_when_nobody_who_begins_at_a_full_block_sees_them(
    window, num_computed, num_left
):
    groups = Groups(None, window)
    tables = groups.sequence()
    assert groups.tables.grow(tables, num_computed + 1)
    groups.tables.leave(tables, num_computed)
    assert [table.num_left for table in tables] == [0, num_left]
    total = sum(len(table.block_ids) for table in tables)
    assert groups.pool.num_free == 40 - total + num_left


def test_growing_takes_blocks_for_every_table_or_for_none():
    groups = Groups(None, None, num_blocks=5)
    tables = groups.sequence()
    assert groups.tables.grow(tables, 8)
    assert not groups.tables.grow(tables, 12)
    assert owned(tables) == [2, 2]
    assert groups.pool.num_free == 1


def test_a_long_prompt_is_admitted_with_all_blocks_where_it_sees_all():
    groups = Groups(None, 5, 9)
    tables = groups.sequence()
    assert groups.tables.admit(tables, 0, 48)
    assert owned(tables) == [12, 3, 4]  # 48 positions, 4 + 8, 8 + 8


def test_a_hit_takes_the_whole_prefix_and_the_last_window():
    groups = Groups(None, 5, 9)
    first = groups.computed(8)
    groups.give_back(first)
    tables = groups.sequence()
    assert groups.tables.take_over(tables, CHAIN, 0, 8) == 8
    assert owned(tables) == [8, 1, 2]
    for mine, theirs in zip(tables, first, strict=True):
        assert mine.owned == theirs.owned
        assert len(mine.block_ids) == 8
    groups.give_back(tables)
    assert groups.pool.num_free == 40


@pytest.mark.parametrize(
    ("group", "index", "hit"), [(0, 5, 5), (1, 7, 7), (2, 7, 7), (2, 6, 6), (1, 6, 8), (0, 0, 0)]
)
def test_a_block_that_is_gone_ends_a_hit_before_it_unless_it_had_left_the_window(group, index, hit):
    groups = Groups(None, 5, 9)
    groups.give_back(groups.computed(8))
    groups.evict(group, index)
    tables = groups.sequence()
    assert groups.tables.take_over(tables, CHAIN, 0, 8) == hit
    groups.give_back(tables)
    assert groups.pool.num_free == 40


def test_windows_that_are_gone_everywhere_leave_no_hit():
    groups = Groups(None, 5)
    groups.give_back(groups.computed(8))
    for index in range(8):
        groups.evict(1, index)
    tables = groups.sequence()
    assert groups.tables.take_over(tables, CHAIN, 0, 8) == 0
    assert owned(tables) == [0, 0]


def test_without_full_layers_the_last_window_is_enough():
    groups = Groups(9)
    groups.give_back(groups.computed(8))
    for index in range(6):
        groups.evict(0, index)
    tables = groups.sequence()
    assert groups.tables.take_over(tables, CHAIN, 0, 8) == 8
    assert owned(tables) == [2]


def test_who_takes_over_in_the_middle_gives_back_the_blocks_it_had_for_it():
    groups = Groups(None, 5)
    other = groups.computed(8)
    mine = groups.sequence()
    assert groups.tables.take_over(mine, CHAIN, 0, 2) == 2
    assert groups.tables.grow(mine, 20)  # three blocks of its own in each group
    before = groups.pool.num_free
    assert groups.tables.take_over(mine, CHAIN, 2, 7) == 7
    assert [len(table.block_ids) for table in mine] == [7, 7]
    assert owned(mine) == [7, 1]
    assert groups.pool.num_free == before + 2 * 3
    assert mine[0].owned == other[0].owned[:7]
    groups.give_back(mine)
    groups.give_back(other)
    assert groups.pool.num_free == 40


@pytest.mark.parametrize(
    ("num_blocks", "windows", "tokens"),
    [
        (15, (None,), 60),
        (16, (None,), 64),
        (99, (None,), 64),  # no more than there can be
        (15, (None, None), 28),
        (15, (None, 5), 44),  # 11 where all is seen, 1 + 3 where a window is
        (20, (None, 5), 64),
        (4, (5,), 64),
        (3, (5,), 12),
        (24, (None, 5, 5), 64),
    ],
)
def test_the_longest_sequence_of_a_pool_holds_no_more_than_its_windows(num_blocks, windows, tokens):
    assert longest_fitting(num_blocks, 4, windows, 8, 64) == tokens
