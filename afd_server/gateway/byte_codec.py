"""Text for a model that comes without a tokenizer: a token for each byte."""

import json

from tokenizers import pre_tokenizers

from afd_server.core.errors import ModelError
from afd_server.gateway.text import TextCodec

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def byte_codec(vocab_size: int) -> TextCodec:
    """Make a codec that reads text as bytes, the tokens 0 … 255.

    The tokens above stand for words such as ` 1f3`, which no text is read as: a model of random
    weights says them, and clients can count what they see.

    Raises:
        ModelError: the vocabulary has no room for the bytes.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet):
        raise ModelError(
            f"a vocabulary of {vocab_size} tokens does not hold the {len(alphabet)} bytes; "
            "put a tokenizer.json beside config.json"
        )
    words = [f"Ġ{index:x}" for index in range(len(alphabet), vocab_size)]  # Ġ is a blank
    vocabulary = {token: index for index, token in enumerate([*alphabet, *words])}
    byte_level = {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False,
    }  # fmt: skip
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    return TextCodec(json.dumps(tokenizer), TEMPLATE, {})
