"""Whether rows know nothing of each other, tried at every start on the shapes in use.

The promise that a token depends on its request alone rests on it, and a kernel that breaks it (a
library's choice by batch size, a miscompiled tile) breaks it for some numbers of rows only.
"""

from collections.abc import Callable, Collection, Iterable, Sequence

import torch
from torch import Tensor

from afd_server.core.errors import ConfigError
from afd_server.kernels.kv_format import store
from afd_server.kernels.reference import PagedRun, plan_paged_rows
from afd_server.kernels.table import Kernels, KVLayer

FEW_ROWS = 48  # every number up to it: full tiles and parts of all kinds, pairs from 13 rows on
MOST_ROWS = 256  # with which they are compared; of attention, one after the other in a sequence
FEW_COLUMNS = 112  # of a product tried with all numbers of rows: three pairs of blocks and one more
MOST_COLUMNS = 4096  # more are blocks like these
SPAN = 64  # keys that share a maximum in attention


def check_rows(
    kernels: Kernels,
    products: Collection[tuple[int, int]],
    heads: Iterable[tuple[int, int, int, int | None]],
    kv_dtype: torch.dtype,
) -> None:
    """Compute 1 … 48 rows together and compare each with the same row of 256.

    Products of all columns are tried with 1 row and with 48 only: blocks of columns know nothing of
    each other. For a model of 576 columns that takes 0.2 s in int8 (AVX-512; 0.8 s with AVX2).

    Args:
        kernels: to be tried.
        products: (in, out) of the model's linear layers.
        heads: query heads, key/value heads, head size and window of each kind of attention.
        kv_dtype: of keys and values.

    Raises:
        ConfigError: a row's bits depend on its company; the text names the kernel and the number.
    """
    generator = torch.Generator().manual_seed(20250727)
    dtype = kernels.row_format.dtype if kernels.row_format.dtype.is_floating_point else None

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype or torch.float32)

    numbers = range(1, FEW_ROWS + 1)
    few = [(width, FEW_COLUMNS, numbers) for width in sorted({width for width, _ in products})]
    whole = [(width, min(out, MOST_COLUMNS + out % SPAN), (1, FEW_ROWS)) for width, out in products]
    for width, columns, counts in (*few, *whole):
        weight, x = kernels.pack(draw(columns, width)), draw(MOST_ROWS, width)
        norm = draw(width)

        def multiply(
            rows: slice, x: Tensor = x, weight: object = weight, norm: Tensor = norm
        ) -> Tensor:
            return kernels.linear(kernels.add_norm(x[rows], None, norm, 1e-5)[1], weight)

        _compare(f"{kernels.name} product {width} x {columns}", multiply, counts)
    for num_heads, num_kv_heads, head_dim, window in heads:
        shape = (MOST_ROWS // SPAN, num_kv_heads, SPAN, head_dim)
        layer = KVLayer(store(draw(*shape), kv_dtype), store(draw(*shape), kv_dtype))
        query = draw(MOST_ROWS, num_heads, head_dim)
        # a longer window hides nothing here; the one tried begins as far into a span
        seen = None if window is None else min(window, 2 * SPAN + window % SPAN)

        def attend(
            rows: slice, query: Tensor = query, layer: KVLayer = layer, seen: int | None = seen
        ) -> Tensor:
            run = PagedRun(rows.start, rows.stop - rows.start, range(MOST_ROWS // SPAN))
            plan = plan_paged_rows([run])
            return kernels.paged_attention(query[rows], layer, plan, seen)

        _compare(f"{kernels.name} attention of heads of {head_dim}", attend, numbers)


def _compare(name: str, kernel: Callable[[slice], Tensor], counts: Sequence[int]) -> None:
    together = kernel(slice(0, MOST_ROWS))
    for count in counts:
        start = count * (count - 1) // 2 % (MOST_ROWS - count + 1)  # here and there
        rows = slice(start, start + count)
        if not torch.equal(kernel(rows), together[rows]):
            raise ConfigError(
                f"self-test: {name} gives a row other bits among {count} rows than among "
                f"{MOST_ROWS}; reinstall the native kernels, or use --quantization none"
            )
