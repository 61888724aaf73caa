"""Tiny random checkpoints, written with the hub's names by transformers itself."""

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCAB_SIZE = 256 + len(SPECIAL)


def write_tokenizer(directory: Path) -> None:
    """Write a tokenizer with one token for each byte and three control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: index + len(SPECIAL) for index, char in enumerate(alphabet)}
    vocabulary |= {token: index for index, token in enumerate(SPECIAL)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": SPECIAL[1], "eos_token": SPECIAL[2]})
    )
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def write_tiny_llama(
    directory: Path, *, heads: int = 6, kv_heads: int = 2, tied: bool = False, seed: int = 0
) -> LlamaForCausalLM:
    """Write a Llama of a few thousand weights and return transformers' model of it."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=96,
        intermediate_size=176,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=512,
        rope_theta=10000.0,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.15,
    )
    model = LlamaForCausalLM(config).eval()
    write_checkpoint(directory, model)
    return model


def write_checkpoint(directory: Path, model: PreTrainedModel) -> None:
    """Write a model, its norms and biases made to matter, and a tokenizer."""
    perturb_norms(model)
    model.save_pretrained(directory)
    write_tokenizer(directory)


def perturb_norms(model: nn.Module) -> None:
    """Make norms and biases matter: at first they are all 1 or 0."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)


@functools.cache
def tiny_llama(
    heads: int = 6, kv_heads: int = 2, tied: bool = False
) -> tuple[Path, LlamaForCausalLM]:
    """Return one shared tiny checkpoint; nobody may change it."""
    directory = Path(tempfile.mkdtemp(prefix="tiny-llama-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory, write_tiny_llama(directory, heads=heads, kv_heads=kv_heads, tied=tied)
