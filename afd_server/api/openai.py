"""The OpenAI dialect: /v1/chat/completions, /v1/completions, /v1/models and the error body.

Requests are pydantic models. A field of a request is served, accepted without effect
(`IGNORED`), refused unless it holds a neutral value (`REFUSED`), or unknown; unknown fields
are accepted, because clients send each server's extras through `extra_body`, and named by
`unknown_fields` for the log. Null always means absent.

Responses are typed dicts made by plain functions, cheap enough to make one per token. Their
shape is OpenAI's with vLLM's `token_ids`, `prompt_token_ids` and `stop_reason`.
"""

import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NotRequired, Self, TypedDict

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from afd_server.core.errors import InvalidRequest
from afd_server.core.request import GUARD_WINDOWS, PRIORITIES, SamplingParams

MAX_CHOICES = 8
MAX_STOP_STRINGS = 16  # OpenAI takes 4; evaluation harnesses send more
MAX_STOP_CHARS = 64  # bounds the text held back, and the search in it, per token
MAX_STOP_TOKENS = 64  # each is compared with every token

IGNORED = frozenset({
    "user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_options", "prompt_cache_retention", "parallel_tool_calls", "prediction",
    "reasoning_effort", "verbosity", "request_id", "session_id", "rid",
    "spaces_between_special_tokens", "include_reasoning",
})  # fmt: skip
"""Accepted without effect: none of them changes which tokens are right."""

REFUSED: dict[str, tuple[object, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "logprobs": (),
    "top_logprobs": (0,),
    "prompt_logprobs": (),
    "logprob_token_ids": ([],),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "repetition_detection": (),
    "min_tokens": (0,),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "best_of": (1,),
    "use_beam_search": (False,),
    "echo": (False,),
    "suffix": ("",),
    "prompt_embeds": (),
    "audio": (),
    "modalities": (["text"],),
    "moderation": (),
    "web_search_options": (),
    "documents": ([],),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "truncate_prompt_tokens": (),
    "include_stop_str_in_output": (False,),
    "no_stop_trim": (False,),
    "skip_special_tokens": (True,),
    "stop_regex": (),
    "return_tokens_as_token_ids": (False,),
    "return_hidden_states": (False,),
    "thinking_token_budget": (),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json_object": (False,),
    "guided_decoding_backend": (),
    "guided_whitespace_pattern": (),
    "regex": (),
    "ebnf": (),
    "json_schema": (),
    "grammar": (),
    "lora_path": (),
    "custom_logit_processor": (),
    "kv_transfer_params": (),
}
"""Fields we know and cannot honour, each with the values that ask for nothing."""

FinishName = Literal["stop", "length"]
StopReason = str | int | None


# ── requests ────────────────────────────────────────────────────────────────────────────────


def _prompts(value: object) -> list[str | list[int]]:
    """Check a prompt by hand: a pydantic union would report every element of a long list."""
    batch = [value] if isinstance(value, str) or _is_ids(value) else value
    if isinstance(batch, list) and batch:
        if all(isinstance(prompt, str) for prompt in batch):
            return [_text(prompt) for prompt in batch]
        if all(_is_ids(prompt) for prompt in batch):
            return batch
    raise PydanticCustomError(
        "prompt",
        "expected a string, a list of strings, a list of token ids or a list of such lists, "
        "none of the lists empty",
    )


def _stop(value: object) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    fits = (
        isinstance(stops, list)
        and len(stops) <= MAX_STOP_STRINGS
        and all(isinstance(stop, str) and 1 <= len(stop) <= MAX_STOP_CHARS for stop in stops)
    )
    if not fits or not isinstance(stops, list):
        raise PydanticCustomError(
            "stop",
            f"expected a string or a list of at most {MAX_STOP_STRINGS} strings, "
            f"each of 1 to {MAX_STOP_CHARS} characters",
        )
    return tuple(stops)


def _content(value: object) -> str:
    """Join the text parts of a message; null is an empty message."""
    if value is None:
        return ""
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, list):
        return "".join(_part_text(part) for part in value)
    raise PydanticCustomError("content", "expected a string or a list of text parts")


