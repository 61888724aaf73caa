"""The OpenAI routes and how their answers are written."""

import time
import uuid
from collections.abc import Iterable, Sequence

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from afd_server.api import openai, sse
from afd_server.core.errors import InvalidRequest
from afd_server.gateway.choices import ChoiceState, Piece
from afd_server.gateway.errors import openai_body
from afd_server.gateway.exchange import (
    admit_and_tokenise,
    answer,
    check_model,
    num_chat_chars,
    plan_choices,
    read_body,
)
from afd_server.gateway.service import Service

MAX_PROMPTS = 32
DEFAULT_COMPLETION_TOKENS = 16  # as OpenAI documents it


def openai_routes(service: Service) -> APIRouter:
    """Return the routes of OpenAI's /v1."""
    router = APIRouter(prefix="/v1")

    @router.get("/models")
    async def models() -> JSONResponse:
        return JSONResponse(openai.model_list([_card(service)]))

    @router.get("/models/{name:path}")
    async def model(name: str) -> JSONResponse:
        check_model(service, name)
        return JSONResponse(_card(service))

    @router.post("/chat/completions")
    async def chat_completions(request: Request) -> Response:
        body = await read_body(service, request, openai.ChatCompletionRequest)
        asker, prompt = await admit_and_tokenise(
            service,
            request,
            body,
            body.n,
            num_chat_chars(body.conversation),
            lambda: service.codec.encode_chat(body.conversation, service.admission.max_model_len),
        )
        plans = plan_choices(
            service, body, [prompt], "messages", body.output_limit, num_choices=body.n
        )
        writer = ChatWriter(_envelope(service, "chatcmpl", body), body, prompt)
        return await answer(service, request, asker, plans, writer, body.stream)

    @router.post("/completions")
    async def completions(request: Request) -> Response:
        body = await read_body(service, request, openai.CompletionRequest)
        if len(body.prompt) > MAX_PROMPTS:
            raise InvalidRequest(
                f"{len(body.prompt)} prompts in one request, at most {MAX_PROMPTS}", "prompt"
            )
        asker, prompts = await admit_and_tokenise(
            service,
            request,
            body,
            body.n * len(body.prompt),
            sum(len(prompt) for prompt in body.prompt if isinstance(prompt, str)),
            lambda: [_encode_prompt(service, prompt) for prompt in body.prompt],
        )
        plans = plan_choices(
            service,
            body,
            prompts,
            "prompt",
            body.output_limit,
            default_tokens=DEFAULT_COMPLETION_TOKENS,
            num_choices=body.n,
        )
        writer = CompletionWriter(_envelope(service, "cmpl", body), body)
        return await answer(service, request, asker, plans, writer, body.stream)

    return router


class _Writer:
    """What the writers of both routes do alike."""

    keep_alive = sse.KEEP_ALIVE

    def __init__(self, envelope: openai.Envelope, body: openai.GenerationRequest) -> None:
        self.headers = {"x-request-id": envelope.id}
        self._envelope = envelope
        self._with_ids = body.return_token_ids
        self._with_metrics = body.return_metrics

    def failure(self, error: Exception) -> bytes:
        """Return the error and the end."""
        return sse.json_event(openai_body(error)[1]) + sse.DONE


class ChatWriter(_Writer):
    """Writes /v1/chat/completions answers."""

    def __init__(
        self,
        envelope: openai.Envelope,
        body: openai.ChatCompletionRequest,
        prompt_ids: list[int],
    ) -> None:
        super().__init__(envelope, body)
        self._prompt_ids = prompt_ids if body.return_token_ids else None

    def whole(self, states: Sequence[ChoiceState]) -> openai.ChatCompletion:
        """Return the answer in one piece."""
        choices = [
            openai.chat_choice(
                index,
                state.text,
                _finish(state),
                state.stop_reason,
                state.token_ids if self._with_ids else None,
                state.metrics if self._with_metrics else None,
            )
            for index, state in enumerate(states)
        ]
        return openai.chat_completion(self._envelope, choices, _usage(states), self._prompt_ids)

    def start(self, num_choices: int) -> Iterable[bytes]:
        """Open every choice."""
        for index in range(num_choices):
            ids = None if index else self._prompt_ids
            yield sse.json_event(openai.chat_start(self._envelope, index, ids))

    def piece(self, piece: Piece, state: ChoiceState) -> Iterable[bytes]:
        """Return what a token adds: its text, and the ending in a chunk of its own."""
        ids = [piece.token_id] if self._with_ids else None
        if piece.text or (ids and piece.finish is None):
            text = openai.chat_text(self._envelope, piece.choice, piece.text, ids)
            yield sse.json_event(text)
            ids = [] if self._with_ids else None
        if piece.finish is not None:
            finish = openai.chat_finish(
                self._envelope,
                piece.choice,
                piece.finish,
                piece.stop_reason,
                ids,
                state.metrics if self._with_metrics else None,
            )
            yield sse.json_event(finish)

    def end(self, states: Sequence[ChoiceState]) -> Iterable[bytes]:
        """Return the chunk with the usage, if it is asked for, and the end."""
        if self._envelope.include_usage:
            yield sse.json_event(openai.chat_usage(self._envelope, _usage(states)))
        yield sse.DONE


class CompletionWriter(_Writer):
    """Writes /v1/completions answers."""

    def __init__(self, envelope: openai.Envelope, body: openai.CompletionRequest) -> None:
        super().__init__(envelope, body)
        self._opened: set[int] = set()

    def whole(self, states: Sequence[ChoiceState]) -> openai.Completion:
        """Return the answer in one piece."""
        choices = [
            openai.completion_choice(
                index,
                state.text,
                _finish(state),
                state.stop_reason,
                state.token_ids if self._with_ids else None,
                list(state.plan.prompt_ids) if self._with_ids else None,
                state.metrics if self._with_metrics else None,
            )
            for index, state in enumerate(states)
        ]
        return openai.completion(self._envelope, choices, _usage(states))

    def start(self, num_choices: int) -> Iterable[bytes]:
        """Return nothing: a completion opens with its first text."""
        return ()

    def piece(self, piece: Piece, state: ChoiceState) -> Iterable[bytes]:
        """Return what a token adds, if it adds anything."""
        if not (piece.text or piece.finish or self._with_ids):
            return
        first = piece.choice not in self._opened
        self._opened.add(piece.choice)
        choice = openai.completion_choice(
            piece.choice,
            piece.text,
            piece.finish,
            piece.stop_reason,
            [piece.token_id] if self._with_ids else None,
            list(state.plan.prompt_ids) if self._with_ids and first else None,
            state.metrics if self._with_metrics and piece.finish else None,
        )
        yield sse.json_event(openai.completion_chunk(self._envelope, choice))

    def end(self, states: Sequence[ChoiceState]) -> Iterable[bytes]:
        """Return the chunk with the usage, if it is asked for, and the end."""
        if self._envelope.include_usage:
            yield sse.json_event(openai.completion(self._envelope, [], _usage(states)))
        yield sse.DONE


def _encode_prompt(service: Service, prompt: str | list[int]) -> list[int]:
    if isinstance(prompt, str):
        ids = service.codec.encode(prompt, service.admission.max_model_len)
    else:
        ids = prompt
    if not ids:
        raise InvalidRequest("the prompt is empty; give at least one token", "prompt")
    return ids


def _usage(states: Sequence[ChoiceState]) -> openai.Usage:
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
