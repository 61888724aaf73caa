"""The Anthropic routes and how their answers are written."""

import uuid
from collections.abc import Iterable, Sequence

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from afd_server.api import anthropic, sse
from afd_server.gateway.choices import ChoiceState, Piece
from afd_server.gateway.errors import ANTHROPIC_PATH, anthropic_body, new_request_id
from afd_server.gateway.exchange import (
    admit_and_tokenise,
    answer,
    num_chat_chars,
    plan_choices,
    read_body,
    tokenise,
)
from afd_server.gateway.service import Service


def anthropic_routes(service: Service) -> APIRouter:
    """Return the routes of Anthropic's Messages API."""
    router = APIRouter(prefix=ANTHROPIC_PATH)

    @router.post("")
    async def messages(request: Request) -> Response:
        body = await read_body(service, request, anthropic.MessagesRequest)
        asker, prompt = await admit_and_tokenise(
            service,
            request,
            body,
            1,
            num_chat_chars(body.conversation),
            lambda: _encode(service, body, service.admission.max_model_len),
        )
        plans = plan_choices(service, body, [prompt], "messages", body.max_tokens)
        writer = MessageWriter(service.model_name, new_request_id(), body.return_metrics)
        return await answer(service, request, asker, plans, writer, body.stream)

    @router.post("/count_tokens")
    async def count_tokens(request: Request) -> JSONResponse:
        body = await read_body(service, request, anthropic.CountTokensRequest)
        num_chars = num_chat_chars(body.conversation)
        prompt = await tokenise(num_chars, lambda: _encode(service, body, None))  # of any length
        count: anthropic.TokenCount = {"input_tokens": len(prompt)}
        return JSONResponse(count, headers={"request-id": new_request_id()})

    return router


class MessageWriter:
    """Writes /v1/messages answers.

    A stream opens with its first token: only then it is known how much of the prompt was cached.
    """

    keep_alive = sse.json_event(anthropic.PING, anthropic.PING["type"])

    def __init__(self, model: str, request_id: str, with_metrics: bool) -> None:
        self.headers = {"request-id": request_id}
        self._request_id = request_id
        self._message_id = f"msg_{uuid.uuid4().hex}"
        self._model = model
        self._with_metrics = with_metrics

    def whole(self, states: Sequence[ChoiceState]) -> anthropic.MessageBody:
        """Return the answer in one piece."""
        (state,) = states
        return anthropic.message(
            self._message_id,
            self._model,
            [anthropic.text_block(state.text)],
            _ending(state),
            _usage(state),
            state.metrics if self._with_metrics else None,
        )

    def start(self, num_choices: int) -> Iterable[bytes]:
        """Return nothing yet."""
        return ()

    def piece(self, piece: Piece, state: ChoiceState) -> Iterable[bytes]:
        """Return what a token adds, and with the first one what opens the message."""
        if len(state.token_ids) == 1:
            yield from map(_framed, anthropic.opening(self._message_id, self._model, _usage(state)))
        if piece.text:
            yield _framed(anthropic.text_event(piece.text))

    def end(self, states: Sequence[ChoiceState]) -> Iterable[bytes]:
        """Return why it ended and what it took."""
        (state,) = states
        metrics = state.metrics if self._with_metrics else None
        return map(_framed, anthropic.closing(_ending(state), _usage(state), metrics))

    def failure(self, error: Exception) -> bytes:
        """Return the error."""
        _status, body = anthropic_body(error, self._request_id)
        return sse.json_event(body, body["type"])


def _encode(
    service: Service, body: anthropic.CountTokensRequest, most_tokens: int | None
) -> list[int]:
    codec = service.codec
    encode = codec.encode_open_chat if body.is_open else codec.encode_chat
    return encode(body.conversation, most_tokens)


def _framed(event: anthropic.Event) -> bytes:
    return sse.json_event(event, event["type"])


def _usage(state: ChoiceState) -> anthropic.Usage:
    return anthropic.make_usage(len(state.plan.prompt_ids), len(state.token_ids), state.num_cached)


def _ending(state: ChoiceState) -> anthropic.Ending:
    assert state.finish is not None, "an unfinished choice cannot be written"
    return anthropic.make_ending(state.finish, state.stop_reason)
