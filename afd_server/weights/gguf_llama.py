"""Turn a GGUF file of architecture `llama` into a Hugging Face model directory.

Once converted, a model is read like any other: no reader, worker or test knows of GGUF. The
safetensors file is written here tensor by tensor rather than by the library, which wants the
whole model in memory (and torch, which nothing here needs).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple  # Any: values of a stranger's metadata, checked one by one

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor, dequantize, quantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm

from afd_server.core.errors import ModelError

_BF16_BYTES = 2
# Kinds of token as GGUF numbers them (`tokenizer.ggml.token_type`).
_CONTROL_TOKEN = 3
_USER_DEFINED_TOKEN = 4


class _Target(NamedTuple):
    """Where a GGUF tensor goes. `num_heads` is set if its rows must be un-permuted."""

    name: str
    shape: tuple[int, ...]
    num_heads: int | None = None


@dataclass(frozen=True, slots=True)
class _Shape:
    """What the metadata says about the model. Sizes are in elements."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int


def convert_gguf_llama(gguf_path: Path, directory: Path) -> None:
    """Write config, tokenizer, chat template and bf16 weights of a GGUF into a directory.

    Quantised weights are dequantised in fp32 and rounded to the nearest bf16: the result is as
    good as the quantised model, no better. Peak memory is one tensor in fp32 (twice while the
    rows of a query or key projection are put in order) and its bf16 result; the GGUF itself is
    mapped, not read. Progress goes to stderr if that is a terminal.

    Args:
        gguf_path: the file to convert; it is not changed.
        directory: an existing directory; files of the same names are replaced.

    Raises:
        ModelError: the file is damaged, or holds something a plain Llama does not have.
    """
    reader, metadata = _open(gguf_path)
    _refuse_unsupported(metadata)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    tokens = _strings(metadata, "tokenizer.ggml.tokens")
    shape = _read_shape(metadata, vocab_size=len(tokens))
    tied = "output.weight" not in tensors
    targets = _plan(shape, tied)
    _check_tensors(tensors, targets)

    _write_json(directory / "config.json", _config(metadata, shape, tied))
    _write_json(directory / "generation_config.json", _special_ids(metadata, "bos", "eos", "pad"))
    _write_json(directory / "tokenizer_config.json", _tokenizer_config(metadata, tokens))
    if template := metadata.get("tokenizer.chat_template"):
        (directory / "chat_template.jinja").write_text(str(template), encoding="utf-8")
    build_tokenizer(metadata).save(str(directory / "tokenizer.json"))
    _write_weights(directory / "model.safetensors", tensors, targets)


def build_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """Build the byte-level BPE tokenizer that GGUF metadata describes, with the same ids.

    Control tokens become special tokens: found in text as a whole, left out when decoding with
    `skip_special_tokens`. No token is put before or after a text.

    Raises:
        ModelError: the lists of tokens, types and merges do not fit together.
    """
    tokens = _strings(metadata, "tokenizer.ggml.tokens")
    kinds = metadata.get("tokenizer.ggml.token_type") or []
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens) or len(kinds) != len(tokens):
        raise ModelError(
            f"GGUF: {len(tokens)} tokens ({len(vocab)} different) of {len(kinds)} types; "
            "expected one type for each token and no token twice"
        )
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=_merges(metadata, vocab)))
    tokenizer.pre_tokenizer = _smollm_pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, kinds, strict=True):
        if kind == _CONTROL_TOKEN:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == _USER_DEFINED_TOKEN:
            tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])
    return tokenizer


