"""Every kernel in plain torch: the specification, and the oracle of faster ones.

Torch's own products give a row other bits in other batch sizes (on AVX-512, fp32 `linear` has
one class each for 1, 2 and ≥ 4 rows). Here every product is made of calls of one fixed shape,
padded with zeros, so a row's bits depend on that row alone.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from afd_server.kernels.table import Kernels, KVLayer, LinearWeight, PagedRows

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
    assert isinstance(weight, Tensor), "the weight was not packed for these kernels"
    num_rows = x.shape[0]
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


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise rows by their root mean square in fp32, cast back, then scale (Llama's order)."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def rope_table(head_dim: int, theta: float, num_positions: int) -> Tensor:
    """Tabulate rotary angles: [num_positions, 2, head_dim] fp32, cosines then sines.

    Dimension i and i + head_dim/2 form a pair (NeoX order), as in the Llama checkpoints.
    """
    frequencies = 1.0 / theta ** (
        torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    )
    angles = torch.outer(torch.arange(num_positions).float(), frequencies)
    both = torch.cat((angles, angles), dim=-1)
    return torch.stack((both.cos(), both.sin()), dim=1)


def rope(x: Tensor, table: Tensor, positions: Tensor) -> Tensor:
    """Rotate heads by their position: x [tokens, heads, head_dim], positions [tokens]."""
    cos, sin = table[positions].to(x.dtype).unsqueeze(2).unbind(1)  # [tokens, 1, head_dim]
    half = x.shape[-1] // 2
    rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + rotated * sin


def write_kv(layer: KVLayer, slots: Tensor, keys: Tensor, values: Tensor) -> None:
    """Store keys and values [tokens, kv_heads, head_dim] at flat slots [tokens], in place."""
    layer.keys.view(-1, *keys.shape[1:]).index_copy_(0, slots, keys)
    layer.values.view(-1, *values.shape[1:]).index_copy_(0, slots, values)


def plan_paged_rows(
    num_keys: Sequence[int], block_ids: Sequence[Sequence[int]], block_size: int
) -> PagedRows:
    """Lay out which keys each row sees.

    Args:
        num_keys: for each row, how many positions it sees, itself included.
        block_ids: for each row, the block table of its sequence.
        block_size: positions in a block; divides `KEY_TILE`.
    """
    assert KEY_TILE % block_size == 0, f"block_size {block_size} does not divide {KEY_TILE}"
    blocks_per_tile = KEY_TILE // block_size
    order = sorted(range(len(num_keys)), key=lambda row: -num_keys[row])
    num_tiles = math.ceil(max(num_keys) / KEY_TILE)
    width = num_tiles * blocks_per_tile
    tables = torch.zeros(len(order), width, dtype=torch.int64)
    for place, row in enumerate(order):
        used = block_ids[row][:width]
        tables[place, : len(used)] = torch.tensor(used, dtype=torch.int64)
    active = tuple(sum(keys > tile * KEY_TILE for keys in num_keys) for tile in range(num_tiles))
    return PagedRows(
        order=torch.tensor(order, dtype=torch.int64),
        num_keys=torch.tensor([num_keys[row] for row in order], dtype=torch.int64),
        block_tables=tables,
        active=active,
    )


def paged_attention(query: Tensor, layer: KVLayer, rows: PagedRows) -> Tensor:
    """Attend with an online softmax over key tiles of 64, in order, in fp32.

    A row is computed alone, by products of fixed shape [group, head_dim] · [head_dim, 64], so
    decoding, prefill and chunked prefill agree bit for bit (FlashAttention's recurrence,
    arXiv 2205.14135 algorithm 1, with a tile size that never changes).

    Args:
        query: [tokens, heads, head_dim]; heads are grouped over the key/value heads.
        layer: the blocks, already holding the keys and values of these tokens.
        rows: what each token may see.

    Returns:
        [tokens, heads · head_dim] in the query's dtype.
    """
    out = torch.empty_like(query)
    ordered = query[rows.order]
    for start in range(0, query.shape[0], ROW_CHUNK):
        chunk = slice(start, start + ROW_CHUNK)
        out[rows.order[chunk]] = _attend_chunk(ordered[chunk], layer, rows, start)
    return out.flatten(1)


def _attend_chunk(query: Tensor, layer: KVLayer, rows: PagedRows, start: int) -> Tensor:
    """Attend for a few rows, which stand at `start` in the order of `rows`."""
    num_rows, num_heads, head_dim = query.shape
    block_size, num_kv_heads = layer.keys.shape[1:3]
    group = num_heads // num_kv_heads
    blocks_per_tile = KEY_TILE // block_size
    grouped = query.float().view(num_rows * num_kv_heads, group, head_dim) * head_dim**-0.5
    highest = torch.full((num_rows * num_kv_heads, group, 1), -math.inf)
    total = torch.zeros_like(highest)
    weighted = torch.zeros_like(grouped)
    for tile, num_active in enumerate(rows.active):
        stop = min(num_active, start + num_rows)
        if stop <= start:
            break
        blocks = slice(tile * blocks_per_tile, (tile + 1) * blocks_per_tile)
        tables = rows.block_tables[start:stop, blocks]
        end = (stop - start) * num_kv_heads
        scores = torch.bmm(grouped[:end], _key_tile(layer.keys, tables).mT)  # [rows, group, 64]
        scores.masked_fill_(_hidden_keys(rows.num_keys[start:stop], tile, num_kv_heads), -math.inf)
        new_highest = torch.maximum(highest[:end], scores.amax(-1, keepdim=True))
        weights = torch.exp(scores - new_highest)
        shrink = torch.exp(highest[:end] - new_highest)
        total[:end] = total[:end] * shrink + weights.sum(-1, keepdim=True)
        partial = torch.bmm(weights, _key_tile(layer.values, tables))
        weighted[:end] = weighted[:end] * shrink + partial
        highest[:end] = new_highest
    return (weighted / total).view(num_rows, num_heads, head_dim).to(query.dtype)


def _key_tile(blocks: Tensor, tables: Tensor) -> Tensor:
    """Copy one key tile for each row and head together: [rows · kv_heads, 64, head_dim] fp32."""
    tile = blocks[tables].flatten(1, 2)  # [rows, 64, kv_heads, head_dim]
    return tile.transpose(1, 2).float().reshape(-1, KEY_TILE, blocks.shape[-1])


def _hidden_keys(num_keys: Tensor, tile: int, num_kv_heads: int) -> Tensor:
    """Mark the keys a row may not see: [rows · kv_heads, 1, 64] bool."""
    positions = torch.arange(tile * KEY_TILE, (tile + 1) * KEY_TILE)
    hidden = positions >= num_keys.unsqueeze(1)
    return hidden.repeat_interleave(num_kv_heads, dim=0).unsqueeze(1)


def silu_mul(gate_up: Tensor) -> Tensor:
    """Compute silu(gate) · up for rows that hold both: [rows, 2 · n] → [rows, n].

    Written with `exp`: torch's own `silu` gives an element other bits at the end of a call than
    in its middle (scalar and vector code), `exp` does not.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    wide = gate.float()
    return (wide / (1.0 + torch.exp(-wide)) * up.float()).to(gate_up.dtype)


REFERENCE = Kernels(
    name="reference",
    pack=pack,
    linear=linear,
    rms_norm=rms_norm,
    rope=rope,
    write_kv=write_kv,
    paged_attention=paged_attention,
    silu_mul=silu_mul,
)
