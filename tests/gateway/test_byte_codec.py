"""The tokenizer of models that have none: whatever is said can be read, and read back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afd_server.core.errors import ModelError
from afd_server.gateway.byte_codec import byte_codec
from afd_server.gateway.text import TextStream

CODEC = byte_codec(1000)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_text_is_its_bytes(text):
    ids = CODEC.encode(text)
    assert len(ids) == len(text.encode())
    assert all(token_id < 256 for token_id in ids)
    assert CODEC.tokenizer.decode(ids) == text


def test_every_further_token_is_a_word_of_its_own():
    words = [CODEC.tokenizer.decode([token_id]) for token_id in range(256, 1000)]
    assert len(set(words)) == 744
    assert all(word.startswith(" ") and len(word) >= 2 for word in words)
    assert all(TextStream(CODEC).push(token_id) for token_id in range(256, 1000))


def test_a_conversation_is_a_line_for_each_message():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hé"}]
    text = "system: Be brief.\nuser: Hé\nassistant:"
    assert CODEC.encode_chat(messages) == CODEC.encode(text)


def test_a_vocabulary_of_fewer_tokens_than_bytes_is_refused():
    assert byte_codec(256).encode("a")
    with pytest.raises(ModelError, match="vocabulary of 255 tokens"):
        byte_codec(255)
