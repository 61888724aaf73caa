"""Anthropic's Messages API over a real server with a tiny model."""

import asyncio
import json

import httpx
import pytest

QUESTION = [{"role": "user", "content": "Hello"}]
LONG = {"messages": QUESTION, "max_tokens": 400, "temperature": 0, "ignore_eos": True}


def ask(server, headers=None, **fields):
    body = {"model": "tiny", "max_tokens": 12, "messages": QUESTION, "temperature": 0, **fields}
    return server.http.post("/v1/messages", json=body, headers=headers)


def events_of(response):
    """Return name and content of each event."""
    assert response.headers["content-type"].startswith("text/event-stream")
    found = []
    for event in response.text.removesuffix("\n\n").split("\n\n"):
        name, data = event.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def error_of(response):
    body = response.json()
    assert set(body) == {"type", "error", "request_id"}
    assert (body["type"], set(body["error"])) == ("error", {"type", "message"})
    assert body["request_id"] == response.headers["request-id"]
    return body["error"]


def openai_text(server, messages, **fields):
    body = {"messages": messages, "max_tokens": 12, "temperature": 0, **fields}
    answer = server.http.post("/v1/chat/completions", json=body).json()
    return answer["choices"][0]["message"]["content"], answer["usage"]["prompt_tokens"]


