"""An HTTP exchange in any dialect: the body in, admitted, planned, answered or streamed.

What a body looks like and how an answer is written is the dialect's: its routes and its `Writer`.
"""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from afd_server.api.body import Body, GenerationBody, check_token_ids, sampling_params
from afd_server.core.errors import Overloaded, TargetOutOfReach
from afd_server.gateway.asker import Asker, check_given_once
from afd_server.gateway.choices import ChoicePlan, Choices, ChoiceState, Piece, run_to_end
from afd_server.gateway.errors import CLIENT_GONE, ModelNotFound, NotReady, end_openly
from afd_server.gateway.service import Service
from afd_server.gateway.text import MOST_CHARS_AT_ONCE
from afd_server.policy.admission import check_capacity, fit_max_tokens

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 4 * 2**20
MESSAGE_CHARS = 32  # what a chat template writes around a message, roughly
KEEP_ALIVE_S = 15.0
SSE_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}

BodyType = TypeVar("BodyType", bound=Body)
Result = TypeVar("Result")


class Writer(Protocol):
    """Writes an answer in one dialect, whole or as the events of a stream.

    Attributes:
        headers: of the answer, in either form.
        keep_alive: sent while a stream is quiet.
    """

    headers: dict[str, str]
    keep_alive: bytes

    def whole(self, states: Sequence[ChoiceState]) -> Mapping[str, object]:
        """Return the answer in one piece."""

    def start(self, num_choices: int) -> Iterable[bytes]:
        """Return what comes before any token."""

    def piece(self, piece: Piece, state: ChoiceState) -> Iterable[bytes]:
        """Return what a token adds."""

    def end(self, states: Sequence[ChoiceState]) -> Iterable[bytes]:
        """Return what comes after all choices have ended."""

    def failure(self, error: Exception) -> bytes:
        """Return how a stream ends that cannot go on."""


