"""The callables a model may use, as one table for each device."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class KVLayer(NamedTuple):
    """Keys and values of one layer, each [num_blocks, block_size, num_kv_heads, head_dim]."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True)
class PagedRows:
    """Which keys each row of a micro-batch may see.

    Rows are put in order of falling context, so that the rows which still have keys in key
    tile t are the first `active[t]` of them.

    Attributes:
        order: [tokens] int64, the micro-batch's row at each place.
        num_keys: [tokens] int64 in that order: a row sees positions 0 … num_keys − 1.
        block_tables: [tokens, key tiles · blocks per tile] int64 in that order, padded with 0.
        active: the number of rows with keys in each key tile.
    """

    order: Tensor
    num_keys: Tensor
    block_tables: Tensor
    active: tuple[int, ...]


# A weight as its kernels keep it, made by `Kernels.pack` from [out, in]. Models never look inside.
LinearWeight = object


@dataclass(frozen=True, slots=True)
class Kernels:
    """One implementation of every operation a model half needs.

    Every function keeps rows independent: a row's result has the same bits whatever else is
    in the call. The semantics are those of `kernels.reference`.
    """

    name: str
    pack: Callable[[Tensor], LinearWeight]
    linear: Callable[[Tensor, LinearWeight], Tensor]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    rope: Callable[[Tensor, Tensor, Tensor], Tensor]
    write_kv: Callable[[KVLayer, Tensor, Tensor, Tensor], None]
    paged_attention: Callable[[Tensor, KVLayer, PagedRows], Tensor]
    silu_mul: Callable[[Tensor], Tensor]
