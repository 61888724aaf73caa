"""The HTTP API through the official client, over a real server with a tiny model."""

import asyncio
import json
import re
import socket

import httpx
import openai
import pytest
import torch

from support.checkpoints import tiny_llama

QUESTION = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def chat(client, **changes):
    arguments = {
        "model": "tiny",
        "messages": QUESTION,
        "max_tokens": 12,
        "temperature": 0,
        **changes,
    }
    return client.chat.completions.create(**arguments)


def reference_tokens(prompt_ids, count):
    model, ids = tiny_llama()[1], list(prompt_ids)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == 2:
            break
    return ids[len(prompt_ids) :]


def test_a_chat_answer_has_the_tokens_of_transformers(client):
    answer = chat(client, extra_body={"return_token_ids": True})
    choice = answer.choices[0]
    assert choice.token_ids == reference_tokens(answer.prompt_token_ids, 12)
    assert answer.usage.prompt_tokens == len(answer.prompt_token_ids)
    assert answer.usage.completion_tokens == len(choice.token_ids)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert choice.finish_reason == ("stop" if choice.token_ids[-1] == 2 else "length")
    assert answer.system_fingerprint.startswith("fp_")


def test_a_stream_says_the_same_as_a_whole_answer(client):
    whole = chat(client, max_tokens=40).choices[0].message.content
    chunks = list(chat(client, max_tokens=40, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == whole
    assert chunks[-2].choices[0].finish_reason in ("stop", "length")
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens > 0
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_the_stream_is_server_sent_events_that_end_in_done(server):
    body = {"messages": QUESTION, "max_tokens": 3, "temperature": 0, "stream": True}
    with server.http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    last = json.loads(lines[-2].removeprefix("data: "))
    assert last["choices"][0]["delta"] == {}


def test_completions_take_text_token_ids_and_batches_of_either(client):
    text, ids = "ab", [ord("a") - 30, ord("b") - 30]
    one = client.completions.create(
        model="tiny",
        prompt=text,
        max_tokens=5,
        temperature=0,
        extra_body={"return_token_ids": True},
    )
    ids = one.choices[0].prompt_token_ids
    many = client.completions.create(
        model="tiny", prompt=[ids, [5, 6, 7], ids], max_tokens=5, temperature=0,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )  # fmt: skip
    assert [choice.index for choice in many.choices] == [0, 1, 2]
    assert many.choices[0].token_ids == many.choices[2].token_ids == one.choices[0].token_ids
    assert many.choices[1].token_ids[:1] == reference_tokens([5, 6, 7], 1)
    assert many.usage.prompt_tokens == 2 * len(ids) + 3


def test_a_streamed_completion_batch_carries_each_choice(client):
    chunks = client.completions.create(
        model="tiny", prompt=["a", "b"], max_tokens=4, temperature=0, stream=True,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )  # fmt: skip
    tokens = {0: [], 1: []}
    for chunk in chunks:
        tokens[chunk.choices[0].index] += chunk.choices[0].token_ids
    whole = client.completions.create(
        model="tiny", prompt=["a", "b"], max_tokens=4, temperature=0,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )  # fmt: skip
    assert tokens == {choice.index: choice.token_ids for choice in whole.choices}


def test_a_seed_makes_sampling_repeatable_and_n_gives_different_choices(client):
    def draw(**more):
        return [c.message.content for c in chat(client, temperature=1.0, n=3, **more).choices]

    assert draw(seed=7) == draw(seed=7)
    assert len(set(draw(seed=7))) == 3
    assert draw(seed=7) != draw(seed=8)


def test_without_a_seed_the_drawn_one_is_returned_and_works(server):
    body = {"messages": QUESTION, "max_tokens": 8, "temperature": 1.0}
    first = server.http.post("/v1/chat/completions", json=body)
    seed = int(first.headers["x-afd-seed"])
    again = server.http.post("/v1/chat/completions", json={**body, "seed": seed})
    assert again.json()["choices"][0]["message"] == first.json()["choices"][0]["message"]


def test_a_stop_string_cuts_the_text_and_frees_the_blocks(server, client):
    whole = chat(client, max_tokens=60, extra_body={"ignore_eos": True}).choices[0].message.content
    stop = whole[4:6]
    cut = chat(client, max_tokens=60, stop=stop, extra_body={"ignore_eos": True}).choices[0]
    assert cut.message.content == whole[: whole.index(stop)]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    streamed = chat(
        client, max_tokens=60, stop=[stop], stream=True, extra_body={"ignore_eos": True}
    )
    assert "".join(c.choices[0].delta.content or "" for c in streamed) == cut.message.content
    server.wait_for(server.all_blocks_free)


def test_a_stop_token_is_named_as_the_reason(client):
    ids = (
        chat(client, extra_body={"return_token_ids": True, "ignore_eos": True}).choices[0].token_ids
    )
    stop = next(i for i in ids[2:] if i > 2)
    cut = chat(
        client,
        extra_body={"return_token_ids": True, "ignore_eos": True, "stop_token_ids": [stop]},
    ).choices[0]
    assert cut.token_ids == ids[: ids.index(stop) + 1]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)


def test_max_completion_tokens_and_max_tokens_mean_the_same(client):
    both = [
        chat(client, extra_body={"ignore_eos": True}, **{"max_tokens": None, name: 3}).usage
        for name in ("max_completion_tokens", "max_tokens")
    ]
    assert [usage.completion_tokens for usage in both] == [3, 3]


def test_many_requests_at_once_get_what_each_gets_alone(server):
    bodies = [
        {
            "prompt": [list(range(3, 3 + 5 * k))], "max_tokens": 4 + 3 * k, "seed": k,
            "temperature": 0.7 * (k % 2), "return_token_ids": True, "ignore_eos": True,
        }
        for k in range(1, 11)
    ]  # fmt: skip

    async def ask_all():
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as http:
            answers = await asyncio.gather(*(http.post("/v1/completions", json=b) for b in bodies))
        return [a.json()["choices"][0]["token_ids"] for a in answers]

    together = asyncio.run(ask_all())
    alone = [
        server.http.post("/v1/completions", json=b).json()["choices"][0]["token_ids"]
        for b in bodies
    ]
    assert together == alone


def error_of(response: httpx.Response) -> dict:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


@pytest.mark.parametrize(
    ("changes", "status", "param"),
    [
        ({"model": "other"}, 404, "model"),
        ({"messages": []}, 400, "messages"),
        ({"temperature": -1}, 400, "temperature"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 100_000}, 400, "max_tokens"),
        ({"messages": [{"role": "user", "content": "x" * 2000}]}, 400, "messages"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools"),
        ({"stop_token_ids": [10**6]}, 400, "stop_token_ids"),
        ({"n": 9}, 400, "n"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(server, changes, status, param):
    body = {"messages": QUESTION, "max_tokens": 4, **changes}
    response = server.http.post("/v1/chat/completions", json=body)
    assert response.status_code == status
    assert error_of(response)["param"] == param


@pytest.mark.parametrize("raw", [b"", b"{", b"[1]", b'{"messages": 3}', b"\xff\xfe"])
def test_a_body_that_is_no_request_gets_a_clear_400(server, raw):
    response = server.http.post("/v1/chat/completions", content=raw)
    assert response.status_code == 400
    assert error_of(response)["message"]


def test_without_max_tokens_a_completion_takes_sixteen_or_what_the_context_leaves(server):
    for num_prompt, expected in ((5, 16), (508, 4)):
        body = {"prompt": [[7] * num_prompt], "temperature": 0, "ignore_eos": True}
        usage = server.http.post("/v1/completions", json=body).json()["usage"]
        assert usage["completion_tokens"] == expected


def test_a_huge_body_is_refused_before_it_is_read(server):
    response = server.http.post("/v1/completions", content=b"x" * (5 * 2**20))
    assert response.status_code == 413
    error_of(response)


def test_token_ids_outside_of_the_vocabulary_are_refused(server):
    response = server.http.post("/v1/completions", json={"prompt": [1, 2, 99999]})
    assert response.status_code == 400
    assert error_of(response)["param"] == "prompt"


def test_an_unknown_path_gets_an_openai_error(server):
    assert error_of(server.http.get("/v1/nothing"))["message"] == "Not Found"


def test_unknown_fields_are_accepted(server):
    body = {"messages": QUESTION, "max_tokens": 2, "my_field": {"a": 1}}
    assert server.http.post("/v1/chat/completions", json=body).status_code == 200


def test_the_model_list_names_what_is_served(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").max_model_len == 512


def test_operators_can_ask_how_it_is(server):
    for path in ("/live", "/ready", "/health"):
        assert server.http.get(path).json() == {"status": "ok"}
    assert re.match(r"\d+\.\d+", server.http.get("/version").json()["version"])
    status = server.status()
    assert (status["topology"], status["epoch"] > 0) == ("1A1F", True)
    assert [worker["name"] for worker in status["workers"]] == ["attention/0", "ffn/0"]


def test_metrics_count_tokens_and_requests(server, client):
    def value(name):
        text = server.http.get("/metrics").text
        return float(re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)[1])

    generated = 'vllm:generation_tokens_total{model_name="tiny"}'
    before = value(generated)
    chat(client, max_tokens=5, extra_body={"ignore_eos": True})
    assert value(generated) == before + 5
    exact_edge = 'vllm:request_time_per_output_token_seconds_bucket{le="0.05",model_name="tiny"}'
    assert value(exact_edge) >= 0


LONG = {"prompt": [[5, 6, 7]], "max_tokens": 480, "temperature": 0, "ignore_eos": True}


def aborted(server) -> float:
    """Return how many requests were ended because nobody waited any more."""
    name = 'vllm:request_success_total{finished_reason="abort",model_name="tiny"}'
    found = re.search(rf"^{re.escape(name)} (\S+)$", server.http.get("/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def test_a_client_that_leaves_a_stream_frees_its_blocks(server):
    before = aborted(server)
    with server.http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as response:
        next(response.iter_bytes())
    server.wait_for(lambda: aborted(server) == before + 1)
    server.wait_for(server.all_blocks_free)
    assert server.status()["live_requests"] == 0


def test_a_client_that_leaves_before_a_whole_answer_frees_its_blocks(server):
    before = aborted(server)
    with httpx.Client(base_url=server.url) as http, pytest.raises(httpx.ReadTimeout):
        http.post("/v1/completions", json=LONG, timeout=0.3)
    server.wait_for(lambda: aborted(server) == before + 1)
    server.wait_for(server.all_blocks_free)
    assert server.status()["live_requests"] == 0


def test_a_client_that_leaves_before_its_request_is_whole_is_no_error(server, client):
    """The log is read at the end: it must not speak of an unexpected error."""
    address = (server.http.base_url.host, server.http.base_url.port)
    with socket.create_connection(address) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n"
        connection.sendall(f"{head}{{".encode())
        with pytest.raises(TimeoutError):
            connection.settimeout(0.2)
            connection.recv(1)
    assert chat(client).choices[0].finish_reason


def test_clients_that_leave_while_queued_are_forgotten(server):
    """More work than the KV cache holds, so that some requests wait for blocks."""

    queued = [{**LONG, "prompt": [[k] * 290], "max_tokens": 200} for k in range(5, 15)]

    async def keep_asking(http, body):
        while True:  # the worker reports twice a second, and may be done sooner
            await http.post("/v1/completions", json=body, timeout=60)

    async def leave_all():
        async with httpx.AsyncClient(base_url=server.url) as http:
            asked = [asyncio.create_task(keep_asking(http, body)) for body in queued]
            await asyncio.to_thread(
                server.wait_for, lambda: server.status()["workers"][0]["load"]["waiting"] > 0
            )
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

    asyncio.run(leave_all())
    server.wait_for(server.all_blocks_free)
    server.wait_for(lambda: server.status()["live_requests"] == 0)


def test_a_full_server_refuses_at_once_and_says_when_to_return(server):
    async def fill():
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
            asked = [
                asyncio.create_task(http.post("/v1/completions", json=LONG)) for _ in range(12)
            ]
            await asyncio.to_thread(server.wait_for, lambda: server.status()["live_requests"] == 12)
            refused = await http.post("/v1/completions", json=LONG)
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
            return refused

    refused = asyncio.run(fill())
    assert refused.status_code == 503
    assert error_of(refused)["code"] == "server_is_overloaded"
    assert int(refused.headers["retry-after"]) >= 1
    assert int(refused.headers["retry-after-ms"]) >= 1000
    server.wait_for(lambda: server.status()["live_requests"] == 0)


def test_streams_that_come_at_once_are_admitted_one_by_one(server):
    async def ask_all():
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
            body = {**LONG, "max_tokens": 100, "stream": True}
            answers = await asyncio.gather(
                *(http.post("/v1/completions", json=body) for _ in range(40))
            )
        return [answer.status_code for answer in answers]

    codes = asyncio.run(ask_all())
    assert set(codes) == {200, 503}
    assert codes.count(200) == 12
    server.wait_for(server.all_blocks_free)
