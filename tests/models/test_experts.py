"""Monoliths with experts = transformers, and each half reads only its own tensors."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from afd_server.core.errors import ModelError
from afd_server.core.model_spec import read_model_spec
from afd_server.core.topology import spread_experts
from afd_server.kernels.reference import REFERENCE
from afd_server.models.base import FFNShare
from afd_server.models.catalogue import ARCHITECTURES
from afd_server.models.head import Held
from afd_server.weights.checkpoint import Checkpoint
from afd_server.weights.packed import PackedWeights
from support.experts import EXPERT_WRITERS, tiny_routed, write_qwen3_moe
from support.monolith import load_halves, logits_in_chunks
from support.pools import EXACT

MODELS = [
    ("mixtral", {}),
    ("mixtral", {"experts": 4, "chosen": 4}),
    ("qwen3_moe", {"chosen": 3}),
    ("qwen3_moe", {"experts": 5, "chosen": 1, "dense_layers": (1,)}),
]
IDS = torch.randint(3, 259, (90,), generator=torch.Generator().manual_seed(1)).tolist()


def logits_of(directory, num_parts=1, sizes=(90,)):
    return logits_in_chunks(*load_halves(directory, EXACT, num_parts), IDS, sizes)


def assert_equals_transformers(logits, reference):
    expected = reference(torch.tensor([IDS])).logits[0]
    assert (logits - expected).abs().max() <= 1e-4
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))
    assert expected.std() > 0.1  # the comparison means something


@pytest.mark.parametrize("num_parts", [1, 3])
@pytest.mark.parametrize(("kind", "shape"), MODELS)
def test_the_monolith_equals_transformers(kind, shape, num_parts):
    directory, reference = tiny_routed(kind, **shape)
    assert_equals_transformers(logits_of(directory, num_parts), reference)


def test_weights_that_are_not_renormalised_are_taken_as_they_are(tmp_path):
    reference = write_qwen3_moe(tmp_path, renormalises=False)
    assert_equals_transformers(logits_of(tmp_path), reference)


@pytest.mark.parametrize("kind", EXPERT_WRITERS)
def test_chunks_and_single_tokens_give_the_bits_of_one_prefill(kind):
    directory, _ = tiny_routed(kind)
    in_chunks = logits_of(directory, sizes=(1, 30, 16, 3, 1, 1, 38))
    assert torch.equal(in_chunks, logits_of(directory))


class RecordingReader(Checkpoint):
    """A checkpoint that remembers how many elements of a tensor were read."""

    def __init__(self, directory):
        super().__init__(directory, torch.float32)
        self.elements = {}

    def read_slice(self, name, shape, place):
        tensor = super().read_slice(name, shape, place)
        self.elements[name] = self.elements.get(name, 0) + tensor.numel()
        return tensor


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(("kind", "shape"), MODELS)
def test_workers_read_their_own_experts_only_and_together_each_element_once(
    kind, shape, stacked, tmp_path
):
    directory, _ = tiny_routed(kind, **shape)
    if stacked:
        directory = stack_experts(directory, tmp_path)
    spec = read_model_spec(directory)
    architecture = ARCHITECTURES[spec.model_type]
    placement, ffn = spread_experts(spec.placed_by_layer, 3, 2, 1), RecordingReader(directory)
    for slot in range(6):
        share = FFNShare(slot % 2, 2, placement.experts_of(slot))
        Held(architecture, spec, PackedWeights(ffn, REFERENCE, None), REFERENCE, share)
    attention = RecordingReader(directory)
    architecture.attention(spec, PackedWeights(attention, REFERENCE, None), REFERENCE, 64)
    for layer in range(spec.num_layers):  # read by the norm and by the gate
        if spec.num_chosen(layer):
            name = f"model.layers.{layer}.post_attention_layernorm.weight"
            attention.elements[name] //= 2
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        sizes = {name: file.get_tensor(name).numel() for name in file.keys()}  # noqa: SIM118
    assert attention.elements.keys().isdisjoint(ffn.elements)
    assert attention.elements | ffn.elements == sizes


@pytest.mark.parametrize(("kind", "shape"), MODELS)
def test_stacked_experts_give_the_bits_of_single_ones(kind, shape, tmp_path):
    directory, _ = tiny_routed(kind, **shape)
    stacked = stack_experts(directory, tmp_path)
    assert torch.equal(logits_of(stacked, 2), logits_of(directory, 2))


def stack_experts(directory, target):
    """Write a checkpoint again with the experts of a layer in one tensor, gate over up."""
    spec = read_model_spec(directory)
    tensors = load_file(directory / "model.safetensors")
    block, gate, up, down = ("mlp", "gate_proj", "up_proj", "down_proj")
    if spec.model_type == "mixtral":
        block, gate, up, down = ("block_sparse_moe", "w1", "w3", "w2")
    for layer, num_experts in enumerate(spec.experts_by_layer):
        if not spec.num_chosen(layer):
            continue
        prefix = f"model.layers.{layer}"
        experts = [f"{prefix}.{block}.experts.{expert}" for expert in range(num_experts)]
        stacked = {
            name: torch.stack([tensors.pop(f"{expert}.{name}.weight") for expert in experts])
            for name in (gate, up, down)
        }
        both = torch.cat([stacked[gate], stacked[up]], 1)
        tensors[f"{prefix}.mlp.gate.weight"] = tensors.pop(f"{prefix}.{block}.gate.weight")
        tensors[f"{prefix}.mlp.experts.gate_up_proj"] = both
        tensors[f"{prefix}.mlp.experts.down_proj"] = stacked[down]
    for path in directory.iterdir():
        if path.suffix != ".safetensors" and path.is_file():
            (target / path.name).write_bytes(path.read_bytes())
    save_file(tensors, target / "model.safetensors")
    return target


@pytest.mark.parametrize(
    ("name", "tensor", "complaint"),
    [
        ("block_sparse_moe.experts.5.w3.weight", None, r"no tensor .*5\.w3.*\[112, 96\]"),
        ("block_sparse_moe.experts.2.w2.weight", (96, 100), r"2\.w2.*\[96, 100\].*\[96, 112\]"),
        ("block_sparse_moe.gate.weight", None, r"no tensor .*gate\.weight.*\[8, 96\]"),
        ("block_sparse_moe.gate.weight", (7, 96), r"gate.* shape \[7, 96\].*\[8, 96\]"),
        ("mlp.experts.gate_up_proj", (8, 9, 96), r"gate_up_proj.*\[8, 9, 96\].*\[8, 224, 96\]"),
    ],
)
def test_a_missing_or_misshapen_tensor_is_named_with_what_was_expected(
    name, tensor, complaint, tmp_path
):
    EXPERT_WRITERS["mixtral"](tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop(f"model.layers.1.{name}", None)
    if tensor is not None:
        tensors[f"model.layers.1.{name}"] = torch.zeros(tensor)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=complaint):
        load_halves(tmp_path, EXACT)
