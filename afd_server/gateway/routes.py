"""The OpenAI routes."""

import asyncio
import contextlib
import logging
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from afd_server.api import openai, sse
from afd_server.core.errors import InvalidRequest, Overloaded
from afd_server.gateway.asker import Asker
from afd_server.gateway.choices import ChoicePlan, Choices, ChoiceState, Piece, run_to_end
from afd_server.gateway.errors import ModelNotFound, NotReady, end_openly
from afd_server.gateway.service import Service
from afd_server.policy.admission import check_capacity, fit_max_tokens

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 4 * 2**20
MAX_PROMPTS = 32
DEFAULT_COMPLETION_TOKENS = 16  # as OpenAI documents it
KEEP_ALIVE_S = 15.0
SSE_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}

Body = TypeVar("Body", bound=openai.GenerationRequest)
Result = TypeVar("Result")
Chunk = openai.ChatChunk | openai.Completion


def openai_routes(service: Service) -> APIRouter:
    """Return the routes of /v1."""
    router = APIRouter(prefix="/v1")

    @router.get("/models")
    async def models() -> JSONResponse:
        return JSONResponse(openai.model_list([_card(service)]))

    @router.get("/models/{name:path}")
    async def model(name: str) -> JSONResponse:
        _check_model(service, name)
        return JSONResponse(_card(service))

    @router.post("/chat/completions")
    async def chat_completions(request: Request) -> Response:
        body = await _parse(service, request, openai.ChatCompletionRequest)
        asker = service.asker_of(request.headers, body.cache_salt, body.priority)
        _admit(service, asker, body.n)
        prompt = service.codec.encode_chat(body.conversation)
        openai.check_token_ids(prompt, service.vocab_size, "messages")
        plans, seed = _plans(service, body, [prompt], body.output_limit, None)
        envelope = _envelope(service, "chatcmpl", body)
        writer = ChatWriter(envelope, body, tuple(prompt))
        return await _answer(service, request, body, asker, plans, writer, seed)

    @router.post("/completions")
    async def completions(request: Request) -> Response:
        body = await _parse(service, request, openai.CompletionRequest)
        if len(body.prompt) > MAX_PROMPTS:
            raise InvalidRequest(
                f"{len(body.prompt)} prompts in one request, at most {MAX_PROMPTS}", "prompt"
            )
        asker = service.asker_of(request.headers, body.cache_salt, body.priority)
        _admit(service, asker, body.n * len(body.prompt))
        prompts = [_encode_prompt(service, prompt) for prompt in body.prompt]
        plans, seed = _plans(service, body, prompts, body.output_limit, DEFAULT_COMPLETION_TOKENS)
        envelope = _envelope(service, "cmpl", body)
        writer = CompletionWriter(envelope, body)
        return await _answer(service, request, body, asker, plans, writer, seed)

    return router


class ChatWriter:
    """Writes /v1/chat/completions answers."""

    def __init__(
        self,
        envelope: openai.Envelope,
        body: openai.ChatCompletionRequest,
        prompt_ids: tuple[int, ...],
    ) -> None:
        self.envelope = envelope
        self._with_ids = body.return_token_ids
        self._with_metrics = body.return_metrics
        self._prompt_ids = list(prompt_ids) if body.return_token_ids else None

    def whole(self, states: list[ChoiceState], usage: openai.Usage) -> openai.ChatCompletion:
        """Return the answer in one piece."""
        choices = [
            openai.chat_choice(
                index,
                state.text,
                _finish(state),
                state.stop_reason,
                state.token_ids if self._with_ids else None,
                _metrics(state) if self._with_metrics else None,
            )
            for index, state in enumerate(states)
        ]
        return openai.chat_completion(self.envelope, choices, usage, self._prompt_ids)

    def start(self, index: int) -> list[Chunk]:
        """Return what opens a choice."""
        return [openai.chat_start(self.envelope, index, None if index else self._prompt_ids)]

    def piece(self, piece: Piece, state: ChoiceState) -> list[Chunk]:
        """Return what a token adds: its text, and the ending in a chunk of its own."""
        ids = [piece.token_id] if self._with_ids else None
        chunks: list[Chunk] = []
        if piece.text or (ids and piece.finish is None):
            chunks.append(openai.chat_text(self.envelope, piece.choice, piece.text, ids))
            ids = [] if self._with_ids else None
        if piece.finish is not None:
            chunks.append(
                openai.chat_finish(
                    self.envelope,
                    piece.choice,
                    piece.finish,
                    piece.stop_reason,
                    ids,
                    _metrics(state) if self._with_metrics else None,
                )
            )
        return chunks

    def usage(self, usage: openai.Usage) -> Chunk:
        """Return the chunk that carries the usage."""
        return openai.chat_usage(self.envelope, usage)


