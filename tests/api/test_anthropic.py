import json

import pytest
from pydantic import ValidationError

from afd_server.api import anthropic as api
from afd_server.api.body import sampling_params, validation_error
from afd_server.core.errors import InvalidRequest

HELLO = [{"role": "user", "content": "hello"}]
USAGE = api.make_usage(prompt_tokens=7, output_tokens=2, cached_tokens=4)


def parse(kind=api.MessagesRequest, **fields):
    body = {"model": "tiny", "max_tokens": 4, "messages": HELLO} | fields
    try:
        return kind.model_validate_json(json.dumps(body))
    except ValidationError as error:
        raise validation_error(error) from error


def refusal(**fields):
    with pytest.raises(InvalidRequest) as caught:
        parse(**fields)
    return caught.value


# ── what a request means ──────────────────────────────────────────────────────────────────


def test_the_system_prompt_comes_first_and_turns_of_one_role_are_one():
    body = parse(
        system=[{"type": "text", "text": t, "cache_control": {"type": "ephemeral"}} for t in "ab"],
        messages=[
            {"role": "user", "content": "one"},
            {"role": "user", "content": [{"type": "text", "text": t} for t in ("tw", "o")]},
            {"role": "assistant", "content": "three"},
            {"role": "system", "content": "four"},
            {"role": "user", "content": "five"},
        ],
    )
    assert [(turn["role"], turn["content"]) for turn in body.conversation] == [
        ("system", "ab"),
        ("user", "one\n\ntwo"),
        ("assistant", "three"),
        ("system", "four"),
        ("user", "five"),
    ]
    assert not body.is_open


def test_a_conversation_that_ends_with_the_assistant_is_open():
    assert parse(messages=[*HELLO, {"role": "assistant", "content": "I"}]).is_open


def test_sampling_is_what_the_fields_say():
    body = parse(temperature=0.5, top_p=0.9, top_k=3, seed=7, stop_sequences=["a", "b"])
    params = sampling_params(
        body, seed=1, choice=0, max_tokens=body.max_tokens, eos_token_ids=(2,), vocab_size=10
    )
    assert (params.temperature, params.top_p, params.top_k, params.seed) == (0.5, 0.9, 3, 7)
    assert (params.max_tokens, params.stop_token_ids) == (4, (2,))
    assert body.stop == ("a", "b")


def test_nulls_mean_absent_and_ignored_fields_are_not_unknown():
    nulls = dict.fromkeys((*api.REFUSED, "system", "stop_sequences", "stream", "top_k"))
    assert parse(**nulls) == parse()
    ignored = {field: {"any": "value"} for field in api.IGNORED}
    assert parse(**ignored, tools=[], zebra=1, stop="x").unknown_fields == ("stop", "zebra")


def test_tokens_are_counted_without_a_limit_on_the_output():
    body = api.CountTokensRequest.model_validate({"messages": HELLO, "system": "short"})
    assert [turn["content"] for turn in body.conversation] == ["short", "hello"]
    with pytest.raises(InvalidRequest, match="tools"):
        parse(api.CountTokensRequest, tools=[{"name": "f"}])


# ── what is refused ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("field", api.REFUSED)
def test_a_field_we_cannot_honour_is_refused_by_name(field):
    wrong = refusal(**{field: {"type": "enabled", "budget_tokens": 1024}})
    assert wrong.param == field
    assert field in str(wrong)


@pytest.mark.parametrize(
    ("field", "value"), [(f, value) for f, neutral in api.REFUSED.items() for value in neutral]
)
def test_a_field_that_asks_for_nothing_is_accepted(field, value):
    assert parse(**{field: value}).unknown_fields == ()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"temperature": 3}, "temperature"),
        ({"top_k": 1.5}, "top_k"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"system": [{"type": "image"}]}, "system"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.[0].role"),
        ({"messages": [{"role": "user"}]}, "messages.[0].content"),
    ],
)
def test_what_is_wrong_is_refused_by_its_path(fields, param):
    wrong = refusal(**fields)
    assert wrong.param == param
    assert str(wrong).startswith(param)


@pytest.mark.parametrize("kind", ["image", "document", "tool_use", "tool_result", "thinking"])
def test_a_block_that_is_no_text_is_named(kind):
    wrong = refusal(messages=[{"role": "user", "content": [{"type": kind}]}])
    assert wrong.param == "messages.[0].content"
    assert kind in str(wrong)


# ── what is answered ──────────────────────────────────────────────────────────────────────


def test_the_input_that_was_cached_is_counted_apart():
    assert USAGE == {
        "input_tokens": 3,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 4,
        "output_tokens": 2,
    }


@pytest.mark.parametrize(
    ("finish", "stopped_by", "reason", "sequence"),
    [
        ("length", None, "max_tokens", None),
        ("stop", None, "end_turn", None),
        ("stop", "END", "stop_sequence", "END"),
        ("stop", 7, "stop_sequence", None),
    ],
)
def test_each_ending_has_its_reason(finish, stopped_by, reason, sequence):
    ending = api.make_ending(finish, stopped_by)
    assert ending == {"stop_reason": reason, "stop_sequence": sequence}


def test_a_message_has_what_clients_read():
    ending = api.make_ending("stop", None)
    assert api.message("msg_1", "tiny", [api.text_block("hi")], ending, USAGE) == {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "tiny",
        "content": [{"type": "text", "text": "hi"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": USAGE,
    }


def test_a_stream_adds_up_to_a_message():
    start, block, ping = api.opening("msg_1", "tiny", USAGE)
    assert start["message"]["content"] == []
    assert start["message"]["stop_reason"] is None
    assert block["content_block"] == {"type": "text", "text": ""}
    assert ping == {"type": "ping"}
    assert api.text_event("hi")["delta"] == {"type": "text_delta", "text": "hi"}
    ending = api.make_ending("stop", None)
    closing = api.closing(ending, USAGE)
    assert [event["type"] for event in closing] == [
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert (closing[1]["delta"], closing[1]["usage"]) == (ending, USAGE)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (404, "not_found_error"),
        (405, "invalid_request_error"),
        (413, "request_too_large"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (503, "api_error"),
        (529, "overloaded_error"),
    ],
)
def test_the_type_of_an_error_follows_its_status(status, kind):
    assert api.error_body(status, "no", "req_1") == {
        "type": "error",
        "error": {"type": kind, "message": "no"},
        "request_id": "req_1",
    }
