"""Packed weights: made once, kept whole, never trusted when damaged."""

import pytest
import torch

from afd_server.kernels.cpu import native_kernels
from afd_server.weights import packed
from afd_server.weights.packed import PackedWeights, pack_path


class NoReader:
    """Packed weights are asked for by name; the checkpoint is not read here."""


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[0]))


def make_all(path, kernels, made):
    weights = PackedWeights(NoReader(), kernels, path)

    def make(name, tensor):
        made.append(name)
        return tensor

    packed = {
        name: weights.pack(name, lambda name=name, t=tensor: make(name, t))
        for name, tensor in {"a": draw(50, 70), "b": draw(16, 64)}.items()
    }
    weights.keep()
    return packed


@pytest.mark.parametrize("weights", ["int8", "float32", "bfloat16"])
def test_a_second_start_reads_what_the_first_one_packed(tmp_path, weights):
    kernels, path, made = native_kernels(weights), pack_path(tmp_path, weights), []
    first = make_all(path, kernels, made)
    assert made == ["a", "b"]
    second = make_all(path, kernels, made)
    assert made == ["a", "b"], "packed twice"
    x = kernels.prepare(draw(3, 70))
    assert torch.equal(kernels.linear(x, first["a"]), kernels.linear(x, second["a"]))


def test_a_damaged_file_is_packed_anew(tmp_path):
    kernels, path, made = native_kernels("int8"), pack_path(tmp_path, 1), []
    make_all(path, kernels, made)
    path.write_bytes(path.read_bytes()[:200])
    make_all(path, kernels, made)
    assert made == ["a", "b"] * 2
    make_all(path, kernels, made)
    assert made == ["a", "b"] * 2


def test_whatever_differs_is_another_file(tmp_path):
    paths = {pack_path(tmp_path, *parts) for parts in [("d", "int8", 0), ("d", "int8", 1), ("e",)]}
    assert len(paths) == 3


def test_files_of_earlier_formats_go_once_a_new_one_is_there(tmp_path, monkeypatch):
    kernels, made = native_kernels("int8"), []
    now = packed.PACK_VERSION
    paths = []
    for version in (now - 1, now + 1, now):
        monkeypatch.setattr(packed, "PACK_VERSION", version)
        paths.append(pack_path(tmp_path, 1))
        paths[-1].parent.mkdir(exist_ok=True)
        paths[-1].touch()
    old, later, path = paths
    unversioned = path.with_name("0123456789abcdef.safetensors")
    others = [path.with_name(name) for name in ("mine.safetensors", "v1-0.txt", f"{path.stem}.77")]
    for each in (unversioned, *others):
        each.touch()
    part = pack_path(tmp_path, "another part")
    make_all(part, kernels, made)
    assert set(part.parent.iterdir()) == {part, path, later, *others}
    with old.open("wb") as file:  # one that is being read
        file.write(b"kept")
    with old.open("rb") as reading:
        make_all(pack_path(tmp_path, "a third"), kernels, made)
        assert not old.exists() and reading.read() == b"kept"


def test_a_start_that_packs_nothing_removes_nothing(tmp_path):
    kernels, path = native_kernels("int8"), pack_path(tmp_path, 1)
    make_all(path, kernels, [])
    old = path.with_name("v1-0123456789abcdef.safetensors")
    old.touch()
    make_all(path, kernels, [])
    assert old.exists(), "an older server may be about to read it"


def test_a_directory_that_cannot_be_written_is_no_error(tmp_path, caplog):
    (tmp_path / ".packed").write_text("in the way")
    made = []
    make_all(pack_path(tmp_path, 1), native_kernels("int8"), made)
    make_all(pack_path(tmp_path, 1), native_kernels("int8"), made)
    assert made == ["a", "b"] * 2
    assert "cannot be kept" in caplog.text


def test_without_a_path_nothing_is_written(tmp_path):
    make_all(None, native_kernels("int8"), [])
    assert not list(tmp_path.iterdir())
