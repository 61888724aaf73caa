"""The calibration: what it reads off a timeline, what it leaves behind, what may go wrong."""

import logging
from collections import Counter

import pytest

from afd_server.core.request import Request, SamplingParams
from afd_server.core.stage import StageId
from afd_server.core.topology import FFNParallel, Role
from afd_server.costmodel.pipeline import CONTEXT_TOKENS, LayerTimes
from afd_server.telemetry.timeline import Event, EventKind, read_events
from afd_server.transport.inproc import Faults
from afd_server.workers.attention import calibration
from afd_server.workers.attention.calibration import (
    NUM_ROUNDS,
    TOGETHER_ROUNDS,
    layer_times,
)
from support.checkpoints import tiny_llama
from support.experts import tiny_routed
from support.pools import Pools, ipc_links

NUM_LAYERS = 3
ALONE = 4 * NUM_ROUNDS + 5  # steps: three sizes that decode, one in two parts too; and of prompts


def requests(count=4, num_output=6):
    return [
        Request(key, tuple(range(5, 12 + 9 * key)), SamplingParams(max_tokens=num_output, seed=key))
        for key in range(1, count + 1)
    ]


def calibrate(pools, turns=3000):
    """Turn until every attention worker is ready, and return these."""
    workers = [pools.workers[m.incarnation] for m in attention_members(pools)]
    for _ in range(turns):
        if all(worker.is_ready for worker in workers):
            return workers
        pools.turn()
    raise AssertionError(f"not ready after {turns} turns")


def attention_members(pools):
    return [m for m in pools.members.values() if m.role is Role.ATTENTION]


def said(caplog):
    return [record.getMessage() for record in caplog.records if "lanes" in record.getMessage()]


@pytest.fixture(autouse=True)
def logged(caplog):
    caplog.set_level(logging.INFO, "afd_server.workers.attention.calibration")


# -- what a timeline says


def event(kind, begin_s, end_s, layer=0, peer=0):
    return Event(begin_s, end_s, step=1, rows=8, lane=0, kind=kind, layer=layer, peer=peer)


def step_events():
    """Two layers and two FFN workers, in milliseconds; worker 1 answers later than worker 0."""
    for layer, start in enumerate((0, 100)):
        yield event(EventKind.ATTENTION, start, start + 20, layer)
        for peer, held in enumerate((30, 40)):
            taken = start + 30
            yield event(EventKind.A_TO_F, start + 20, taken, layer, peer)
            yield event(EventKind.F_TO_A, taken + held, taken + held + 10, layer, peer)
        yield event(EventKind.WAIT, start + 25, start + 90)
    yield event(EventKind.SAMPLE, 200, 240)


def test_what_is_neither_slept_nor_held_is_the_attention_workers():
    """Asleep from 25 to 80 in each layer, of which 40 are held; the step takes 240."""
    times = layer_times(step_events(), 2)
    assert times == LayerTimes(240 - 2 * 55, [40, 40], [(55 - 40) / 2] * 2)


def test_an_answer_that_nobody_had_to_wait_for_was_not_under_way():
    events = [e for e in step_events() if e.kind != EventKind.WAIT or e.begin_s > 100]
    times = layer_times(events, 2)
    assert times == LayerTimes(240 - 55, [40, 40], [0.0, (55 - 40) / 2])


def test_a_step_with_a_call_that_was_sent_again_tells_nothing():
    events = [e for e in step_events() if not (e.layer == 1 and e.kind != EventKind.ATTENTION)]
    assert layer_times(events, 2) is None


# -- what it leaves behind


@pytest.mark.parametrize("num_attention", [1, 2])
def test_requests_that_come_early_wait_and_get_the_same_tokens(num_attention, caplog):
    slots = [request.key % num_attention for request in requests()]
    pools = Pools(tiny_llama()[0], num_attention=num_attention, num_ffn=2, num_lanes=None)
    plain = Pools(tiny_llama()[0], num_attention=num_attention, num_ffn=2)
    for request, slot in zip(requests(), slots, strict=True):
        pools.submit(request, slot)
    assert not any(pools.workers[m.incarnation].is_ready for m in attention_members(pools))
    assert pools.run(requests(), slots) == plain.run(requests(), slots)
    assert len(said(caplog)) == num_attention


def test_it_leaves_no_block_no_row_and_nothing_cached():
    pools = Pools(tiny_llama()[0], num_lanes=None)
    (worker,) = calibrate(pools)
    report = worker.load(0)
    assert report.free_blocks == report.num_blocks
    assert report.cached_blocks == report.rows == report.running == report.waiting == 0
    assert report.steps == ALONE
    steps = [e for e in read_events(report.events.data) if e.kind == EventKind.STEP]
    assert [(e.step, e.rows) for e in steps] == [
        (number, rows)
        for number, rows in enumerate(
            [2, 4, 16, 16, 32, 2, 4, 16, 16, 32, 96, 32, 2, 4, 16, 16, 32]
            + [2, 4, 16, 16] * (NUM_ROUNDS - 3),
            1,
        )
    ]


def test_what_goes_in_two_parts_is_learned_so_and_its_stages_are_those_of_one(monkeypatch):
    monkeypatch.setattr(calibration, "LONGEST_S", 1e9)
    learned, chosen_by = [], []
    pools = Pools(tiny_llama()[0], num_lanes=None)
    worker = pools.workers[pools.attention()]
    made = worker._calibration
    monkeypatch.setattr(made, "_note_stages", chosen_by.append)
    monkeypatch.setattr(worker._scheduler.pace.model, "calibrate", learned.extend)
    calibrate(pools)
    assert Counter(chosen_by) == {2: NUM_ROUNDS - 1, 4: NUM_ROUNDS - 1, 16: NUM_ROUNDS - 1}
    assert sorted(load.rows for load, _ in learned if load.rows) == [2, 4, 16]
    assert {len(made._seconds[load]) for load, _ in learned if load.rows} == {NUM_ROUNDS - 1}


