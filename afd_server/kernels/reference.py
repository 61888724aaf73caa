"""Every kernel in plain torch: the specification, and the oracle of faster ones.

Torch's own products give a row other bits in other batch sizes (on AVX-512, fp32 `linear` has
one class each for 1, 2 and ≥ 4 rows). Here every product is made of calls of one fixed shape,
padded with zeros, so a row's bits depend on that row alone.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from afd_server.kernels import sampling
from afd_server.kernels.kv_format import restore, scales_and_values, store, stored_dim
from afd_server.kernels.table import (
    GQAWeights,
    Kernels,
    KVLayer,
    LinearWeight,
    NativeAttention,
    PagedRows,
    RowFormat,
    SiLUMul,
)

# 16 rows cost hardly more than 1 (the weights' memory traffic rules), and a prefill in tiles of
# 16 was 22 % slower than in one call (fp32 576x1536, one Zen 5 core).
LINEAR_TILE_ROWS = 16
KEY_TILE = 64
ROW_CHUNK = 16  # rows attended together: their key tiles stay in the second-level cache


def pack(weight: Tensor) -> LinearWeight:
    """Keep a weight as it is, [out, in]."""
    return weight


def linear(x: Tensor, weight: LinearWeight) -> Tensor:
    """Multiply rows by a weight: [rows, in] · [out, in]ᵀ → [rows, out], in x's dtype."""
    weight, num_rows = _tensor(weight), x.shape[0]
    if num_rows == 0:
        return x.new_empty(0, weight.shape[0])
    padding = -num_rows % LINEAR_TILE_ROWS
    padded = F.pad(x, (0, 0, 0, padding)) if padding else x
    if padded.shape[0] == LINEAR_TILE_ROWS:
        return F.linear(padded, weight)[:num_rows]
    out = x.new_empty(padded.shape[0], weight.shape[0])
    for start in range(0, padded.shape[0], LINEAR_TILE_ROWS):
        tile = slice(start, start + LINEAR_TILE_ROWS)
        out[tile] = F.linear(padded[tile], weight)
    return out[:num_rows]