def test_a_message_says_what_the_openai_route_says(server):
    response = ask(server, {"anthropic-version": "2023-06-01"}, system="be brief", metadata={})
    message = response.json()
    turns = [{"role": "system", "content": "be brief"}, *QUESTION]
    text, num_prompt = openai_text(server, turns)
    assert message["content"] == [{"type": "text", "text": text}]
    assert (message["type"], message["role"], message["model"]) == ("message", "assistant", "tiny")
    assert message["stop_reason"] in ("end_turn", "max_tokens")
    usage = message["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == num_prompt
    assert usage["output_tokens"] <= 12
    assert message["id"].startswith("msg_")
    assert response.headers["request-id"].startswith("req_")


def test_a_stream_adds_up_to_the_whole_message(server):
    whole = ask(server, max_tokens=40, ignore_eos=True).json()
    events = events_of(ask(server, max_tokens=40, ignore_eos=True, stream=True))
    assert [name for name, _ in events] == [content["type"] for _, content in events]
    names = [name for name, _ in events if name != "content_block_delta"]
    assert names == [
        "message_start", "content_block_start", "ping",
        "content_block_stop", "message_delta", "message_stop",
    ]  # fmt: skip
    texts = [content["delta"]["text"] for name, content in events if name == "content_block_delta"]
    assert "".join(texts) == whole["content"][0]["text"]
    delta = events[-2][1]
    assert delta["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert delta["usage"]["output_tokens"] == whole["usage"]["output_tokens"] == 40


def test_a_stop_sequence_cuts_the_text_and_is_named(server):
    text = ask(server, max_tokens=60, ignore_eos=True).json()["content"][0]["text"]
    stop = text[4:6]
    cut = ask(server, max_tokens=60, ignore_eos=True, stop_sequences=["\0", stop]).json()
    assert cut["content"][0]["text"] == text[: text.index(stop)]
    assert (cut["stop_reason"], cut["stop_sequence"]) == ("stop_sequence", stop)
    server.wait_for(server.all_blocks_free)


def test_a_prefilled_answer_goes_on_where_it_ends(server):
    def post(path, **fields):
        body = {"max_tokens": 20, "temperature": 0, "ignore_eos": True, **fields}
        return server.http.post(f"/v1/{path}", json=body).json()

    turns = [*QUESTION, {"role": "assistant", "content": "ab "}]
    chat = post("chat/completions", messages=QUESTION, return_token_ids=True)
    begun = post("completions", prompt="ab ", return_token_ids=True)["choices"][0]
    prompt = chat["prompt_token_ids"] + begun["prompt_token_ids"]
    message = post("messages", messages=turns)
    assert message["content"][0]["text"] == post("completions", prompt=prompt)["choices"][0]["text"]
    count = post("messages/count_tokens", messages=turns)
    assert count == {"input_tokens": len(prompt)}


def test_tokens_are_counted_as_they_are_used(server):
    fields = {"messages": QUESTION, "system": "short"}
    count = server.http.post("/v1/messages/count_tokens", json=fields)
    usage = ask(server, **fields).json()["usage"]
    assert count.json() == {
        "input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]
    }
    assert count.headers["request-id"].startswith("req_")


def test_a_second_turn_reads_the_first_from_the_cache(server):
    turns = [{"role": "user", "content": "a long enough story " * 8}]
    first = ask(server, {"x-api-key": "cache"}, messages=turns).json()["usage"]
    again = ask(server, {"x-api-key": "cache"}, messages=turns).json()["usage"]
    other = ask(server, {"x-api-key": "other"}, messages=turns).json()["usage"]
    bearer = ask(server, {"authorization": "Bearer cache"}, messages=turns, stream=True)
    assert first["cache_read_input_tokens"] == other["cache_read_input_tokens"] == 0
    assert again["cache_read_input_tokens"] > 0
    assert again["input_tokens"] + again["cache_read_input_tokens"] == first["input_tokens"]
    start = events_of(bearer)[0][1]["message"]["usage"]
    assert start["cache_read_input_tokens"] == again["cache_read_input_tokens"]


@pytest.mark.parametrize(
    ("fields", "status", "kind", "named"),
    [
        ({"model": "other"}, 404, "not_found_error", "model"),
        ({"max_tokens": None}, 400, "invalid_request_error", "max_tokens"),
        ({"max_tokens": 100_000}, 400, "invalid_request_error", "max_tokens"),
        ({"tools": [{"name": "f"}]}, 400, "invalid_request_error", "tools"),
        ({"thinking": {"type": "enabled"}}, 400, "invalid_request_error", "thinking"),
        (
            {"messages": [{"role": "user", "content": "x" * 2000}]},
            400,
            "invalid_request_error",
            "messages",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(server, fields, status, kind, named):
    response = ask(server, **fields)
    assert response.status_code == status
    assert error_of(response)["type"] == kind
    assert named in error_of(response)["message"]


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "kind"),
    [
        ("POST", "", b"{", 400, "invalid_request_error"),
        ("POST", "/count_tokens", b"[]", 400, "invalid_request_error"),
        ("GET", "", b"", 405, "invalid_request_error"),
        ("POST", "/batches", b"{}", 404, "not_found_error"),
        ("POST", "", b"x" * (5 * 2**20), 413, "request_too_large"),
    ],
)
def test_every_error_below_the_path_has_the_dialects_form(
    server, method, path, content, status, kind
):
    response = server.http.request(method, f"/v1/messages{path}", content=content)
    assert response.status_code == status
    assert error_of(response)["type"] == kind


def test_unknown_fields_are_accepted(server):
    assert ask(server, my_field={"a": 1}).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_server_says_529_and_when_to_return(server, stream):
    async def fill():
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
            asked = [asyncio.create_task(http.post("/v1/messages", json=LONG)) for _ in range(12)]
            await asyncio.to_thread(server.wait_for, lambda: server.status()["live_requests"] == 12)
            refused = await http.post("/v1/messages", json={**LONG, "stream": stream})
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
            return refused

    refused = asyncio.run(fill())
    assert refused.status_code == 529
    assert error_of(refused)["type"] == "overloaded_error"
    assert refused.headers["x-afd-reject-reason"] == "max_live_requests"
    assert int(refused.headers["retry-after"]) >= 1
    assert int(refused.headers["retry-after-ms"]) >= 1000
    server.wait_for(lambda: server.status()["live_requests"] == 0)


def test_a_client_that_leaves_a_stream_frees_its_blocks(server):
    body = {**LONG, "stream": True}
    with server.http.stream("POST", "/v1/messages", json=body) as response:
        next(response.iter_bytes())
    server.wait_for(server.all_blocks_free)
    server.wait_for(lambda: server.status()["live_requests"] == 0)
