import json

import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import ValidationError

from afd_server.api import openai as api
from afd_server.api.body import sampling_params, validation_error
from afd_server.core.errors import InvalidRequest

HELLO = [{"role": "user", "content": "hello"}]
ENVELOPE = api.Envelope("id-1", 1_700_000_000, "tiny", "fp", include_usage=True)
USAGE = api.make_usage(3, 2, cached_tokens=1)


def chat(**fields):
    return _parse(api.ChatCompletionRequest, {"model": "tiny", "messages": HELLO} | fields)


def completion(**fields):
    return _parse(api.CompletionRequest, {"model": "tiny", "prompt": "hello"} | fields)


def _parse(kind, body):
    try:
        return kind.model_validate_json(json.dumps(body))
    except ValidationError as error:
        raise validation_error(error) from error


def sampling(body, choice=0):
    return sampling_params(
        body, seed=1, choice=choice, max_tokens=4, eos_token_ids=(2,), vocab_size=10
    )


def refusal(make, **fields):
    with pytest.raises(InvalidRequest) as caught:
        make(**fields)
    return caught.value


# ── what a request means ──────────────────────────────────────────────────────────────────


def test_nulls_mean_absent_for_every_field():
    fields = set(api.ChatCompletionRequest.model_fields) - {"messages"} | set(api.REFUSED)
    body = chat(**dict.fromkeys(fields))
    assert body == api.ChatCompletionRequest.model_validate({"messages": HELLO})
    assert (body.n, body.stream, body.include_usage, body.output_limit) == (1, False, False, None)


def test_messages_are_reduced_to_roles_and_text():
    body = chat(
        messages=[
            {"role": "developer", "content": "be brief", "name": "boss"},
            {"role": "user", "content": [{"type": "text", "text": t} for t in ("a", "b")]},
            {"role": "assistant", "content": None, "tool_calls": []},
            {"role": "tool", "content": "42", "tool_call_id": "x"},
        ]
    )
    assert body.conversation == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": ""},
        {"role": "tool", "content": "42"},
    ]


@pytest.mark.parametrize(
    ("prompt", "batch"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_every_shape_of_a_prompt_becomes_a_batch(prompt, batch):
    assert completion(prompt=prompt).prompt == batch


def test_the_newer_name_of_the_output_limit_wins():
    assert chat(max_tokens=5).output_limit == 5
    assert chat(max_tokens=5, max_completion_tokens=7).output_limit == 7
    assert completion().output_limit is None


def test_stop_is_a_string_or_a_list():
    assert chat(stop="a").stop == ("a",)
    assert chat(stop=["a", "b"]).stop == ("a", "b")


def test_ignored_fields_are_accepted_and_unknown_ones_are_named():
    ignored = {field: {"any": "value"} for field in api.IGNORED}
    colliding = {"model_config": 1, "unknown_fields": 2, "_private": 3}
    assert chat(**colliding).unknown_fields == ("_private", "model_config", "unknown_fields")
    assert chat(**ignored, tools=[], zebra=1, apple=None, bee=[]).unknown_fields == ("bee", "zebra")


def test_the_schema_can_be_shown():
    for kind in (api.ChatCompletionRequest, api.CompletionRequest):
        assert "temperature" in kind.model_json_schema()["properties"]


# ── what is refused ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("make", [chat, completion])
@pytest.mark.parametrize("field", api.REFUSED)
def test_a_field_we_cannot_honour_is_refused_by_name(make, field):
    wrong = refusal(make, **{field: {"type": "json_schema"}})
    assert wrong.param == field
    assert field in str(wrong)


@pytest.mark.parametrize("make", [chat, completion])
@pytest.mark.parametrize(
    ("field", "value"), [(f, value) for f, neutral in api.REFUSED.items() for value in neutral]
)
def test_a_field_that_asks_for_nothing_is_accepted(make, field, value):
    assert make(**{field: value}).unknown_fields == ()


def test_what_is_neutral_may_depend_on_the_endpoint():
    assert chat(logprobs=False, add_special_tokens=False, best_of=2, n=2).n == 2
    assert completion(add_special_tokens=True)
    assert refusal(completion, logprobs=0).param == "logprobs"
    assert refusal(completion, add_special_tokens=False).param == "add_special_tokens"
    assert refusal(completion, best_of=3, n=2).param == "best_of"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "1"),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("top_n_sigma", -0.5),
        ("top_n_sigma", float("inf")),
        ("min_k", -3),
        ("min_k", "3"),
        ("guard_window", -1),
        ("guard_window", 1),
        ("guard_window", 65),
        ("guard_window", 7.5),
        ("top_k", -2),
        ("top_k", 1.5),
        ("seed", 2**64),
        ("seed", -(2**63) - 1),
        ("seed", True),
        ("max_tokens", 0),
        ("max_completion_tokens", 0),
        ("n", 0),
        ("n", 9),
        ("stream", "yes"),
        ("stop", ""),
        ("stop", 7),
        ("stop", ["a"] * 17),
        ("stop", ["a" * 65]),
        ("stop_token_ids", [1] * 65),
        ("cache_salt", ""),
        ("cache_salt", 7),
        ("messages", []),
        ("messages", "hello"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field, value):
    wrong = refusal(chat, **{field: value})
    assert wrong.param == field
    assert str(wrong).startswith(f"{field}: ")
    assert "\n" not in str(wrong)


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages.[1].content"),
        ({"role": "user", "content": ["a"]}, "messages.[1].content"),
        ({"role": "user", "content": 7}, "messages.[1].content"),
        ({"role": "user", "content": "\ud800"}, "messages.[1].content"),
        ({"role": "wizard", "content": "a"}, "messages.[1].role"),
        ({"content": "a"}, "messages.[1].role"),
        ({"role": "assistant", "tool_calls": [{"id": "x"}]}, "messages.[1].tool_calls"),
    ],
)
def test_a_wrong_message_is_refused_by_its_path(message, param):
    with pytest.raises(ValidationError) as caught:
        api.ChatCompletionRequest.model_validate({"messages": [*HELLO, message]})
    assert validation_error(caught.value).param == param


