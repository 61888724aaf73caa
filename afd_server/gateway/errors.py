"""Errors as HTTP answers. Exception texts of ours are written for clients; others never leave."""

import logging
import math
import random
from collections.abc import AsyncIterator

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from afd_server.api import sse
from afd_server.api.openai import ErrorBody, error_body, validation_error
from afd_server.core.errors import AFDError, InvalidRequest, Overloaded, WorkerFailed

log = logging.getLogger(__name__)


class ModelNotFound(InvalidRequest):
    """The client names a model that is not served here."""


class NotReady(AFDError):
    """The server is starting or stopping."""


def describe(error: Exception) -> tuple[int, ErrorBody]:
    """Return the HTTP status and body of an error."""
    if isinstance(error, ValidationError):
        error = validation_error(error)
    match error:
        case ModelNotFound():
            return 404, error_body(str(error), "invalid_request_error", "model", "model_not_found")
        case InvalidRequest():
            return 400, error_body(
                str(error), "invalid_request_error", error.param, "invalid_value"
            )
        case Overloaded(is_own_doing=True):
            return 429, error_body(str(error), "rate_limit_error", None, "slow_down")
        case Overloaded():
            return 503, error_body(str(error), "server_error", None, "server_is_overloaded")
        case NotReady():
            return 503, error_body(str(error), "server_error", None, "server_is_starting")
        case WorkerFailed():
            return 503, error_body(str(error), "server_error", None, "worker_failed")
        case HTTPException():
            kind = "invalid_request_error" if error.status_code < 500 else "server_error"
            return error.status_code, error_body(str(error.detail), kind)
    log.exception("unexpected error", exc_info=error)
    return 500, error_body("the server failed on this request", "server_error", None, "internal")


def retry_headers(error: Exception) -> dict[str, str]:
    """Return when to come back, with jitter so that refused clients do not return together."""
    if not isinstance(error, Overloaded | NotReady):
        return {}
    delay_s = error.retry_after_s if isinstance(error, Overloaded) else 1.0
    delay_s *= random.uniform(1.0, 1.5)
    headers = {"retry-after": str(math.ceil(delay_s)), "retry-after-ms": str(int(delay_s * 1000))}
    if isinstance(error, Overloaded):
        headers["x-afd-reject-reason"] = error.reason
    return headers


async def answer(_request: Request, error: Exception) -> JSONResponse:
    """Turn an error into the response that OpenAI's clients understand."""
    status, body = describe(error)
    return JSONResponse(body, status, headers=retry_headers(error))


async def end_openly(events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Pass a stream on; an error becomes its last event, since the status has been sent."""
    try:
        async for event in events:
            yield event
    except Exception as error:  # noqa: BLE001  a stream never ends in silence
        yield sse.json_event(describe(error)[1])
    yield sse.DONE


def install(app: FastAPI) -> None:
    """Make `answer` the only way in which errors leave the app."""
    for kind in (AFDError, ValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)
