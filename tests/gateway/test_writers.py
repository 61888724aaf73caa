"""How answers are written in each dialect, from the tokens of real choices."""

import json

import pytest

from afd_server.api import openai
from afd_server.core.errors import Overloaded, WorkerFailed
from afd_server.core.request import SamplingParams
from afd_server.gateway.anthropic_routes import MessageWriter
from afd_server.gateway.byte_codec import byte_codec
from afd_server.gateway.choices import ChoicePlan, ChoiceState, Piece
from afd_server.gateway.generation import Timing
from afd_server.gateway.openai_routes import ChatWriter, CompletionWriter
from afd_server.gateway.text import TextStream

CODEC = byte_codec(300)
PROMPT = (1, 2, 3, 4, 5)
TIMING = Timing(ttft_s=0.5, tpot_s=0.25, queue_s=0.125, slo_met=True)


def written(writer, text, num_cached=3):
    """Write a choice of one token a character and return its state and its events."""
    plan = ChoicePlan(0, PROMPT, SamplingParams(9), ())
    state = ChoiceState(plan, TextStream(CODEC), num_cached=num_cached, timing=TIMING)
    raw = [*writer.start(1)]
    for number, char in enumerate(text, 1):
        state.token_ids += CODEC.encode(char)
        state.text += char
        state.finish = "stop" if number == len(text) else None
        raw += writer.piece(Piece(0, char, state.token_ids[-1], state.finish, None), state)
    return state, [*raw, *writer.end([state])]


def parsed(raw):
    """Return name and content of Anthropic's events."""
    heads = [event.decode().removesuffix("\n\n").split("\ndata: ") for event in raw]
    return [(name.removeprefix("event: "), json.loads(data)) for name, data in heads]


def test_a_message_is_streamed_in_anthropics_order():
    state, raw = written(MessageWriter("tiny", "req_1", False), "hey")
    names = [name for name, _ in parsed(raw)]
    assert names == [
        "message_start", "content_block_start", "ping", *["content_block_delta"] * 3,
        "content_block_stop", "message_delta", "message_stop",
    ]  # fmt: skip
    assert all(name == content["type"] for name, content in parsed(raw))
    deltas = [content["delta"]["text"] for _, content in parsed(raw)[3:6]]
    assert "".join(deltas) == state.text


def test_a_message_is_the_same_whole_or_streamed():
    writer = MessageWriter("tiny", "req_1", False)
    state, raw = written(writer, "hey")
    whole = writer.whole([state])
    events = dict(parsed(raw))
    start, delta = events["message_start"]["message"], events["message_delta"]
    assert {
        **start,
        **delta["delta"],
        "content": whole["content"],
        "usage": delta["usage"],
    } == whole
    assert start["usage"] == {**whole["usage"], "output_tokens": 1}
    assert (whole["usage"]["input_tokens"], whole["usage"]["cache_read_input_tokens"]) == (2, 3)
    assert whole["id"].startswith("msg_")


def test_a_message_says_how_it_was_served_if_that_is_asked_for():
    writer = MessageWriter("tiny", "req_1", with_metrics=True)
    state, raw = written(writer, "hey")
    metrics = {"ttft_ms": 500.0, "tpot_ms": 250.0, "queue_ms": 125.0, "slo_met": True}
    assert writer.whole([state])["metrics"] == metrics
    assert [content["type"] for _, content in parsed(raw) if "metrics" in content] == [
        "message_delta"
    ]
    assert dict(parsed(raw))["message_delta"]["metrics"] == metrics
    plain = MessageWriter("tiny", "req_1", with_metrics=False)
    assert "metrics" not in plain.whole([state])


@pytest.mark.parametrize(
    ("error", "kind"),
    [(WorkerFailed("gone"), "api_error"), (Overloaded("late", 1.0, "q"), "overloaded_error")],
)
def test_a_message_that_cannot_go_on_ends_with_an_error_event(error, kind):
    ((name, content),) = parsed([MessageWriter("tiny", "req_1", False).failure(error)])
    assert name == content["type"] == "error"
    assert (content["error"]["type"], content["request_id"]) == (kind, "req_1")


ENVELOPE = openai.Envelope("id-1", 1, "tiny", "fp", include_usage=True)


def openai_writers():
    chat = openai.ChatCompletionRequest.model_validate(
        {"messages": [{"role": "user", "content": "a"}], "return_token_ids": True}
    )
    completion = openai.CompletionRequest.model_validate({"prompt": "a", "return_token_ids": True})
    return [ChatWriter(ENVELOPE, chat, list(PROMPT)), CompletionWriter(ENVELOPE, completion)]


@pytest.mark.parametrize("writer", openai_writers())
def test_openais_streams_end_with_the_usage_and_done(writer):
    state, raw = written(writer, "hey")
    assert raw[-1] == b"data: [DONE]\n\n"
    chunks = [json.loads(event.removeprefix(b"data: ")) for event in raw[:-1]]
    assert chunks[-1]["usage"] == writer.whole([state])["usage"]
    token_ids = [token for c in chunks[:-1] for token in c["choices"][0].get("token_ids", [])]
    assert token_ids == state.token_ids


@pytest.mark.parametrize("writer", openai_writers())
@pytest.mark.parametrize(
    ("error", "code"), [(WorkerFailed("gone"), "worker_failed"), (KeyError("secret"), "internal")]
)
def test_openais_streams_that_fail_say_so_and_end_in_done(writer, error, code):
    failure, done, rest = writer.failure(error).split(b"\n\n")
    assert json.loads(failure.removeprefix(b"data: "))["error"]["code"] == code
    assert b"secret" not in failure
    assert (done, rest) == (b"data: [DONE]", b"")