@pytest.mark.parametrize("prompt", [[], [[]], ["a", 1], [1, [2]], [1.5], [True], {}, 7, [["a"]]])
def test_a_prompt_of_no_known_shape_is_refused(prompt):
    assert refusal(completion, prompt=prompt).param == "prompt"


def test_errors_are_one_sentence_and_do_not_repeat_the_whole_value():
    assert str(refusal(chat, temperature=3)) == (
        "temperature: input should be less than or equal to 2; got 3"
    )
    assert len(str(refusal(completion, prompt=["a" * 999, 1]))) < 250


@pytest.mark.parametrize(
    ("raw", "text", "param"),
    [
        ("{", "not valid JSON", None),
        ("[1]", "must be a JSON object", None),
        ("{}", "messages is required", "messages"),
    ],
)
def test_a_body_of_another_kind_is_refused(raw, text, param):
    with pytest.raises(ValidationError) as caught:
        api.ChatCompletionRequest.model_validate_json(raw)
    wrong = validation_error(caught.value)
    assert text in str(wrong)
    assert wrong.param == param


# ── sampling ──────────────────────────────────────────────────────────────────────────────


def test_sampling_follows_the_request():
    body = chat(temperature=0, top_p=0.5, top_k=3, min_p=0.1, seed=7, stop_token_ids=[5, 2])
    params = sampling(body, choice=1)
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0, 0.5, 3, 0.1)
    assert (params.seed, params.choice, params.max_tokens) == (7, 1, 4)
    assert params.stop_token_ids == (5, 2)
    params = sampling(chat(top_n_sigma=1, min_k=3))
    assert (params.top_n_sigma, params.min_k) == (1, 3)
    assert sampling(chat(guard_window=7, top_p=1, top_k=-1)).guard_window == 7


@pytest.mark.parametrize(
    "other", [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"top_n_sigma": 1}, {"min_k": 3}]
)
def test_guard_goes_with_no_filter_and_not_with_greedy(other):
    wrong = refusal(chat, guard_window=7, **other)
    assert wrong.param == next(iter(other))
    assert "GUARD chooses" in str(wrong)
    assert refusal(chat, guard_window=7, temperature=0).param == "guard_window"


