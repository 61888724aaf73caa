"""The native kernels, in every build that this machine can run, against their specification."""

import ctypes

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from afd_server.core.errors import ConfigError
from afd_server.kernels.cpu import (
    NEEDS,
    available_builds,
    interleave,
    native_kernels,
    pack_native_int8,
)
from afd_server.kernels.fingerprint import kernel_fingerprint
from afd_server.kernels.kv_format import store, stored_size
from afd_server.kernels.quant import (
    GROUP,
    linear_int8,
    pack_int8,
    quantise_rows,
    quantised_row_bytes,
    rotate,
    split_rows,
)
from afd_server.kernels.reference import (
    REFERENCE,
    PagedRun,
    PlainGQA,
    paged_attention,
    plan_paged_rows,
    rope_table,
)
from afd_server.kernels.table import GQAWeights, KVLayer, Norms

BUILDS = available_builds()
SHAPES = [(576, 960), (1536, 576), (64, 16), (64, 1), (96, 50), (1, 3), (65, 17), (200, 33)]
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NUM_ROWS = [0, 1, 37, 512]
KV_FORMATS = {**FLOATS, "int8": torch.int8}


def draw(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def native(build, weights="int8"):
    return native_kernels(weights, build)


def test_the_machines_builds_were_installed():
    assert "portable" in BUILDS, "no native kernels: reinstall with a C++ compiler"


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize(("width", "columns"), SHAPES)
def test_quantised_rows_and_int8_products_have_the_bits_of_the_specification(build, width, columns):
    kernels, weight = native(build), pack_int8(draw(columns, width, seed=1))
    for num_rows in (0, 1, 2, 5, 11, 12, 13, 24, 100):
        x = draw(num_rows, width, seed=num_rows, scale=3.0)
        if num_rows > 1:
            x[1] = 0.0  # a row without any scale
            x[2:, ::7] *= 1000.0  # and some with channels far above the others
        rows = kernels.prepare(x)
        assert rows.shape == (num_rows, kernels.row_format.size(width))
        assert torch.equal(rows, quantise_rows(x))
        assert torch.equal(kernels.linear(rows, interleave(weight)), linear_int8(rows, weight))


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize(("width", "columns"), [(576, 960), (65, 17)])
def test_a_bound_weight_multiplies_rows_as_any_does(build, width, columns):
    kernels = native(build)
    weight, rows = kernels.pack(draw(columns, width)), kernels.prepare(draw(5, width, seed=1))
    bound, out = kernels.bind(weight), torch.empty(5, columns)
    assert (bound.row_bytes, bound.width) == (rows.shape[1], columns)
    arguments = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p
    call = ctypes.CFUNCTYPE(None, *arguments)(bound.function)
    call(bound.context, rows.data_ptr(), 5, out.data_ptr())
    assert torch.equal(out, kernels.linear(rows, weight))
    assert native(build, "float32").bind(weight) is None and REFERENCE.bind(weight) is None


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("weights", ["int8", "float32", "bfloat16"])
def test_512_rows_are_512_single_rows(build, weights):
    kernels = native(build, weights)
    weight = kernels.pack(draw(70, 576, seed=1))
    rows = kernels.prepare(draw(512, 576, seed=2))
    together = kernels.linear(rows, weight)
    assert all(
        torch.equal(kernels.linear(rows[r : r + 1], weight)[0], together[r]) for r in range(512)
    )


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("weights", FLOATS)
@pytest.mark.parametrize(("width", "columns"), SHAPES)
def test_float_products_are_near_the_references(build, weights, width, columns):
    kernels, weight = native(build, weights), draw(columns, width, seed=1)
    for num_rows in (0, 1, 12, 13, 50):
        x = draw(num_rows, width, seed=num_rows)
        expected = x.double() @ weight.to(FLOATS[weights]).double().T
        got = kernels.linear(kernels.prepare(x), kernels.pack(weight))
        assert got.shape == (num_rows, columns)
        assert torch.allclose(got.double(), expected, rtol=1e-5, atol=1e-4)


def restore(rows, width):
    """The float rows that quantised rows stand for."""
    values, scales = split_rows(rows)
    return (rotate(values * scales.unsqueeze(-1)) / 8).flatten(1)[:, :width]


@given(st.integers(1, 6), st.integers(1, 200), st.floats(1e-20, 1e20))
@settings(max_examples=40, deadline=None)
def test_quantised_rows_are_within_half_a_step(num_rows, width, scale):
    x = draw(num_rows, width, seed=width) * scale
    rows = quantise_rows(x)
    assert rows.shape[1] == quantised_row_bytes(width)
    errors = F.pad(restore(rows, width) - x, (0, -width % GROUP)).view(num_rows, -1, GROUP)
    steps = split_rows(rows)[1]
    # of each rotated column; rotating back keeps the length of a group's 64 errors
    assert (errors.norm(dim=-1) <= 0.5001 * 8 * steps + 1e-30).all()


@given(st.lists(st.integers(-1000, 1000), min_size=64, max_size=64))
def test_a_rotation_is_undone_by_itself_up_to_64(column):
    group = torch.tensor(column, dtype=torch.float32)
    assert torch.equal(rotate(rotate(group)), 64 * group)


def test_a_rotation_changes_no_product():
    x, y = (draw(50, 3, 64, seed=seed).double() for seed in (0, 1))
    rotated = (rotate(x) * rotate(y)).sum(-1) / 64
    assert torch.allclose(rotated, (x * y).sum(-1), rtol=0, atol=1e-12)


@given(st.integers(0, 575), st.floats(20, 1000))
@settings(max_examples=20, deadline=None)
def test_a_channel_far_above_the_others_coarsens_its_group_little(channel, height):
    x = draw(8, 576, seed=channel)
    x[:, channel] = height
    group = torch.arange(576) // GROUP == channel // GROUP
    step = height / 127  # with a scale of the group as it is
    unrotated = (x[:, group] / step).round() * step - x[:, group]
    assert (restore(quantise_rows(x), 576) - x)[:, group].norm() < 0.5 * unrotated.norm()


def test_an_int8_product_is_near_the_float_product():
    x, weight = draw(20, 576), draw(300, 576, seed=1)
    exact, got = x @ weight.T, linear_int8(quantise_rows(x), pack_int8(weight))
    assert (got - exact).norm() / exact.norm() < 0.010


def test_a_row_that_was_not_prepared_is_refused():
    kernels = native_kernels("int8")
    with pytest.raises(AssertionError, match="prepared"):
        kernels.linear(draw(2, 64), pack_native_int8(draw(16, 64)))


class Paged:
    """Sequences of some lengths in shuffled blocks, and a query for each position."""

    def __init__(self, lengths, heads, kv_heads, head_dim, block_size=16, dtype=torch.float32):
        blocks = sum(-(-n // block_size) for n in lengths) + 2
        shape = (blocks, kv_heads, block_size, head_dim)
        self.layer = KVLayer(*(store(draw(*shape, seed=seed), dtype) for seed in (1, 2)))
        order = torch.randperm(blocks, generator=torch.Generator().manual_seed(3)).tolist()
        self.tables = [[order.pop() for _ in range(-(-n // block_size))] for n in lengths]
        self.queries = [draw(n, heads, head_dim, seed=4 + i) for i, n in enumerate(lengths)]

    def call(self, *runs):
        """Arguments of an attention over runs (sequence, start, length)."""
        query = torch.cat([self.queries[s][start : start + n] for s, start, n in runs])
        plan = plan_paged_rows([PagedRun(start, n, self.tables[s]) for s, start, n in runs])
        return query, self.layer, plan


def is_near(attended, expected, dtype):
    """Allow weights of int8 values, of 15 bits, to be rounded the other way now and then."""
    distance = (attended - expected).abs()
    return distance.max() < (2e-4 if dtype is torch.int8 else 3e-6) and distance.mean() < 3e-6


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("dtype", KV_FORMATS.values(), ids=KV_FORMATS)
@pytest.mark.parametrize("block_size", [1, 16, 64])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(9, 3, 64), (6, 2, 16), (8, 1, 256), (4, 4, 128), (5, 1, 48), (32, 1, 32), (4, 2, 20)],
)
def test_native_attention_is_the_references(build, dtype, block_size, heads, kv_heads, head_dim):
    paged = Paged([1, 15, 16, 17, 64, 100, 33], heads, kv_heads, head_dim, block_size, dtype)
    call = paged.call((0, 0, 1), (3, 10, 7), (2, 15, 1), (4, 0, 64), (5, 99, 1), (1, 3, 2))
    for window in (None, 1, 16, 23, 64):
        got = native(build).paged_attention(*call, window)
        expected = paged_attention(*call, window)
        assert is_near(got, expected, dtype)


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("dtype", KV_FORMATS.values(), ids=KV_FORMATS)
@pytest.mark.parametrize("heads", [(9, 3, 64), (8, 1, 256), (4, 4, 128)])
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_a_native_row_attends_alike_in_any_chunk_and_company(build, dtype, heads, data):
    lengths = data.draw(st.lists(st.integers(1, 90), min_size=1, max_size=5))
    paged, kernels = Paged(lengths, *heads, dtype=dtype), native(build)
    window = data.draw(st.none() | st.integers(1, 90))
    wholes = [
        kernels.paged_attention(*paged.call((s, 0, n)), window) for s, n in enumerate(lengths)
    ]
    runs = []
    for _ in range(data.draw(st.integers(1, 6))):
        sequence = data.draw(st.integers(0, len(lengths) - 1))
        start = data.draw(st.integers(0, lengths[sequence] - 1))
        runs.append((sequence, start, data.draw(st.integers(1, lengths[sequence] - start))))
    together = kernels.paged_attention(*paged.call(*runs), window)
    assert torch.equal(together, torch.cat([wholes[s][a : a + n] for s, a, n in runs]))


@pytest.mark.parametrize("dtype", KV_FORMATS.values(), ids=KV_FORMATS)
def test_attention_of_no_row_of_512_and_over_1000_keys_is_the_references(dtype):
    paged = Paged([1000, 512, 3], 4, 2, 32, dtype=dtype)
    runs = [(1, 0, 512), (0, 999, 1), (2, 0, 3), (0, 700, 20)]
    query, layer, plan = paged.call(*runs)
    for window in (None, 300):
        expected = paged_attention(query, layer, plan, window)
        for kernels in map(native, BUILDS):
            got = kernels.paged_attention(query, layer, plan, window)
            assert is_near(got, expected, dtype)
            for row, run in [(0, (1, 0, 1)), (300, (1, 300, 1)), (511, (1, 511, 1))]:
                alone = kernels.paged_attention(*paged.call(run), window)
                assert torch.equal(alone[0], got[row])
            none = kernels.paged_attention(*paged.call((0, 7, 0)), window)
            assert none.shape == (0, 4 * 32)


def test_stale_blocks_cannot_poison_a_row():
    paged = Paged([20], 4, 2, 64)
    kernels, call = native_kernels("int8"), paged.call((0, 5, 3))
    before = kernels.paged_attention(*call)
    for blocks in paged.layer:
        kept = blocks[paged.tables[0][0], :, :8].clone()
        blocks.fill_(float("nan"))
        blocks[paged.tables[0][0], :, :8] = kept
    assert torch.equal(kernels.paged_attention(*call), before)


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("num_rows", NUM_ROWS)
@pytest.mark.parametrize("width", [1, 16, 50, 96, 576])
def test_native_norms_and_activations_are_the_references_row_by_row(build, width, num_rows):
    kernels, exact = native(build), native(build, "float32")
    x, delta = draw(num_rows, width, scale=4.0), draw(num_rows, width, seed=5)
    weight, both = draw(width, seed=1), draw(num_rows, 2 * width, seed=2, scale=20.0)
    weight[::9] *= 50.0
    total, normed = exact.add_norm(x, delta, weight, 1e-5)
    assert torch.equal(total, x + delta)
    for got, expected in (
        (exact.rms_norm(x, weight, 1e-5), REFERENCE.rms_norm(x, weight, 1e-5)),
        (normed, REFERENCE.rms_norm(x + delta, weight, 1e-5)),
        (exact.silu_mul(both), REFERENCE.silu_mul(both)),
        (exact.silu_mul(both, 0.3), REFERENCE.silu_mul(both, 0.3)),
    ):
        assert torch.allclose(got, expected, rtol=2e-6, atol=2e-6)
    for limit in (None, 0.3):
        expected = quantise_rows(exact.silu_mul(both, limit))
        assert torch.equal(kernels.silu_mul(both, limit), expected)
    for given_delta in (None, delta):
        total, rows = kernels.add_norm(x, given_delta, weight, 1e-5)
        expected_total, expected = exact.add_norm(x, given_delta, weight, 1e-5)
        assert torch.equal(total, expected_total)
        assert torch.equal(rows, quantise_rows(expected))
    plain, clamped = exact.silu_mul(both), exact.silu_mul(both, 0.3)
    for row in range(0, num_rows, num_rows // 37 or 1):
        one = slice(row, row + 1)
        assert torch.equal(kernels.add_norm(x[one], delta[one], weight, 1e-5)[1][0], rows[row])
        assert torch.equal(exact.silu_mul(both[one])[0], plain[row])
        assert torch.equal(exact.silu_mul(both[one], 0.3)[0], clamped[row])


@pytest.mark.parametrize("build", BUILDS)
def test_silu_is_right_far_out(build):
    gate = torch.tensor([[-1e30, -200.0, -90.0, -0.0, 0.0, 90.0, 200.0, 1e30]])
    both = torch.cat((gate, torch.ones_like(gate)), 1)
    got = native(build, "float32").silu_mul(both)
    assert torch.allclose(got, REFERENCE.silu_mul(both), atol=1e-30)
    got = native(build, "float32").silu_mul(both.flip(1), 7.0)  # far out in the other factor
    assert torch.allclose(got, REFERENCE.silu_mul(both.flip(1), 7.0))


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("dtype", KV_FORMATS.values(), ids=KV_FORMATS)
@pytest.mark.parametrize("num_rows", NUM_ROWS)
@pytest.mark.parametrize(("heads", "head_dim"), [(3, 64), (1, 2), (5, 48)])
def test_native_rope_and_kv_writes_have_the_references_bits_also_on_views(
    build, dtype, heads, head_dim, num_rows
):
    kernels, table = native(build), rope_table(head_dim, 1e4, 50)
    whole, blocks = draw(num_rows, heads + 2, head_dim), num_rows // 4 + 1
    positions = torch.arange(num_rows) * 11 % 50
    for x in (whole[:, :heads], whole[:, 2:], whole.transpose(1, 2).contiguous().transpose(1, 2)):
        assert torch.equal(kernels.rope(x, table, positions), REFERENCE.rope(x, table, positions))
    slots = torch.randperm(4 * blocks, generator=torch.Generator().manual_seed(1))[:num_rows]
    written, fused = [], []
    for each in (kernels, REFERENCE):
        size = stored_size(head_dim, dtype)
        layer = KVLayer(*(torch.zeros(blocks, heads, 4, size, dtype=dtype) for _ in "kv"))
        each.write_kv(layer, slots, whole[:, :heads], whole[:, 2:])
        written.append(layer)
        layer = KVLayer(*(torch.zeros(blocks, 1, 4, size, dtype=dtype) for _ in "kv"))
        fused.append((each.rope_write_kv(whole.flatten(1), heads, table, positions, slots, layer),
                      *layer))  # fmt: skip
    for got, expected in zip((*written[0], *fused[0]), (*written[1], *fused[1]), strict=True):
        assert torch.equal(got, expected)


def test_rounding_to_bfloat16_is_torchs():
    bits = torch.randint(-(2**31), 2**31, (4, 2, 64), generator=torch.Generator().manual_seed(0))
    values = bits.to(torch.int32).view(torch.float32)
    values[0, 0, :4] = torch.tensor([float("inf"), -float("inf"), 0.0, -0.0])
    layer = KVLayer(*(torch.zeros(1, 2, 4, 64, dtype=torch.bfloat16) for _ in "kv"))
    native_kernels("int8").write_kv(layer, torch.arange(4), values, values)
    keys = layer.keys[0].transpose(0, 1)
    assert torch.equal(keys.isnan(), values.isnan())
    assert torch.equal(keys.nan_to_num(1), values.to(torch.bfloat16).nan_to_num(1))


@pytest.mark.parametrize("weights", ["int8", "float32", "bfloat16"])
@pytest.mark.parametrize("kv", KV_FORMATS.values(), ids=KV_FORMATS)
def test_all_builds_give_the_same_bits(weights, kv):
    prints = {kernel_fingerprint(native(build, weights), torch.float32, kv) for build in BUILDS}
    assert len(prints) == 1


def test_a_build_that_is_not_there_is_said():
    missing = next((name for name in NEEDS if name not in BUILDS), "avx1024")
    with pytest.raises(ConfigError, match=r"g\+\+ and reinstall"):
        native(missing)


def test_a_library_of_another_format_is_refused(monkeypatch):
    monkeypatch.setattr("afd_server.kernels.cpu.INTERFACE", 1)
    with pytest.raises(ConfigError, match="built from other sources"):
        native("portable")


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize(
    ("hidden", "inner", "middle"),
    [(64, 64, 64), (100, 33, 33), (64, 100, 100), (96, 80, 64), (100, 176, 128), (576, 1536, 768)],
)
def test_an_ffn_in_one_call_has_the_bits_of_its_parts(build, hidden, inner, middle):
    """The parts of each half of its columns, if both are whole blocks, are added in order."""
    kernels = native(build)
    gate, up = draw(inner, hidden, seed=1), draw(inner, hidden, seed=2)
    down = draw(hidden, inner, seed=3)
    packed = kernels.pack(torch.cat((gate, up))), kernels.pack(down)
    ranges = [slice(0, middle), slice(middle, inner)][: 1 + (middle < inner)]
    halves = [(kernels.pack(torch.cat((gate[r], up[r]))), kernels.pack(down[:, r])) for r in ranges]
    for num_rows in (0, 1, 5, 13, 24, 70):
        rows = kernels.prepare(draw(num_rows, hidden, seed=num_rows, scale=3.0))
        for limit in (None, 0.3):
            ffn = kernels.swiglu(*packed, limit)
            parts = [
                kernels.linear(kernels.silu_mul(kernels.linear(rows, first), limit), second)
                for first, second in halves
            ]
            assert torch.equal(ffn(rows), sum(parts[1:], parts[0]))
            assert torch.equal(called(ffn.native, rows, hidden), ffn(rows))
            assert (ffn.halves is None) == (len(parts) == 1)
            for half, part in zip(ffn.halves or (), parts, strict=bool(ffn.halves)):
                assert torch.equal(half(rows), part)
                assert torch.equal(called(half.native, rows, hidden), part)


def called(call, rows, width):
    out = torch.empty(rows.shape[0], width)
    assert (call.row_bytes, call.width) == (rows.shape[1], width)
    function = ctypes.CFUNCTYPE(
        None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p
    )(call.function)
    function(call.context, rows.data_ptr(), rows.shape[0], out.data_ptr())
    return out


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("kv_format", KV_FORMATS)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (4, 1, 256), (2, 2, 40)])
@pytest.mark.parametrize("num_rows", [7, 60])
def test_attention_in_one_call_has_the_bits_of_its_parts(
    build, kv_format, heads, kv_heads, head_dim, num_rows
):
    kernels, hidden, width = native(build), 100, heads * head_dim
    qkv = kernels.pack(draw(width + 2 * kv_heads * head_dim, hidden, seed=1))
    output = kernels.pack(draw(hidden, width, seed=2))
    rope, long = rope_table(head_dim, 1e4, 600), range(num_rows - 6)
    few = [PagedRun(0, 1, [3, 4]), PagedRun(17, 5, [5, 6])]
    paged = plan_paged_rows([*few, PagedRun(63, num_rows - 6, list(range(7, 44)))])
    positions = torch.tensor([0, *range(17, 22), *(63 + place for place in long)])
    places = (10 * 16 + 15 + place for place in long)
    slots = torch.tensor([3 * 16, *(6 * 16 + place for place in range(1, 6)), *places])
    kept = KVLayer(
        *(
            store(draw(44, kv_heads, 16, head_dim, seed=seed), KV_FORMATS[kv_format])
            for seed in (3, 4)
        )
    )
    norms = Norms(draw(hidden, seed=6), draw(hidden, seed=7), 1e-5)
    x = draw(num_rows, hidden, seed=5, scale=3.0)
    for window, delta in ((None, None), (20, draw(num_rows, hidden, seed=8)), (None, x)):
        one, parts = (KVLayer(*(part.clone() for part in kept)) for _ in range(2))
        weights = GQAWeights(qkv, output, rope, norms, heads, window)
        got = kernels.gqa(weights)(x, delta, positions, slots, paged, one)
        expected = PlainGQA(lambda: kernels, weights)(x, delta, positions, slots, paged, parts)
        assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))
        assert all(torch.equal(*pair) for pair in zip(one, parts, strict=True))
    none, nowhere = torch.empty(0, dtype=torch.int64), plan_paged_rows([PagedRun(9, 0, [3])])
    got = kernels.gqa(weights)(x[:0], None, none, none, nowhere, one)
    assert [part.shape[0] for part in got] == [0, 0]
