"""A client of OpenAI's API that sends offers and writes down what became of them."""

import asyncio
import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any  # Any: JSON

from afd_server.core.errors import TransportError
from afd_server.loadgen.config import EndpointType
from afd_server.loadgen.http import Origin, exchange
from afd_server.workload.offers import Offer
from afd_server.workload.report import Outcome, RequestRecord

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
REFUSALS = (429, 503, 529)
FAULTS = ("worker_failed", "server_is_starting")  # codes of our 503 that refuse nobody
WORDS = ("the", "and", "for", "you", "are", "with", "that", "this", "from", "have", "not", "but")


@dataclass(frozen=True, slots=True)
class BodyStyle:
    """What request bodies have in common.

    Prompts of completions are token ids out of `vocabulary`, exactly as long as asked for. Chats
    take text: as many common words, so a length is about right, and the server's count is used.
    `cache_salt` keeps what an earlier run left in a prefix cache out of this one, where the
    server knows that field. `extra` fields go over all; a null leaves a field out.
    """

    endpoint_type: EndpointType
    model: str
    vocabulary: range
    cache_salt: str
    extra: dict[str, Any]

    def body(self, offer: Offer) -> dict[str, Any]:
        """Return the body of a request: a streamed answer of an exact length, greedy."""
        ids = [token for part in offer.shape.prompt for token in part.token_ids(self.vocabulary)]
        body = self._prompt(ids) | {
            "model": self.model,
            "max_tokens": offer.shape.num_output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,  # a chunk for every token, also for those without text
            "cache_salt": self.cache_salt,
        }
        return {key: value for key, value in (body | self.extra).items() if value is not None}

    def _prompt(self, ids: list[int]) -> dict[str, Any]:
        if self.endpoint_type == "completions":
            return {"prompt": ids}
        text = " ".join(WORDS[token % len(WORDS)] for token in ids)
        return {"messages": [{"role": "user", "content": text}]}


@dataclass(frozen=True, slots=True)
class Prepared:
    """An offer as bytes to send, made beforehand so that nothing is left to do when it is due."""

    offer: Offer
    request: bytes
    exact_output: bool


class Client:
    """Sends offers to one server. `timeout_s` is the longest that one may take."""

    def __init__(self, origin: Origin, style: BodyStyle, timeout_s: float) -> None:
        self.origin = origin
        self._style = style
        self._timeout_s = timeout_s

    def prepare(self, offer: Offer) -> Prepared:
        """Write an offer's request; a target of its own goes into a header."""
        body = self._style.body(offer)
        headers = {}
        if offer.slo.tpot_s is not None:
            headers["x-slo-tpot-ms"] = f"{offer.slo.tpot_s * 1000:g}"
        path = PATHS[self._style.endpoint_type]
        request = self.origin.request("POST", path, json.dumps(body).encode(), headers)
        return Prepared(offer, request, bool(body.get("ignore_eos")))

    async def send(self, prepared: Prepared, intended_s: float) -> RequestRecord:
        """Send a request and follow its stream to the end.

        Never raises for what a server does. A task that is cancelled in here gives a record of
        an unfinished request.
        """
        offer, stream = prepared.offer, AnswerStream()
        leaves = offer.cancel_after_s is not None and offer.cancel_after_s < self._timeout_s
        sent_s = time.monotonic()
        try:
            async with asyncio.timeout(offer.cancel_after_s if leaves else self._timeout_s):
                await exchange(self.origin, prepared.request, stream)
            outcome, reason = stream.verdict()
        except TransportError as error:
            outcome, reason = Outcome.FAILED, str(error)
        except TimeoutError:
            outcome, reason = Outcome.CANCELLED, ""
            if not leaves:
                outcome, reason = Outcome.FAILED, f"no end within {self._timeout_s:g} s"
        except asyncio.CancelledError:
            outcome, reason = Outcome.UNFINISHED, ""
        if stream.finished:  # all was said, whatever became of the connection
            outcome, reason = stream.verdict()
        wanted, got = offer.shape.num_output_tokens, stream.num_output_tokens
        if outcome is Outcome.COMPLETED and prepared.exact_output and got != wanted:
            hint = """, the server may not know ignore_eos: --extra-body '{"ignore_eos": null}'"""
            outcome, reason = Outcome.FAILED, f"{got} tokens instead of {wanted}{hint}"
        completed = outcome is Outcome.COMPLETED
        return RequestRecord(
            intended_s,
            sent_s,
            stream.end_s if completed else time.monotonic(),
            tuple(stream.chunk_times_s),
            stream.num_input_tokens or offer.shape.num_input_tokens,
            stream.num_output_tokens,
            outcome,
            reason,
            stream.retry_after_s,
            offer.slo,
        )