def test_lanes_are_timed_beside_each_other_and_leave_nothing_behind_either(monkeypatch):
    monkeypatch.setattr(calibration, "LONGEST_S", 1e9)
    pools = Pools(tiny_llama()[0], num_lanes=3, calibrates=True)
    (worker,) = calibrate(pools)
    report = worker.load(0)
    assert report.free_blocks == report.num_blocks
    assert report.steps == ALONE + 3 * 2 * TOGETHER_ROUNDS
    steps = [e for e in read_events(report.events.data) if e.kind == EventKind.STEP]
    rows = Counter((e.lane, e.rows) for e in steps if e.step > ALONE)
    assert rows == {(lane, n): TOGETHER_ROUNDS for lane in range(3) for n in (1, 5)}
    assert pools.run(requests()) == Pools(tiny_llama()[0]).run(requests())


def test_it_counts_no_tokens_of_experts_and_asks_for_several():
    pools = Pools(tiny_routed("mixtral")[0], num_lanes=None, num_ffn=2, parallel=FFNParallel.EXPERT)
    (worker,) = calibrate(pools)
    assert not any(worker.expert_load().tokens.data)
    calls = [e for e in read_events(worker.load(0).events.data) if e.kind == EventKind.A_TO_F]
    assert {event.peer for event in calls} == {0, 1}


def test_a_small_cache_calibrates_with_what_it_has(caplog):
    pools = Pools(
        tiny_llama()[0], num_lanes=None, kv_cache_bytes=5 * 16 * 768, max_model_len=64
    )  # five blocks for sixteen sequences
    (worker,) = calibrate(pools)
    assert "2 rows" in said(caplog)[0]
    assert "5 rows" in said(caplog)[0]
    assert worker.load(0).free_blocks == 5


def test_no_made_up_sequence_is_longer_than_the_model_allows():
    assert CONTEXT_TOKENS > 64
    calibrate(Pools(tiny_llama()[0], num_lanes=None, max_model_len=64))


def test_a_single_sequence_has_a_single_lane(caplog):
    calibrate(Pools(tiny_llama()[0], num_lanes=None, max_num_seqs=1))
    assert said(caplog)[0].startswith("lanes: 1 ")


def test_over_a_real_link_the_figures_are_in_the_log(tmp_path, caplog):
    pools = Pools(tiny_llama()[0], num_lanes=None, link=ipc_links(tmp_path))
    try:
        calibrate(pools, turns=30_000)
    finally:
        pools.close()
    (sentence,) = said(caplog)
    assert sentence.startswith("lanes: ")
    assert "2 rows: T_a " in sentence
    assert "16 streams through a layer" in sentence
    assert "T_a 0," not in sentence


# -- what may go wrong


def test_an_ffn_worker_that_dies_in_the_middle_delays_it_until_it_is_replaced():
    pools = Pools(tiny_llama()[0], num_ffn=2, num_lanes=None)
    for _ in range(10):
        pools.turn()
    victim = next(n for n, m in pools.members.items() if m.role is Role.FFN and m.slot == 1)
    pools.kill(victim)
    pools.publish()
    for _ in range(20):
        pools.turn()
    assert not any(pools.workers[m.incarnation].is_ready for m in attention_members(pools))
    pools.start(Role.FFN, 1)
    pools.publish()
    calibrate(pools)
    assert pools.run(requests()) == Pools(tiny_llama()[0], num_ffn=2).run(requests())


def test_an_attention_worker_that_is_replaced_calibrates_again():
    pools = Pools(tiny_llama()[0], num_lanes=None)
    calibrate(pools)
    pools.kill(pools.attention())
    pools.publish()
    pools.start(Role.ATTENTION, 0)
    pools.publish()
    assert calibrate(pools)[0].load(0).steps == ALONE


@pytest.mark.parametrize("seed", range(3))
def test_a_network_that_loses_and_repeats_frames_changes_no_token(seed):
    faults = Faults(seed, drop=0.05, duplicate=0.2, max_delay=5)
    pools = Pools(tiny_llama()[0], num_lanes=None, num_ffn=2, faults=faults, resend_s=0.3)
    calibrate(pools)
    assert pools.run(requests()) == Pools(tiny_llama()[0], num_ffn=2).run(requests())


def test_where_every_step_is_disturbed_two_micro_batches_are_in_flight(caplog):
    pools = Pools(tiny_llama()[0], num_lanes=None, faults=Faults(1, drop=0.4), resend_s=0.1)
    (worker,) = calibrate(pools, turns=20_000)
    (record,) = [r for r in caplog.records if "lanes" in r.getMessage()]
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("lanes for 2 micro-batches, uncalibrated")
    assert len(worker._lanes) == 1, "whose steps go in two parts"


def test_every_step_has_a_number_of_its_own():
    pools = Pools(tiny_llama()[0], num_lanes=None)
    (worker,) = calibrate(pools)
    pools.run(requests())
    events = read_events(worker.load(0).events.data)
    stages = [StageId(e.step, e.lane, e.layer) for e in events if e.kind == EventKind.ATTENTION]
    assert len(set(stages)) == len(stages) > ALONE * NUM_LAYERS
