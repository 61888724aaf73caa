"""The prefix cache as clients and operators see it."""

import itertools
import re

import openai
import pytest

from support.checkpoints import tiny_llama
from support.server import serving

_numbers = itertools.count()


def fresh_prompt(length=40):
    """Return a prompt that begins like no other of this module."""
    number = next(_numbers)
    return [3 + number // 200, 3 + number % 200, *range(5, 3 + length)]


def body(prompt, **changes):
    return {
        "prompt": [prompt], "max_tokens": 6, "temperature": 0, "ignore_eos": True,
        "return_token_ids": True, **changes,
    }  # fmt: skip


def ask(server, prompt, key=None, **changes):
    """Return the tokens of an answer and how many of its prompt were found computed."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    answer = server.http.post("/v1/completions", json=body(prompt, **changes), headers=headers)
    usage = answer.json()["usage"]
    assert usage["prompt_tokens"] == len(prompt)
    tokens = [choice["token_ids"] for choice in answer.json()["choices"]]
    return tokens, usage["prompt_tokens_details"]["cached_tokens"]


def test_a_prompt_asked_again_is_cached_but_for_its_last_block(server):
    prompt = fresh_prompt(40)
    first, again = ask(server, prompt), ask(server, prompt)
    assert (first[1], again[1]) == (0, 32)
    assert first[0] == again[0]


def test_the_openai_client_sees_cached_tokens_whole_and_streamed(server):
    content = f"{next(_numbers)} " + "The same long question. " * 4
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:

        def chat(**more):
            return client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": content}], max_tokens=3, **more
            )

        assert chat().usage.prompt_tokens_details.cached_tokens == 0
        usage = chat().usage
        expected = (usage.prompt_tokens - 1) // 16 * 16
        assert usage.prompt_tokens_details.cached_tokens == expected
        *_, last = chat(stream=True, stream_options={"include_usage": True})
        assert last.usage.prompt_tokens_details.cached_tokens == expected


def test_the_next_turn_of_a_chat_finds_question_and_answer(server):
    prompt = fresh_prompt(40)
    tokens, _ = ask(server, prompt, max_tokens=30)
    assert ask(server, [*prompt, *tokens[0], 7, 8, 9])[1] == 64  # of 69 computed


def test_the_choices_of_a_request_share_a_prompt_that_counts_as_computed_once(server):
    prompt = fresh_prompt(40)
    tokens, cached = ask(server, prompt, n=4, temperature=1.0, seed=5)
    assert cached == 0
    again, cached = ask(server, prompt, n=4, temperature=1.0, seed=5)
    assert cached == 32
    assert tokens == again
    assert len({tuple(choice) for choice in tokens}) > 1


def test_a_cache_salt_keeps_requests_apart(server):
    prompt = fresh_prompt()
    tokens = ask(server, prompt)
    for salt in ("mine", "theirs"):
        assert ask(server, prompt, cache_salt=salt) == (tokens[0], 0)
        assert ask(server, prompt, cache_salt=salt) == (tokens[0], 32)


def test_api_keys_keep_requests_apart_and_no_cache_salt_leads_to_another_key(server):
    prompt = fresh_prompt()
    assert ask(server, prompt, key="a")[1] == 0
    assert ask(server, prompt, key="b")[1] == 0
    assert ask(server, prompt)[1] == 0
    assert ask(server, prompt, cache_salt="Bearer a")[1] == 0
    assert ask(server, prompt, key="a", cache_salt="x")[1] == 0
    assert ask(server, prompt, key="a")[1] == 32


@pytest.mark.parametrize("salt", ["", 7, ["a"]])
def test_a_cache_salt_that_is_none_is_refused_by_name(server, salt):
    answer = server.http.post("/v1/completions", json=body([5], cache_salt=salt))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "cache_salt"
    assert "cache_salt" in answer.json()["error"]["message"]


def test_openais_prompt_cache_key_separates_nothing(server):
    prompt = fresh_prompt()
    ask(server, prompt, prompt_cache_key="a")
    assert ask(server, prompt, prompt_cache_key="b", user="c")[1] == 32


def test_operators_see_queries_hits_and_cached_blocks(server):
    def figures():
        text = server.http.get("/metrics").text
        return [
            sum(float(x) for x in re.findall(rf"^{name}_total{{.*}} (\S+)$", text, re.MULTILINE))
            for name in ("afd_prefix_cache_queries_tokens", "afd_prefix_cache_hits_tokens",
                         "vllm:prefix_cache_queries", "vllm:prefix_cache_hits")
        ]  # fmt: skip

    before, prompt = figures(), fresh_prompt()
    for _ in range(3):
        ask(server, prompt)
    server.wait_for(lambda: figures()[0] >= before[0] + 120)
    server.wait_for(server.all_blocks_free)  # the last request was counted when it was planned
    queries, hits, *for_all = figures()
    assert hits >= before[1] + 64
    assert for_all == [queries, hits]
    load = server.status()["workers"][0]["load"]
    assert 0 < load["cached_blocks"] <= load["free_blocks"] == load["num_blocks"]


@pytest.mark.slow
def test_int8_tokens_are_the_same_with_a_warm_and_a_cold_cache_and_without(short_dir):
    """Default settings but for tiny memory: native kernels, chunks, eviction, much company."""
    import concurrent.futures

    head = [3 + i % 250 for i in range(120)]
    bodies = [
        body(head[: 17 * (k % 8)] + [k + 3] * (1 + 5 * k), max_tokens=40, seed=k,
             temperature=0.9 * (k % 2))
        for k in range(24)
    ]  # fmt: skip

    def answers(server, num_together, **changes):
        def one(asked):
            answer = server.http.post("/v1/completions", json={**asked, **changes}).json()
            cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
            return answer["choices"][0]["token_ids"], cached

        with concurrent.futures.ThreadPoolExecutor(num_together) as pool:
            found = list(pool.map(one, bodies))
        return [tokens for tokens, _ in found], sum(cached for _, cached in found)

    settings = (tiny_llama()[0], "--launcher", "local", "--kv-cache-mb", 1)
    with serving(short_dir, *settings, "--no-prefix-caching") as server:
        expected, cached = answers(server, 8)
        assert cached == 0
        assert server.status()["workers"][0]["load"]["cached_blocks"] == 0
    with serving(
        short_dir, *settings, "--max-num-seqs", 32, "--max-batch-tokens", 48, "--lanes", 3
    ) as server:
        for num_together in (1, 24, 8):
            tokens, cached = answers(server, num_together)
            assert tokens == expected
            assert cached > 0
        server.wait_for(server.all_blocks_free)
