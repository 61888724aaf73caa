"""The timeline of whole pools: every stage is there once, with its rows and its place."""

from collections import Counter

import pytest

from afd_server.core.request import Request, SamplingParams
from afd_server.core.stage import AHEAD, StageId
from afd_server.core.topology import FFNParallel, Role
from afd_server.telemetry.timeline import EventKind, read_events
from afd_server.transport.inproc import Faults
from support.checkpoints import tiny_llama
from support.pools import Pools

NUM_LAYERS = 3


def requests(count=3, num_output=4):
    return [
        Request(key, tuple(range(5, 12 + 9 * key)), SamplingParams(max_tokens=num_output))
        for key in range(1, count + 1)
    ]


def events_of(pools, role):
    """Return the new events of a pool's workers, by slot."""
    members = sorted((m for m in pools.members.values() if m.role is role), key=lambda m: m.slot)
    reports = [pools.workers[member.incarnation].load(0) for member in members]
    assert not any(report.dropped_events for report in reports)
    return [list(read_events(report.events.data)) for report in reports]


def of_kind(events, kind):
    return [event for event in events if event.kind == kind]


def stage(event):
    return StageId(event.step, event.lane, event.layer)


@pytest.mark.parametrize(
    ("lm_head", "shares_head"), [(Role.ATTENTION, False), (Role.FFN, False), (Role.FFN, True)]
)
@pytest.mark.parametrize("num_ffn", [1, 2])
def test_every_stage_of_every_step_is_recorded_once(num_ffn, lm_head, shares_head):
    pools = Pools(tiny_llama()[0], num_ffn=num_ffn, lm_head=lm_head, shares_head=shares_head)
    pools.run(requests())
    (attention,) = events_of(pools, Role.ATTENTION)
    steps = of_kind(attention, EventKind.STEP)
    assert len({(event.step, event.lane) for event in steps}) == len(steps) > 4
    assert {event.lane for event in steps} == {0, 1}
    stages = of_kind(attention, EventKind.ATTENTION)
    places = {(e.step, e.lane): e.rows for e in stages if e.layer == 0}  # of parts
    rows_of_step = Counter()
    for (step, lane), rows in places.items():
        rows_of_step[step, lane % AHEAD] += rows
    assert rows_of_step == {(event.step, event.lane): event.rows for event in steps}
    assert any(lane >= AHEAD for _, lane in places), "some go in two parts"
    expected = of_kind(attention, EventKind.EXPECTED)
    assert [(stage(e), e.begin_s, e.rows) for e in expected] == [
        (stage(e), e.begin_s, e.rows) for e in steps
    ]
    assert all(e.end_s > e.begin_s for e in expected)
    layers = Counter(
        StageId(step, lane, layer) for step, lane in places for layer in range(NUM_LAYERS)
    )
    sampled = {(e.step, e.lane): e.rows for e in of_kind(attention, EventKind.SAMPLE) if e.rows}
    heads = Counter(StageId(step, lane, NUM_LAYERS) for step, lane in sampled)
    assert Counter(map(stage, stages)) == layers + heads
    for event in stages:
        rows = sampled if event.layer == NUM_LAYERS else places
        assert event.rows == rows[event.step, event.lane]
    last = {
        StageId(step, lane, NUM_LAYERS - 1)
        for step, lane in places.keys() - sampled.keys()
        if lane >= AHEAD
    }
    expected = layers + heads if lm_head is Role.FFN else layers
    expected = Counter(s for s in expected.elements() if s not in last)  # nothing is behind it
    for kind in (EventKind.A_TO_F, EventKind.F_TO_A):
        calls = Counter((stage(event), event.peer) for event in of_kind(attention, kind))
        assert calls == Counter((s, peer) for s in expected for peer in range(num_ffn))
    for ffn in events_of(pools, Role.FFN):
        computed = of_kind(ffn, EventKind.FFN) + of_kind(ffn, EventKind.GATHERED)
        assert Counter(map(stage, computed)) == expected
    assert sum(sampled.values()) == 3 * 4
    here = Counter(map(stage, of_kind(attention, EventKind.FFN)))
    assert here == (heads if lm_head is Role.ATTENTION or shares_head else Counter())


