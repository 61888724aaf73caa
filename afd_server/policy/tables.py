"""The block tables of sequences: one for each KV group, all over one pool.

In a group with a window a sequence owns the blocks that a later row can still see, and no more.
"""

from collections.abc import Sequence

from afd_server.core.sequence import BlockTable
from afd_server.policy.blocks import BlockPool


class BlockTables:
    """Lengthens, shares and shortens block tables.

    A block belongs to one group while it is owned or cached: its name in the prefix index says
    to which.

    Args:
        pool: of all groups.
        windows: of each group; None sees all.
        max_batch_tokens: most rows of one step.
    """

    def __init__(
        self, pool: BlockPool, windows: Sequence[int | None], max_batch_tokens: int
    ) -> None:
        self._pool = pool
        self._windows = tuple(windows)
        self._max_batch_tokens = max_batch_tokens
        self._full = [group for group, window in enumerate(windows) if window is None]
        self._sliding = [group for group, window in enumerate(windows) if window is not None]

    def admit(self, tables: list[BlockTable], num_computed: int, num_tokens: int) -> bool:
        """Lengthen tables for all tokens of a sequence, or for as many as its windows ever hold.

        Returns:
            False, with the tables unchanged, if there are not enough free blocks.
        """
        ends = [num_tokens if w is None else self._reach(w, num_computed) for w in self._windows]
        return self._grow(tables, [min(end, num_tokens) for end in ends])

    def grow(self, tables: list[BlockTable], num_tokens: int) -> bool:
        """Lengthen tables until they hold `num_tokens`; False and unchanged as in `admit`."""
        return self._grow(tables, [num_tokens] * len(tables))

    def num_wanted(self, tables: list[BlockTable], num_tokens: int) -> int:
        """Return how many blocks more a sequence owns when it has so many tokens, at most."""
        wanted = 0
        for table, window in zip(tables, self._windows, strict=True):
            end = num_tokens if window is None else min(num_tokens, self._reach(window, 0))
            owned = len(table.block_ids) - table.num_left
            wanted += max(0, self._pool.blocks_for(end) - owned)
        return wanted

    def leave(self, tables: list[BlockTable], num_computed: int) -> None:
        """Take back the blocks that no row from position `num_computed` on can see."""
        for group in self._sliding:
            table, left = tables[group], self._num_left(group, num_computed)
            self._pool.free(table.block_ids[table.num_left : left])
            table.num_left = max(table.num_left, left)

    def take_over(
        self, tables: list[BlockTable], chain: Sequence[bytes], first: int, stop: int
    ) -> int:
        """Let a sequence own blocks that others have computed, instead of its own if it has some.

        Windows need only the last of them: what the next row sees.

        Args:
            tables: of the sequence.
            chain: the names of its blocks.
            first: so many blocks are computed.
            stop: of how many it may be.

        Returns:
            How many blocks are computed now.
        """
        if first == stop:
            return first  # decoding: nothing to look for, in every step
        hit = first
        while hit < stop and all(self._holds(group, chain[hit]) for group in self._full):
            hit += 1
        while (missing := self._last_missing(chain, first, hit)) is not None:
            hit = missing
        if hit == first:
            return first
        for group, table in enumerate(tables):
            left = self._num_left(group, hit * self._pool.block_size)
            self._pool.free(table.block_ids[table.num_left : min(left, first)])
            self._pool.free(table.block_ids[first:hit])
            table.block_ids[first:hit] = [
                self._share(group, chain[index]) if index >= left else 0
                for index in range(first, hit)
            ]
            table.num_left = max(table.num_left, left)
        return hit

    def hand_on(
        self, tables: list[BlockTable], chain: Sequence[bytes], first: int, stop: int
    ) -> None:
        """Let others find the blocks first … stop − 1, which the sequence has just filled."""
        for index in range(first, stop):
            for group, table in enumerate(tables):
                name, block = _name(group, chain[index]), table.block_ids[index]
                table.block_ids[index] = self._pool.enter(name, block)

    def _reach(self, window: int, num_computed: int) -> int:
        """Return how far the blocks go that a sequence ever holds before it leaves some."""
        return max(window - 1, num_computed) + self._max_batch_tokens

    def _grow(self, tables: list[BlockTable], ends: Sequence[int]) -> bool:
        pool, missing = self._pool, 0
        for table, end in zip(tables, ends, strict=True):
            missing += max(0, pool.blocks_for(end) - len(table.block_ids))
        if missing > pool.num_free:
            return False
        if missing:  # which is seldom: in most steps blocks are long enough
            for table, end in zip(tables, ends, strict=True):
                grown = pool.grow(table.block_ids, end)
                assert grown, "there were enough free blocks"
        return True

    def _num_left(self, group: int, num_computed: int) -> int:
        """Return how many blocks nobody needs who goes on behind the last full block.

        Counted from there and not from `num_computed`: who takes over what this sequence leaves
        begins there.
        """
        window, size = self._windows[group], self._pool.block_size
        return 0 if window is None else max(0, num_computed // size * size + 1 - window) // size

    def _last_missing(self, chain: Sequence[bytes], first: int, hit: int) -> int | None:
        """Return the last block before `hit` that a window needs and nobody holds."""
        begins = [
            (group, self._num_left(group, hit * self._pool.block_size)) for group in self._sliding
        ]
        lowest = min((begin for _, begin in begins), default=hit)
        for index in range(hit - 1, max(first, lowest) - 1, -1):
            if any(index >= begin and not self._holds(g, chain[index]) for g, begin in begins):
                return index
        return None

    def _holds(self, group: int, digest: bytes) -> bool:
        return self._pool.holds(_name(group, digest))

    def _share(self, group: int, digest: bytes) -> int:
        block = self._pool.share(_name(group, digest))
        assert block is not None, "the block was there a moment ago"
        return block


def _name(group: int, digest: bytes) -> bytes:
    """Return what a block is called in the index; all digests are of one length."""
    return digest + group.to_bytes(2, "big") if group else digest
