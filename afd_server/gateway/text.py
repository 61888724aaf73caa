"""Text to token ids and back: chat template, tokenizer, stop strings.

Knows nothing of requests, HTTP or time limits. Everything here is a function of text and
ids alone (invariant I3 of docs/protocol.md), so a request that moves to another worker
keeps its text state.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any  # Any: values of a stranger's JSON, checked where they are used

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from afd_server.core.errors import InvalidRequest, ModelError
from afd_server.core.model_spec import read_json
from afd_server.gateway.token_bytes import find_measure

MOST_CHARS_AT_ONCE = 2**14
"""Tokenised in a few milliseconds, in which no other thread runs; longer texts go into one of their
own (docs/decisions/0026-long-texts-in-a-thread.md)."""

PRIVATE_USE = range(0xE000, 0xF900)
"""Code points without a meaning: at most one is needed for each special token."""

MAX_HELD_CHARS = 3
"""An unfinished UTF-8 character has at most 3 bytes, each shown as U+FFFD by some decoders."""

CONTEXT_TOKENS = 16
"""Kept when the decode window is cut: more bytes than the held U+FFFD can stand for (3 each)."""


class TextCodec:
    """The tokenizer and chat template of one model.

    Special tokens spelled in the content of a chat message become ordinary text, so a client
    cannot forge a turn. A raw completion prompt is the client's own and may spell them.

    Encoding long texts lets other threads run, and may be done in several at once. Given
    `most_tokens`, it refuses at once what cannot be so few, whatever the tokens are.

    Args:
        tokenizer_json: the content of tokenizer.json.
        template: the chat template's source, or None if the model has none.
        template_tokens: `bos_token`, `eos_token` and the like, as the template names them.
        now: the local time, for templates that write the date.

    Raises:
        ModelError: the tokenizer or the template cannot be parsed.
    """

    def __init__(
        self,
        tokenizer_json: str,
        template: str | None,
        template_tokens: Mapping[str, str],
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        self.tokenizer = _parse_tokenizer(tokenizer_json)
        # A second one, because the attribute is part of the tokenizer's shared state.
        self._literal_tokenizer = _parse_tokenizer(tokenizer_json)
        self._literal_tokenizer.encode_special_tokens = True
        self._measure = find_measure(json.loads(self.tokenizer.to_str()))
        self._template = _compile(template, now) if template is not None else None
        self._template_tokens = template_tokens
        added = self.tokenizer.get_added_tokens_decoder()
        special = {index: token.content for index, token in added.items() if token.special}
        self.special_ids = frozenset(special)
        longest_first = sorted(special.values(), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    @classmethod
    def load(cls, directory: Path) -> "TextCodec":
        """Read tokenizer.json, tokenizer_config.json and the chat template of a model.

        Raises:
            ModelError: tokenizer.json is missing, or a file cannot be used.
        """
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise ModelError(f"{directory} lacks tokenizer.json; only fast tokenizers are served")
        config_path = directory / "tokenizer_config.json"
        config = read_json(config_path) if config_path.is_file() else {}
        return cls(_read_text(path), _template_source(directory, config), _named_tokens(config))

    def encode(self, text: str, most_tokens: int | None = None) -> list[int]:
        """Tokenise a raw prompt, with what the tokenizer puts around one (such as BOS).

        Raises:
            InvalidRequest: it cannot be `most_tokens` or fewer.
        """
        self._check_length([text], most_tokens, "prompt")
        (ids,) = _encode(self.tokenizer, [text], add_special_tokens=True)
        return ids

    def encode_chat(
        self, messages: Sequence[Mapping[str, str]], most_tokens: int | None = None
    ) -> list[int]:
        """Render a conversation and the opening of the assistant's turn, and tokenise it.

        A special token spelled in a message is replaced by a private-use character while the
        template runs and is tokenised as text afterwards; all others are the template's own.

        Args:
            messages: each with `role` and `content`.
            most_tokens: what cannot be so few is refused.

        Raises:
            InvalidRequest: there is no template, it refuses these messages, or they are too long.
        """
        marked, literals = self._mark(messages)
        rendered = self._render(marked, add_generation_prompt=True)
        return self._encode_marked(rendered, literals, most_tokens)

    def encode_open_chat(
        self, messages: Sequence[Mapping[str, str]], most_tokens: int | None = None
    ) -> list[int]:
        """Render a conversation up to the end of its last message, for the model to go on there.

        A private-use character at that end shows where the template puts it.

        Raises:
            InvalidRequest: as `encode_chat`, and if the template repeats or drops the end.
        """
        end = next(_free_characters([message["content"] for message in messages]), "")
        last = {**messages[-1], "content": messages[-1]["content"] + end}
        marked, literals = self._mark([*messages[:-1], last])
        rendered = self._render(marked, add_generation_prompt=False)
        if rendered.count(end) != 1:
            raise InvalidRequest(
                "this model's chat template does not let the last message be continued; "
                "end with one of another role",
                "messages",
            )
        return self._encode_marked(rendered[: rendered.index(end)], literals, most_tokens)

    def _mark(
        self, messages: Sequence[Mapping[str, str]]
    ) -> tuple[list[dict[str, str]], dict[str, str]]:
        """Replace special tokens in the contents by characters found in none of them.

        Returns:
            The messages, and the special token that each of these characters stands for.
        """
        contents = [message["content"] for message in messages]
        found = dict.fromkeys(
            literal for text in contents for literal in self._special.findall(text)
        )
        marks = dict(zip(found, _free_characters(contents), strict=False))
        if len(marks) < len(found):
            raise InvalidRequest("the messages use up all private-use characters", "messages")
        marked = [
            {**message, "content": self._special.sub(lambda m: marks[m[0]], message["content"])}
            for message in messages
        ]
        return marked, {mark: literal for literal, mark in marks.items()}

    def _render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> str:
        if self._template is None:
            raise InvalidRequest("this model has no chat template; use /v1/completions", "messages")
        try:
            return self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._template_tokens,
            )
        except TemplateError as error:
            raise InvalidRequest(f"the chat template refuses: {error}", "messages") from error

    def _encode_marked(
        self, text: str, literals: Mapping[str, str], most_tokens: int | None
    ) -> list[int]:
        split = re.split(f"([{''.join(literals)}])" if literals else r"(?!)", text)
        pieces = [piece for piece in split if piece]
        self._check_length(
            [literals.get(piece, piece) for piece in pieces], most_tokens, "messages"
        )
        literal_ids = {
            mark: self._literal_tokenizer.encode(literal, add_special_tokens=False).ids
            for mark, literal in literals.items()
        }
        texts = [piece for piece in pieces if piece not in literals]
        text_ids = _encode(self.tokenizer, texts, add_special_tokens=False)
        ids: list[int] = []
        for piece in pieces:
            ids += literal_ids[piece] if piece in literals else next(text_ids)
        return ids

    def _check_length(self, pieces: Sequence[str], most_tokens: int | None, param: str) -> None:
        if most_tokens is None or self._measure is None:
            return
        num_bytes = self._measure.num_bytes(pieces)
        most_bytes = self._measure.longest_token * most_tokens
        if num_bytes > most_bytes:
            raise InvalidRequest(
                f"the prompt has {num_bytes} bytes, the context holds {most_tokens} tokens, which "
                f"stand for {most_bytes} at most; shorten the prompt",
                param,
            )


class TextStream:
    """The text of one choice, growing with its token ids.

    The text so far is a function of the ids pushed so far. What is returned is never taken
    back: an unfinished character and a possible beginning of a stop string are held.

    The stop string that is complete first wins; of those complete at the same character, the
    longest. It and everything after it are dropped. Special tokens give no text.

    Args:
        codec: the tokenizer that made the ids.
        stop: the stop strings, none of them empty.
    """

    def __init__(self, codec: TextCodec, stop: Sequence[str] = ()) -> None:
        self._tokenizer = codec.tokenizer
        self._special_ids = codec.special_ids
        self._stop = stop
        prefixes = {text[:size] for text in stop for size in range(1, len(text))}
        self._beginnings = sorted(prefixes, key=len, reverse=True)
        self._window: list[int] = []  # the latest ids: enough context to decode the next one
        self._num_taken = 0  # characters of the window's text that left for `_held`
        self._held = ""  # decoded, but maybe the beginning of a stop string
        self._stopped_by: str | None = None

    @property
    def stopped_by(self) -> str | None:
        """Return the stop string that ended the text, or None."""
        return self._stopped_by

    def push(self, token_id: int) -> str:
        """Take the next id and return the text that is now certain."""
        unknown = self._tokenizer.id_to_token(token_id) is None  # a padding row of the vocabulary
        if self._stopped_by is not None or unknown or token_id in self._special_ids:
            return ""
        self._window.append(token_id)
        text = self._decode()
        unfinished = len(text) - len(text.rstrip("\ufffd"))
        num_certain = len(text) - min(unfinished, MAX_HELD_CHARS)
        released = self._release(text[self._num_taken : num_certain])
        self._num_taken = max(self._num_taken, num_certain)
        if len(self._window) >= 2 * CONTEXT_TOKENS:
            self._cut_window(len(text) - self._num_taken)
        return released

    def finish(self) -> str:
        """Return what is held, at the end of the ids; a stop string may still end it earlier."""
        if self._stopped_by is not None:
            return ""
        tail = self._decode()[self._num_taken :]
        self._num_taken += len(tail)
        released = self._release(tail)
        rest, self._held = self._held, ""
        return released + rest

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window)

    def _cut_window(self, num_untaken: int) -> None:
        """Forget the older ids; the untaken characters are the last ones of either text."""
        del self._window[:-CONTEXT_TOKENS]
        self._num_taken = max(len(self._decode()) - num_untaken, 0)

    def _release(self, text: str) -> str:
        """Append certain text and return what no stop string can claim any more."""
        if not self._stop:
            return text
        self._held += text
        if (match := self._first_stop()) is not None:
            start, self._stopped_by = match
            released, self._held = self._held[:start], ""
            return released
        keep = next((len(part) for part in self._beginnings if self._held.endswith(part)), 0)
        cut = len(self._held) - keep
        released, self._held = self._held[:cut], self._held[cut:]
        return released

    def _first_stop(self) -> tuple[int, str] | None:
        """Return where the winning stop string starts, and the string."""
        found = ((self._held.find(stop), stop) for stop in self._stop)
        matches = [(start, stop) for start, stop in found if start >= 0]
        return min(matches, key=lambda match: (match[0] + len(match[1]), match[0]), default=None)


def _encode(
    tokenizer: Tokenizer, texts: Sequence[str], *, add_special_tokens: bool
) -> Iterator[list[int]]:
    """Yield the ids of each text. The library releases the GIL for batches only.

    Those it gives to threads of its own, which is too far for a short one.
    """
    if sum(map(len, texts)) <= MOST_CHARS_AT_ONCE:
        for text in texts:
            yield tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return
    # "fast" is without offsets, which nobody needs
    for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=add_special_tokens):
        yield encoding.ids


def _free_characters(contents: Sequence[str]) -> Iterator[str]:
    """Yield the private-use characters found in none of the contents."""
    used = set().union(*contents)
    yield from (char for char in map(chr, PRIVATE_USE) if char not in used)


class _GenerationTag(Extension):
    """Accept `{% generation %}`, with which training templates mark the assistant's words."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _compile(source: str, now: Callable[[], datetime]) -> Template:
    """Compile a chat template in the environment that Hugging Face templates are written for."""

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def strftime_now(pattern: str) -> str:
        return now().strftime(pattern)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise ModelError(f"the chat template is not valid Jinja: {error}") from error


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON as it is; Jinja's own filter escapes for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _parse_tokenizer(source: str) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(source)
    except Exception as error:  # the library raises nothing narrower
        raise ModelError(f"tokenizer.json cannot be used: {error}") from error
    tokenizer.no_truncation()  # settings of training that some files carry along
    tokenizer.no_padding()
    return tokenizer


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error


def _template_source(directory: Path, config: Mapping[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        return _read_text(path)
    found = config.get("chat_template")
    if isinstance(found, list):
        named = [entry for entry in found if isinstance(entry, dict)]
        found = next((e.get("template") for e in named if e.get("name") == "default"), None)
    if found is None or isinstance(found, str):
        return found
    raise ModelError("tokenizer_config.json: chat_template is neither text nor a list of templates")


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Return `bos_token` and its like; each is text or an object with `content`."""
    found: dict[str, str] = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found
