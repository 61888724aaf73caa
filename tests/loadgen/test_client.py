"""What a client makes of a server's answers, whole or broken."""

import asyncio
import json

import pytest

from afd_server.core.errors import ConfigError, TransportError
from afd_server.core.request import SLO
from afd_server.loadgen.client import AnswerStream, BodyStyle, Client
from afd_server.loadgen.http import find_origin, get_json
from afd_server.workload.offers import Offer, PromptPart, Shape
from afd_server.workload.report import Outcome
from support.fake_openai import faking

USAGE = {"prompt_tokens": 3, "completion_tokens": 2}


def style(endpoint_type="completions", extra=None):
    return BodyStyle(endpoint_type, "fake", range(100, 200), "salt", extra or {})


def offer(num_input=8, num_output=4, slo=SLO(), cancel_after_s=None):  # noqa: B008  immutable
    return Offer(0.0, Shape((PromptPart("0", num_input),), num_output), slo, cancel_after_s)


def send(fake, one=None, timeout_s=10.0, **options):
    async def sending():
        client = Client(find_origin(fake.url, {"authorization": "Bearer k"}),
                        style(**options), timeout_s)  # fmt: skip
        return await client.send(client.prepare(one or offer()), 0.0)

    return asyncio.run(sending())


def read(*events, status=200, headers=None):
    stream = AnswerStream()
    stream.begin(status, headers or {})
    for number, event in enumerate(events):
        data = event if isinstance(event, bytes) else f"data: {json.dumps(event)}\n\n".encode()
        stream.receive(data, float(number))
    return stream


def test_a_served_request_has_a_time_for_each_chunk_and_the_servers_counts():
    with faking(first_s=0.02, gap_s=0.01) as fake:
        record = send(fake)
    assert (record.outcome, record.reason) == (Outcome.COMPLETED, "")
    assert (record.num_input_tokens, record.num_output_tokens) == (8, 4)
    assert len(record.chunk_times_s) == 4
    assert record.chunk_times_s[0] - record.sent_s >= 0.02
    assert record.tpot_s >= 0.01
    assert record.end_s == record.chunk_times_s[-1]


def test_tokens_are_counted_by_usage_where_a_chunk_brings_several():
    with faking(conduct=lambda _: "pairs") as fake:
        record = send(fake)
    assert (len(record.chunk_times_s), record.num_output_tokens) == (2, 4)


def test_a_body_has_exact_token_ids_and_headers_carry_key_and_target():
    with faking() as fake:
        record = send(fake, offer(slo=SLO(tpot_s=0.02)), extra={"seed": 7, "cache_salt": None})
    (body,), (headers,) = fake.bodies, fake.headers
    assert len(body["prompt"]) == 8
    assert all(100 <= token < 200 for token in body["prompt"])
    assert (body["max_tokens"], body["seed"], body["ignore_eos"]) == (4, 7, True)
    assert "cache_salt" not in body
    assert (headers["x-slo-tpot-ms"], headers["authorization"]) == ("20", "Bearer k")
    assert record.slo == SLO(tpot_s=0.02)


def test_a_chat_has_as_many_words_and_no_target_unless_the_request_has_one():
    with faking() as fake:
        assert send(fake, endpoint_type="chat").outcome is Outcome.COMPLETED
    (message,) = fake.bodies[0]["messages"]
    assert len(message["content"].split()) == 8
    assert "x-slo-tpot-ms" not in fake.headers[0]


@pytest.mark.parametrize(
    ("conduct", "outcome", "reason"),
    [
        ("refuse", Outcome.REFUSED, "slo"),
        ("reject", Outcome.FAILED, "HTTP 400: no such model"),
        ("break", Outcome.FAILED, "the connection ended before the answer"),
        ("error", Outcome.FAILED, "a worker failed"),
        ("no usage", Outcome.FAILED, "no usage in the stream"),
        ("short", Outcome.FAILED, "3 tokens instead of 4"),
        ("die", Outcome.FAILED, "HTTP 500|the connection ended before the answer"),
    ],
)
def test_what_goes_wrong_is_told_apart(conduct, outcome, reason):
    with faking(conduct=lambda _: conduct) as fake:
        record = send(fake)
    assert record.outcome is outcome
    assert any(part in record.reason for part in reason.split("|")), record.reason
    assert record.retry_after_s == (2.0 if conduct == "refuse" else None)