class CompletionWriter:
    """Writes /v1/completions answers."""

    def __init__(self, envelope: openai.Envelope, body: openai.CompletionRequest) -> None:
        self.envelope = envelope
        self._with_ids = body.return_token_ids
        self._with_metrics = body.return_metrics
        self._opened: set[int] = set()

    def whole(self, states: list[ChoiceState], usage: openai.Usage) -> openai.Completion:
        """Return the answer in one piece."""
        choices = [
            openai.completion_choice(
                index,
                state.text,
                _finish(state),
                state.stop_reason,
                state.token_ids if self._with_ids else None,
                list(state.plan.prompt_ids) if self._with_ids else None,
                _metrics(state) if self._with_metrics else None,
            )
            for index, state in enumerate(states)
        ]
        return openai.completion(self.envelope, choices, usage)

    def start(self, _index: int) -> list[Chunk]:
        """Return nothing: a completion opens with its first text."""
        return []

    def piece(self, piece: Piece, state: ChoiceState) -> list[Chunk]:
        """Return what a token adds, if it adds anything."""
        if not (piece.text or piece.finish or self._with_ids):
            return []
        first = piece.choice not in self._opened
        self._opened.add(piece.choice)
        choice = openai.completion_choice(
            piece.choice,
            piece.text,
            piece.finish,
            piece.stop_reason,
            [piece.token_id] if self._with_ids else None,
            list(state.plan.prompt_ids) if self._with_ids and first else None,
            _metrics(state) if self._with_metrics and piece.finish else None,
        )
        return [openai.completion_chunk(self.envelope, choice)]

    def usage(self, usage: openai.Usage) -> Chunk:
        """Return the chunk that carries the usage."""
        return openai.completion(self.envelope, [], usage)


Writer = ChatWriter | CompletionWriter


async def _answer(
    service: Service,
    request: Request,
    body: openai.GenerationRequest,
    asker: Asker,
    plans: list[ChoicePlan],
    writer: Writer,
    seed: int,
) -> Response:
    choices = Choices(service.generations, service.codec, plans, asker, service.eos_token_ids)
    headers = {"x-afd-seed": str(seed), "x-request-id": writer.envelope.id}
    if body.stream:
        stream = _EventStream(choices, _events(choices, writer, body.include_usage), headers)
        if service.admission.slo_mode == "enforce":  # it may still be refused, with a status
            await stream.begin(request)
        return stream
    with choices:
        states = await _unless_disconnected(request, lambda: run_to_end(choices))
    if states is None:
        return Response(status_code=499)  # nobody reads it
    return JSONResponse(writer.whole(states, _usage(states)), headers=headers)


class _EventStream(StreamingResponse):
    """Streams an answer whose generation has begun, and ends the generation with the response.

    It begins before the first byte is asked for, so that the next request is admitted with this
    one counted; it ends even if the client has left by then and nothing is ever streamed.
    """

    def __init__(
        self, choices: Choices, events: AsyncIterator[bytes], headers: dict[str, str]
    ) -> None:
        super().__init__(
            end_openly(events), media_type="text/event-stream", headers={**headers, **SSE_HEADERS}
        )
        self._choices = choices.__enter__()

    async def begin(self, request: Request) -> None:
        """Wait until there is something to stream, or nobody to read it.

        Raises:
            AFDError: there will never be anything.
        """
        with contextlib.ExitStack() as ending:
            ending.push(self._choices)
            await _unless_disconnected(request, self._choices.begin)
            ending.pop_all()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.ExitStack() as ending:
            ending.push(self._choices)
            await super().__call__(scope, receive, send)


async def _events(choices: Choices, writer: Writer, include_usage: bool) -> AsyncIterator[bytes]:
    for index in range(len(choices.states)):
        for chunk in writer.start(index):
            yield sse.json_event(chunk)
    async for piece in choices.pieces(KEEP_ALIVE_S):
        if piece is None:
            yield sse.KEEP_ALIVE
            continue
        for chunk in writer.piece(piece, choices.states[piece.choice]):
            yield sse.json_event(chunk)
    if include_usage:
        yield sse.json_event(writer.usage(_usage(choices.states)))