def _tensor(weight: LinearWeight) -> Tensor:
    assert isinstance(weight, Tensor), "the weight was not packed for these kernels"
    return weight


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise rows by their root mean square in fp32, cast back, then scale (Llama's order)."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add what a sublayer gave, if anything, and norm the sum: returns the sum and its norm."""
    total = x if delta is None else x + delta
    return total, rms_norm(total, weight, eps)


def rope_table(head_dim: int, theta: float, num_positions: int) -> Tensor:
    """Tabulate rotary angles: [num_positions, 2, head_dim] fp32, cosines then sines.

    Dimension i and i + head_dim/2 form a pair (NeoX order), as in the Llama checkpoints.
    """
    frequencies = 1.0 / theta ** (
        torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    )
    return angle_table(frequencies, num_positions)


def angle_table(frequencies: Tensor, num_positions: int) -> Tensor:
    """Tabulate the angles of frequencies [head_dim / 2], as `rope_table` does."""
    angles = torch.outer(torch.arange(num_positions).float(), frequencies)
    both = torch.cat((angles, angles), dim=-1)
    return torch.stack((both.cos(), both.sin()), dim=1)


def rope(x: Tensor, table: Tensor, positions: Tensor) -> Tensor:
    """Rotate heads by their position: x [tokens, heads, head_dim], positions [tokens]."""
    cos, sin = table[positions].to(x.dtype).unsqueeze(2).unbind(1)  # [tokens, 1, head_dim]
    half = x.shape[-1] // 2
    rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + rotated * sin


def write_kv(layer: KVLayer, slots: Tensor, keys: Tensor, values: Tensor | None) -> None:
    """Store keys and values [tokens, kv_heads, head_dim] at flat slots [tokens], in place.

    No values where those of the layer are a view of its keys.
    """
    block_size = layer.keys.shape[2]
    block_ids, offsets = slots // block_size, slots % block_size
    for rows, blocks in ((keys, layer.keys), (values, layer.values)):
        if rows is not None and len(rows):  # torch takes no view of nothing in another size
            blocks[block_ids, :, offsets] = store(rows, blocks.dtype)


def rope_write_kv(
    qkv: Tensor, num_heads: int, table: Tensor, positions: Tensor, slots: Tensor, layer: KVLayer
) -> Tensor:
    """Rotate queries and keys, store keys and values; return the queries.

    Args:
        qkv: [tokens, (heads + 2 · kv_heads) · head_dim], queries first, then keys, then values.
        num_heads: of the queries.
        table: from `rope_table`.
        positions: [tokens], of the rows in their sequences.
        slots: [tokens], where keys and values go.
        layer: the blocks, written in place.

    Returns:
        [tokens, heads, head_dim].
    """
    num_kv_heads, head_dim = layer.keys.shape[1], table.shape[-1]
    sizes = [num_heads, num_kv_heads, num_kv_heads]
    heads = qkv.view(qkv.shape[0], sum(sizes), head_dim)
    query, keys, values = torch.split(heads, sizes, dim=1)
    write_kv(layer, slots, rope(keys, table, positions), values)
    return rope(query, table, positions)


class PagedRun(NamedTuple):
    """Tokens of one sequence in a micro-batch: positions start … start + length − 1."""

    start: int
    length: int
    block_ids: Sequence[int]


def plan_paged_rows(runs: Sequence[PagedRun]) -> PagedRows:
    """Lay out which keys each row sees: those of its own sequence up to its own position."""
    row_starts = [0, *itertools.accumulate(run.length for run in runs)]
    num_keys = [
        position + 1 for run in runs for position in range(run.start, run.start + run.length)
    ]
    width = max(len(run.block_ids) for run in runs)
    tables = [[*run.block_ids, *(0,) * (width - len(run.block_ids))] for run in runs]
    return PagedRows(
        row_starts=torch.tensor(row_starts, dtype=torch.int64),
        num_keys=torch.tensor(num_keys, dtype=torch.int64),
        block_tables=torch.tensor(tables, dtype=torch.int64),
    )


def paged_attention(
    query: Tensor, layer: KVLayer, rows: PagedRows, window: int | None = None
) -> Tensor:
    """Attend with an online softmax over key tiles of 64, in order, in fp32.

    A row is computed alone, by products of fixed shape [group, head_dim] · [head_dim, 64], so
    decoding, prefill and chunked prefill agree bit for bit (FlashAttention's recurrence,
    arXiv 2205.14135 algorithm 1, with a tile size that never changes). By int8 keys queries are
    multiplied as int8, quantised as these are; weights of int8 values, times the scales of these,
    are rounded to 15 bits, of the largest weight and the largest scale that a row sees in the tile.

    Args:
        query: [tokens, heads, head_dim]; heads are grouped over the key/value heads.
        layer: the blocks, already holding the keys and values of these tokens.
        rows: what each token may see.
        window: of that, how many positions it sees at most, the latest; None for all.

    Returns:
        [tokens, heads · value_dim] in the query's dtype; a value may be narrower than a key.
    """
    out = query.new_empty(*query.shape[:2], stored_dim(layer.values))
    lengths = rows.row_starts.diff()
    tables = rows.block_tables.repeat_interleave(lengths, 0)  # [tokens, blocks]
    for start in range(0, query.shape[0], ROW_CHUNK):
        chunk = slice(start, start + ROW_CHUNK)
        seen = rows.num_keys[chunk]
        out[chunk] = _attend_chunk(query[chunk], layer, seen, tables[chunk], window)
    return out.flatten(1)


def _attend_chunk(
    query: Tensor, layer: KVLayer, num_keys: Tensor, tables: Tensor, window: int | None
) -> Tensor:
    """Attend for a few rows: num_keys [rows], tables [rows, blocks]."""
    num_rows, num_heads, head_dim = query.shape
    num_kv_heads, block_size = layer.keys.shape[1:3]
    assert KEY_TILE % block_size == 0, f"block_size {block_size} does not divide {KEY_TILE}"
    blocks_per_tile = KEY_TILE // block_size
    num_tiles = -(-int(num_keys.max()) // KEY_TILE)
    tables = F.pad(tables, (0, max(0, num_tiles * blocks_per_tile - tables.shape[1])))
    group = num_heads // num_kv_heads
    if layer.keys.dtype is torch.int8:  # so that a product with a key is a sum of integers
        query = restore(store(query, torch.int8))
    grouped = query.float().view(num_rows * num_kv_heads, group, head_dim) * head_dim**-0.5
    highest = torch.full((num_rows * num_kv_heads, group, 1), torch.finfo(torch.float32).min)
    total = torch.zeros_like(highest)
    weighted = torch.zeros(*grouped.shape[:2], stored_dim(layer.values))
    for tile in range(num_tiles):
        blocks = tables[:, tile * blocks_per_tile : (tile + 1) * blocks_per_tile]
        hidden = _hidden_keys(num_keys, window, tile, num_kv_heads)
        scores = torch.bmm(grouped, restore(_tile(layer.keys, blocks)).mT)  # [rows, group, 64]
        scores.masked_fill_(hidden, -math.inf)
        tile_highest = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
        new_highest = torch.maximum(highest, tile_highest)
        weights = torch.exp(scores - tile_highest)
        shrink, share = torch.exp(highest - new_highest), torch.exp(tile_highest - new_highest)
        total = total * shrink + weights.sum(-1, keepdim=True) * share
        weighted = weighted * shrink + _weigh(weights, _tile(layer.values, blocks), hidden) * share
        highest = new_highest
    return (weighted / total).view(num_rows, num_heads, -1).to(query.dtype)


def _tile(blocks: Tensor, tables: Tensor) -> Tensor:
    """Copy one key tile for each row and head together: [rows · kv_heads, 64, stored]."""
    tile = blocks[tables].transpose(1, 2)  # [rows, kv_heads, blocks, block_size, stored]
    return tile.reshape(-1, KEY_TILE, blocks.shape[-1])


def _weigh(weights: Tensor, stored: Tensor, hidden: Tensor) -> Tensor:
    """Sum values times weights [rows · kv_heads, group, 64], in int8 as whole numbers."""
    if stored.dtype is not torch.int8:
        return torch.bmm(weights, restore(stored))
    scales, values = scales_and_values(stored)
    scales = scales.mT.masked_fill(hidden, 0.0)
    top = scales.amax(-1, keepdim=True)
    steps = scales * torch.where(top > 1e-30, 32767 / top, 0.0)
    return torch.bmm((weights * steps).round().double(), values.double()).float() * (top / 32767)


def _hidden_keys(num_keys: Tensor, window: int | None, tile: int, num_kv_heads: int) -> Tensor:
    """Mark the keys a row may not see: [rows · kv_heads, 1, 64] bool."""
    positions = torch.arange(tile * KEY_TILE, (tile + 1) * KEY_TILE)
    hidden = positions >= num_keys.unsqueeze(1)
    if window is not None:
        hidden |= positions < num_keys.unsqueeze(1) - window
    return hidden.repeat_interleave(num_kv_heads, dim=0).unsqueeze(1)


def silu_mul(gate_up: Tensor, limit: float | None = None) -> Tensor:
    """Compute silu(gate) · up for rows that hold both: [rows, 2 · n] → [rows, n].

    Written with `exp`: torch's own `silu` gives an element other bits at the end of a call than
    in its middle (scalar and vector code), `exp` does not.

    Args:
        gate_up: gate first.
        limit: what silu(gate) is clamped to from above and up from both sides, if anything.
    """
    gate, up = (half.float() for half in gate_up.chunk(2, dim=-1))
    gate = gate / (1.0 + torch.exp(-gate))
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (gate * up).to(gate_up.dtype)


class PlainSwiGLU:
    """One FFN made of other kernels."""

    native = None
    halves = None

    def __init__(
        self,
        linear: Callable[[Tensor, LinearWeight], Tensor],
        silu_mul: SiLUMul,
        gate_up: LinearWeight,
        down: LinearWeight,
        limit: float | None,
    ) -> None:
        self._linear = linear
        self._silu_mul = silu_mul
        self._gate_up = gate_up
        self._down = down
        self._limit = limit

    def __call__(self, rows: Tensor) -> Tensor:
        inner = self._silu_mul(self._linear(rows, self._gate_up), self._limit)
        return self._linear(inner, self._down)


class PlainGQA:
    """One layer up to its FFN made of other kernels.

    Args:
        kernels: returns them; they are not there yet when this is bound to them.
    """

    native: NativeAttention | None = None

    def __init__(self, kernels: Callable[[], Kernels], weights: GQAWeights) -> None:
        self._kernels = kernels
        self._weights = weights

    def __call__(
        self,
        hidden: Tensor,
        delta: Tensor | None,
        positions: Tensor,
        slots: Tensor,
        paged: PagedRows,
        layer: KVLayer,
    ) -> tuple[Tensor, Tensor]:
        kernels, weights = self._kernels(), self._weights
        norms = weights.norms
        hidden, rows = kernels.add_norm(hidden, delta, norms.before, norms.eps)
        qkv = kernels.linear(rows, weights.qkv)
        query = kernels.rope_write_kv(qkv, weights.num_heads, weights.rope, positions, slots, layer)
        attended = kernels.paged_attention(query, layer, paged, weights.window)
        projected = kernels.linear(kernels.prepare(attended), weights.output)
        return kernels.add_norm(hidden, projected, norms.after, norms.eps)


def sigmoid(x: Tensor) -> Tensor:
    """Compute 1 / (1 + exp(−x)) in float32, written with `exp` as `silu_mul` is."""
    return 1.0 / (1.0 + torch.exp(-x.float()))


def reference(dtype: torch.dtype) -> Kernels:
    """Return these kernels for weights and rows of a dtype; prepared rows are the rows."""
    kernels = Kernels(
        name="reference",
        row_format=RowFormat(dtype, lambda width: width),
        pack=pack,
        pack_parts=("weight",),
        dump=lambda weight: {"weight": _tensor(weight)},
        unpack=lambda parts: parts["weight"],
        prepare=lambda x: x,
        linear=linear,
        bind=lambda weight: None,
        rms_norm=rms_norm,
        add_norm=add_norm,
        rope=rope,
        write_kv=write_kv,
        rope_write_kv=rope_write_kv,
        paged_attention=paged_attention,
        gqa=lambda weights: PlainGQA(lambda: kernels, weights),
        silu_mul=silu_mul,
        swiglu=partial(PlainSwiGLU, linear, silu_mul),
        argmax=sampling.argmax,
        gumbel_argmax=sampling.gumbel_argmax,
        select=sampling.select,
    )
    return kernels


REFERENCE = reference(torch.float32)