def test_a_gathered_call_is_recorded_with_its_own_worker():
    pools = Pools(tiny_llama()[0], num_attention=2, num_lanes=1)
    pools.run(requests(2), [0, 1])
    (ffn,) = events_of(pools, Role.FFN)
    gathered = of_kind(ffn, EventKind.GATHERED)
    assert gathered
    groups = {event.begin_s: event for event in of_kind(ffn, EventKind.FFN)}
    for call in gathered:
        group = groups[call.begin_s]
        assert group.rows > call.rows
        assert (group.layer, group.end_s) == (call.layer, call.end_s)
        assert {group.peer, call.peer} == {0, 1}


def test_stages_follow_each_other_within_their_step():
    pools = Pools(tiny_llama()[0])
    pools.run(requests(2))
    (attention,) = events_of(pools, Role.ATTENTION)
    for step in of_kind(attention, EventKind.STEP):
        mine = [e for e in attention if (e.step, e.lane) == (step.step, step.lane)]
        assert step.begin_s <= min(e.begin_s for e in mine)
        assert step.end_s >= max(e.end_s for e in mine if e.kind != EventKind.EXPECTED)
        stages = of_kind(mine, EventKind.ATTENTION)
        (sampling,) = of_kind(mine, EventKind.SAMPLE)
        assert [e.layer for e in stages] == list(range(NUM_LAYERS + (sampling.rows > 0)))
        for sent, call in zip(stages[:NUM_LAYERS], of_kind(mine, EventKind.A_TO_F), strict=True):
            assert sent.end_s <= call.begin_s


def test_a_call_that_was_sent_again_has_no_transfer_time():
    pools = Pools(tiny_llama()[0], faults=Faults(3, drop=0.1), resend_s=0.3)
    pools.run(requests())
    (attention,) = events_of(pools, Role.ATTENTION)
    assert pools.workers[pools.attention()].load(0).resends > 0
    num_stages = len(of_kind(attention, EventKind.ATTENTION))
    transfers = of_kind(attention, EventKind.A_TO_F)
    assert 0 < len(transfers) < num_stages
    assert all(e.end_s - e.begin_s < 0.3 for e in transfers)


def test_waiting_counts_as_a_bubble_only_while_there_is_live_work():
    pools = Pools(tiny_llama()[0])
    for request in requests(2):
        for _ in range(500):  # 5 s of nothing to do
            pools.turn()
        pools.run([request])
    for events in (*events_of(pools, Role.ATTENTION), *events_of(pools, Role.FFN)):
        waits = of_kind(events, EventKind.WAIT)
        assert waits
        assert max(e.end_s - e.begin_s for e in waits) < 0.1


def test_replicas_are_named_by_their_slot():
    pools = Pools(tiny_llama()[0], num_ffn=2, parallel=FFNParallel.REPLICATE)
    pools.run(requests())
    (attention,) = events_of(pools, Role.ATTENTION)
    for event in of_kind(attention, EventKind.A_TO_F):
        assert event.peer == event.lane % 2


def test_a_colocated_worker_records_its_ffn_stages_and_no_transfers():
    pools = Pools(tiny_llama()[0], num_ffn=0, parallel=FFNParallel.COLOCATED)
    pools.run(requests())
    (events,) = events_of(pools, Role.ATTENTION)
    stages = Counter(map(stage, of_kind(events, EventKind.ATTENTION)))
    assert Counter(map(stage, of_kind(events, EventKind.FFN))) == stages
    assert len(stages) == (NUM_LAYERS + 1) * len(of_kind(events, EventKind.STEP))
    for kind in (EventKind.A_TO_F, EventKind.F_TO_A, EventKind.WAIT):
        assert not of_kind(events, kind)


@pytest.mark.parametrize("parallel", [FFNParallel.TENSOR, FFNParallel.COLOCATED])
def test_long_prompts_go_in_two_parts_where_calls_travel_and_nothing_is_saved_elsewhere(parallel):
    travels = parallel is FFNParallel.TENSOR
    pools = Pools(tiny_llama()[0], num_ffn=int(travels), parallel=parallel, max_batch_tokens=96)
    pools.run([Request(1, tuple(range(5, 85)), SamplingParams(max_tokens=2))])
    (attention,) = events_of(pools, Role.ATTENTION)
    assert any(event.lane >= AHEAD for event in of_kind(attention, EventKind.ATTENTION)) == travels
    assert pools.workers[pools.attention()]._scheduler.cuts_steps == travels
