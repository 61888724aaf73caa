"""Fixed runs of KV slots: who owns them, and what they still hold when nobody does."""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence

from afd_server.policy.prefix import PrefixIndex


def num_kv_blocks(bytes_per_token: int, block_size: int, memory_bytes: int) -> int:
    """Return how many blocks of `block_size` tokens fit into this much memory."""
    return memory_bytes // (block_size * bytes_per_token)


def longest_fitting(
    num_blocks: int,
    block_size: int,
    windows: Sequence[int | None],
    max_batch_tokens: int,
    max_model_len: int,
) -> int:
    """Return the tokens of the longest sequence that fits into a pool by itself.

    With a window w a sequence holds the blocks of the next step's rows, of the w − 1 positions
    that the first of them sees, and up to one block before these (`policy.tables`).

    Args:
        num_blocks: of the pool.
        block_size: token positions in a block.
        windows: of each KV group; None sees all.
        max_batch_tokens: most rows of one step.
        max_model_len: tokens of the longest sequence there can be. No more whole blocks than it
            needs are counted.
    """
    rows = -(-(max_batch_tokens + block_size - 1) // block_size)

    def held(length: int) -> int:
        """Return the most blocks that a sequence of so many blocks holds."""
        bounds = (w if w is None else -(-(w - 1) // block_size) + rows for w in windows)
        return sum(length if bound is None else min(length, bound) for bound in bounds)

    lengths = range(-(-max_model_len // block_size) + 1)
    return (bisect_right(lengths, num_blocks, key=held) - 1) * block_size


class BlockPool:
    """Hands out block ids and takes them back.

    A block has one owner while it is written. Once it is full it may be entered into the prefix
    index; then others may share it, and nobody writes to it. Without owners it is *cached*: free
    like any other, but it keeps its content until the space is needed. The least recently used
    goes first, and of one sequence the last block first: a chain never loses its head before
    its tail.

    Args:
        num_blocks: blocks in the pool, ids 0 … num_blocks − 1.
        block_size: token positions in a block.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks > 0 < block_size, f"{num_blocks} blocks of {block_size} positions"
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._num_owners = [0] * num_blocks
        self._empty = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # the next to be evicted first
        self._index = PrefixIndex()

    @property
    def num_free(self) -> int:
        """Return the blocks that nobody owns, cached ones included."""
        return len(self._empty) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Return the blocks that nobody owns and whose content can still be shared."""
        return len(self._cached)

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks hold this many tokens."""
        return -(-num_tokens // self.block_size)

    def grow(self, block_ids: list[int], num_tokens: int) -> bool:
        """Lengthen a block table until it holds `num_tokens`, evicting what is cached if need be.

        Returns:
            False, with the table unchanged, if there are not enough free blocks.
        """
        missing = self.blocks_for(num_tokens) - len(block_ids)
        if missing > self.num_free:
            return False
        for _ in range(missing):
            block = self._empty.pop() if self._empty else self._evict()
            self._num_owners[block] = 1
            block_ids.append(block)
        return True

    def free(self, block_ids: Sequence[int]) -> None:
        """Take the blocks of a table back from one of their owners."""
        for block in reversed(block_ids):
            assert self._num_owners[block] > 0, f"block {block} was freed twice"
            self._num_owners[block] -= 1
            if self._num_owners[block] > 0:
                continue
            if block in self._index:
                self._cached[block] = None
            else:
                self._empty.append(block)

    def holds(self, digest: bytes) -> bool:
        """Tell whether there is a block of this name."""
        return self._index.find(digest) is not None

    def share(self, digest: bytes) -> int | None:
        """Give the block of this name one owner more and return it; None if there is none."""
        block = self._index.find(digest)
        if block is not None:
            self._cached.pop(block, None)
            self._num_owners[block] += 1
        return block

    def enter(self, digest: bytes, block: int) -> int:
        """Let others find a block that its owner has filled.

        Returns:
            The block to go on with: where another sequence was first, that one's, and the
            given one is taken back. So all owners of a block own the blocks before it.
        """
        assert self._num_owners[block] == 1, f"block {block} was shared before it was full"
        first = self.share(digest)
        if first is None:
            self._index.enter(digest, block)
            return block
        self.free([block])
        return first

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        self._index.forget(block)
        return block