@pytest.mark.parametrize(("top_k", "effective"), [(-1, 0), (0, 0), (10**30, 10)])
def test_top_k_is_off_or_within_the_vocabulary(top_k, effective):
    assert sampling(chat(top_k=top_k)).top_k == effective


@pytest.mark.parametrize(("seed", "masked"), [(None, 1), (0, 0), (-1, 2**63 - 1), (2**63, 0)])
def test_any_64_bit_seed_is_masked_and_a_missing_one_is_drawn(seed, masked):
    assert sampling(chat(seed=seed)).seed == masked


def test_ignore_eos_keeps_only_the_clients_stop_tokens():
    assert sampling(chat(stop_token_ids=[3])).stop_token_ids == (3, 2)
    assert sampling(chat(stop_token_ids=[3], ignore_eos=True)).stop_token_ids == (3,)


@pytest.mark.parametrize("token_id", [-1, 10])
def test_a_token_id_outside_of_the_vocabulary_is_refused(token_id):
    assert refusal(sampling, body=chat(stop_token_ids=[token_id])).param == "stop_token_ids"


# ── responses ─────────────────────────────────────────────────────────────────────────────


def test_a_chat_response_is_the_sdks():
    choice = api.chat_choice(0, "hi", "stop", stop_reason="\n", token_ids=[4, 5])
    ours = api.chat_completion(ENVELOPE, [choice], USAGE, prompt_token_ids=[1, 2, 3])
    theirs = ChatCompletion.model_validate(ours, strict=True)
    assert theirs.choices[0].message.content == "hi"
    assert theirs.usage is not None and theirs.usage.to_dict() == USAGE
    assert ours["prompt_token_ids"] == [1, 2, 3]
    assert (ours["choices"][0]["stop_reason"], ours["choices"][0]["token_ids"]) == ("\n", [4, 5])


def test_a_chat_stream_is_the_sdks():
    chunks = [
        api.chat_start(ENVELOPE, 0, prompt_token_ids=[1]),
        api.chat_text(ENVELOPE, 0, "hi", token_ids=[4]),
        api.chat_finish(ENVELOPE, 0, "stop", stop_reason=2, token_ids=[2]),
        api.chat_usage(ENVELOPE, USAGE),
    ]
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk, strict=True)
    start, text, finish, usage = chunks
    assert start["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert start["prompt_token_ids"] == [1]
    assert text["choices"][0]["delta"] == {"content": "hi"}
    assert text["choices"][0]["finish_reason"] is None
    assert finish["choices"][0]["delta"] == {}
    assert (finish["choices"][0]["finish_reason"], finish["choices"][0]["stop_reason"]) == (
        "stop",
        2,
    )
    assert [chunk["usage"] for chunk in chunks] == [None, None, None, USAGE]
    assert usage["choices"] == []


def test_a_completion_is_the_sdks_whole_or_streamed():
    whole = api.completion_choice(0, "hi", "length", token_ids=[4], prompt_token_ids=[1])
    ours = api.completion(ENVELOPE, [whole], USAGE)
    assert Completion.model_validate(ours, strict=True).choices[0].text == "hi"
    assert whole["prompt_token_ids"] == [1]
    chunk = api.completion_chunk(ENVELOPE, api.completion_choice(1, "h"))
    assert chunk["choices"][0]["finish_reason"] is None
    assert chunk["usage"] is None
    Completion.model_validate(api.completion(ENVELOPE, [], USAGE), strict=True)


def test_nothing_is_added_that_was_not_asked_for():
    plain = api.Envelope("id-1", 1, "tiny", "fp")
    chat_chunk = api.chat_text(plain, 0, "a")
    text_chunk = api.completion_chunk(plain, api.completion_choice(0, "a"))
    for chunk in (chat_chunk, text_chunk):
        assert not {"usage", "prompt_token_ids"} & chunk.keys()
        assert not {"token_ids", "prompt_token_ids"} & chunk["choices"][0].keys()


def test_the_models_and_the_error_have_their_shapes():
    models = api.model_list([api.model_card("tiny", 1, 128)])
    assert models["object"] == "list"
    assert Model.model_validate(models["data"][0], strict=True).id == "tiny"
    assert api.error_body("no", "invalid_request_error", "n", 400) == {
        "error": {"message": "no", "type": "invalid_request_error", "param": "n", "code": 400}
    }
