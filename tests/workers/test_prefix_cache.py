"""The oracle: with a prefix cache the workers give the bits that they give without."""

import random
from dataclasses import replace

import pytest
import torch

from afd_server.core.request import Request, SamplingParams
from afd_server.core.topology import FFNParallel, Role
from afd_server.transport.inproc import Faults
from afd_server.workers.config import Numerics
from support.checkpoints import tiny_llama
from support.logits import record_logits
from support.pools import Pools

TINY_KV_BYTES = 10 * 16 * 768  # 10 blocks: two sequences at most


@pytest.fixture
def logits_of(monkeypatch):
    return record_logits(monkeypatch)


def prompts_that_begin_alike(count=8, seed=5):
    """Draw prompts of one to three parts: instructions, a question, a few words of one's own."""
    rng = random.Random(seed)

    def draw(length):
        return tuple(rng.randrange(3, 259) for _ in range(length))

    instructions, questions = draw(40), [draw(21), draw(16)]
    return [
        instructions + questions[number % 2] * (number % 3 > 0) + draw(rng.randint(1, 30))
        for number in range(count)
    ]


def requests_of(prompts, first_key=1, num_output=12, salt=""):
    return [
        Request(
            key,
            prompt,
            SamplingParams(num_output, temperature=0.8 * (key % 2), seed=key * 7919),
            salt=salt,
        )
        for key, prompt in enumerate(prompts, first_key)
    ]


def hits(pools):
    return [pools.workers[n].load(0).hit_tokens for n in pools.workers if n.startswith("att")]


def run_apart(requests, **settings):
    """Return what each request gets where nothing is shared."""
    pools = Pools(tiny_llama()[0], prefix_caching=False, **settings)
    tokens = pools.run(requests)
    assert hits(pools) == [0]
    assert set(pools.cached.values()) == {0}
    return tokens


@pytest.mark.parametrize(
    "settings",
    [
        {"num_lanes": 1},
        {"num_lanes": 2, "num_ffn": 2},
        {"num_lanes": 3, "max_batch_tokens": 256},
        {"numerics": Numerics("native", "int8", "bfloat16")},
        {"num_ffn": 0, "parallel": FFNParallel.COLOCATED},
    ],
)
def test_sharing_changes_no_bit_of_any_logits(settings, logits_of):
    requests = requests_of(prompts_that_begin_alike())
    expected_tokens, expected = run_apart(requests, **settings), dict(logits_of)
    logits_of.clear()
    pools = Pools(tiny_llama()[0], **settings)
    assert pools.run(requests) == expected_tokens
    assert hits(pools)[0] >= 32 * (len(requests) - 1)
    assert logits_of.keys() == expected.keys()
    assert all(torch.equal(logits_of[place], logits) for place, logits in expected.items())


def test_a_request_asked_again_computes_its_last_block_only(logits_of):
    (request,) = requests_of([prompts_that_begin_alike()[0]])
    pools = Pools(tiny_llama()[0])
    first, expected = pools.run([request]), dict(logits_of)
    again = replace(request, key=77)
    logits_of.clear()
    assert pools.run([again]) == first
    assert pools.cached[77] == (len(request.prompt_ids) - 1) // 16 * 16
    assert all(torch.equal(logits_of[place], logits) for place, logits in expected.items())


def test_every_turn_of_a_chat_finds_the_turns_before_it():
    pools, prompt = Pools(tiny_llama()[0]), prompts_that_begin_alike()[0]
    num_computed = 0
    for turn in range(1, 5):
        (request,) = requests_of([prompt], first_key=turn)
        (tokens,) = pools.run([request])
        assert [tokens] == run_apart([request])
        assert pools.cached[turn] == num_computed // 16 * 16
        num_computed = len(prompt) + len(tokens) - 1  # the last token was sampled, no more
        prompt = (*prompt, *tokens, 50 + turn, 60, 70)


@pytest.mark.parametrize("num_lanes", [1, 2])
def test_preemption_and_eviction_change_no_token(num_lanes):
    settings = {"kv_cache_bytes": TINY_KV_BYTES, "max_model_len": 128, "num_lanes": num_lanes}
    requests = requests_of(prompts_that_begin_alike(), num_output=24)
    expected = run_apart(requests, **settings)
    pools = Pools(tiny_llama()[0], **settings)
    assert pools.run(requests) == expected
    load = pools.workers[pools.attention()].load(0)
    assert load.preemptions > 0
    assert load.hit_tokens > 0
    assert load.free_blocks == load.num_blocks >= load.cached_blocks > 0


def test_requests_of_different_salts_share_nothing():
    prompts = prompts_that_begin_alike()
    pools = Pools(tiny_llama()[0])
    mine, theirs = requests_of(prompts, 1, salt="mine"), requests_of(prompts, 100, salt="theirs")
    expected = pools.run(mine)
    before = hits(pools)[0]
    first = theirs[:1]
    assert pools.run(first) == run_apart(first)
    assert pools.cached[100] == 0
    assert hits(pools)[0] == before
    assert pools.run([replace(mine[0], key=50)]) == expected[:1]
    assert pools.cached[50] >= 32


def test_salts_in_company_get_the_tokens_each_gets_alone():
    prompts = prompts_that_begin_alike()
    requests = requests_of(prompts, 1, salt="mine") + requests_of(prompts, 100, salt="theirs")
    expected = run_apart(requests)
    pools = Pools(tiny_llama()[0])
    assert pools.run(requests) == expected
    for salt in ("mine", "theirs"):
        found = [pools.cached[request.key] for request in requests if request.salt == salt]
        assert found.count(0) == 1, "each tenant computes its instructions once"


def test_cancelled_requests_leave_no_wrong_block():
    requests = requests_of(prompts_that_begin_alike(), num_output=30)
    expected = run_apart(requests)
    pools = Pools(tiny_llama()[0], kv_cache_bytes=24 * 16 * 768)
    rng = random.Random(3)
    for round_ in range(6):
        for request in requests:
            pools.submit(replace(request, key=1000 * (round_ + 1) + request.key))
        for _ in range(rng.randint(5, 120)):
            pools.turn()
        for request in requests:
            pools.cancel(1000 * (round_ + 1) + request.key)
    assert pools.run(requests) == expected
    load = pools.workers[pools.attention()].load(0)
    assert load.free_blocks == load.num_blocks


@pytest.mark.parametrize("seed", range(3))
def test_a_network_that_loses_repeats_delays_and_reorders_changes_no_token(seed):
    requests = requests_of(prompts_that_begin_alike())
    expected = run_apart(requests)
    faults = Faults(seed, drop=0.05, duplicate=0.1, max_delay=5)
    pools = Pools(tiny_llama()[0], num_ffn=2, faults=faults, resend_s=0.3)
    assert pools.run(requests) == run_apart(requests, num_ffn=2) == expected
    assert hits(pools)[0] > 0


def test_a_request_that_moves_to_another_worker_gets_the_same_tokens():
    requests = requests_of(prompts_that_begin_alike(), num_output=30)
    expected = run_apart(requests)
    pools = Pools(tiny_llama()[0], num_attention=2)
    pools.run([replace(r, key=r.key + 100) for r in requests[:3]], [1, 1, 1])
    for request in requests:
        pools.submit(request, 0)
    while not all(len(pools.tokens[request.key]) > 3 for request in requests):
        pools.turn()
    pools.kill(pools.attention(0))
    pools.start(Role.ATTENTION, 0)
    pools.publish()
    assert pools.run(requests, [1] * len(requests)) == expected
    assert hits(pools)[0] > 0