def _part_text(part: object) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise PydanticCustomError(
            "content_part",
            'only parts of the form {"type": "text", "text": "…"} are supported',
        )
    return _text(text)


def _text(value: str) -> str:
    """Refuse lone surrogates, which JSON can spell and UTF-8, hence the tokenizer, cannot."""
    if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        raise PydanticCustomError("text", "text holds a lone surrogate; expected valid Unicode")
    return value


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _no_tool_calls(value: list[object]) -> list[object]:
    if value:
        raise PydanticCustomError("tool_calls", "tool calls are not supported")
    return value


class ChatMessage(BaseModel):
    """One message of a conversation, its content reduced to text."""

    model_config = ConfigDict(strict=True, frozen=True)

    role: Annotated[
        Literal["system", "user", "assistant", "tool"],
        BeforeValidator(lambda role: "system" if role == "developer" else role),
    ]
    content: Annotated[
        str, PlainValidator(_content, json_schema_input_type=str | list[dict[str, str]] | None)
    ] = ""
    tool_calls: Annotated[list[object] | None, AfterValidator(_no_tool_calls)] = None


class StreamOptions(BaseModel):
    """What a stream carries beside the text."""

    model_config = ConfigDict(strict=True, frozen=True)

    include_usage: bool | None = None


class GenerationRequest(BaseModel):
    """The fields that chat and completion requests share.

    Raises:
        InvalidRequest: from validation, when a field of `REFUSED` asks for something.
    """

    # inf and NaN are refused by every float field; `extra` keeps what we do not serve.
    model_config = ConfigDict(strict=True, frozen=True, extra="allow", allow_inf_nan=False)

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1)  # -1 and 0 mean off
    min_p: float = Field(default=0.0, ge=0, le=1)
    top_n_sigma: float = Field(default=0.0, ge=0)  # 0 means off; n of arXiv 2411.07641
    min_k: float = Field(default=0.0, ge=0)  # 0 means off; τ of arXiv 2604.11012
    guard_window: int = Field(default=0, ge=0, lt=GUARD_WINDOWS.stop)  # 0 means off
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    stop: Annotated[
        tuple[str, ...], PlainValidator(_stop, json_schema_input_type=str | list[str])
    ] = ()
    stop_token_ids: list[int] = Field(default_factory=list, max_length=MAX_STOP_TOKENS)
    ignore_eos: bool = False
    return_token_ids: bool = False
    cache_salt: str | None = Field(default=None, min_length=1)  # vLLM's
    priority: int = Field(default=0, ge=PRIORITIES[0], le=PRIORITIES[-1])  # vLLM's: lower is first
    return_metrics: bool = False
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, body: object) -> object:
        if not isinstance(body, dict):
            return body
        return {field: value for field, value in body.items() if value is not None}

    @model_validator(mode="after")
    def _refuse_what_we_cannot_honour(self) -> Self:
        extra = self.model_extra or {}
        for field, neutral in (REFUSED | self._also_neutral()).items():
            if field in extra and extra[field] not in neutral:
                raise InvalidRequest(
                    f"{field} {_short(extra[field])} is not supported by this server; "
                    f"leave {field} out",
                    param=field,
                )
        return self

    @model_validator(mode="after")
    def _refuse_what_does_not_go_with_guard(self) -> Self:
        if self.guard_window == 0:
            return self
        if self.guard_window not in GUARD_WINDOWS:
            raise InvalidRequest(
                f"guard_window: expected 0 or at least {GUARD_WINDOWS.start}; "
                f"got {self.guard_window}",
                param="guard_window",
            )
        if self.temperature == 0:
            raise InvalidRequest(
                "guard_window: GUARD draws tokens and temperature 0 does not; raise the "
                "temperature or leave guard_window out",
                param="guard_window",
            )
        filters = (
            (self.top_p < 1, "top_p"),
            (self.top_k > 0, "top_k"),
            (self.min_p > 0, "min_p"),
            (self.top_n_sigma > 0, "top_n_sigma"),
            (self.min_k > 0, "min_k"),
        )
        for is_set, field in filters:
            if is_set:
                raise InvalidRequest(
                    f"{field}: GUARD chooses the candidates itself; leave {field} or "
                    "guard_window out",
                    param=field,
                )
        return self

    def _also_neutral(self) -> dict[str, tuple[object, ...]]:
        return {"best_of": (1, self.n)}

    @property
    def include_usage(self) -> bool:
        """Return whether a stream ends with a chunk of usage."""
        return bool(self.stream_options.include_usage)

    @property
    def unknown_fields(self) -> tuple[str, ...]:
        """Return the names of the fields that nobody looked at, for a debug log."""
        return tuple(sorted((self.model_extra or {}).keys() - IGNORED - REFUSED.keys()))


