"""When workers collect garbage: between steps, and everything once nothing is left to do."""

import gc
from dataclasses import replace

import pytest

from afd_server.core.request import Request, SamplingParams
from afd_server.core.topology import Role
from support.checkpoints import tiny_llama
from support.pools import Pools

A_WHILE = 600  # turns of 10 ms


@pytest.fixture
def generations():
    """The generations of all collections from now on; none happens by itself."""
    seen = []

    def note(phase, info):
        if phase == "start":
            seen.append(info["generation"])

    gc.collect()
    gc.disable()
    gc.callbacks.append(note)
    yield seen
    gc.callbacks.remove(note)
    gc.enable()


def request(num_output):
    return Request(1, tuple(range(5, 20)), SamplingParams(max_tokens=num_output))


def turns(pools, count):
    for _ in range(count):
        pools.turn()


def test_no_collection_falls_into_a_step_of_the_only_lane(generations):
    pools = Pools(tiny_llama()[0], num_lanes=1)
    worker, loop = pools.workers[pools.attention()], pools.loops[pools.attention()]
    others = {name: each for name, each in pools.loops.items() if each is not loop}
    pools.loops = {pools.attention(): loop}  # the FFN worker's collections are another test's
    pools.submit(request(num_output=50))
    num_taken = 0
    while 1 not in pools.finish:
        turns(pools, 30)  # more than a heartbeat, in which the call is out
        if worker._ffn._pending:
            assert len(generations) == num_taken
        for each in others.values():
            each.turn(0.0)
        pools.turn()
        num_taken = len(generations)
    assert num_taken >= 40
    assert set(generations) == {1}


def test_an_ffn_worker_collects_while_no_call_waits(generations):
    pools = Pools(tiny_llama()[0], num_attention=2, num_lanes=1, max_gather_rows=1)
    ffn = next(m.incarnation for m in pools.members.values() if m.role is Role.FFN)
    loop = pools.loops.pop(ffn)
    for slot in range(2):
        pools.submit(replace(request(num_output=2), key=slot), slot)
    turns(pools, 30)
    generations.clear()
    loop.turn(0.0)
    assert loop._worker._waiting and not generations, "another call waits"
    loop.turn(0.0)
    assert generations == [1]


@pytest.mark.parametrize("num_lanes", [1, 3])
def test_everything_is_collected_once_after_the_last_step(generations, num_lanes):
    pools = Pools(tiny_llama()[0], num_lanes=num_lanes)
    for _ in range(2):
        pools.finish.clear()
        pools.tokens.clear()
        pools.run([request(num_output=30)])
        assert generations and set(generations) == {1}
        turns(pools, A_WHILE)
        assert generations.count(2) == len(pools.loops)
        generations.clear()
