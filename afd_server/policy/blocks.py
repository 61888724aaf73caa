"""Fixed runs of KV slots and who owns them."""

from collections.abc import Iterable


def num_kv_blocks(bytes_per_token: int, block_size: int, memory_bytes: int) -> int:
    """Return how many blocks of `block_size` tokens fit into this much memory."""
    return memory_bytes // (block_size * bytes_per_token)


class BlockPool:
    """Hands out block ids and takes them back; a block has at most one owner.

    Args:
        num_blocks: blocks in the pool, ids 0 … num_blocks − 1.
        block_size: token positions in a block.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks > 0 < block_size, f"{num_blocks} blocks of {block_size} positions"
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._is_free = [True] * num_blocks

    @property
    def num_free(self) -> int:
        """Return the blocks that nobody owns."""
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks hold this many tokens."""
        return -(-num_tokens // self.block_size)

    def grow(self, block_ids: list[int], num_tokens: int) -> bool:
        """Lengthen a block table until it holds `num_tokens`.

        Returns:
            False, with the table unchanged, if there are not enough free blocks.
        """
        missing = self.blocks_for(num_tokens) - len(block_ids)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            block = self._free.pop()
            self._is_free[block] = False
            block_ids.append(block)
        return True

    def free(self, block_ids: Iterable[int]) -> None:
        """Take blocks back."""
        for block in block_ids:
            assert not self._is_free[block], f"block {block} was freed twice"
            self._is_free[block] = True
            self._free.append(block)