class ChatCompletionRequest(GenerationRequest):
    """The body of POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)

    def _also_neutral(self) -> dict[str, tuple[object, ...]]:
        # The template writes the special tokens of a chat, so "add none" is what we do.
        return {"best_of": (1, self.n), "logprobs": (False,), "add_special_tokens": (False,)}

    @property
    def conversation(self) -> list[dict[str, str]]:
        """Return the messages as a chat template reads them."""
        return [{"role": message.role, "content": message.content} for message in self.messages]

    @property
    def output_limit(self) -> int | None:
        """Return the most tokens to generate, or None for what the context leaves."""
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(GenerationRequest):
    """The body of POST /v1/completions."""

    # Always a batch: one element for each prompt, as text or as token ids.
    prompt: Annotated[
        list[str | list[int]],
        PlainValidator(
            _prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]
        ),
    ]

    def _also_neutral(self) -> dict[str, tuple[object, ...]]:
        return {"best_of": (1, self.n), "add_special_tokens": (True,)}

    @property
    def output_limit(self) -> int | None:
        """Return the most tokens to generate, or None if the client does not say."""
        return self.max_tokens


def sampling_params(
    body: GenerationRequest,
    *,
    seed: int,
    choice: int,
    max_tokens: int,
    eos_token_ids: tuple[int, ...],
    vocab_size: int,
) -> SamplingParams:
    """Say how one choice of a request is sampled.

    Args:
        body: the checked request.
        seed: drawn by the gateway; used when the client gave none.
        choice: index of the choice, 0 … n − 1.
        max_tokens: the client's limit, cut to what the context leaves.
        eos_token_ids: the model's end-of-sequence tokens.
        vocab_size: the model's, against which the client's token ids are checked.

    Raises:
        InvalidRequest: a stop token id is outside of the vocabulary.
    """
    check_token_ids(body.stop_token_ids, vocab_size, "stop_token_ids")
    eos = () if body.ignore_eos else eos_token_ids
    chosen_seed = seed if body.seed is None else body.seed
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=min(max(body.top_k, 0), vocab_size),
        min_p=body.min_p,
        top_n_sigma=body.top_n_sigma,
        min_k=body.min_k,
        guard_window=body.guard_window,
        seed=chosen_seed & (2**63 - 1),
        choice=choice,
        stop_token_ids=tuple(dict.fromkeys((*body.stop_token_ids, *eos))),
    )


def check_token_ids(token_ids: Iterable[int], vocab_size: int, param: str) -> None:
    """Refuse ids outside of the vocabulary: they would index beyond the embedding.

    Raises:
        InvalidRequest: there is such an id; `param` names the field it came in.
    """
    wrong = next((token_id for token_id in token_ids if not 0 <= token_id < vocab_size), None)
    if wrong is not None:
        raise InvalidRequest(
            f"{param}: token id {_short(wrong)} is outside of the vocabulary; "
            f"expected 0 to {vocab_size - 1}",
            param=param,
        )


# ── errors ──────────────────────────────────────────────────────────────────────────────────


class ErrorDetail(TypedDict):
    """The content of an error body."""

    message: str
    type: str
    param: str | None
    code: str | int | None


class ErrorBody(TypedDict):
    """The body of every failed call, and the last event of a failed stream before `[DONE]`."""

    error: ErrorDetail


def error_body(
    message: str, kind: str, param: str | None = None, code: str | int | None = None
) -> ErrorBody:
    """Make an error body; `kind` is OpenAI's `type`, such as `invalid_request_error`."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def validation_error(exc: ValidationError) -> InvalidRequest:
    """Turn pydantic's report into one sentence about the first thing that is wrong."""
    first = exc.errors(include_url=False, include_context=False)[0]
    if first["type"] == "json_invalid":
        return InvalidRequest(f"the body is not valid JSON: {first['msg']}")
    if not first["loc"]:
        return InvalidRequest("the body must be a JSON object")
    param = ".".join(f"[{part}]" if isinstance(part, int) else part for part in first["loc"])
    if first["type"] == "missing":
        return InvalidRequest(f"{param} is required", param)
    message = first["msg"][:1].lower() + first["msg"][1:]
    return InvalidRequest(f"{param}: {message}; got {_short(first['input'])}", param)


