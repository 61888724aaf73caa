"""One tiny random checkpoint of each architecture, and an independent model of it."""

import atexit
import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from support.checkpoints import VOCAB_SIZE, write_checkpoint

SIZES = {
    "hidden_size": 96,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.15,
}


class Family(NamedTuple):
    """A checkpoint, and the logits [tokens, vocab] that belong to token ids."""

    directory: Path
    logits: Callable[[list[int]], Tensor]


def _llama(directory):
    return _saved(directory, LlamaForCausalLM(LlamaConfig(**SIZES, rope_theta=1e4)))


def _qwen2(directory):
    return _saved(directory, Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)))


def _qwen3(directory):
    # as in the release: the heads together are wider than the hidden size
    return _saved(directory, Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=32)))


def _saved(directory, model):
    write_checkpoint(directory, model.eval())
    return lambda ids: model(torch.tensor([ids])).logits[0]


WRITERS = {"llama": _llama, "qwen2": _qwen2, "qwen3": _qwen3}


@functools.cache
def family(name: str) -> Family:
    """Return one shared tiny checkpoint; nobody may change it."""
    directory = Path(tempfile.mkdtemp(prefix=f"tiny-{name}-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    torch.manual_seed(0)
    return Family(directory, WRITERS[name](directory))
