"""Finds blocks already computed for a prompt.

A full block is named by the digest of everything its keys and values depend on: all tokens up to
its end, and whose they are. Equal names mean equal bits (invariant I1), whoever computed them.
"""

import array
import hashlib
from collections.abc import Sequence


def extend_chain(
    chain: list[bytes], token_ids: Sequence[int], block_size: int, num_blocks: int, salt: str
) -> None:
    """Lengthen a chain of digests until it names the first `num_blocks` blocks of a sequence.

    Each digest covers the one before it and its own block's tokens; the first covers the salt,
    so that tenants never meet. They are SHA-256: two runs of tokens that a tenant could find to
    share a shorter digest would be taken for each other.
    """
    for index in range(len(chain), num_blocks):
        parent = chain[-1] if chain else hashlib.sha256(salt.encode()).digest()
        run = array.array("i", token_ids[index * block_size : (index + 1) * block_size])
        chain.append(hashlib.sha256(parent + run.tobytes()).digest())


class PrefixIndex:
    """Which block holds which run of tokens: one block for a digest, one digest for a block."""

    def __init__(self) -> None:
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    def __contains__(self, block: int) -> bool:
        return block in self._digest_of

    def find(self, digest: bytes) -> int | None:
        """Return the block of this name, or None if nobody computed it or it was evicted."""
        return self._block_of.get(digest)

    def enter(self, digest: bytes, block: int) -> None:
        """Let a block be found; every one of its tokens has been computed."""
        assert digest not in self._block_of, f"block {block} is computed twice"
        assert block not in self._digest_of, f"block {block} has a name already"
        self._block_of[digest] = block
        self._digest_of[block] = digest

    def forget(self, block: int) -> None:
        """Let a block be found no more: its content is about to be overwritten."""
        del self._block_of[self._digest_of.pop(block)]