def _short(value: object) -> str:
    return reprlib.repr(value)


# ── responses ───────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Envelope:
    """What all chunks of one response have in common."""

    id: str
    created: int  # Unix seconds
    model: str
    system_fingerprint: str
    include_usage: bool = False


class CachedTokens(TypedDict):
    """How much of the prompt was not computed again."""

    cached_tokens: int


class Usage(TypedDict):
    """Token counts of one response."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class ResponseHead(TypedDict):
    """What responses and chunks of either kind have in common."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    usage: NotRequired[Usage | None]
    prompt_token_ids: NotRequired[list[int]]


class Ending(TypedDict):
    """How a choice ended, if it did, with the ids of its text and metrics if they are asked for."""

    finish_reason: FinishName | None
    stop_reason: StopReason
    token_ids: NotRequired[list[int]]
    prompt_token_ids: NotRequired[list[int]]
    metrics: NotRequired["Metrics"]


class Metrics(TypedDict):
    """How a choice was served, if `return_metrics` asks for it; times in milliseconds.

    `tpot_ms` is None for a choice of one token; `slo_met` is whether it kept its targets.
    """

    ttft_ms: float
    tpot_ms: float | None
    queue_ms: float
    slo_met: bool


class ChatReply(TypedDict):
    """The assistant's message."""

    role: Literal["assistant"]
    content: str
    refusal: None


class Delta(TypedDict, total=False):
    """What a chunk adds to the assistant's message."""

    role: Literal["assistant"]
    content: str


class ChatChoice(Ending):
    """One choice of a chat response."""

    index: int
    logprobs: None
    message: ChatReply


class ChatChunkChoice(Ending):
    """One choice of a chat chunk."""

    index: int
    logprobs: None
    delta: Delta


class CompletionChoice(Ending):
    """One choice of a completion, whole or a chunk of it."""

    index: int
    logprobs: None
    text: str


class ChatCompletion(ResponseHead):
    """The response of /v1/chat/completions."""

    choices: list[ChatChoice]


class ChatChunk(ResponseHead):
    """An event of a streamed /v1/chat/completions."""

    choices: list[ChatChunkChoice]


class Completion(ResponseHead):
    """The response of /v1/completions, or an event of it when streamed."""

    choices: list[CompletionChoice]


class ModelCard(TypedDict):
    """One served model; `max_model_len` is vLLM's."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(TypedDict):
    """The response of /v1/models."""

    object: Literal["list"]
    data: list[ModelCard]


def make_usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> Usage:
    """Count up."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def model_card(name: str, created: int, max_model_len: int) -> ModelCard:
    """Describe one served model."""
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "afd_server",
        "max_model_len": max_model_len,
    }


def model_list(cards: Sequence[ModelCard]) -> ModelList:
    """Make the response of /v1/models."""
    return {"object": "list", "data": list(cards)}


def chat_choice(
    index: int,
    content: str,
    finish_reason: FinishName,
    stop_reason: StopReason = None,
    token_ids: list[int] | None = None,
    metrics: Metrics | None = None,
) -> ChatChoice:
    """Make one choice of a chat response."""
    message: ChatReply = {"role": "assistant", "content": content, "refusal": None}
    ending = _ending(finish_reason, stop_reason, token_ids, metrics)
    return {"index": index, "message": message, "logprobs": None, **ending}


