"""Whether rows know nothing of each other, tried at every start on the shapes in use.

The promise that a token depends on its request alone rests on it, and a kernel that breaks it (a
library's choice by batch size, a miscompiled tile) breaks it for some numbers of rows only.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from afd_server.core.errors import ConfigError
from afd_server.kernels.kv_format import store
from afd_server.kernels.reference import PagedRun, plan_paged_rows
from afd_server.kernels.table import Kernels, KVLayer

MOST_ROWS = 33  # every number of rows up to two full tiles and one more
KEYS = 40  # two tiles of native attention and a part


def check_rows(
    kernels: Kernels,
    products: Iterable[tuple[int, int]],
    heads: Iterable[tuple[int, int, int]],
    kv_dtype: torch.dtype,
) -> None:
    """Compute 1 … 33 rows together and compare each with the same row of all 33.

    Args:
        kernels: to be tried.
        products: (in, out) of the model's linear layers.
        heads: query heads, key/value heads and head size of each kind of attention.
        kv_dtype: of keys and values.

    Raises:
        ConfigError: a row's bits depend on its company; the text names the kernel and the number.
    """
    generator = torch.Generator().manual_seed(20250727)
    dtype = kernels.row_format.dtype if kernels.row_format.dtype.is_floating_point else None

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype or torch.float32)

    for width, columns in products:
        weight, x = kernels.pack(draw(columns, width)), draw(MOST_ROWS, width)
        norm = draw(width)

        def multiply(rows: Tensor, weight: object = weight, norm: Tensor = norm) -> Tensor:
            return kernels.linear(kernels.add_norm(rows, None, norm, 1e-5)[1], weight)

        _compare(f"{kernels.name} product {width} x {columns}", multiply, x)
    for num_heads, num_kv_heads, head_dim in heads:
        shape = (1, num_kv_heads, 64, head_dim)
        layer = KVLayer(store(draw(*shape), kv_dtype), store(draw(*shape), kv_dtype))

        def attend(query: Tensor, layer: KVLayer = layer) -> Tensor:
            plan = plan_paged_rows([PagedRun(KEYS - MOST_ROWS, query.shape[0], [0])])
            return kernels.paged_attention(query, layer, plan)

        query = draw(MOST_ROWS, num_heads, head_dim)
        _compare(f"{kernels.name} attention of heads of {head_dim}", attend, query)


def _compare(name: str, kernel: Callable[[Tensor], Tensor], rows: Tensor) -> None:
    together = kernel(rows)
    for count in range(1, MOST_ROWS):
        if not torch.equal(kernel(rows[:count]), together[:count]):
            raise ConfigError(
                f"self-test: {name} gives a row other bits among {count} rows than among "
                f"{MOST_ROWS}; reinstall the native kernels, or use --quantization none"
            )
