"""No text is longer than what its tokens are said to stand for."""

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from afd_server.gateway.byte_codec import byte_codec
from afd_server.gateway.token_bytes import NFC_SHRINKS, TextMeasure, find_measure

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
SPELLED = [f"<0x{byte:02X}>" for byte in range(256)]
MERGED = ["ab", "abab", "Ġ" * 2, "Ġ" * 4]
MERGES = [("a", "b"), ("ab", "ab"), ("Ġ", "Ġ"), ("Ġ" * 2, "Ġ" * 2)]


def byte_level(*steps, alphabet=ALPHABET, normalizer=None, unk=None, added="<s>"):
    vocabulary = {token: index for index, token in enumerate([*alphabet, *MERGED])}
    tokenizer = Tokenizer(models.BPE(vocabulary, MERGES, unk_token=unk))
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, last])
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.add_special_tokens([added])
    return tokenizer


def byte_fallback(alphabet=SPELLED):
    vocabulary = {token: index for index, token in enumerate([*alphabet, "▁", "a", "▁a"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("▁", "a")], byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return tokenizer


def measure_of(tokenizer):
    return find_measure(json.loads(tokenizer.to_str()))


MEASURED = [
    byte_level(),
    byte_level(pre_tokenizers.Digits(), normalizer=normalizers.NFC()),
    byte_level(alphabet=ALPHABET[5:]),  # passes over some bytes
    byte_fallback(),
    byte_codec(400).tokenizer,
]


@pytest.mark.parametrize("tokenizer", MEASURED)
@given(text=st.text(st.sampled_from('ab  !"#<s>é\u0301你😀\u1fbe\u0308\u212a'), max_size=40))
def test_a_text_is_no_longer_than_its_tokens_stand_for(tokenizer, text):
    measure = measure_of(tokenizer)
    num_tokens = len(tokenizer.encode(text).ids)
    assert measure.num_bytes([text]) <= measure.longest_token * num_tokens


def test_the_bound_is_the_longest_token_in_bytes():
    assert measure_of(MEASURED[0]) == TextMeasure(4)
    assert measure_of(MEASURED[2]) == TextMeasure(4, b'!"#$%')
    assert measure_of(byte_fallback()).longest_token == len("<0x00>")
    assert measure_of(byte_level(added="<longest>")).longest_token == len("<longest>")


@pytest.mark.parametrize(
    "tokenizer",
    [
        Tokenizer(models.Unigram([("a", 0.0)], 0, False)),
        Tokenizer(models.BPE({"a": 0}, [], unk_token="a", fuse_unk=True)),
        byte_fallback(SPELLED[:-1]),
        byte_level(alphabet=ALPHABET[1:], unk="ab"),
        byte_level(alphabet=ALPHABET[1:], normalizer=normalizers.NFC()),
        byte_level(normalizer=normalizers.Strip()),
        byte_level(normalizer=normalizers.Replace("ab", "")),
        byte_level(pre_tokenizers.WhitespaceSplit()),
        byte_level(pre_tokenizers.Split("a", "removed")),
        byte_level(added=AddedToken("<s>", lstrip=True)),
    ],
)
def test_a_tokenizer_that_may_leave_text_out_has_no_bound(tokenizer):
    assert measure_of(tokenizer) is None


def test_composed_characters_come_from_few_bytes():
    """Every character of Unicode, each part of it written as long as possible."""
    chars = [chr(c) for c in range(0x30000) if not 0xD800 <= c < 0xE000]
    parts_of = {char: unicodedata.normalize("NFD", char) for char in chars}
    longest = {}
    for char, parts in parts_of.items():
        if len(parts) == 1:
            longest[parts] = max(len(char.encode()), longest.get(parts, 0))
    shrinks = [
        sum(longest[part] for part in parts) / len(char.encode())
        for char, parts in parts_of.items()
        if unicodedata.is_normalized("NFC", char)
    ]
    assert 3 < max(shrinks) <= NFC_SHRINKS
