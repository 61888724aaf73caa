"""How much text a token can stand for: what is longer than a context of them cannot fit it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any  # Any: the JSON of a tokenizer that the library has parsed

from tokenizers import pre_tokenizers

NFC_SHRINKS = 4  # times at most: U+1FBE U+0308 U+0301 has 7 bytes, and becomes one of 2
KEEPING = ("ByteLevel", "Digits", "Metaspace", "Punctuation", "Split", "UnicodeScripts")


@dataclass(frozen=True, slots=True)
class TextMeasure:
    """Measures text by what its tokens must stand for.

    Attributes:
        longest_token: the most bytes of UTF-8 that a token stands for.
        dropped: bytes without a token, which the tokenizer passes over.
    """

    longest_token: int
    dropped: bytes = b""

    def num_bytes(self, pieces: Sequence[str]) -> int:
        """Return the bytes of a text that go into tokens."""
        return sum(len(piece.encode().translate(None, self.dropped)) for piece in pieces)


def find_measure(tokenizer: Mapping[str, Any]) -> TextMeasure | None:
    """Return the measure of a tokenizer, or None if it has no such bound.

    It has one if it keeps all of a text. Others leave out blanks, or make a single token of
    whatever they do not know.

    Args:
        tokenizer: the content of tokenizer.json, as the library writes it.
    """
    model, added = tokenizer["model"], tokenizer["added_tokens"]
    splits = list(_steps(tokenizer["pre_tokenizer"], "pretokenizers"))
    changes = list(_steps(tokenizer["normalizer"], "normalizers"))
    if (
        model["type"] != "BPE"
        or not all(map(_keeps_text, [*splits, *changes]))
        or any(token["lstrip"] or token["rstrip"] for token in added)
    ):
        return None
    is_byte_level = any(step["type"] == "ByteLevel" for step in splits)
    alphabet = _byte_level_alphabet() if is_byte_level else _fallback_alphabet()
    dropped = bytes(byte for token, byte in alphabet.items() if token not in model["vocab"])
    has_nfc = any(step["type"] == "NFC" for step in changes)
    is_plain = is_byte_level and not changes and model["unk_token"] is None
    if not (is_byte_level or model["byte_fallback"]) or (dropped and not is_plain):
        return None
    # A character of a byte-level token is a byte.
    sizes = [len(token) if is_byte_level else len(token.encode()) for token in model["vocab"]]
    sizes += [len(token["content"].encode()) for token in added]
    return TextMeasure(max(sizes) * (NFC_SHRINKS if has_nfc else 1), dropped)


def _steps(step: Mapping[str, Any] | None, inner: str) -> Iterator[Mapping[str, Any]]:
    if step is not None and step["type"] == "Sequence":
        for part in step[inner]:
            yield from _steps(part, inner)
    elif step is not None:
        yield step


def _keeps_text(step: Mapping[str, Any]) -> bool:
    """Tell whether a step of a tokenizer leaves no less text than before, but for NFC."""
    if step["type"] == "Replace":
        replaced = step["pattern"].get("String")
        return replaced is not None and len(replaced.encode()) <= len(step["content"].encode())
    return step["type"] in ("NFC", "Prepend", *KEEPING) and step.get("behavior") != "Removed"


def _byte_level_alphabet() -> dict[str, int]:
    """Return the byte of each character: its own where it has one, the others in order."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    others = iter(sorted(set(range(256)) - set(map(ord, alphabet))))
    return {char: ord(char) if ord(char) < 256 else next(others) for char in alphabet}


def _fallback_alphabet() -> dict[str, int]:
    return {f"<0x{byte:02X}>": byte for byte in range(256)}
