"""Monoliths with experts = transformers; each half reads only its own tensors, however spelled."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from afd_server.core.errors import ModelError
from afd_server.core.model_spec import parse_model_spec, read_model_spec
from afd_server.core.topology import spread_experts
from afd_server.kernels.reference import REFERENCE
from afd_server.models.base import FFNShare
from afd_server.models.catalogue import ARCHITECTURES
from afd_server.models.head import Held
from afd_server.models.routing import RoutedRows, join
from afd_server.weights.checkpoint import Checkpoint
from afd_server.weights.dummy import DummyWeights
from afd_server.weights.packed import PackedWeights
from support.block_fp8 import plain, quantise
from support.experts import EXPERT_WRITERS, tiny_routed, write_qwen3_moe
from support.families import ROUTED, family
from support.monolith import load_halves, logits_in_chunks
from support.pools import EXACT

MODELS = [
    ("mixtral", {}),
    ("mixtral", {"experts": 4, "chosen": 4}),
    ("qwen3_moe", {"chosen": 3}),
    ("qwen3_moe", {"experts": 5, "chosen": 1, "dense_layers": (1,)}),
]
# families and where other checkpoints than the hub's have their experts
RESPELLED = [
    ("mixtral", "transformers"), ("qwen3_moe", "transformers"), ("deepseek_v3", "transformers"),
    ("step3_text", "moe.experts.{}"), ("step3_text", "moe.{}"), ("step3p5", "moe.experts.{}"),
]  # fmt: skip
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

    def _read(self, name, shape, place, dtype):
        tensor = super()._read(name, shape, place, dtype)
        self.elements[name] = self.elements.get(name, 0) + tensor.numel()
        return tensor


@pytest.mark.parametrize(("name", "spelling"), [*((name, "hub") for name in ROUTED), *RESPELLED])
def test_workers_read_their_own_experts_only_and_together_each_element_once(
    name, spelling, tmp_path
):
    directory = spelled(name, spelling, tmp_path)
    spec = read_model_spec(directory)
    architecture = ARCHITECTURES[spec.model_type]
    placement, ffn = spread_experts(spec.placed_by_layer, 3, 2, 1), RecordingReader(directory)
    for slot in range(6):
        share = FFNShare(slot % 2, 2, placement.experts_of(slot))
        Held(architecture, spec, PackedWeights(ffn, REFERENCE, None), REFERENCE, share)
    attention = RecordingReader(directory)
    architecture.attention(spec, PackedWeights(attention, REFERENCE, None), REFERENCE, 64)
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        sizes = {name: file.get_tensor(name).numel() for name in file.keys()}  # noqa: SIM118
    assert attention.elements.keys().isdisjoint(ffn.elements)
    assert attention.elements.keys() | ffn.elements.keys() == sizes.keys()
    assert ffn.elements == {name: sizes[name] for name in ffn.elements}


@pytest.mark.parametrize(("name", "spelling"), RESPELLED)
def test_every_spelling_of_experts_gives_the_bits_of_the_hubs(name, spelling, tmp_path):
    respelled = spelled(name, spelling, tmp_path)
    assert torch.equal(logits_of(respelled, 2), logits_of(family(name).directory, 2))


def spelled(name, spelling, target):
    """Return a family's checkpoint, its experts under other names or stacked otherwise."""
    directory = family(name).directory
    if spelling == "hub":
        return directory
    spec, tensors = read_model_spec(directory), load_file(directory / "model.safetensors")
    if spelling == "transformers":
        stack_experts(spec, tensors)
    else:
        unstack_experts(spec, tensors, spelling)
    for path in directory.iterdir():
        if path.suffix != ".safetensors" and path.is_file():
            (target / path.name).write_bytes(path.read_bytes())
    save_file(tensors, target / "model.safetensors")
    return target


def stack_experts(spec, tensors):
    """Put the experts of each layer into one tensor, gate over up."""
    block, gate, up, down = ("mlp", "gate_proj", "up_proj", "down_proj")
    if spec.model_type == "mixtral":
        block, gate, up, down = ("block_sparse_moe", "w1", "w3", "w2")
    for layer in filter(spec.num_chosen, range(spec.num_layers)):
        prefix = f"model.layers.{layer}"
        experts = [f"{prefix}.{block}.experts.{n}" for n in range(spec.experts.num_experts)]
        stacked = {
            name: torch.stack([tensors.pop(f"{expert}.{name}.weight") for expert in experts])
            for name in (gate, up, down)
        }
        both = torch.cat([stacked[gate], stacked[up]], 1)
        tensors[f"{prefix}.mlp.gate.weight"] = tensors.pop(f"{prefix}.{block}.gate.weight")
        tensors[f"{prefix}.mlp.experts.gate_up_proj"] = both
        tensors[f"{prefix}.mlp.experts.down_proj"] = stacked[down]


def unstack_experts(spec, tensors, module):
    """Give each expert of Step-3 tensors of its own in a module."""
    for layer in filter(spec.num_chosen, range(spec.num_layers)):
        for projection in ("gate_proj", "up_proj", "down_proj"):
            stacked = tensors.pop(f"model.layers.{layer}.moe.{projection}.weight")
            for expert, weight in enumerate(stacked):
                name = f"model.layers.{layer}.{module.format(expert)}.{projection}.weight"
                tensors[name] = weight.clone()


@pytest.mark.parametrize("num_parts", [1, 2])
@pytest.mark.parametrize("name", ["step3_text", "step3p5", "deepseek_v3"])
def test_experts_in_block_fp8_give_the_bits_of_their_products(name, num_parts, tmp_path):
    config = json.loads((family(name).directory / "config.json").read_text())
    config |= {"moe_intermediate_size": 200, "hidden_size": 192}  # more than a block, and no two
    spec, drawn = parse_model_spec(config, {}), RecordingDummy(torch.float32, 0)
    load_ffn(spec, drawn, 1)
    stored, multiplied = {}, {}
    for tensor, shape in drawn.shapes.items():
        values, scales = quantise(drawn.read(tensor, shape))
        stored |= {tensor: values, f"{tensor}_scale_inv": scales}
        multiplied[tensor] = plain(values, scales)
    rows, layer = torch.randn(5, 192, generator=torch.Generator().manual_seed(0)), 1
    chosen, count = spec.num_chosen(layer), spec.experts_by_layer[layer]
    experts = torch.arange(count - chosen, count, dtype=torch.int32).repeat(5, 1)
    routed = join(RoutedRows(rows, experts, torch.rand(5, chosen)))
    outputs = []
    for kind, tensors in (("fp8", stored), ("float32", multiplied)):
        (tmp_path / kind).mkdir()
        save_file(tensors, tmp_path / kind / "model.safetensors")
        parts = load_ffn(spec, Checkpoint(tmp_path / kind, torch.float32), num_parts)
        outputs.append([part.partial_sum(layer, routed) for part in parts])
    assert all(torch.equal(*pair) for pair in zip(*outputs, strict=True))
    assert all(output.abs().max() > 0.1 for output in outputs[0])


class RecordingDummy(DummyWeights):
    """Random weights that remember what was asked of them."""

    def __init__(self, dtype, seed):
        super().__init__(dtype, seed)
        self.shapes = {}

    def read_slice(self, name, shape, place):
        self.shapes[name] = shape
        return super().read_slice(name, shape, place)


def load_ffn(spec, reader, num_parts):
    weights, build = PackedWeights(reader, REFERENCE, None), ARCHITECTURES[spec.model_type].ffn
    return [build(spec, weights, REFERENCE, FFNShare(p, num_parts)) for p in range(num_parts)]


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
