"""The specification itself: right values, and rows that know nothing of each other."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from afd_server.kernels.fingerprint import kernel_fingerprint
from afd_server.kernels.reference import (
    REFERENCE,
    PagedRun,
    linear,
    paged_attention,
    plan_paged_rows,
    reference,
    rms_norm,
    rope,
    rope_table,
    sigmoid,
    silu_mul,
    write_kv,
)
from afd_server.kernels.table import KVLayer

DTYPES = [torch.float32, torch.bfloat16]
BLOCK = 16


def rows_of(num_rows: int, width: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [0, 1, 2, 15, 16, 17, 33, 100])
def test_linear_is_the_product_with_the_transposed_weight(num_rows, dtype):
    x, weight = rows_of(num_rows, 48, dtype), rows_of(30, 48, dtype, seed=1)
    expected = x.float() @ weight.float().T
    tolerance = 1e-5 if dtype is torch.float32 else 0.2
    assert linear(x, weight).shape == (num_rows, 30)
    assert linear(x, weight).dtype is dtype
    assert (
        (linear(x, weight).float() - expected).abs().max().item() <= tolerance if num_rows else True
    )


ROW_FUNCTIONS = {
    "linear": lambda x: linear(x, rows_of(40, x.shape[1], x.dtype, seed=9)),
    "rms_norm": lambda x: rms_norm(x, x.new_ones(x.shape[1]) * 1.5, 1e-5),
    "silu_mul": silu_mul,
    "silu_mul_clamped": lambda x: silu_mul(x, 0.3),
    "sigmoid": sigmoid,
}


@pytest.mark.parametrize("name", ROW_FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [2, 50, 96, 352, 576, 1536])
def test_a_rows_bits_do_not_depend_on_its_neighbours_place_or_number(name, dtype, width):
    function, x = ROW_FUNCTIONS[name], rows_of(40, width, dtype)
    together = function(x)
    for num_rows in (1, 2, 3, 7, 16, 31):
        assert torch.equal(function(x[:num_rows].clone()), together[:num_rows])
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    assert torch.equal(function(x[order]), together[order])


def test_rms_norm_divides_by_the_root_mean_square():
    x = torch.tensor([[3.0, 4.0]])
    expected = x / math.sqrt(12.5 + 1e-5) * torch.tensor([1.0, 2.0])
    assert torch.allclose(rms_norm(x, torch.tensor([1.0, 2.0]), 1e-5), expected)


def test_silu_mul_is_silu_of_the_first_half_times_the_second():
    x = rows_of(5, 64, torch.float32)
    assert torch.allclose(silu_mul(x), F.silu(x[:, :32]) * x[:, 32:], atol=1e-6)


def test_a_limit_clamps_silu_from_above_and_the_other_factor_from_both_sides():
    x = rows_of(5, 64, torch.float32)
    expected = F.silu(x[:, :32]).clamp(max=0.3) * x[:, 32:].clamp(-0.3, 0.3)
    assert torch.allclose(silu_mul(x, 0.3), expected, atol=1e-6)
    assert not torch.allclose(silu_mul(x), expected, atol=1e-2)


def test_rope_turns_each_pair_by_position_times_frequency():
    table = rope_table(head_dim=4, theta=100.0, num_positions=8)
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    turned = rope(x, table, torch.tensor([3]))[0, 0]
    for pair, frequency in enumerate((1.0, 0.1)):  # theta^0, theta^(-2/4)
        a, b = x[0, 0, pair].item(), x[0, 0, pair + 2].item()
        angle = 3 * frequency
        assert turned[pair].item() == pytest.approx(
            a * math.cos(angle) - b * math.sin(angle), abs=1e-6
        )
        assert turned[pair + 2].item() == pytest.approx(
            b * math.cos(angle) + a * math.sin(angle), abs=1e-6
        )


def test_rope_at_position_zero_changes_nothing():
    x = rows_of(3, 8, torch.float32).view(3, 1, 8)
    table = rope_table(8, 1e4, 4)
    assert torch.equal(rope(x, table, torch.zeros(3, dtype=torch.int64)), x)


class PagedSequences:
    """Random keys and values of some sequences in shuffled blocks, and their dense copies."""

    def __init__(self, lengths, heads=(6, 2), head_dim=32, dtype=torch.float32, seed=0):
        generator = torch.Generator().manual_seed(seed)
        num_blocks = sum(-(-length // BLOCK) for length in lengths) + 3
        ids = torch.randperm(num_blocks, generator=generator).tolist()
        shape = (num_blocks, heads[1], BLOCK, head_dim)
        self.layer = KVLayer(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype))
        self.tables, self.keys, self.values, self.query = [], [], [], []
        for length in lengths:
            table = [ids.pop() for _ in range(-(-length // BLOCK))]
            draw = lambda *s: torch.randn(*s, generator=generator).to(dtype)  # noqa: E731
            keys, values = draw(length, heads[1], head_dim), draw(length, heads[1], head_dim)
            slots = torch.tensor([table[i // BLOCK] * BLOCK + i % BLOCK for i in range(length)])
            write_kv(self.layer, slots, keys, values)
            self.tables.append(table)
            self.keys.append(keys)
            self.values.append(values)
            self.query.append(draw(length, heads[0], head_dim))

    def attend(self, rows: list[tuple[int, int]], window=None) -> torch.Tensor:
        """Attend for (sequence, position) rows in one call."""
        plan = plan_paged_rows([PagedRun(p, 1, self.tables[s]) for s, p in rows])
        query = torch.stack([self.query[s][p] for s, p in rows])
        return paged_attention(query, self.layer, plan, window)

    def dense(self, sequence: int, position: int, window=10**6) -> torch.Tensor:
        seen = slice(max(0, position + 1 - window), position + 1)
        keys = self.keys[sequence][seen].transpose(0, 1).float()
        values = self.values[sequence][seen].transpose(0, 1).float()
        query = self.query[sequence][position].unsqueeze(1).float()
        group = query.shape[0] // keys.shape[0]
        out = F.scaled_dot_product_attention(
            query, keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
        )
        return out.flatten()


@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (8, 1)])
def test_paged_attention_equals_dense_attention(heads):
    sequences = PagedSequences([1, 16, 63, 64, 65, 200], heads=heads)
    rows = [(s, len(keys) - 1) for s, keys in enumerate(sequences.keys)] + [(5, 0), (5, 130)]
    out = sequences.attend(rows)
    for row, (sequence, position) in enumerate(rows):
        assert torch.allclose(out[row], sequences.dense(sequence, position), atol=2e-6)


@pytest.mark.parametrize("window", [1, 2, 63, 64, 65, 130, 500])
def test_a_window_hides_all_keys_but_the_latest(window):
    sequences = PagedSequences([1, 16, 63, 64, 65, 200])
    rows = [(s, len(keys) - 1) for s, keys in enumerate(sequences.keys)] + [(5, 0), (5, 130)]
    out = sequences.attend(rows, window)
    for row, (sequence, position) in enumerate(rows):
        assert torch.allclose(out[row], sequences.dense(sequence, position, window), atol=2e-6)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_decode_prefill_and_chunked_prefill_attend_bit_for_bit_alike(data):
    lengths = data.draw(st.lists(st.integers(1, 150), min_size=1, max_size=4))
    sequences = PagedSequences(lengths, dtype=data.draw(st.sampled_from(DTYPES)))
    everything = [(s, p) for s, length in enumerate(lengths) for p in range(length)]
    window = data.draw(st.none() | st.integers(1, 150))
    together = sequences.attend(everything, window)
    chosen = data.draw(st.lists(st.sampled_from(range(len(everything))), min_size=1, max_size=40))
    some = sequences.attend([everything[i] for i in chosen], window)
    assert torch.equal(some, together[chosen])
    alone = sequences.attend([everything[chosen[0]]], window)
    assert torch.equal(alone[0], together[chosen[0]])


def test_what_lies_in_foreign_blocks_does_not_matter():
    sequences = PagedSequences([40])
    before = sequences.attend([(0, 39), (0, 10)])
    mine = set(sequences.tables[0])
    for block in range(sequences.layer.keys.shape[0]):
        if block not in mine:
            sequences.layer.keys[block] = 1e4
            sequences.layer.values[block] = -1e4
    assert torch.equal(sequences.attend([(0, 39), (0, 10)]), before)


def test_the_fingerprint_names_dtype_and_kernels_and_is_repeatable():
    exact, short = torch.float32, torch.bfloat16
    first = kernel_fingerprint(REFERENCE, exact, exact)
    assert first == kernel_fingerprint(REFERENCE, exact, exact)
    assert first != kernel_fingerprint(REFERENCE, exact, short)
    assert first != kernel_fingerprint(reference(short), short, short)


def test_other_bits_give_another_fingerprint():
    from dataclasses import replace

    other = replace(REFERENCE, linear=lambda x, w: linear(x, w) * (1 + 2**-20))
    exact = torch.float32
    assert kernel_fingerprint(other, exact, exact) != kernel_fingerprint(REFERENCE, exact, exact)
