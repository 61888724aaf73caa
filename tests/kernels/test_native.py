"""The native kernels, in every build that this machine can run, against their specification."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from afd_server.core.errors import ConfigError
from afd_server.kernels.cpu import NEEDS, available_builds, interleave, native_int8, pack_native
from afd_server.kernels.fingerprint import kernel_fingerprint
from afd_server.kernels.quant import linear_int8, pack_int8, quantise_rows
from afd_server.kernels.reference import (
    REFERENCE,
    paged_attention,
    plan_paged_rows,
    rope_table,
)
from afd_server.kernels.table import KVLayer

BUILDS = available_builds()
SHAPES = [(576, 960), (1536, 576), (64, 16), (64, 1), (96, 50), (1, 3), (65, 17), (200, 33)]


def draw(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def test_the_machines_builds_were_installed():
    assert "portable" in BUILDS, "no native kernels: reinstall with a C++ compiler"


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize(("width", "columns"), SHAPES)
def test_int8_products_have_the_bits_of_the_specification(build, width, columns):
    kernels, weight = native_int8(build), pack_int8(draw(columns, width, seed=1))
    for rows in (0, 1, 2, 5, 11, 12, 13, 24, 100):
        x = draw(rows, width, seed=rows, scale=3.0)
        if rows > 1:
            x[1] = 0.0  # a row without any scale
        assert torch.equal(kernels.linear(x, interleave(weight)), linear_int8(x, weight))


@pytest.mark.parametrize("build", BUILDS)
def test_512_rows_are_512_single_rows(build):
    kernels, weight = native_int8(build), pack_native(draw(960, 576, seed=1))
    x = draw(512, 576, seed=2)
    together = kernels.linear(x, weight)
    assert all(
        torch.equal(kernels.linear(x[r : r + 1], weight)[0], together[r]) for r in range(512)
    )


@given(st.integers(1, 6), st.integers(1, 200), st.floats(1e-20, 1e20))
@settings(max_examples=40, deadline=None)
def test_quantised_rows_are_within_half_a_step(rows, width, scale):
    x = draw(rows, width, seed=width) * scale
    values, scales = quantise_rows(x)
    restored = (values * scales.unsqueeze(-1)).flatten(1)[:, :width]
    assert values.abs().max() <= 127
    step = scales.repeat_interleave(64, 1)[:, :width]
    assert ((restored - x).abs() <= 0.5001 * step + 1e-30).all()


def test_an_int8_product_is_near_the_float_product():
    x, weight = draw(20, 576), draw(300, 576, seed=1)
    exact, got = x @ weight.T, linear_int8(x, pack_int8(weight))
    assert (got - exact).norm() / exact.norm() < 0.012


class Paged:
    def __init__(self, lengths, heads, kv_heads, head_dim, block_size=16):
        blocks = sum(-(-n // block_size) for n in lengths) + 2
        self.layer = KVLayer(
            draw(blocks, block_size, kv_heads, head_dim, seed=1),
            draw(blocks, block_size, kv_heads, head_dim, seed=2),
        )
        order = torch.randperm(blocks, generator=torch.Generator().manual_seed(3)).tolist()
        self.tables = [[order.pop() for _ in range(-(-n // block_size))] for n in lengths]
        self.query = draw(len(lengths), heads, head_dim, seed=4)
        self.lengths, self.block_size = lengths, block_size

    def rows(self, chosen):
        lengths, tables = [self.lengths[i] for i in chosen], [self.tables[i] for i in chosen]
        return self.query[chosen], self.layer, plan_paged_rows(lengths, tables, self.block_size)


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(9, 3, 64), (6, 2, 16), (8, 1, 256), (4, 4, 128), (5, 1, 48), (32, 1, 32), (4, 2, 20)],
)
def test_native_attention_is_the_references(build, heads, kv_heads, head_dim):
    paged = Paged([1, 15, 16, 17, 64, 200, 33], heads, kv_heads, head_dim)
    everything = list(range(7))
    got = native_int8(build).paged_attention(*paged.rows(everything))
    expected = paged_attention(*paged.rows(everything))
    assert (got - expected).abs().max() < 2e-6


@pytest.mark.parametrize("build", BUILDS)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_a_native_row_attends_alike_in_any_company(build, data):
    lengths = data.draw(st.lists(st.integers(1, 120), min_size=1, max_size=8))
    paged, kernels = Paged(lengths, 9, 3, 64), native_int8(build)
    together = kernels.paged_attention(*paged.rows(list(range(len(lengths)))))
    chosen = data.draw(st.lists(st.sampled_from(range(len(lengths))), min_size=1, max_size=6))
    assert torch.equal(kernels.paged_attention(*paged.rows(chosen)), together[chosen])


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("width", [1, 16, 50, 96, 576])
def test_native_norms_and_activations_are_the_references_row_by_row(build, width):
    native = native_int8(build)
    x, weight = draw(37, width, scale=4.0), draw(width, seed=1)
    both = draw(37, 2 * width, seed=2, scale=20.0)
    for got, expected in (
        (native.rms_norm(x, weight, 1e-5), REFERENCE.rms_norm(x, weight, 1e-5)),
        (native.silu_mul(both), REFERENCE.silu_mul(both)),
    ):
        assert torch.allclose(got, expected, rtol=2e-6, atol=2e-6)
    for row in range(37):
        one = slice(row, row + 1)
        assert torch.equal(
            native.rms_norm(x[one], weight, 1e-5)[0], native.rms_norm(x, weight, 1e-5)[row]
        )
        assert torch.equal(native.silu_mul(both[one])[0], native.silu_mul(both)[row])


@pytest.mark.parametrize("build", BUILDS)
def test_silu_is_right_far_out(build):
    gate = torch.tensor([[-1e30, -200.0, -90.0, -0.0, 0.0, 90.0, 200.0, 1e30]])
    got = native_int8(build).silu_mul(torch.cat((gate, torch.ones_like(gate)), 1))
    assert torch.allclose(
        got, REFERENCE.silu_mul(torch.cat((gate, torch.ones_like(gate)), 1)), atol=1e-30
    )


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize(("heads", "head_dim"), [(3, 64), (1, 2), (5, 48)])
def test_native_rope_and_kv_writes_have_the_references_bits_also_on_views(build, heads, head_dim):
    native, table = native_int8(build), rope_table(head_dim, 1e4, 50)
    whole = draw(9, heads + 2, head_dim)
    positions = torch.tensor([0, 3, 49, 7, 7, 1, 2, 30, 11])
    for x in (whole[:, :heads], whole[:, 2:], whole.transpose(1, 2).contiguous().transpose(1, 2)):
        assert torch.equal(native.rope(x, table, positions), REFERENCE.rope(x, table, positions))
    layers = [
        KVLayer(torch.zeros(4, 4, heads, head_dim), torch.zeros(4, 4, heads, head_dim))
        for _ in "ab"
    ]
    slots = torch.tensor([5, 0, 15, 3, 4, 9, 10, 11, 2])
    for kernels, layer in zip((native, REFERENCE), layers, strict=True):
        kernels.write_kv(layer, slots, whole[:, :heads], whole[:, 2:])
    assert torch.equal(layers[0].keys, layers[1].keys)
    assert torch.equal(layers[0].values, layers[1].values)


def test_all_builds_give_the_same_bits():
    prints = {kernel_fingerprint(native_int8(build), torch.float32) for build in BUILDS}
    assert len(prints) == 1


def test_a_build_that_is_not_there_is_said():
    missing = next((name for name in NEEDS if name not in BUILDS), "avx1024")
    with pytest.raises(ConfigError, match=r"g\+\+.*--quantization none"):
        native_int8(missing)
