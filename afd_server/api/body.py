"""What the bodies of all dialects have in common: fields, their checks, sampling.

A field of a body is served, accepted without effect (`ignored`), refused unless it holds a
neutral value (`refused`), or unknown; unknown fields are accepted, because clients send each
server's extras through `extra_body`, and named by `unknown_fields` for the log. Null always
means absent.
"""

import reprlib
from collections.abc import Iterable, Mapping
from typing import Annotated, ClassVar, Self, TypedDict

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from afd_server.core.errors import InvalidRequest
from afd_server.core.request import GUARD_WINDOWS, PRIORITIES, SamplingParams

MAX_STOP_STRINGS = 16  # OpenAI takes 4; evaluation harnesses send more
MAX_STOP_CHARS = 64  # bounds the text held back, and the search in it, per token
MAX_STOP_TOKENS = 64  # each is compared with every token


# ── texts ───────────────────────────────────────────────────────────────────────────────────


def valid_text(value: str) -> str:
    """Refuse lone surrogates, which JSON can spell and UTF-8, hence the tokenizer, cannot."""
    if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        raise PydanticCustomError("text", "text holds a lone surrogate; expected valid Unicode")
    return value


def _content(value: object) -> str:
    """Join the text parts of a message; null is an empty message."""
    if value is None:
        return ""
    if isinstance(value, str):
        return valid_text(value)
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
    return valid_text(text)


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


MessageText = Annotated[
    str, PlainValidator(_content, json_schema_input_type=str | list[dict[str, str]] | None)
]
"""The content of a message, reduced to text."""

StopStrings = Annotated[
    tuple[str, ...], PlainValidator(_stop, json_schema_input_type=str | list[str])
]


# ── bodies ──────────────────────────────────────────────────────────────────────────────────


class Body(BaseModel):
    """A JSON object that a client sends, with what a dialect does about fields it does not serve.

    Attributes:
        ignored: accepted without effect.
        refused: fields we know and cannot honour, each with the values that ask for nothing.

    Raises:
        InvalidRequest: from validation, when a field of `refused` asks for something.
    """

    # inf and NaN are refused by every float field; `extra` keeps what we do not serve.
    model_config = ConfigDict(strict=True, frozen=True, extra="allow", allow_inf_nan=False)
    ignored: ClassVar[frozenset[str]] = frozenset()
    refused: ClassVar[Mapping[str, tuple[object, ...]]] = {}

    model: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, body: object) -> object:
        if not isinstance(body, dict):
            return body
        return {field: value for field, value in body.items() if value is not None}

    @model_validator(mode="after")
    def _refuse_what_we_cannot_honour(self) -> Self:
        extra = self.model_extra or {}
        for field, neutral in {**self.refused, **self._also_neutral()}.items():
            if field in extra and extra[field] not in neutral:
                raise InvalidRequest(
                    f"{field} {short(extra[field])} is not supported by this server; "
                    f"leave {field} out",
                    param=field,
                )
        return self

    def _also_neutral(self) -> dict[str, tuple[object, ...]]:
        return {}

    @property
    def unknown_fields(self) -> tuple[str, ...]:
        """Return the names of the fields that nobody looked at, for a debug log."""
        return tuple(sorted((self.model_extra or {}).keys() - self.ignored - self.refused.keys()))


class GenerationBody(Body):
    """A body that asks for text: how it is sampled, how it is served."""

    stream: bool = False
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1)  # -1 and 0 mean off
    min_p: float = Field(default=0.0, ge=0, le=1)
    top_n_sigma: float = Field(default=0.0, ge=0)  # 0 means off; n of arXiv 2411.07641
    min_k: float = Field(default=0.0, ge=0)  # 0 means off; τ of arXiv 2604.11012
    guard_window: int = Field(default=0, ge=0, lt=GUARD_WINDOWS.stop)  # 0 means off
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    stop: StopStrings = ()
    stop_token_ids: list[int] = Field(default_factory=list, max_length=MAX_STOP_TOKENS)
    ignore_eos: bool = False
    cache_salt: str | None = Field(default=None, min_length=1)  # vLLM's
    priority: int = Field(default=0, ge=PRIORITIES[0], le=PRIORITIES[-1])  # vLLM's: lower is first
    return_metrics: bool = False

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


def sampling_params(
    body: GenerationBody,
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
            f"{param}: token id {short(wrong)} is outside of the vocabulary; "
            f"expected 0 to {vocab_size - 1}",
            param=param,
        )


# ── errors ──────────────────────────────────────────────────────────────────────────────────


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
    return InvalidRequest(f"{param}: {message}; got {short(first['input'])}", param)


def short(value: object) -> str:
    """Return how a value is shown to those who sent it, whatever its length."""
    return reprlib.repr(value)


# ── answers ─────────────────────────────────────────────────────────────────────────────────


class Metrics(TypedDict):
    """How a choice was served, if `return_metrics` asks for it; times in milliseconds.

    `tpot_ms` is None for a choice of one token; `slo_met` is whether it kept its targets.
    """

    ttft_ms: float
    tpot_ms: float | None
    queue_ms: float
    slo_met: bool
