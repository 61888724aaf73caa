"""Errors as HTTP answers. Exception texts of ours are written for clients; others never leave."""

import logging
import math
import random
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Literal

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from afd_server.api import anthropic, openai
from afd_server.api.body import validation_error
from afd_server.core.errors import (
    AFDError,
    InvalidRequest,
    Overloaded,
    TargetOutOfReach,
    WorkerFailed,
)

log = logging.getLogger(__name__)

CLIENT_GONE = 499  # no standard: what proxies log for it
START_AGAIN_S = 1.0  # of those who come while the server starts or stops
REPLACE_AGAIN_S = 5.0  # a small model's worker is replaced and calibrated by then

ANTHROPIC_PATH = "/v1/messages"  # here and below clients expect Anthropic's errors


class ModelNotFound(InvalidRequest):
    """The client names a model that is not served here."""


class NotReady(AFDError):
    """The server is starting or stopping; `reason` is for metrics and clients."""

    def __init__(self, reason: Literal["starting", "stopping"]) -> None:
        super().__init__("not ready yet" if reason == "starting" else "the server is stopping")
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Failure:
    """What a client may know of an error, with OpenAI's status and code."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None


def describe(error: Exception) -> Failure:
    """Say what went wrong; log it if that is not known."""
    if isinstance(error, ValidationError):
        error = validation_error(error)
    match error:
        case ModelNotFound():
            return Failure(404, str(error), "model_not_found", "model")
        case InvalidRequest():
            return Failure(400, str(error), "invalid_value", error.param)
        case Overloaded(is_own_doing=True):
            return Failure(429, str(error), "slow_down")
        case Overloaded():
            return Failure(503, str(error), "server_is_overloaded")
        case NotReady():
            return Failure(503, str(error), "server_is_starting")
        case WorkerFailed():
            return Failure(503, str(error), "worker_failed")
        case HTTPException():
            return Failure(error.status_code, str(error.detail))
        case ClientDisconnect():  # before its request was whole; nobody reads this
            return Failure(CLIENT_GONE, "the client has left")
    log.exception("unexpected error", exc_info=error)
    return Failure(500, "the server failed on this request", "internal")


def openai_body(error: Exception) -> tuple[int, openai.ErrorBody]:
    """Return the HTTP status and body of an error in OpenAI's dialect."""
    failure = describe(error)
    kind = "invalid_request_error" if failure.status < 500 else "server_error"
    if failure.status == 429:
        kind = "rate_limit_error"
    return failure.status, openai.error_body(failure.message, kind, failure.param, failure.code)


def anthropic_body(error: Exception, request_id: str) -> tuple[int, anthropic.ErrorBody]:
    """Return the HTTP status and body of an error in Anthropic's dialect.

    It has no place for the parameter's name, so the message must say it.
    """
    failure = describe(error)
    is_full = isinstance(error, Overloaded) and not error.is_own_doing
    status = anthropic.OVERLOADED if is_full else failure.status
    names = failure.param is None or failure.param in failure.message
    message = failure.message if names else f"{failure.param}: {failure.message}"
    return status, anthropic.error_body(status, message, request_id)


def new_request_id() -> str:
    """Return an id for an answer in Anthropic's dialect."""
    return f"req_{uuid.uuid4().hex}"


def retry_headers(error: Exception) -> dict[str, str]:
    """Return why, and when to come back: with jitter, so that they do not return together."""
    match error:
        case TargetOutOfReach():
            return {"x-afd-reject-reason": error.reason}
        case Overloaded():
            delay_s, reason = error.retry_after_s, {"x-afd-reject-reason": error.reason}
        case NotReady():
            delay_s, reason = START_AGAIN_S, {"x-afd-reject-reason": error.reason}
        case WorkerFailed():
            delay_s, reason = REPLACE_AGAIN_S, {}
        case _:
            return {}
    delay_s *= random.uniform(1.0, 1.5)
    return {
        "retry-after": str(math.ceil(delay_s)),
        "retry-after-ms": str(int(delay_s * 1000)),
        **reason,
    }


async def answer(request: Request, error: Exception) -> JSONResponse:
    """Turn an error into the response that the clients of this path understand."""
    headers = retry_headers(error)
    if request.url.path.startswith(ANTHROPIC_PATH):
        request_id = new_request_id()
        status, body = anthropic_body(error, request_id)
        return JSONResponse(body, status, headers={**headers, "request-id": request_id})
    status, openai_error = openai_body(error)
    return JSONResponse(openai_error, status, headers=headers)


async def end_openly(
    events: AsyncIterator[bytes], failure: Callable[[Exception], bytes]
) -> AsyncIterator[bytes]:
    """Pass a stream on; an error becomes its end, since the status has been sent."""
    try:
        async for event in events:
            yield event
    except Exception as error:  # noqa: BLE001  a stream never ends in silence
        yield failure(error)


def install(app: FastAPI) -> None:
    """Make `answer` the only way in which errors leave the app."""
    for kind in (AFDError, ValidationError, HTTPException, ClientDisconnect, Exception):
        app.add_exception_handler(kind, answer)
