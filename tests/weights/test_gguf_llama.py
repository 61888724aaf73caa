import json

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, dequantize, quantize
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer

from afd_server.core.attention_spec import GQASpec, RopeSpec
from afd_server.core.errors import ModelError
from afd_server.core.model_spec import read_model_spec
from afd_server.weights.gguf_llama import build_tokenizer, convert_gguf_llama

PLAIN = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "blk.1.attn_norm": "model.layers.1.input_layernorm",
    "blk.1.attn_v": "model.layers.1.self_attn.v_proj",
    "blk.1.attn_output": "model.layers.1.self_attn.o_proj",
    "blk.1.ffn_norm": "model.layers.1.post_attention_layernorm",
    "blk.1.ffn_gate": "model.layers.1.mlp.gate_proj",
    "blk.1.ffn_up": "model.layers.1.mlp.up_proj",
    "blk.1.ffn_down": "model.layers.1.mlp.down_proj",
}


@pytest.fixture
def convert(tiny, tmp_path):
    """Write the tiny model as it is by then, convert it, and return the directory."""

    def run():
        directory = tmp_path / "converted"
        directory.mkdir()
        convert_gguf_llama(tiny.write(tmp_path / "tiny.gguf"), directory)
        return directory

    return run


def bf16(values):
    return torch.from_numpy(values).to(torch.bfloat16)


@pytest.mark.parametrize(("source", "target"), PLAIN.items())
def test_values_arrive_rounded_to_the_nearest_bf16(tiny, convert, source, target):
    weights = load_file(convert() / "model.safetensors")
    assert torch.equal(weights[f"{target}.weight"], bf16(tiny.tensors[f"{source}.weight"]))


def test_quantised_weights_are_dequantised(tiny, convert):
    weights = load_file(convert() / "model.safetensors")
    kind = GGMLQuantizationType.Q8_0
    expected = dequantize(quantize(tiny.tensors["blk.0.ffn_down.weight"], kind), kind)
    assert torch.equal(weights["model.layers.0.mlp.down_proj.weight"], bf16(expected))


@pytest.mark.parametrize(("letter", "num_heads"), [("q", 4), ("k", 2)])
def test_rotated_rows_are_put_half_a_head_apart(tiny, convert, letter, num_heads):
    """Pair i of a head is rows 2i and 2i+1 in GGUF, and rows i and i + head_dim/2 on the hub."""
    weights = load_file(convert() / "model.safetensors")
    hub = weights[f"model.layers.0.self_attn.{letter}_proj.weight"]
    gguf = bf16(tiny.tensors[f"blk.0.attn_{letter}.weight"])
    half = tiny.head_dim // 2
    for head in range(num_heads):
        first_row = head * tiny.head_dim
        for pair in range(half):
            assert torch.equal(hub[first_row + pair], gguf[first_row + 2 * pair])
            assert torch.equal(hub[first_row + half + pair], gguf[first_row + 2 * pair + 1])


def test_a_model_without_output_weights_is_tied(convert):
    directory = convert()
    assert "lm_head.weight" not in load_file(directory / "model.safetensors")
    assert read_model_spec(directory).tie_embeddings


def test_a_model_with_output_weights_is_not_tied(tiny, convert):
    tiny.tensors["output.weight"] = tiny.tensors["token_embd.weight"] + 1
    directory = convert()
    weights = load_file(directory / "model.safetensors")
    assert torch.equal(weights["lm_head.weight"], bf16(tiny.tensors["output.weight"]))
    assert not read_model_spec(directory).tie_embeddings


def test_the_config_says_what_the_metadata_says(tiny, convert):
    spec = read_model_spec(convert())
    assert (spec.hidden_size, spec.intermediate_size, spec.num_layers) == (32, 64, 2)
    assert spec.attention == (GQASpec(4, 2, 6, RopeSpec(6, 50000.0)),) * 2
    assert (spec.vocab_size, spec.max_position) == (len(tiny.tokens), 128)
    assert spec.rms_norm_eps == 1e-5
    assert spec.eos_token_ids == (2,)


def test_the_chat_template_is_kept(tiny, convert):
    template = (convert() / "chat_template.jinja").read_text()
    assert template == tiny.metadata["tokenizer.chat_template"]


def test_a_model_without_a_chat_template_has_no_template_file(tiny, convert):
    del tiny.metadata["tokenizer.chat_template"]
    assert not (convert() / "chat_template.jinja").exists()


def test_the_tokenizer_config_names_the_special_tokens(convert):
    config = json.loads((convert() / "tokenizer_config.json").read_text())
    assert config["bos_token"] == "<|im_start|>"
    assert config["eos_token"] == config["pad_token"] == "<|im_end|>"
    assert config["unk_token"] == "<|endoftext|>"
    assert config["model_max_length"] == 128


