"""The OpenAI dialect: /v1/chat/completions, /v1/completions, /v1/models and the error body.

Responses are typed dicts made by plain functions, cheap enough to make one per token. Their
shape is OpenAI's with vLLM's `token_ids`, `prompt_token_ids` and `stop_reason`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NotRequired, TypedDict

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator
from pydantic_core import PydanticCustomError

from afd_server.api.body import GenerationBody, MessageText, Metrics, valid_text

MAX_CHOICES = 8

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
            return [valid_text(prompt) for prompt in batch]
        if all(_is_ids(prompt) for prompt in batch):
            return batch
    raise PydanticCustomError(
        "prompt",
        "expected a string, a list of strings, a list of token ids or a list of such lists, "
        "none of the lists empty",
    )


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
    content: MessageText = ""
    tool_calls: Annotated[list[object] | None, AfterValidator(_no_tool_calls)] = None


class StreamOptions(BaseModel):
    """What a stream carries beside the text."""

    model_config = ConfigDict(strict=True, frozen=True)

    include_usage: bool | None = None


class GenerationRequest(GenerationBody):
    """The fields that chat and completion requests share."""

    ignored = IGNORED
    refused = REFUSED

    stream_options: StreamOptions = StreamOptions()
    max_tokens: int | None = Field(default=None, ge=1)
    return_token_ids: bool = False
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)

    def _also_neutral(self) -> dict[str, tuple[object, ...]]:
        return {"best_of": (1, self.n)}

    @property
    def include_usage(self) -> bool:
        """Return whether a stream ends with a chunk of usage."""
        return bool(self.stream_options.include_usage)


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
    metrics: NotRequired[Metrics]


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
