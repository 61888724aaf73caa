"""Reading safetensors: only what is asked for, and clear words for what is wrong."""

import json

import pytest
import torch
from safetensors.torch import save_file

from afd_server.core.errors import ModelError
from afd_server.weights.checkpoint import INDEX_NAME, Checkpoint

WEIGHT = torch.arange(24, dtype=torch.float32).view(4, 6)


@pytest.fixture
def directory(tmp_path):
    save_file({"a": WEIGHT}, tmp_path / "one.safetensors")
    save_file({"b": WEIGHT.bfloat16(), "ids": torch.arange(3)}, tmp_path / "two.safetensors")
    return tmp_path


def test_tensors_of_all_files_are_found_and_cast(directory):
    checkpoint = Checkpoint(directory, torch.bfloat16)
    assert torch.equal(checkpoint.read("a", (4, 6)), WEIGHT.bfloat16())
    assert torch.equal(checkpoint.read("b", (4, 6)), WEIGHT.bfloat16())


def test_a_tensor_is_read_in_float32_whatever_the_dtype_of_the_others(directory):
    save_file({"fine": WEIGHT / 7}, directory / "three.safetensors")
    checkpoint = Checkpoint(directory, torch.bfloat16)
    assert torch.equal(checkpoint.read_float32("fine", (4, 6)), WEIGHT / 7)
    assert checkpoint.read_float32("b", (4, 6)).dtype is torch.float32


def test_rows_and_columns_are_contiguous_copies(directory):
    checkpoint = Checkpoint(directory, torch.float32)
    rows = checkpoint.read_rows("a", (4, 6), 1, 3)
    columns = checkpoint.read_slice("a", (4, 6), (slice(None), slice(2, 5)))
    assert torch.equal(rows, WEIGHT[1:3])
    assert torch.equal(columns, WEIGHT[:, 2:5])
    assert columns.is_contiguous()
    assert columns.untyped_storage().nbytes() == columns.nbytes


def test_integers_where_weights_are_expected_are_refused(directory):
    with pytest.raises(ModelError, match=r"ids is torch\.int64, expected floats"):
        Checkpoint(directory, torch.float32).read("ids", (3,))


def test_a_directory_without_checkpoint_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"holds no \*\.safetensors"):
        Checkpoint(tmp_path, torch.float32)


def test_a_damaged_file_is_named(directory):
    (directory / "two.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{not json")
    with pytest.raises(ModelError, match=r"two\.safetensors is damaged"):
        Checkpoint(directory, torch.float32)


def test_a_shard_that_the_index_names_must_be_there(directory):
    weight_map = {"a": "one.safetensors", "c": "three.safetensors"}
    (directory / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelError, match=r"lacks three\.safetensors"):
        Checkpoint(directory, torch.float32)


def test_with_an_index_other_files_are_not_read(directory):
    (directory / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    with pytest.raises(ModelError, match="no tensor b"):
        Checkpoint(directory, torch.float32).read("b", (4, 6))