def test_every_token_keeps_its_id(tiny, convert):
    tokenizer = Tokenizer.from_file(str(convert() / "tokenizer.json"))
    assert [tokenizer.id_to_token(i) for i in range(len(tiny.tokens))] == tiny.tokens
    assert tokenizer.get_vocab_size() == len(tiny.tokens)


def test_merges_apply_and_digits_stay_apart(tiny):
    tokenizer = build_tokenizer(tiny.metadata)
    assert tokenizer.encode("hello w12").tokens == ["hello", "Ġw", "1", "2"]


def test_special_tokens_stay_special(tiny, convert):
    tokenizer = Tokenizer.from_file(str(convert() / "tokenizer.json"))
    ids = tokenizer.encode("<|im_start|>he<|im_end|>").ids
    assert ids == [1, tiny.tokens.index("he"), 2]
    assert tokenizer.decode(ids) == "he"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>he<|im_end|>"


def test_user_defined_tokens_are_found_whole_but_are_not_special(tiny):
    tiny.metadata["tokenizer.ggml.token_type"][tiny.tokens.index("12")] = 4
    tokenizer = build_tokenizer(tiny.metadata)
    ids = tokenizer.encode("a12b").ids
    assert ids[1] == tiny.tokens.index("12")
    assert tokenizer.decode(ids) == "a12b"


def test_no_token_is_put_around_a_text(tiny):
    assert build_tokenizer(tiny.metadata).encode("").ids == []


def test_any_text_survives_the_tokenizer(tiny):
    tokenizer = build_tokenizer(tiny.metadata)

    @given(st.text())
    def survives(text):
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text

    survives()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokenizer.ggml.model", "llama"),
        ("tokenizer.ggml.pre", "qwen2"),
        ("tokenizer.ggml.add_bos_token", True),
        ("llama.rope.scaling.type", "yarn"),
        ("llama.rope.dimension_count", 4),
        ("llama.embedding_length", "many"),
        ("llama.attention.layer_norm_rms_epsilon", 0.0),
        ("tokenizer.ggml.bos_token_id", 100000),
        ("tokenizer.ggml.token_type", [1, 1]),
        ("tokenizer.ggml.merges", ["h e", "no thing"]),
        ("tokenizer.ggml.merges", ["he"]),
    ],
)
def test_metadata_we_do_not_understand_is_refused_with_its_value(tiny, convert, key, value):
    tiny.metadata[key] = value
    with pytest.raises(ModelError, match=r"GGUF: "):
        convert()


def test_another_architecture_is_refused_by_name(tiny, convert):
    tiny.architecture = "qwen2"
    with pytest.raises(ModelError, match=r"general.architecture 'qwen2' .* expected 'llama'"):
        convert()


def test_another_pre_tokenizer_is_refused_by_name(tiny, convert):
    tiny.metadata["tokenizer.ggml.pre"] = "llama-bpe"
    with pytest.raises(ModelError, match=r"tokenizer.ggml.pre 'llama-bpe' .* expected 'smollm'"):
        convert()


@pytest.mark.parametrize("key", ["llama.block_count", "tokenizer.ggml.tokens"])
def test_missing_metadata_is_named(tiny, convert, key):
    del tiny.metadata[key]
    with pytest.raises(ModelError, match=key):
        convert()


def test_a_missing_tensor_is_named(tiny, convert):
    del tiny.tensors["blk.1.ffn_up.weight"]
    with pytest.raises(ModelError, match=r"blk.1.ffn_up.weight is missing"):
        convert()


def test_a_tensor_of_another_shape_is_named(tiny, convert):
    tiny.tensors["blk.1.ffn_up.weight"] = np.zeros((63, 32), np.float32)
    with pytest.raises(ModelError, match=r"blk.1.ffn_up.weight has shape \(63, 32\)"):
        convert()


def test_a_tensor_that_a_llama_does_not_have_is_named(tiny, convert):
    tiny.tensors["rope_freqs.weight"] = np.ones(3, np.float32)
    with pytest.raises(ModelError, match=r"rope_freqs.weight is not supported"):
        convert()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(tiny, tmp_path, share):
    path = tiny.write(tmp_path / "tiny.gguf")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ModelError, match=r"no intact GGUF file"):
        convert_gguf_llama(path, tmp_path)


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "letter.gguf"
    path.write_text("Dear reader, this is not a model at all.")
    with pytest.raises(ModelError, match=r"letter.gguf is no intact GGUF file"):
        convert_gguf_llama(path, tmp_path)