def chat_completion(
    envelope: Envelope,
    choices: list[ChatChoice],
    usage: Usage,
    prompt_token_ids: list[int] | None = None,
) -> ChatCompletion:
    """Make the response of /v1/chat/completions."""
    head = _head(envelope, "chat.completion")
    response: ChatCompletion = {**head, "choices": choices, "usage": usage}
    if prompt_token_ids is not None:
        response["prompt_token_ids"] = prompt_token_ids
    return response


def chat_start(
    envelope: Envelope, index: int, prompt_token_ids: list[int] | None = None
) -> ChatChunk:
    """Open a choice; the ids of the prompt go with the first choice only."""
    chunk = _chat_chunk(envelope, index, {"role": "assistant", "content": ""}, _ending())
    if prompt_token_ids is not None:
        chunk["prompt_token_ids"] = prompt_token_ids
    return chunk


def chat_text(
    envelope: Envelope, index: int, text: str, token_ids: list[int] | None = None
) -> ChatChunk:
    """Add text to a choice."""
    return _chat_chunk(envelope, index, {"content": text}, _ending(token_ids=token_ids))


def chat_finish(
    envelope: Envelope,
    index: int,
    finish_reason: FinishName,
    stop_reason: StopReason = None,
    token_ids: list[int] | None = None,
    metrics: Metrics | None = None,
) -> ChatChunk:
    """Close a choice; its text has been sent."""
    ending = _ending(finish_reason, stop_reason, token_ids, metrics)
    return _chat_chunk(envelope, index, {}, ending)


def chat_usage(envelope: Envelope, usage: Usage) -> ChatChunk:
    """Make the last chunk of a chat stream with `include_usage`."""
    return {**_head(envelope, "chat.completion.chunk"), "choices": [], "usage": usage}


def completion_choice(
    index: int,
    text: str,
    finish_reason: FinishName | None = None,
    stop_reason: StopReason = None,
    token_ids: list[int] | None = None,
    prompt_token_ids: list[int] | None = None,
    metrics: Metrics | None = None,
) -> CompletionChoice:
    """Make one choice of a completion; without `finish_reason` it is one of a chunk."""
    ending = _ending(finish_reason, stop_reason, token_ids, metrics)
    choice: CompletionChoice = {"index": index, "text": text, "logprobs": None, **ending}
    if prompt_token_ids is not None:
        choice["prompt_token_ids"] = prompt_token_ids
    return choice


def completion(envelope: Envelope, choices: list[CompletionChoice], usage: Usage) -> Completion:
    """Make the response of /v1/completions; without choices, the last chunk with usage."""
    return {**_head(envelope, "text_completion"), "choices": choices, "usage": usage}


def completion_chunk(envelope: Envelope, choice: CompletionChoice) -> Completion:
    """Make an event of a streamed /v1/completions."""
    chunk: Completion = {**_head(envelope, "text_completion"), "choices": [choice]}
    if envelope.include_usage:
        chunk["usage"] = None
    return chunk


def _chat_chunk(envelope: Envelope, index: int, delta: Delta, ending: Ending) -> ChatChunk:
    chunk: ChatChunk = {
        **_head(envelope, "chat.completion.chunk"),
        "choices": [{"index": index, "delta": delta, "logprobs": None, **ending}],
    }
    if envelope.include_usage:
        chunk["usage"] = None
    return chunk


def _head(envelope: Envelope, kind: str) -> ResponseHead:
    return {
        "id": envelope.id,
        "object": kind,
        "created": envelope.created,
        "model": envelope.model,
        "system_fingerprint": envelope.system_fingerprint,
    }


def _ending(
    finish_reason: FinishName | None = None,
    stop_reason: StopReason = None,
    token_ids: list[int] | None = None,
    metrics: Metrics | None = None,
) -> Ending:
    ending: Ending = {"finish_reason": finish_reason, "stop_reason": stop_reason}
    if metrics is not None:
        ending["metrics"] = metrics
    if token_ids is not None:
        ending["token_ids"] = token_ids
    return ending
