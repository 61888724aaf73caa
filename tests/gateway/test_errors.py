"""Errors leave in one shape; texts that are not ours never do."""

import asyncio
import json

import pytest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from afd_server.core.errors import InvalidRequest, Overloaded, TargetOutOfReach, WorkerFailed
from afd_server.gateway.errors import (
    ModelNotFound,
    NotReady,
    answer,
    anthropic_body,
    end_openly,
    openai_body,
    retry_headers,
)


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (InvalidRequest("bad", "n"), 400, "invalid_value"),
        (ModelNotFound("no"), 404, "model_not_found"),
        (Overloaded("full", 1.0, "full"), 503, "server_is_overloaded"),
        (NotReady("starting"), 503, "server_is_starting"),
        (NotReady("stopping"), 503, "server_is_starting"),
        (WorkerFailed("gone"), 503, "worker_failed"),
        (HTTPException(405, "Method Not Allowed"), 405, None),
        (ClientDisconnect(), 499, None),
        (RuntimeError("secret at 0x7fff"), 500, "internal"),
    ],
)
def test_each_error_has_its_status_and_code(error, status, code):
    got, body = openai_body(error)
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


@pytest.mark.parametrize(
    ("error", "seconds"), [(NotReady("stopping"), 1), (WorkerFailed("gone"), 5)]
)
def test_who_meets_a_server_without_its_workers_is_told_when_they_may_be_back(error, seconds):
    headers = retry_headers(error)
    assert seconds <= int(headers["retry-after-ms"]) / 1000 <= 1.5 * seconds
    assert headers.get("x-afd-reject-reason") == getattr(error, "reason", None)


def test_a_target_out_of_reach_says_so_to_those_who_count_refusals_and_not_to_come_back():
    error = TargetOutOfReach("out of reach", "x-slo-tpot-ms")
    status, body = openai_body(error)
    assert (status, body["error"]["param"]) == (400, "x-slo-tpot-ms")
    assert retry_headers(error) == {"x-afd-reject-reason": "target_out_of_reach"}


FULL = Overloaded("full", 2.0, "queue_full")
OWN_DOING = Overloaded("yours", 2.0, "expected_wait", is_own_doing=True)


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (InvalidRequest("n is bad", "n"), 400, "invalid_request_error"),
        (ModelNotFound("no model"), 404, "not_found_error"),
        (HTTPException(404, "Not Found"), 404, "not_found_error"),
        (HTTPException(413, "too large"), 413, "request_too_large"),
        (OWN_DOING, 429, "rate_limit_error"),
        (RuntimeError("secret"), 500, "api_error"),
        (WorkerFailed("gone"), 503, "api_error"),
        (NotReady("starting"), 503, "api_error"),
        (FULL, 529, "overloaded_error"),
    ],
)
def test_each_error_has_its_status_and_type_in_anthropics_dialect(error, status, kind):
    got, body = anthropic_body(error, "req_1")
    assert (got, body["error"]["type"], body["request_id"]) == (status, kind, "req_1")
    assert "secret" not in body["error"]["message"]


def test_a_message_for_anthropics_clients_names_the_field():
    def message(error):
        return anthropic_body(error, "req_1")[1]["error"]["message"]

    assert message(InvalidRequest("max_tokens: too low", "max_tokens")) == "max_tokens: too low"
    assert message(InvalidRequest("too long", "messages")) == "messages: too long"
    assert message(InvalidRequest("not JSON")) == "not JSON"


@pytest.mark.parametrize(
    ("path", "error", "status"),
    [
        ("/v1/messages", FULL, 529),
        ("/v1/messages/count_tokens", OWN_DOING, 429),
        ("/v1/chat/completions", FULL, 503),
        ("/v1/completions", OWN_DOING, 429),
    ],
)
def test_the_path_decides_on_the_dialect_and_every_refusal_says_when_to_return(path, error, status):
    response = asyncio.run(answer(Request({"type": "http", "path": path, "headers": []}), error))
    body = json.loads(response.body)
    assert response.status_code == status
    assert int(response.headers["retry-after"]) >= 2
    assert int(response.headers["retry-after-ms"]) >= 2000
    assert response.headers["x-afd-reject-reason"] == error.reason
    is_anthropic = path.startswith("/v1/messages")
    assert (body.get("type") == "error") == is_anthropic
    assert body.get("request_id") == response.headers.get("request-id")
    assert ("request-id" in response.headers) == is_anthropic


def test_a_stream_that_fails_ends_with_the_failure():
    async def events():
        yield b"1"
        raise WorkerFailed("gone")

    async def collect():
        return [event async for event in end_openly(events(), lambda error: repr(error).encode())]

    assert asyncio.run(collect()) == [b"1", b"WorkerFailed('gone')"]