async def _unless_disconnected(
    request: Request, work: Callable[[], Awaitable[Result]]
) -> Result | None:
    """Do the work, or give it up when the client goes away; then return None."""
    working = asyncio.ensure_future(work())
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _parse(service: Service, request: Request, kind: type[Body]) -> Body:
    if service.is_draining or not service.is_ready:
        raise NotReady("the server is stopping" if service.is_draining else "not ready yet")
    raw = bytearray()
    async for part in request.stream():
        raw += part
        if len(raw) > MAX_BODY_BYTES:
            raise HTTPException(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
    body = kind.model_validate_json(bytes(raw))
    if body.unknown_fields:
        log.debug("ignored unknown fields %s", ", ".join(body.unknown_fields))
    if body.model is not None:
        _check_model(service, body.model)
    return body


def _admit(service: Service, asker: Asker, num_new: int) -> None:
    admission, generations = service.admission, service.generations
    try:
        check_capacity(admission, generations.num_live, num_new)
        if admission.slo_mode == "enforce":
            service.check_reachable(asker.slo)
            generations.queue.check(
                admission, asker.slo.ttft_s, asker.priority, asker.tenant, num_new
            )
    except Overloaded as error:
        service.metrics.refused(error.reason)
        raise


def _plans(
    service: Service,
    body: openai.GenerationRequest,
    prompts: list[list[int]],
    wanted_tokens: int | None,
    default_tokens: int | None,
) -> tuple[list[ChoicePlan], int]:
    """Return a plan for each choice, prompt by prompt, and the seed they share.

    Without `wanted_tokens` it is `default_tokens` or what the context leaves.
    """
    drawn = secrets.randbits(63)
    plans = []
    for prompt_index, prompt in enumerate(prompts):
        param = "messages" if isinstance(body, openai.ChatCompletionRequest) else "prompt"
        max_tokens = fit_max_tokens(service.admission, len(prompt), wanted_tokens, param)
        if wanted_tokens is None and default_tokens is not None:
            max_tokens = min(max_tokens, default_tokens)
        for choice in range(body.n):
            sampling = openai.sampling_params(
                body,
                seed=drawn,
                choice=choice,
                max_tokens=max_tokens,
                eos_token_ids=service.eos_token_ids,
                vocab_size=service.vocab_size,
            )
            plans.append(ChoicePlan(prompt_index, tuple(prompt), sampling, body.stop))
    return plans, plans[0].sampling.seed


def _encode_prompt(service: Service, prompt: str | list[int]) -> list[int]:
    ids = service.codec.encode(prompt) if isinstance(prompt, str) else prompt
    openai.check_token_ids(ids, service.vocab_size, "prompt")
    if not ids:
        raise InvalidRequest("the prompt is empty; give at least one token", "prompt")
    return ids


def _usage(states: list[ChoiceState]) -> openai.Usage:
    """Count each prompt once, with what the first of its choices to compute it found computed."""
    prompts: dict[int, int] = {}
    cached: dict[int, int] = {}
    for state in states:
        index = state.plan.prompt_index
        prompts[index] = len(state.plan.prompt_ids)
        cached[index] = min(state.num_cached, cached.get(index, state.num_cached))
    return openai.make_usage(
        sum(prompts.values()),
        sum(len(state.token_ids) for state in states),
        sum(cached.values()),
    )


def _metrics(state: ChoiceState) -> openai.Metrics:
    timing = state.timing
    assert timing is not None, "an unfinished choice has no metrics"
    return {
        "ttft_ms": timing.ttft_s * 1e3,
        "tpot_ms": None if timing.tpot_s is None else timing.tpot_s * 1e3,
        "queue_ms": timing.queue_s * 1e3,
        "slo_met": timing.slo_met,
    }


def _finish(state: ChoiceState) -> openai.FinishName:
    assert state.finish is not None, "an unfinished choice cannot be written"
    return state.finish


def _envelope(service: Service, prefix: str, body: openai.GenerationRequest) -> openai.Envelope:
    return openai.Envelope(
        id=f"{prefix}-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=service.model_name,
        system_fingerprint=service.system_fingerprint,
        include_usage=body.include_usage,
    )


def _card(service: Service) -> openai.ModelCard:
    return openai.model_card(service.model_name, service.created, service.admission.max_model_len)


def _check_model(service: Service, name: str) -> None:
    if name != service.model_name:
        raise ModelNotFound(f"model {name!r} is not served here; use {service.model_name!r}")
