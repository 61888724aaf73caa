"""Blocks that left a window are given back, and no bit of any logits changes."""

import random
from dataclasses import replace

import pytest
import torch

from afd_server.core.errors import ConfigError
from afd_server.core.kv_groups import KVGroup
from afd_server.core.model_spec import ModelSpec, read_model_spec
from afd_server.core.request import Request, SamplingParams
from afd_server.workers.config import Numerics
from support.families import family
from support.logits import record_logits
from support.pools import Pools

TOKEN_BYTES = 4 * 2 * 64 * 4  # four layers with two heads of 32 elements, keys and values, float32
NUMERICS = [Numerics("reference", "float32", "float32"), Numerics("native", "int8", "int8")]
WINDOW, BLOCK, ROWS = 21, 16, 24
# blocks: of the positions before a row, and of the rows of a step, which begin anywhere in one
MOST_HELD = -(-(WINDOW - 1) // BLOCK) + -(-(ROWS + BLOCK - 1) // BLOCK)


@pytest.fixture
def logits_of(monkeypatch):
    return record_logits(monkeypatch)


def step3p5():
    return family("step3p5").directory


def keep_everything(monkeypatch):
    """Let all layers have one block table, as if none had a window."""
    everything = property(lambda spec: (KVGroup(tuple(range(spec.num_layers)), None),))
    monkeypatch.setattr(ModelSpec, "kv_groups", everything)


def requests_of(num_requests=6, num_output=40, seed=3):
    """Draw prompts of which many begin alike, longer than the window and shorter."""
    rng = random.Random(seed)
    stem = [rng.randrange(3, 259) for _ in range(100)]
    return [
        Request(
            key,
            (*stem[: rng.choice([0, 50, 100])], *(rng.randrange(3, 259) for _ in range(key * 4))),
            SamplingParams(num_output, temperature=0.8 * (key % 2), seed=key * 7919),
        )
        for key in range(1, num_requests + 1)
    ]


def scheduler_of(pools):
    return pools.workers[pools.attention()]._scheduler


@pytest.mark.parametrize("numerics", NUMERICS, ids=["float32", "int8"])
@pytest.mark.parametrize(
    ("num_blocks", "settings"),
    [
        (400, {"num_lanes": 1, "prefix_caching": False}),
        (400, {"num_lanes": 2}),
        (400, {"num_lanes": 3, "max_batch_tokens": 200}),
        (36, {"num_lanes": 2}),
    ],
)
def test_giving_blocks_back_changes_no_bit_of_any_logits(
    num_blocks, settings, numerics, logits_of, monkeypatch
):
    requests, spec = requests_of(), read_model_spec(step3p5())
    kv_cache_bytes = num_blocks * BLOCK * spec.kv_slot_bytes(numerics.kv)
    pools = Pools(step3p5(), numerics=numerics, kv_cache_bytes=kv_cache_bytes, **settings)
    tokens, found = pools.run(requests), dict(logits_of)
    scheduler = scheduler_of(pools)
    assert scheduler.blocks.num_free == scheduler.blocks.num_blocks
    assert (num_blocks < 400) == (scheduler.num_preemptions > 0)
    assert (scheduler.num_hit_tokens > 0) == settings.get("prefix_caching", True)
    logits_of.clear()
    keep_everything(monkeypatch)
    whole = {"num_lanes": 1, "prefix_caching": False}
    assert Pools(step3p5(), numerics=numerics, **whole).run(requests) == tokens
    assert logits_of.keys() == found.keys()
    assert all(torch.equal(found[place], logits) for place, logits in logits_of.items())


def test_a_pool_too_small_for_all_keys_and_values_serves_a_long_sequence(monkeypatch):
    """240 tokens take 15 blocks in the one layer that sees all, 5 in each of the three others."""
    num_bytes = (15 + 3 * MOST_HELD) * BLOCK * TOKEN_BYTES // 4
    (request,) = requests_of(1, num_output=132)
    assert len(request.prompt_ids) + 132 > 230
    pools, most = Pools(step3p5(), kv_cache_bytes=num_bytes, max_model_len=240), [0, 0, 0, 0]
    pools.submit(request)
    while request.key not in pools.finish:
        pools.turn()
        for sequence in scheduler_of(pools)._running:
            held = (len(table.owned) for table in sequence.tables)
            most = list(map(max, most, held))
    assert most[0] == 15
    assert max(most[1:]) <= MOST_HELD
    assert scheduler_of(pools).num_preemptions == 0
    keep_everything(monkeypatch)
    with pytest.raises(ConfigError, match="the KV cache holds 112 tokens"):
        Pools(step3p5(), kv_cache_bytes=num_bytes, max_model_len=240)
    assert Pools(step3p5()).run([request]) == [pools.tokens[request.key]]


@pytest.mark.parametrize(
    "name", ["qwen2_windows", "qwen3_windows", "mixtral_windows", "qwen3_moe_windows"]
)
def test_other_models_with_windows_give_blocks_back_too(name, logits_of, monkeypatch):
    requests, directory = requests_of(4, num_output=12), family(name).directory
    pools = Pools(directory)
    tokens, found, most = pools.run(requests), dict(logits_of), []
    request = replace(requests_of(1, num_output=100)[0], key=99)
    pools.submit(request)
    while request.key not in pools.finish:
        pools.turn()
        most += [sum(len(t.owned) for t in s.tables) for s in scheduler_of(pools)._running]
    scheduler = scheduler_of(pools)
    num_blocks = (len(request.prompt_ids) + 100) // BLOCK
    num_full = scheduler._config.windows.count(None)
    num_sliding = len(scheduler._config.windows) - num_full
    assert num_sliding > 0
    assert max(most) <= num_full * (num_blocks + 1) + num_sliding * MOST_HELD
    logits_of.clear()
    keep_everything(monkeypatch)
    assert Pools(directory, num_lanes=1).run(requests) == tokens
    assert all(torch.equal(found[place], logits) for place, logits in logits_of.items())


def test_the_next_turn_of_a_chat_finds_the_turns_before_it():
    pools, prompt, num_computed = Pools(step3p5()), requests_of()[-1].prompt_ids, 0
    for turn in range(1, 4):
        (tokens,) = pools.run([Request(turn, prompt, SamplingParams(20))])
        assert pools.cached[turn] == num_computed // BLOCK * BLOCK
        num_computed = len(prompt) + len(tokens) - 1
        prompt = (*prompt, *tokens, 50 + turn, 60)


def test_cancelled_requests_leave_nothing_behind():
    pools, requests = Pools(step3p5()), requests_of()
    for request in requests:
        pools.submit(request)
    for turn in range(200):
        pools.turn()
        if turn % 40 == 39:
            pools.cancel(requests[turn // 40].key)
    pools.cancel(requests[-1].key)
    for _ in range(200):
        pools.turn()
    scheduler = scheduler_of(pools)
    assert scheduler.num_running == scheduler.num_waiting == 0
    assert scheduler.blocks.num_free == scheduler.blocks.num_blocks