def _open(path: Path) -> tuple[GGUFReader, dict[str, Any]]:
    try:
        reader = GGUFReader(path)
        return reader, {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        # The reader checks little: a damaged file shows as whatever fails first.
        raise ModelError(f"{path} is no intact GGUF file ({error}); fetch it anew") from error


def _refuse_unsupported(metadata: Mapping[str, Any]) -> None:
    wanted: tuple[tuple[str, tuple[object, ...]], ...] = (
        ("general.architecture", ("llama",)),
        ("tokenizer.ggml.model", ("gpt2",)),
        ("tokenizer.ggml.pre", ("smollm",)),
        ("tokenizer.ggml.add_bos_token", (False, None)),
        ("tokenizer.ggml.add_eos_token", (False, None)),
        ("llama.rope.scaling.type", ("none", None)),
    )
    for key, supported in wanted:
        if (value := metadata.get(key)) not in supported:
            raise ModelError(f"GGUF: {key} {value!r} is not supported; expected {supported[0]!r}")


def _read_shape(metadata: Mapping[str, Any], vocab_size: int) -> _Shape:
    hidden_size = _integer(metadata, "llama.embedding_length")
    num_heads = _integer(metadata, "llama.attention.head_count")
    head_dim = _integer(metadata, "llama.attention.key_length", default=hidden_size // num_heads)
    rotated = _integer(metadata, "llama.rope.dimension_count", default=head_dim)
    if rotated != head_dim or head_dim % 2:
        raise ModelError(
            f"GGUF: {rotated} rotated dimensions in a head of {head_dim} are not supported; "
            "expected all of them, an even number"
        )
    return _Shape(
        hidden_size=hidden_size,
        intermediate_size=_integer(metadata, "llama.feed_forward_length"),
        num_layers=_integer(metadata, "llama.block_count"),
        num_heads=num_heads,
        num_kv_heads=_integer(metadata, "llama.attention.head_count_kv", default=num_heads),
        head_dim=head_dim,
        vocab_size=vocab_size,
    )


def _plan(shape: _Shape, tied: bool) -> dict[str, _Target]:
    """Return the target of every GGUF tensor, in the order in which they are written."""
    hidden, vocab = shape.hidden_size, shape.vocab_size
    targets = {"token_embd.weight": _Target("model.embed_tokens.weight", (vocab, hidden))}
    for layer in range(shape.num_layers):
        for source, target in _plan_layer(shape).items():
            name = f"model.layers.{layer}.{target.name}.weight"
            targets[f"blk.{layer}.{source}.weight"] = target._replace(name=name)
    targets["output_norm.weight"] = _Target("model.norm.weight", (hidden,))
    if not tied:
        targets["output.weight"] = _Target("lm_head.weight", (vocab, hidden))
    return targets


def _plan_layer(shape: _Shape) -> dict[str, _Target]:
    hidden, inner = shape.hidden_size, shape.intermediate_size
    q_heads, kv_heads = shape.num_heads, shape.num_kv_heads
    q_rows, kv_rows = q_heads * shape.head_dim, kv_heads * shape.head_dim
    return {
        "attn_norm": _Target("input_layernorm", (hidden,)),
        "attn_q": _Target("self_attn.q_proj", (q_rows, hidden), q_heads),
        "attn_k": _Target("self_attn.k_proj", (kv_rows, hidden), kv_heads),
        "attn_v": _Target("self_attn.v_proj", (kv_rows, hidden)),
        "attn_output": _Target("self_attn.o_proj", (hidden, q_rows)),
        "ffn_norm": _Target("post_attention_layernorm", (hidden,)),
        "ffn_gate": _Target("mlp.gate_proj", (inner, hidden)),
        "ffn_up": _Target("mlp.up_proj", (inner, hidden)),
        "ffn_down": _Target("mlp.down_proj", (hidden, inner)),
    }


def _check_tensors(tensors: Mapping[str, ReaderTensor], targets: Mapping[str, _Target]) -> None:
    for name, target in targets.items():
        if name not in tensors:
            raise ModelError(f"GGUF: tensor {name} is missing; the file is incomplete")
        found = tuple(int(size) for size in reversed(tensors[name].shape))
        if found != target.shape:
            raise ModelError(f"GGUF: tensor {name} has shape {found}, expected {target.shape}")
    if surplus := sorted(tensors.keys() - targets.keys()):
        raise ModelError(f"GGUF: tensor {surplus[0]} is not supported; a plain Llama has none")


def _config(metadata: Mapping[str, Any], shape: _Shape, tied: bool) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": _integer(metadata, "llama.context_length"),
        "rope_theta": _number(metadata, "llama.rope.freq_base", default=10000.0),
        "rms_norm_eps": _number(metadata, "llama.attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        **_special_ids(metadata, "bos", "eos", "pad"),
    }


def _special_ids(metadata: Mapping[str, Any], *roles: str) -> dict[str, object]:
    """Return `bos_token_id` and the like for the roles that the metadata fills."""
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    found = {role: metadata.get(f"tokenizer.ggml.{keys[role]}_token_id") for role in roles}
    return {f"{role}_token_id": index for role, index in found.items() if index is not None}


def _tokenizer_config(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, object]:
    config: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": _integer(metadata, "llama.context_length"),
        "clean_up_tokenization_spaces": False,
    }
    for field, index in _special_ids(metadata, "bos", "eos", "unk", "pad").items():
        if not isinstance(index, int) or not 0 <= index < len(tokens):
            raise ModelError(f"GGUF: {field} is {index!r}, expected one of {len(tokens)} ids")
        config[field.removesuffix("_id")] = tokens[index]
    return config


def _merges(metadata: Mapping[str, Any], vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    merges = []
    for merge in _strings(metadata, "tokenizer.ggml.merges"):
        left, _, right = merge.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise ModelError(f"GGUF: merge {merge!r} is not of two tokens that make a third")
        merges.append((left, right))
    return merges


def _smollm_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """Return what `pre=smollm` stands for: digits one by one, then GPT-2's words in bytes."""
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return pre_tokenizers.Sequence([digits, words])


def _write_weights(
    path: Path, tensors: Mapping[str, ReaderTensor], targets: Mapping[str, _Target]
) -> None:
    progress = tqdm(targets.items(), desc="Converting", unit="tensor", disable=None)
    with path.open("wb") as file:
        file.write(_safetensors_header(targets))
        for name, target in progress:
            file.write(_to_bf16(tensors[name], target))


def _safetensors_header(targets: Mapping[str, _Target]) -> bytes:
    """Return the head of a safetensors file whose tensors follow each other in bf16.

    It is the length of the JSON in 8 bytes, then the JSON, padded with spaces so that the
    tensors begin at a multiple of 8.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for target in targets.values():
        end = start + prod(target.shape) * _BF16_BYTES
        offsets = [start, end]
        entries[target.name] = {"dtype": "BF16", "shape": target.shape, "data_offsets": offsets}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _to_bf16(tensor: ReaderTensor, target: _Target) -> bytes:
    try:
        values = dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        kind = tensor.tensor_type.name
        raise ModelError(f"GGUF: tensor {tensor.name} is of unsupported type {kind}") from error
    if target.num_heads is not None:
        values = _unpermute(values, target.num_heads)
    packed: bytes = quantize(values, GGMLQuantizationType.BF16).tobytes()
    return packed


def _unpermute(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Put the rows of a query or key projection back in the order of the hub.

    GGUF has the two rows that are rotated together beside each other; the hub has all first
    ones of a head, then all second ones.
    """
    out_features, in_features = rows.shape
    pairs = rows.reshape(num_heads, out_features // num_heads // 2, 2, in_features)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(out_features, in_features)


def _integer(metadata: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(f"GGUF: {key} is {value!r}, expected a positive integer")
    return value


def _number(metadata: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = metadata.get(key, default)
    if not isinstance(value, float) or value <= 0:
        raise ModelError(f"GGUF: {key} is {value!r}, expected a positive number")
    # GGUF keeps fp32, so 1e-5 arrives as 9.999999747e-06; the shortest text is what was meant.
    return float(str(np.float32(value)))


def _strings(metadata: Mapping[str, Any], key: str) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ModelError(f"GGUF: {key} is {type(value).__name__}, expected a list of strings")
    return value


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
