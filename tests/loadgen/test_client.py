"""What a client makes of a server's answers, whole or broken."""

import asyncio
import json

import pytest

from afd_server.core.errors import ConfigError, TransportError
from afd_server.core.request import SLO
from afd_server.loadgen.client import AnswerStream, BodyStyle, Client
from afd_server.loadgen.http import Origin, find_origin, get_json
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


def send_raw(raw):
    """Send a request to a server that answers with these bytes and hangs up."""

    async def answer(reader, writer):
        await reader.read(65536)
        writer.write(raw)
        writer.close()

    async def sending():
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            client = Client(find_origin(f"http://127.0.0.1:{port}", {}), style(), 10.0)
            return await client.send(client.prepare(offer()), 0.0)

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


def test_an_answer_lasts_until_its_last_token_with_text_or_without():
    with faking(gap_s=0.02, conduct=lambda _: "blank") as fake:
        record = send(fake)
    assert (record.outcome, len(record.chunk_times_s)) == (Outcome.COMPLETED, 1)
    assert record.end_s - record.chunk_times_s[0] >= 0.06
    assert record.tpot_s >= 0.02


def test_an_answer_that_was_said_to_be_done_counts_whatever_becomes_of_the_connection():
    with faking(conduct=lambda _: "linger") as fake:
        assert send(fake, timeout_s=0.5).outcome is Outcome.COMPLETED
        record = send(fake, offer(cancel_after_s=0.5))
    assert (record.outcome, record.reason, record.num_output_tokens) == (Outcome.COMPLETED, "", 4)
    assert record.end_s - record.sent_s < 0.5


def test_an_answer_may_end_with_its_connection():
    body = b'{"error": {"code": "overloaded"}}'
    record = send_raw(b"HTTP/1.1 503 Unavailable\r\nserver: x\r\n\r\n" + body)
    assert (record.outcome, record.reason) == (Outcome.REFUSED, "overloaded")
    chunk = {"choices": [{"text": "a"}], "usage": {"prompt_tokens": 8, "completion_tokens": 4}}
    events = f"data: {json.dumps(chunk)}\n\ndata: [DONE]".encode()
    assert send_raw(b"HTTP/1.1 200 OK\r\n\r\n" + events).outcome is Outcome.COMPLETED


@pytest.mark.parametrize(
    "raw",
    [b"", b"HTTP/1.1 503 Un", b"HTTP/1.1 503 Unavailable\r\ncontent-length: 9\r\n\r\n{",
     b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n"],
)  # fmt: skip
def test_an_answer_that_has_told_its_length_or_none_at_all_may_not(raw):
    record = send_raw(raw)
    assert record.outcome is Outcome.FAILED
    assert record.reason.startswith("the connection ended before the answer")


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
        ("short", Outcome.FAILED, "3 tokens instead of 4, the server may not know ignore_eos"),
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
        patient = send(fake, offer(cancel_after_s=20.0), timeout_s=0.05)
    assert (patient.outcome, patient.reason) == (record.outcome, record.reason)


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
    assert stream.end_s == 4.0
    assert stream.verdict() == (Outcome.COMPLETED, "")


def test_events_are_read_however_they_are_cut():
    whole = b'data: {"choices": [{"text": "a"}], "usage": null}\r\n\r\ndata: [DONE]\r\n\r\n'
    stream = read(*(whole[n : n + 1] for n in range(len(whole))))
    assert stream.finished
    assert len(stream.chunk_times_s) == 1
    assert not read(b"data: [DO").finished
    assert read(b"data: [DO", b"NE]").finished


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


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b'{"error": {"message": "too long"}}', "HTTP 400: too long"),
        (b'{"error": "too long"}', 'HTTP 400: {"error": "too long"}'),
        (b'{"detail": "too long"}', 'HTTP 400: {"detail": "too long"}'),
        (b"<html>\n  Bad\n</html>\n", "HTTP 400: <html> Bad </html>"),
        (b"[1]", "HTTP 400: [1]"),
        (b"\xff", "HTTP 400: \N{REPLACEMENT CHARACTER}"),
        (b"", "HTTP 400"),
    ],
)
def test_what_other_servers_say_of_an_error_is_kept(body, says):
    assert read(body, status=400).verdict() == (Outcome.FAILED, says)


def test_a_redirection_says_where_to():
    answer = read(b"moved", status=307, headers={"location": "/v2"})
    assert answer.verdict() == (Outcome.FAILED, "HTTP 307: /v2: moved")


@pytest.mark.parametrize("code", ["worker_failed", "server_is_starting"])
def test_a_server_that_could_not_is_no_server_that_would_not(code):
    body = json.dumps({"error": {"code": code, "message": "gone"}}).encode()
    headers = {"x-afd-reject-reason": "starting"}
    for answer in (read(body, status=503), read(body, status=503, headers=headers)):
        assert answer.verdict() == (Outcome.FAILED, "HTTP 503: gone")


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


@pytest.mark.parametrize(("host", "said"), [("::1", b"[::1]:80"), ("a.example", b"a.example:80")])
def test_a_host_that_is_an_ipv6_address_is_written_in_brackets(host, said):
    request = Origin(host, host, 80, None, "", {}).request("GET", "/v1/models")
    assert b"\r\nhost: " + said + b"\r\n" in request


def test_a_document_that_is_not_there_is_an_error():
    with faking() as fake, pytest.raises(TransportError, match="/status answered with status 404"):
        asyncio.run(get_json(find_origin(fake.url, {}), "/status"))
