"""Block-FP8 tensors: whole or in part, they are the plain product of values and factors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from afd_server.core.errors import ModelError
from afd_server.weights.checkpoint import Checkpoint
from support.block_fp8 import plain, quantise
from support.checkpoints import tiny_llama

MATRIX, STACK = (300, 200), (3, 150, 260)


@pytest.fixture(scope="module")
def stored():
    generator = torch.Generator().manual_seed(4)
    weights = {"a.weight": MATRIX, "b.weight": STACK}
    tensors = {}
    for name, shape in weights.items():
        values, scales = quantise(torch.randn(*shape, generator=generator) * 3)
        tensors |= {name: values, f"{name}_scale_inv": scales}
    return tensors | {"plain.weight": torch.randn(*MATRIX, generator=generator)}


@pytest.fixture(scope="module")
def directory(stored, tmp_path_factory):
    directory = tmp_path_factory.mktemp("fp8")
    factors = {name: tensor for name, tensor in stored.items() if name.endswith("_inv")}
    save_file(factors, directory / "factors.safetensors")  # in a file of their own
    rest = {name: tensor for name, tensor in stored.items() if name not in factors}
    save_file(rest, directory / "values.safetensors")
    return directory


@pytest.mark.parametrize(("name", "shape"), [("a.weight", MATRIX), ("b.weight", STACK)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_whole_tensor_is_the_product(directory, stored, name, shape, dtype):
    expected = plain(stored[name], stored[f"{name}_scale_inv"])
    found = Checkpoint(directory, dtype).read(name, shape)
    assert torch.equal(found, expected.to(dtype))
    assert found.is_contiguous()


@given(
    st.sampled_from([("a.weight", MATRIX), ("b.weight", STACK)]),
    st.sampled_from([0, 1, 64, 127, 128, 129, 149, 199]), st.integers(1, 300),
)  # fmt: skip
def test_any_rows_and_columns_are_those_of_the_whole(directory, stored, tensor, start, length):
    (name, shape), checkpoint = tensor, Checkpoint(directory, torch.float32)
    whole = plain(stored[name], stored[f"{name}_scale_inv"])
    first, last = start % shape[0], min(start % shape[0] + length, shape[0])
    assert torch.equal(checkpoint.read_rows(name, shape, first, last), whole[first:last])
    first, last = start % shape[1], min(start % shape[1] + length, shape[1])
    columns = checkpoint.read_slice(name, shape, (slice(None), slice(first, last)))
    assert torch.equal(columns, whole[:, first:last])
    assert columns.is_contiguous()


def test_tensors_that_are_not_quantised_are_read_as_they_are(directory, stored):
    found = Checkpoint(directory, torch.float32).read("plain.weight", MATRIX)
    assert torch.equal(found, stored["plain.weight"])


def test_float8_without_its_factors_is_refused_by_name(tmp_path, stored):
    save_file({"a.weight": stored["a.weight"]}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"no tensor a\.weight_scale_inv, expected shape \[3, 2\]"):
        Checkpoint(tmp_path, torch.float32).read("a.weight", MATRIX)


def test_factors_of_another_shape_and_other_float8_are_refused(tmp_path, stored):
    values = stored["a.weight"]
    tensors = {"a.weight": values, "a.weight_scale_inv": torch.ones(2, 3),
               "c.weight": values.to(torch.float8_e5m2)}  # fmt: skip
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path, torch.float32)
    with pytest.raises(ModelError, match=r"a\.weight_scale_inv has shape \[2, 3\]"):
        checkpoint.read("a.weight", MATRIX)
    with pytest.raises(ModelError, match=r"c\.weight is torch\.float8_e5m2"):
        checkpoint.read("c.weight", MATRIX)


def test_a_llama_in_block_fp8_is_near_the_unquantised_one(tmp_path):
    source = tiny_llama()[0]
    tensors = load_file(source / "model.safetensors")
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        values, scales = quantise(tensors[name])
        tensors |= {name: values, f"{name}_scale_inv": scales}
    save_file(tensors, tmp_path / "model.safetensors")
    name, shape = "model.layers.0.mlp.down_proj.weight", (96, 176)
    exact, quantised = (Checkpoint(path, torch.float32) for path in (source, tmp_path))
    cuts = [(slice(None), slice(*columns)) for columns in ((0, 64), (64, 176))]
    parts = torch.cat([quantised.read_slice(name, shape, cut) for cut in cuts], 1)
    assert torch.equal(parts, quantised.read(name, shape))
    assert float((parts - exact.read(name, shape)).std() / parts.std()) < 0.05
    norm = "model.norm.weight"
    assert torch.equal(quantised.read(norm, (96,)), exact.read(norm, (96,)))
