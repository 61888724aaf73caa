"""Monolith = transformers, and each half reads only its own tensors."""

import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from afd_server.core.errors import ModelError
from afd_server.core.model_spec import read_model_spec
from afd_server.kernels.reference import REFERENCE, PagedRun, plan_paged_rows
from afd_server.models.base import FFNShare, MicroBatch
from afd_server.models.head import Held
from afd_server.models.llama import LLAMA
from afd_server.models.monolith import run_monolith
from afd_server.weights.checkpoint import Checkpoint
from afd_server.weights.packed import PackedWeights
from afd_server.workers.attention.kv_store import KVStore
from support.checkpoints import tiny_llama, write_tiny_llama

SHAPES = [
    {"heads": 6, "kv_heads": 2},
    {"heads": 6, "kv_heads": 6, "tied": True},
    {"heads": 4, "kv_heads": 1},
]


class RecordingReader:
    """A checkpoint that remembers what was asked of it."""

    def __init__(self, directory):
        self.inner = Checkpoint(directory, torch.float32)
        self.elements: dict[str, int] = {}

    def __getattr__(self, method):
        def read(name, *args):
            tensor = getattr(self.inner, method)(name, *args)
            self.elements[name] = self.elements.get(name, 0) + tensor.numel()
            return tensor

        return read


def weights_of(reader):
    return PackedWeights(reader, REFERENCE, None)


def halves(directory, num_parts=1):
    spec, reader = read_model_spec(directory), weights_of(Checkpoint(directory, torch.float32))
    shares = [FFNShare(part, num_parts) for part in range(num_parts)]
    held = [Held(LLAMA, spec, reader, REFERENCE, share) for share in shares]
    return spec, LLAMA.attention(spec, reader, REFERENCE, 256), held


def batch_of(spec, kv, ids, start=0, table=tuple(range(16))):
    positions = range(start, start + len(ids))
    return MicroBatch(
        token_ids=torch.tensor(ids),
        positions=torch.tensor(list(positions)),
        slots=torch.tensor([table[p // 16] * 16 + p % 16 for p in positions]),
        rows=plan_paged_rows([PagedRun(start, len(ids), table)]),
        logit_rows=torch.arange(len(ids)),
        kv=kv,
    )


def empty_kv(spec):
    return KVStore(spec, 20, 16, torch.float32).layers


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_parts", [1, 2, 5])
def test_the_monolith_equals_transformers(shape, num_parts):
    directory, reference = tiny_llama(**shape)
    spec, attention, held = halves(directory, num_parts)
    ids = torch.randint(
        3, spec.vocab_size, (150,), generator=torch.Generator().manual_seed(1)
    ).tolist()
    logits = run_monolith(attention, held, batch_of(spec, empty_kv(spec), ids))
    expected = reference(torch.tensor([ids])).logits[0]
    assert (logits - expected).abs().max() < 1e-4
    assert expected.std() > 0.1  # the comparison means something


def test_chunks_and_single_tokens_give_the_bits_of_one_prefill():
    spec, attention, held = halves(tiny_llama()[0])
    ids = torch.randint(
        3, spec.vocab_size, (90,), generator=torch.Generator().manual_seed(2)
    ).tolist()
    whole = run_monolith(attention, held, batch_of(spec, empty_kv(spec), ids))
    kv, start, parts = empty_kv(spec), 0, []
    for size in (1, 30, 16, 3, 1, 1, 38):
        parts.append(
            run_monolith(attention, held, batch_of(spec, kv, ids[start : start + size], start))
        )
        start += size
    assert start == len(ids)
    assert torch.equal(torch.cat(parts), whole)


def test_each_half_reads_only_its_own_tensors_and_together_they_read_all():
    directory, _ = tiny_llama()
    spec = read_model_spec(directory)
    attention, ffn = RecordingReader(directory), RecordingReader(directory)
    LLAMA.attention(spec, weights_of(attention), REFERENCE, 64)
    for part in range(3):
        Held(LLAMA, spec, weights_of(ffn), REFERENCE, FFNShare(part, 3))
    assert not any(".mlp." in name or "lm_head" in name for name in attention.elements)
    assert all(".mlp." in name or "lm_head" in name for name in ffn.elements)
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        sizes = {name: file.get_tensor(name).numel() for name in file.keys()}  # noqa: SIM118
    assert attention.elements | ffn.elements == sizes  # shards read each element once


MEASURE_PEAK = """
import resource, sys, torch
from pathlib import Path
from afd_server.core.model_spec import read_model_spec
from afd_server.kernels.reference import REFERENCE
from afd_server.models.base import FFNShare
from afd_server.models.llama import LLAMA
from afd_server.weights.checkpoint import Checkpoint
from afd_server.weights.packed import PackedWeights
directory, role = Path(sys.argv[1]), sys.argv[2]
spec = read_model_spec(directory)
torch.ones(64, 64) @ torch.ones(64, 64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
reader = PackedWeights(Checkpoint(directory, torch.float32), REFERENCE, None)
if role == "attention":
    half = LLAMA.attention(spec, reader, REFERENCE, 64)
else:
    half = LLAMA.ffn(spec, reader, REFERENCE, FFNShare(0, 2))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.parametrize("role", ["attention", "ffn"])
def test_loading_a_half_takes_its_own_bytes_and_one_tensor_more(tmp_path, role):
    hidden, inner, layers, vocab = 512, 2048, 8, 8000
    write_big_llama(tmp_path, hidden, inner, layers, vocab)
    mlp = 3 * hidden * inner * 4
    if role == "attention":
        own = (layers * 4 * hidden * hidden + vocab * hidden) * 4
        largest = vocab * hidden * 4
    else:
        own, largest = layers * mlp // 2, hidden * inner * 4
    peak = int(
        subprocess.run(
            [sys.executable, "-c", MEASURE_PEAK, str(tmp_path), role],
            capture_output=True, text=True, check=True,
        ).stdout
    )  # fmt: skip
    assert peak < own + 2 * largest + 16 * 2**20, f"{peak >> 20} MiB for {own >> 20} MiB of weights"


def write_big_llama(directory, hidden, inner, layers, vocab):
    """Write a checkpoint large enough that its parts stand out of the noise."""
    import json

    tensors = {
        "model.embed_tokens.weight": torch.zeros(vocab, hidden),
        "model.norm.weight": torch.ones(hidden),
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = torch.ones(hidden)
        for name in "qkvo":
            tensors[f"{prefix}self_attn.{name}_proj.weight"] = torch.zeros(hidden, hidden)
        for name, shape in (
            ("gate", (inner, hidden)),
            ("up", (inner, hidden)),
            ("down", (hidden, inner)),
        ):
            tensors[f"{prefix}mlp.{name}_proj.weight"] = torch.zeros(shape)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(
        json.dumps(
            {
                "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner,
                "num_hidden_layers": layers, "num_attention_heads": 8, "vocab_size": vocab,
                "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
            }
        )
    )  # fmt: skip


def test_a_missing_tensor_is_named_with_its_shape(tmp_path):
    write_tiny_llama(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ModelError, match=r"no tensor model\.layers\.1\.mlp\.up_proj.*\[176, 96\]"):
        halves(tmp_path)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(tmp_path):
    write_tiny_llama(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({"model.norm.weight": torch.ones(95)}))
    with pytest.raises(ModelError, match=r"model\.norm\.weight has shape \[95\].*\[96\]"):
        halves(tmp_path)


def rewrite(directory, change):
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
