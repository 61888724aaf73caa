"""The callables a model may use, as one table for each device."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol  # Any: what only its kernels look into

import torch
from torch import Tensor


class KVLayer(NamedTuple):
    """Keys and values of one layer, each [num_blocks, num_kv_heads, block_size, head_dim].

    In int8 the last dimension has the scale as well (`kernels.kv_format`).
    A head's keys of a block lie together: what attention reads next is what it reads next to.
    Values may be a view of the keys: of their first elements, or of all.
    """

    keys: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True)
class PagedRows:
    """Which keys each row of a micro-batch may see.

    Attributes:
        row_starts: [sequences + 1] int64; sequence i has rows row_starts[i] … row_starts[i+1] − 1.
        num_keys: [rows] int64: a row sees positions 0 … num_keys − 1 of its sequence.
        block_tables: [sequences, blocks] int64, padded with 0.
        derived: what kernels make of it, and of the positions and slots that come with it, once
            for all layers.
    """

    row_starts: Tensor
    num_keys: Tensor
    block_tables: Tensor
    derived: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)


class PagedAttention(Protocol):
    """Attention over paged keys and values; see `reference.paged_attention`."""

    def __call__(
        self, query: Tensor, layer: KVLayer, rows: PagedRows, window: int | None = None, /
    ) -> Tensor: ...


class SiLUMul(Protocol):
    """SwiGLU of rows that hold both factors; see `reference.silu_mul`."""

    def __call__(self, gate_up: Tensor, limit: float | None = None, /) -> Tensor: ...


class BoundSwiGLU(Protocol):
    """One FFN of prepared rows: gate over up, their product, down."""

    @property
    def native(self) -> "NativeCall | None":
        """Return the same for code outside of Python, if there is such."""
        ...

    @property
    def halves(self) -> "tuple[BoundSwiGLU, BoundSwiGLU] | None":
        """Return what computes the summands of the output, one for each half of its columns.

        Their sum in float32, in this order, is the output to the bit. None if it has no halves.
        """
        ...

    def __call__(self, rows: Tensor, /) -> Tensor: ...


class BoundGQA(Protocol):
    """One layer of grouped-query attention, from the residual to the rows of its FFN."""

    @property
    def native(self) -> "NativeAttention | None":
        """Return the same for code outside of Python, if there is such."""
        ...

    def __call__(
        self,
        hidden: Tensor,
        delta: Tensor | None,
        positions: Tensor,
        slots: Tensor,
        paged: PagedRows,
        layer: KVLayer,
        /,
    ) -> tuple[Tensor, Tensor]: ...


class Norms(NamedTuple):
    """The norms of one layer, before its attention and after it, [hidden] each, and their eps."""

    before: Tensor
    after: Tensor
    eps: float


class GQAWeights(NamedTuple):
    """What one layer of grouped-query attention is made of.

    Attributes:
        qkv: the projections of queries, keys and values, stacked.
        output: the projection of what was attended to.
        rope: as `Kernels.rope` takes it.
    """

    qkv: object
    output: object
    rope: Tensor
    norms: Norms
    num_heads: int
    window: int | None


@dataclass(frozen=True, slots=True)
class NativeCall:
    """What code outside of Python calls to compute rows: function(context, rows, count, out).

    Attributes:
        function: address of a `void(const void*, const uint8_t*, int64_t, float*)`.
        context: address of what it needs; valid as long as `owner` lives.
        row_bytes: of one row that it reads.
        width: float32 elements of one row that it writes.
        owner: keeps the memory.
    """

    function: int
    context: int
    row_bytes: int
    width: int
    owner: object


@dataclass(frozen=True, slots=True)
class NativeAttention:
    """What code outside of Python calls for one layer up to its FFN.

    function(context, hidden, delta, count, blocks, seen, total, rows), as `BoundGQA`; `total` may
    be `hidden`. Returns whether it was done.

    Attributes:
        function: address of an `int32_t(const void*, const float*, const float*, int64_t,
            const void*, const void*, float*, uint8_t*)`.
        context: address of what it needs; valid as long as `owner` lives.
        blocks_of: makes `blocks` of the keys and values of a layer; its buffer lives as they do.
        seen_of: makes `seen` of positions, slots and rows; kept with the rows.
        owner: keeps the memory.
    """

    function: int
    context: int
    blocks_of: Callable[[KVLayer], ctypes.Structure]
    seen_of: Callable[[Tensor, Tensor, PagedRows], ctypes.Structure]
    owner: object


# A weight as its kernels keep it, made by `Kernels.pack` from [out, in]. Models never look inside.
LinearWeight = object


@dataclass(frozen=True, slots=True)
class RowFormat:
    """What `linear` reads, and what travels to the FFN workers: [rows, size(width)] of a dtype."""

    dtype: torch.dtype
    size: Callable[[int], int]


@dataclass(frozen=True, slots=True)
class Kernels:
    """One implementation of every operation a model half needs.

    Every function keeps rows independent: a row's result has the same bits whatever else is
    in the call. The semantics are those of `kernels.reference` and `kernels.sampling`. Where a
    result is only ever multiplied next it is made as *prepared rows* at once, in `row_format`.
    `dump` takes a packed weight apart into the tensors named by `pack_parts`; `unpack` undoes it.
    `swiglu` binds one FFN's weights and the limit of its `silu_mul`; `gqa` the weights of one
    layer up to its FFN; `bind` one weight, for code outside of Python that multiplies rows by it as
    `linear` does, None if there is no such.
    """

    name: str
    row_format: RowFormat
    pack: Callable[[Tensor], LinearWeight]
    pack_parts: tuple[str, ...]
    dump: Callable[[LinearWeight], dict[str, Tensor]]
    unpack: Callable[[dict[str, Tensor]], LinearWeight]
    prepare: Callable[[Tensor], Tensor]
    linear: Callable[[Tensor, LinearWeight], Tensor]
    bind: Callable[[LinearWeight], NativeCall | None]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_norm: Callable[[Tensor, Tensor | None, Tensor, float], tuple[Tensor, Tensor]]
    rope: Callable[[Tensor, Tensor, Tensor], Tensor]
    write_kv: Callable[[KVLayer, Tensor, Tensor, Tensor | None], None]
    rope_write_kv: Callable[[Tensor, int, Tensor, Tensor, Tensor, KVLayer], Tensor]
    paged_attention: PagedAttention
    gqa: Callable[[GQAWeights], BoundGQA]
    silu_mul: SiLUMul
    swiglu: Callable[[LinearWeight, LinearWeight, float | None], BoundSwiGLU]
    argmax: Callable[[Tensor], int]
    gumbel_argmax: Callable[[Tensor, Tensor | None, float, int], int]
    select: Callable[[Tensor, float, int, float, float], Tensor]
