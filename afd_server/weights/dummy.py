"""Random tensors instead of a checkpoint's, for load tests of any model without its weights."""

import math
from hashlib import sha256

import torch
from torch import Tensor

BLOCK_ELEMENTS = 2**20  # drawn at once: a part of a tensor costs no more than its blocks


class DummyWeights:
    """Draws every tensor that is asked for.

    A value depends on seed, name, shape and place alone, so all workers see parts of the same
    tensors, however they are cut. Matrices are uniform with a variance of 1 / columns, which
    keeps activations of one size through the layers; vectors, mostly scales of norms, lie
    within 10 % of 1.

    Args:
        dtype: of the tensors returned.
        seed: another one gives other tensors.
    """

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        self._dtype = dtype
        self._seed = seed

    def has(self, name: str) -> bool:
        """Deny every name: families then ask for the tensors that the hub has."""
        return False

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self.read_slice(name, shape, ())

    def read_float32(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._draw(name, shape, ())

    def read_rows(self, name: str, shape: tuple[int, ...], start: int, stop: int) -> Tensor:
        return self.read_slice(name, shape, (slice(start, stop),))

    def read_slice(self, name: str, shape: tuple[int, ...], place: tuple[slice, ...]) -> Tensor:
        return self._draw(name, shape, place).to(self._dtype)

    def _draw(self, name: str, shape: tuple[int, ...], place: tuple[slice, ...]) -> Tensor:
        """Draw a part of a tensor in blocks along its first dimension; of stacked ones, one each.

        Experts that are stacked are read one by one, and a block is drawn as a whole.
        """
        start, stop, _ = (place or (slice(None),))[0].indices(shape[0])
        size = max(1, BLOCK_ELEMENTS // math.prod(shape[1:])) if len(shape) <= 2 else 1
        parts = []
        for first in range(start // size * size, stop, size):
            block = self._block(name, shape, first, min(size, shape[0] - first))
            kept = block[max(0, start - first) : stop - first]
            parts.append(kept[(slice(None), *place[1:])])
        return torch.cat(parts)

    def _block(self, name: str, shape: tuple[int, ...], first: int, num_rows: int) -> Tensor:
        """Draw the rows from `first` on, in float32.

        Torch's uniform numbers are those of the Mersenne twister on every machine; its normal
        ones differ in the last bits between instruction sets.
        """
        digest = sha256(repr((self._seed, name, shape, first)).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
        uniform = torch.rand(num_rows, *shape[1:], generator=generator)
        if len(shape) == 1:
            return 0.9 + 0.2 * uniform
        return (2 * uniform - 1) * math.sqrt(3 / shape[-1])
