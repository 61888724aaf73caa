"""Random weights: the same for everybody, however they are cut."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from afd_server.core.errors import ModelError
from afd_server.weights import dummy
from afd_server.weights.dummy import DummyWeights
from afd_server.weights.manifest import model_digest

WEIGHTS = DummyWeights(torch.float32, seed=0)
PINNED = [0.4008896052837372, -0.15876540541648865, 0.8501482009887695, -0.8007721304893494]


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """Let tensors of a test have many blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dummy, "BLOCK_ELEMENTS", 60)
        yield


@given(
    st.sampled_from([(50, 12), (50, 70), (7, 3, 5), (200,)]),
    st.integers(0, 50), st.integers(0, 50),
)  # fmt: skip
def test_parts_are_parts_of_the_whole(shape, one, other):
    whole, (start, stop) = WEIGHTS.read("w", shape), sorted((one, other))
    assert whole.shape == shape
    start, stop = min(start, shape[0] - 1), max(min(stop, shape[0]), min(start, shape[0] - 1) + 1)
    assert torch.equal(WEIGHTS.read_rows("w", shape, start, stop), whole[start:stop])
    if len(shape) > 1:
        start, stop = start % shape[1], shape[1]
        columns = WEIGHTS.read_slice("w", shape, (slice(None), slice(start, stop)))
        assert torch.equal(columns, whole[:, start:stop])
        assert columns.is_contiguous()


def test_another_name_shape_or_seed_gives_other_weights():
    whole = WEIGHTS.read("w", (8, 8))
    assert torch.equal(whole, DummyWeights(torch.float32, seed=0).read("w", (8, 8)))
    others = [
        WEIGHTS.read("v", (8, 8)),
        WEIGHTS.read("w", (8, 9))[:, :8],
        DummyWeights(torch.float32, seed=1).read("w", (8, 8)),
    ]
    assert not any((whole == other).any() for other in others)
    rounded = DummyWeights(torch.bfloat16, seed=0)
    assert torch.equal(rounded.read("w", (8, 8)), whole.bfloat16())
    assert torch.equal(rounded.read_float32("w", (8, 8)), whole)


def test_the_values_are_those_of_every_version_and_machine():
    assert WEIGHTS.read("w", (2, 2)).flatten().tolist() == PINNED


def test_matrices_keep_the_size_of_activations_and_vectors_lie_around_one():
    matrix, vector = WEIGHTS.read("m", (400, 300)), WEIGHTS.read("n", (1000,))
    outputs = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)) @ matrix.T
    assert float(outputs.std()) == pytest.approx(1.0, abs=0.03)
    assert float(vector.mean()) == pytest.approx(1.0, abs=0.01)
    assert 0.9 <= float(vector.min()) < 0.905 < 1.095 < float(vector.max()) <= 1.1


def test_the_digest_names_config_and_dummy_and_needs_no_other_file(tmp_path):
    with pytest.raises(ModelError, match=r"lacks config\.json"):
        model_digest(tmp_path, "dummy")
    (tmp_path / "config.json").write_text("{}")
    first = model_digest(tmp_path, "dummy")
    (tmp_path / "tokenizer.json").write_text("{}")
    assert model_digest(tmp_path, "dummy") == first != model_digest(tmp_path)
    (tmp_path / "config.json").write_text("{ }")
    assert model_digest(tmp_path, "dummy") != first