class AnswerStream:
    """Reads an answer, event by event: when tokens came, and what the server says it did."""

    def __init__(self) -> None:
        self.chunk_times_s: list[float] = []
        self.end_s = 0.0  # when the last chunk came that tells of tokens, also of some without text
        self.num_input_tokens = 0
        self.num_output_tokens = 0
        self.finished = False
        self._has_usage = False
        self._error: str | None = None
        self._status = 0
        self._headers: Mapping[str, str] = {}
        self._rest = b""

    def begin(self, status: int, headers: Mapping[str, str]) -> None:
        self._status, self._headers = status, headers

    def receive(self, data: bytes, now_s: float) -> None:
        self._rest += data
        if self._status != 200:
            return
        *lines, self._rest = self._rest.split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._take(line[5:].strip(), now_s)
        if self._rest.rstrip() == b"data: [DONE]":  # the last line may lack its end
            self.finished = True

    @property
    def retry_after_s(self) -> float | None:
        """Return when the server asks to come back; None if it does not say in seconds."""
        with suppress(KeyError, ValueError):
            return float(self._headers["retry-after"])
        return None

    def verdict(self) -> tuple[Outcome, str]:
        """Return how a complete answer ended, and why if not well."""
        reason = self._headers.get("x-afd-reject-reason")
        error = self._error_of_body() if self._status != 200 else {}
        code = error.get("code")
        if code not in FAULTS and (reason is not None or self._status in REFUSALS):
            return Outcome.REFUSED, str(reason or code or f"HTTP {self._status}")
        if self._status != 200:
            said = str(error.get("message") or self._rest.decode("utf-8", "replace"))
            parts = f"HTTP {self._status}", self._headers.get("location"), " ".join(said.split())
            return Outcome.FAILED, ": ".join(filter(None, parts))[:200]
        if self._error is not None:
            return Outcome.FAILED, self._error[:200]
        if not self.finished:
            return Outcome.FAILED, "the stream ended without [DONE]"
        if not self._has_usage:
            return Outcome.FAILED, "no usage in the stream, although include_usage was asked for"
        if not self.chunk_times_s:
            return Outcome.FAILED, "the stream had no tokens"
        return Outcome.COMPLETED, ""

    def _take(self, event: bytes, now_s: float) -> None:
        if event == b"[DONE]":
            self.finished = True
            return
        try:
            chunk = json.loads(event)
            if choices := chunk.get("choices"):
                self.end_s = now_s
                if any(map(_has_output, choices)):
                    self.chunk_times_s.append(now_s)
            if usage := chunk.get("usage"):
                self._has_usage = True
                self.num_input_tokens = int(usage["prompt_tokens"])
                self.num_output_tokens = int(usage["completion_tokens"])
            if error := chunk.get("error"):
                self._error = str(error.get("message", error))
        except (ValueError, KeyError, TypeError, AttributeError):
            self._error = f"an event that is no chunk: {event[:80]!r}"

    def _error_of_body(self) -> dict[str, Any]:
        with suppress(ValueError, KeyError, TypeError):
            error = json.loads(self._rest)["error"]
            if isinstance(error, dict):
                return error
        return {}


def _has_output(choice: dict[str, Any]) -> bool:
    """Say whether a chunk brings tokens: a chat's first has a role alone, a last one nothing."""
    if choice.get("token_ids") is not None:
        return bool(choice["token_ids"])
    piece = choice.get("delta") or choice
    names = ("text", "content", "reasoning_content", "reasoning", "tool_calls")
    return any(piece.get(name) for name in names)