def test_a_client_that_gives_up_is_no_failure_but_a_server_that_never_answers_is():
    with faking(conduct=lambda _: "silence") as fake:
        assert send(fake, offer(cancel_after_s=0.05)).outcome is Outcome.CANCELLED
        record = send(fake, timeout_s=0.05)
    assert (record.outcome, record.reason) == (Outcome.FAILED, "no end within 0.05 s")


def test_a_server_that_is_gone_is_a_failure():
    with faking() as fake:
        origin = find_origin(fake.url, {})
    client = Client(origin, style(), 5.0)
    record = asyncio.run(client.send(client.prepare(offer()), 0.0))
    assert record.outcome is Outcome.FAILED
    assert record.reason.startswith("no connection: ")
    with pytest.raises(TransportError, match="no server listens at http"):
        find_origin(fake.url, {})


def test_an_answer_without_the_asked_length_is_fine_where_the_end_was_left_to_the_model():
    with faking(conduct=lambda _: "short") as fake:
        assert send(fake, extra={"ignore_eos": False}).outcome is Outcome.COMPLETED


def test_only_chunks_that_bring_tokens_have_a_time():
    stream = read(
        {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
        {"choices": [{"delta": {"content": "a"}}]},
        {"choices": [{"delta": {"reasoning_content": "b"}}]},
        {"choices": [{"delta": {"content": ""}, "token_ids": [5]}]},
        {"choices": [{"text": "", "finish_reason": "length"}]},
        {"choices": [], "usage": USAGE},
        b": keep-alive\n\n",
        b"data: [DONE]\n\n",
    )
    assert stream.chunk_times_s == [1.0, 2.0, 3.0]
    assert stream.verdict() == (Outcome.COMPLETED, "")


def test_events_are_read_however_they_are_cut():
    whole = b'data: {"choices": [{"text": "a"}], "usage": null}\r\n\r\ndata: [DONE]\r\n\r\n'
    stream = read(*(whole[n : n + 1] for n in range(len(whole))))
    assert stream.finished
    assert len(stream.chunk_times_s) == 1


@pytest.mark.parametrize("event", [b"data: {\n", b"data: 5\n", b'data: {"usage": {"a": 1}}\n'])
def test_an_event_that_is_no_chunk_fails_the_request(event):
    outcome, reason = read(event, b"data: [DONE]\n").verdict()
    assert outcome is Outcome.FAILED
    assert reason.startswith("an event that is no chunk")


def test_a_stream_without_its_end_or_without_tokens_is_a_failure():
    chunk = {"choices": [{"text": "a"}], "usage": USAGE}
    assert read(chunk).verdict() == (Outcome.FAILED, "the stream ended without [DONE]")
    empty = read({"choices": [], "usage": USAGE}, b"data: [DONE]\n")
    assert empty.verdict() == (Outcome.FAILED, "the stream had no tokens")


@pytest.mark.parametrize("status", [429, 503, 529])
def test_a_refusal_without_a_header_is_named_by_its_code_or_status(status):
    named = read(b'{"error": {"code": "slow_down"}}', status=status)
    assert named.verdict() == (Outcome.REFUSED, "slow_down")
    assert read(b"busy", status=status).verdict() == (Outcome.REFUSED, f"HTTP {status}")


@pytest.mark.parametrize("code", ["worker_failed", "server_is_starting"])
def test_a_server_that_could_not_is_no_server_that_would_not(code):
    body = json.dumps({"error": {"code": code, "message": "gone"}}).encode()
    assert read(body, status=503).verdict() == (Outcome.FAILED, "HTTP 503: gone")


def test_whatever_the_status_an_answer_with_a_reason_is_a_refusal():
    """A target that is out of reach is a 400, and nobody's failure."""
    answer = read(b"{}", status=400, headers={"x-afd-reject-reason": "target_out_of_reach"})
    assert answer.verdict() == (Outcome.REFUSED, "target_out_of_reach")
    assert read(b"{}", status=400).verdict()[0] is Outcome.FAILED


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", "http://x:99999"])
def test_a_url_that_is_none_is_refused(url):
    with pytest.raises(ConfigError, match="url is"):
        find_origin(url, {})


def test_a_url_may_end_as_openais_clients_want_it_and_other_paths_are_kept():
    with faking() as fake:
        assert find_origin(f"{fake.url}/v1/", {}).prefix == ""
        assert find_origin(f"{fake.url}/proxy", {}).prefix == "/proxy"


def test_a_document_that_is_not_there_is_an_error():
    with faking() as fake, pytest.raises(TransportError, match="/status answered with status 404"):
        asyncio.run(get_json(find_origin(fake.url, {}), "/status"))