async def read_body(service: Service, request: Request, kind: type[BodyType]) -> BodyType:
    """Return the checked body of a request.

    Raises:
        NotReady: the server is starting or stopping.
        HTTPException: the body is too large.
        ClientDisconnect: the client has left before it was whole.
        ValidationError, InvalidRequest: it is not of this kind.
    """
    if service.is_draining or not service.is_ready:
        error = NotReady("stopping" if service.is_draining else "starting")
        service.metrics.refused(error.reason)  # how many choices it wants is not known yet
        raise error
    raw = bytearray()
    async for part in request.stream():
        raw += part
        if len(raw) > MAX_BODY_BYTES:
            raise HTTPException(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
    body = kind.model_validate_json(bytes(raw))
    if body.unknown_fields:
        log.debug("ignored unknown fields %s", ", ".join(body.unknown_fields))
    if body.model is not None:
        check_model(service, body.model)
    return body


def check_model(service: Service, name: str) -> None:
    """Refuse a model that is not the one served here."""
    if name != service.model_name:
        raise ModelNotFound(f"model {name!r} is not served here; use {service.model_name!r}")


async def tokenise(num_chars: int, encode: Callable[[], Result]) -> Result:
    """Encode texts of so many characters; long ones in a thread, beside the running streams."""
    return encode() if num_chars <= MOST_CHARS_AT_ONCE else await asyncio.to_thread(encode)


def num_chat_chars(messages: Sequence[Mapping[str, str]]) -> int:
    """Return about how much text a chat template makes of a conversation."""
    return sum(MESSAGE_CHARS + len(message["content"]) for message in messages)


async def admit_and_tokenise(
    service: Service,
    request: Request,
    body: GenerationBody,
    num_new: int,
    num_chars: int,
    encode: Callable[[], Result],
) -> tuple[Asker, Result]:
    """Return on whose behalf `num_new` choices run, and their prompts.

    From here to the start of the choices nothing is awaited, so that those admitted next find
    them counted. Others may have come while a long text was tokenised: its request is admitted
    again.

    Raises:
        AFDError: what `admit` and `encode` raise.
    """
    asker = admit(service, request, body, num_new)
    prompts = await tokenise(num_chars, encode)
    if num_chars > MOST_CHARS_AT_ONCE:
        asker = replace(admit(service, request, body, num_new), arrived_s=asker.arrived_s)
    return asker, prompts


def admit(service: Service, request: Request, body: GenerationBody, num_new: int) -> Asker:
    """Return on whose behalf `num_new` choices may run, before any work is done for them.

    Raises:
        Overloaded: there is no room for them now.
        TargetOutOfReach: not even one alone would keep their target.
        InvalidRequest: their targets are nonsense, or they are more than may ever wait.
    """
    check_given_once(request.headers)
    asker = service.asker_of(request.headers, body.cache_salt, body.priority)
    admission, generations, now_s = service.admission, service.generations, service.clock.now()
    try:
        retry_after_s = generations.queue.retry_after_s(now_s)
        check_capacity(admission, generations.num_live, num_new, retry_after_s)
        if admission.slo_mode == "enforce":
            service.check_reachable(asker.slo)
            generations.queue.check(
                admission, asker.slo.ttft_s, asker.priority, asker.tenant, num_new, now_s
            )
    except (Overloaded, TargetOutOfReach) as error:
        service.metrics.refused(error.reason, num_new)
        raise
    return asker


def plan_choices(
    service: Service,
    body: GenerationBody,
    prompts: list[list[int]],
    param: str,
    wanted_tokens: int | None,
    *,
    default_tokens: int | None = None,
    num_choices: int = 1,
) -> list[ChoicePlan]:
    """Return a plan for each choice, prompt by prompt; they share a seed.

    Without `wanted_tokens` it is `default_tokens` or what the context leaves.

    Raises:
        InvalidRequest: a prompt, which came in the field `param`, does not fit.
    """
    drawn = secrets.randbits(63)
    plans = []
    for prompt_index, prompt in enumerate(prompts):
        max_tokens = fit_max_tokens(service.admission, len(prompt), wanted_tokens, param)
        check_token_ids(prompt, service.vocab_size, param)
        if wanted_tokens is None and default_tokens is not None:
            max_tokens = min(max_tokens, default_tokens)
        for choice in range(num_choices):
            sampling = sampling_params(
                body,
                seed=drawn,
                choice=choice,
                max_tokens=max_tokens,
                eos_token_ids=service.eos_token_ids,
                vocab_size=service.vocab_size,
            )
            plans.append(ChoicePlan(prompt_index, tuple(prompt), sampling, body.stop))
    return plans


async def answer(
    service: Service,
    request: Request,
    asker: Asker,
    plans: list[ChoicePlan],
    writer: Writer,
    is_streamed: bool,
) -> Response:
    """Generate what is planned and answer with it."""
    choices = Choices(service.generations, service.codec, plans, asker, service.eos_token_ids)
    headers = {"x-afd-seed": str(plans[0].sampling.seed), **writer.headers}
    if is_streamed:
        stream = _EventStream(choices, writer, headers)
        if service.admission.slo_mode == "enforce":  # it may still be refused, with a status
            await stream.begin(request)
        return stream
    with choices:
        states = await _unless_disconnected(request, lambda: run_to_end(choices))
    if states is None:
        return Response(status_code=CLIENT_GONE)
    return JSONResponse(writer.whole(states), headers=headers)


class _EventStream(StreamingResponse):
    """Streams an answer whose generation has begun, and ends the generation with the response.

    It begins before the first byte is asked for, so that the next request is admitted with this
    one counted; it ends even if the client has left by then and nothing is ever streamed.
    """

    def __init__(self, choices: Choices, writer: Writer, headers: dict[str, str]) -> None:
        super().__init__(
            end_openly(_events(choices, writer), writer.failure),
            media_type="text/event-stream",
            headers={**headers, **SSE_HEADERS},
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


async def _events(choices: Choices, writer: Writer) -> AsyncIterator[bytes]:
    for event in writer.start(len(choices.states)):
        yield event
    async for piece in choices.pieces(KEEP_ALIVE_S):
        if piece is None:
            yield writer.keep_alive
            continue
        for event in writer.piece(piece, choices.states[piece.choice]):
            yield event
    for event in writer.end(choices.states):
        yield event


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
