"""The Anthropic dialect: /v1/messages, /v1/messages/count_tokens and the error body.

Served for text. The samplers' fields and `seed`, `priority` and the like, which Anthropic does not
have, mean what they mean in the OpenAI dialect. The events of a stream are named by their `type`.
"""

from itertools import groupby
from typing import Annotated, Literal, NotRequired, TypedDict

from pydantic import BaseModel, ConfigDict, Field

from afd_server.api.body import Body, GenerationBody, MessageText, Metrics, StopStrings

IGNORED = frozenset({
    "metadata", "service_tier", "speed", "cache_control", "diagnostics", "user_profile_id",
    "workspace_id",
})  # fmt: skip
"""Accepted without effect: none of them changes which tokens are right."""

REFUSED: dict[str, tuple[object, ...]] = {
    "tools": ([],),
    "tool_choice": ({"type": "none"}, {"type": "auto"}),
    "thinking": ({"type": "disabled"},),
    "output_config": ({},),
    "output_format": (),
    "mcp_servers": ([],),
    "container": (),
    "context_management": ({}, {"edits": []}),
    "inference_geo": (),
}
"""Fields we know and cannot honour, each with the values that ask for nothing."""

OVERLOADED = 529
"""The status with which Anthropic's servers say that they are full."""

StopReason = Literal["end_turn", "max_tokens", "stop_sequence"]


# ── requests ────────────────────────────────────────────────────────────────────────────────


class Message(BaseModel):
    """One message of a conversation, its content reduced to text."""

    model_config = ConfigDict(strict=True, frozen=True)

    role: Literal["user", "assistant", "system"]
    content: MessageText


class CountTokensRequest(Body):
    """The body of POST /v1/messages/count_tokens."""

    ignored = IGNORED
    refused = REFUSED

    system: MessageText = ""
    messages: list[Message] = Field(min_length=1)

    @property
    def conversation(self) -> list[dict[str, str]]:
        """Return the messages as a chat template reads them, one for each turn.

        Consecutive messages of one role are paragraphs of one turn.
        """
        turns = [(message.role, message.content) for message in self.messages]
        system = [("system", self.system)] if self.system else []
        return [
            {"role": role, "content": "\n\n".join(content for _, content in group)}
            for role, group in groupby([*system, *turns], key=lambda turn: turn[0])
        ]

    @property
    def is_open(self) -> bool:
        """Tell whether the last turn is the assistant's, for the model to go on with it."""
        return self.messages[-1].role == "assistant"


class MessagesRequest(CountTokensRequest, GenerationBody):
    """The body of POST /v1/messages."""

    max_tokens: int = Field(ge=1)
    stop: Annotated[StopStrings, Field(alias="stop_sequences")] = ()


# ── errors ──────────────────────────────────────────────────────────────────────────────────


class ErrorDetail(TypedDict):
    """The content of an error body."""

    type: str
    message: str


class ErrorBody(TypedDict):
    """The body of every failed call, and the last event of a failed stream."""

    type: Literal["error"]
    error: ErrorDetail
    request_id: str


ERROR_TYPES = {
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    OVERLOADED: "overloaded_error",
}
"""Of the statuses that have their own; others are the client's fault or the server's."""


def error_body(status: int, message: str, request_id: str) -> ErrorBody:
    """Make an error body; the status decides on its type."""
    kind = ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id}


# ── responses ───────────────────────────────────────────────────────────────────────────────


class Usage(TypedDict):
    """Token counts of one response; the three of input add up to the whole prompt."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class TextBlock(TypedDict):
    """A piece of the assistant's message."""

    type: Literal["text"]
    text: str


class Ending(TypedDict):
    """Why a message ended, both None while it has not."""

    stop_reason: StopReason | None
    stop_sequence: str | None


class MessageBody(Ending):
    """The response of /v1/messages."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextBlock]
    usage: Usage
    metrics: NotRequired[Metrics]


class TextDelta(TypedDict):
    """What an event adds to a block."""

    type: Literal["text_delta"]
    text: str


class Event(TypedDict):
    """An event of a stream, with what its type has."""

    type: str
    message: NotRequired[MessageBody]
    index: NotRequired[int]
    content_block: NotRequired[TextBlock]
    delta: NotRequired[TextDelta | Ending]
    usage: NotRequired[Usage]
    metrics: NotRequired[Metrics]


class TokenCount(TypedDict):
    """The response of /v1/messages/count_tokens."""

    input_tokens: int


def make_usage(prompt_tokens: int, output_tokens: int, cached_tokens: int) -> Usage:
    """Count up; what is cached here costs nothing to create."""
    return {
        "input_tokens": prompt_tokens - cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached_tokens,
        "output_tokens": output_tokens,
    }


def make_ending(finish: Literal["stop", "length"], stopped_by: str | int | None) -> Ending:
    """Say why a message ended: at `stopped_by`, a stop string or token, if there is one."""
    if finish == "length":
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if stopped_by is None:
        return {"stop_reason": "end_turn", "stop_sequence": None}
    text = stopped_by if isinstance(stopped_by, str) else None
    return {"stop_reason": "stop_sequence", "stop_sequence": text}


def message(
    message_id: str,
    model: str,
    content: list[TextBlock],
    ending: Ending,
    usage: Usage,
    metrics: Metrics | None = None,
) -> MessageBody:
    """Make the response of /v1/messages."""
    body: MessageBody = {
        "id": message_id,
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": content,
        "stop_reason": ending["stop_reason"],
        "stop_sequence": ending["stop_sequence"],
        "usage": usage,
    }
    if metrics is not None:
        body["metrics"] = metrics
    return body


def text_block(text: str) -> TextBlock:
    """Make a piece of the assistant's message."""
    return {"type": "text", "text": text}


def opening(message_id: str, model: str, usage: Usage) -> list[Event]:
    """Return the events before the first text."""
    not_ended: Ending = {"stop_reason": None, "stop_sequence": None}
    begun = message(message_id, model, [], not_ended, usage)
    return [
        {"type": "message_start", "message": begun},
        {"type": "content_block_start", "index": 0, "content_block": text_block("")},
        PING,
    ]


def text_event(text: str) -> Event:
    """Return the event that adds text."""
    return {
        "type": "content_block_delta",
        "index": 0,
        "delta": {"type": "text_delta", "text": text},
    }


def closing(ending: Ending, usage: Usage, metrics: Metrics | None = None) -> list[Event]:
    """Return the events after the last text; the counts are those of the whole message."""
    delta: Event = {"type": "message_delta", "delta": ending, "usage": usage}
    if metrics is not None:
        delta["metrics"] = metrics
    return [{"type": "content_block_stop", "index": 0}, delta, {"type": "message_stop"}]


PING: Event = {"type": "ping"}
"""Dropped by clients; keeps proxies from closing an idle stream."""
