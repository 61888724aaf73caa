"""Errors leave in one shape; texts that are not ours never do."""

import asyncio
import json

import pytest
from starlette.exceptions import HTTPException

from afd_server.core.errors import InvalidRequest, Overloaded, WorkerFailed
from afd_server.gateway.errors import ModelNotFound, NotReady, describe, end_openly, retry_headers


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (InvalidRequest("bad", "n"), 400, "invalid_value"),
        (ModelNotFound("no"), 404, "model_not_found"),
        (Overloaded("full", 1.0, "full"), 503, "server_is_overloaded"),
        (NotReady("soon"), 503, "server_is_starting"),
        (WorkerFailed("gone"), 503, "worker_failed"),
        (HTTPException(405, "Method Not Allowed"), 405, None),
        (RuntimeError("secret at 0x7fff"), 500, "internal"),
    ],
)
def test_each_error_has_its_status_and_code(error, status, code):
    got, body = describe(error)
    assert (got, body["error"]["code"]) == (status, code)
    assert "secret" not in body["error"]["message"]


def test_overload_says_when_to_return_with_jitter():
    delays = {
        int(retry_headers(Overloaded("full", 2.0, "queue_full"))["retry-after-ms"])
        for _ in range(50)
    }
    assert min(delays) >= 2000
    assert max(delays) <= 3000
    assert len(delays) > 5
    assert retry_headers(InvalidRequest("bad")) == {}


@pytest.mark.parametrize("error", [WorkerFailed("gone"), KeyError("secret")])
def test_a_stream_that_fails_says_so_and_ends_in_done(error):
    async def events():
        yield b"data: 1\n\n"
        raise error

    async def collect():
        return [event async for event in end_openly(events())]

    first, failure, done = asyncio.run(collect())
    assert first == b"data: 1\n\n"
    assert json.loads(failure.removeprefix(b"data: "))["error"]["code"] in (
        "worker_failed",
        "internal",
    )
    assert b"secret" not in failure
    assert done == b"data: [DONE]\n\n"
