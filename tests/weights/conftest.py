"""A Llama of a few thousand weights as a GGUF file."""

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from tokenizers import pre_tokenizers

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2"]


class TinyLlama:
    """The content of a small GGUF file; tests change it before they write it."""

    hidden, inner, layers, heads, kv_heads, head_dim = 32, 64, 2, 4, 2, 6

    def __init__(self):
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        self.tokens = SPECIAL_TOKENS + alphabet + [merge.replace(" ", "") for merge in MERGES]
        self.architecture = "llama"
        self.metadata = {
            "llama.block_count": self.layers,
            "llama.context_length": 128,
            "llama.embedding_length": self.hidden,
            "llama.feed_forward_length": self.inner,
            "llama.attention.head_count": self.heads,
            "llama.attention.head_count_kv": self.kv_heads,
            "llama.attention.key_length": self.head_dim,
            "llama.attention.layer_norm_rms_epsilon": 1e-5,
            "llama.rope.freq_base": 50000.0,
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "smollm",
            "tokenizer.ggml.tokens": self.tokens,
            "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(self.tokens) - 3),
            "tokenizer.ggml.merges": MERGES,
            "tokenizer.ggml.add_bos_token": False,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.unknown_token_id": 0,
            "tokenizer.ggml.padding_token_id": 2,
            "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
        }
        self.tensors = self._random_tensors()
        self.quantised = {"blk.0.ffn_down.weight": GGMLQuantizationType.Q8_0}

    def _random_tensors(self):
        q_rows, kv_rows = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes = {"token_embd": (len(self.tokens), self.hidden), "output_norm": (self.hidden,)}
        for layer in range(self.layers):
            shapes |= {
                f"blk.{layer}.attn_norm": (self.hidden,),
                f"blk.{layer}.attn_q": (q_rows, self.hidden),
                f"blk.{layer}.attn_k": (kv_rows, self.hidden),
                f"blk.{layer}.attn_v": (kv_rows, self.hidden),
                f"blk.{layer}.attn_output": (self.hidden, q_rows),
                f"blk.{layer}.ffn_norm": (self.hidden,),
                f"blk.{layer}.ffn_gate": (self.inner, self.hidden),
                f"blk.{layer}.ffn_up": (self.inner, self.hidden),
                f"blk.{layer}.ffn_down": (self.hidden, self.inner),
            }
        rng = np.random.default_rng(7)
        return {
            f"{name}.weight": rng.standard_normal(shape, dtype=np.float32)
            for name, shape in shapes.items()
        }

    def write(self, path: Path) -> Path:
        writer = GGUFWriter(path, self.architecture)
        for key, value in self.metadata.items():
            add = {
                str: writer.add_string,
                bool: writer.add_bool,
                int: writer.add_uint32,
                float: writer.add_float32,
                list: writer.add_array,
            }[type(value)]
            add(key, value)
        for name, values in self.tensors.items():
            kind = self.quantised.get(name)
            data = values if kind is None else quantize(values, kind)
            writer.add_tensor(name, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


@pytest.fixture
def tiny() -> TinyLlama:
    return TinyLlama()
