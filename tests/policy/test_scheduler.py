"""The scheduler under random workloads: budget kept, blocks conserved, nobody starves.

Each block's content is kept beside it, so a block that is shared wrongly, overwritten, or read
before it is written is seen at once.
"""

import random
from dataclasses import replace
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from afd_server.core.batch import Emitted, Sampled, StepPlan, StepResult
from afd_server.core.errors import ConfigError
from afd_server.core.request import SLO, FinishReason, Request, SamplingParams
from afd_server.core.sequence import History
from afd_server.policy import pace
from afd_server.policy.scheduler import Scheduler, SchedulerConfig
from afd_server.policy.step_time import StepLoad

STOP = 7


def config(**changes):
    return SchedulerConfig(
        **{
            "max_model_len": 64,
            "max_num_seqs": 8,
            "max_batch_tokens": 16,
            "num_lanes": 2,
            "num_blocks": 16,
            "block_size": 4,
            "prefix_caching": True,
            **changes,
        }
    )


def request(key, num_prompt=5, max_tokens=4, attempt=1, emitted=(), first=100):
    sampling = SamplingParams(max_tokens=max_tokens, stop_token_ids=(STOP,))
    return Request(key, tuple(range(first, first + num_prompt)), sampling, attempt, emitted)


def result_of(plan, token=1):
    return StepResult(plan, tuple(Sampled(token) for planned in plan.sequences if planned.samples))


def run_alone(scheduler, token=1, lane=0) -> list[Emitted]:
    emitted = []
    while (plan := scheduler.plan(lane, 0.0)) is not None:
        emitted += scheduler.commit(result_of(plan, token), 0.0)
    return emitted


def test_a_long_prompt_is_prefilled_in_chunks_and_then_decoded_token_by_token():
    scheduler = Scheduler(config())
    scheduler.submit(request(1, num_prompt=40, max_tokens=3), 0.0)
    sizes = []
    while (plan := scheduler.plan(0, 0.0)) is not None:
        sizes.append((plan.sequences[0].start, plan.num_tokens, plan.sequences[0].samples))
        scheduler.commit(result_of(plan), 0.0)
    assert sizes == [(0, 16, False), (16, 16, False), (32, 8, True), (40, 1, True), (41, 1, True)]


def test_what_a_step_is_expected_to_take_counts_what_began_beside_it():
    scheduler = Scheduler(config())
    for key in (1, 2):
        scheduler.submit(request(key, first=100 * key), 0.0)
    scheduler.plan(0, 0.0)
    alone_s = scheduler.expected_s(0)
    assert alone_s == scheduler.pace.model.predict(StepLoad(prefill=5, prefill_keys=12.5))
    scheduler.plan(1, 0.0)
    assert scheduler.expected_s(0) > alone_s


def test_the_last_of_max_tokens_ends_a_request_with_length():
    scheduler = Scheduler(config())
    scheduler.submit(request(1, max_tokens=3), 0.0)
    emitted = run_alone(scheduler)
    assert [(e.index, e.finish) for e in emitted] == [
        (0, None),
        (1, None),
        (2, FinishReason.LENGTH),
    ]
    assert scheduler.blocks.num_free == 16


def test_a_lane_that_does_not_pay_waits_and_its_sequences_join_the_other(monkeypatch):
    scheduler = Scheduler(config())
    scheduler.open_lanes(2, fewest=1)
    monkeypatch.setattr(pace, "TRIAL_STEPS", 0)
    scheduler.submit(request(1, max_tokens=9), 0.0)
    first = scheduler.plan(0, 0.0)
    scheduler.submit(request(2, max_tokens=9, first=300), 0.0)
    second = scheduler.plan(1, 0.0)
    assert [plan.sequences[0].key for plan in (first, second)] == [1, 2], "prompts do not wait"
    scheduler.commit(result_of(first), 0.0)
    third = scheduler.plan(0, 0.0)
    scheduler.commit(result_of(second), 0.0)
    assert scheduler.plan(1, 0.0) is None
    scheduler.commit(result_of(third), 0.0)
    joined = scheduler.plan(1, 0.0)
    assert [planned.key for planned in joined.sequences] == [1, 2]
    assert scheduler.plan(0, 0.0) is None
    scheduler.submit(request(3, first=500), 0.0)
    assert [planned.key for planned in scheduler.plan(0, 0.0).sequences] == [3], (
        "a lane for prompts"
    )
    scheduler.submit(request(4, first=700), 0.0)
    scheduler.commit(result_of(joined), 0.0)
    assert [planned.key for planned in scheduler.plan(1, 0.0).sequences] == [1, 2]


def test_what_begins_beside_a_step_that_has_hardly_begun_counts_for_it_too(monkeypatch):
    """A prompt begins behind the step that decodes; whose time would else be put down to chance."""
    scheduler, observed = Scheduler(config()), []
    monkeypatch.setattr(scheduler.pace.model, "observe", lambda load, _: observed.append(load))
    expected_s = scheduler.pace.model.predict(StepLoad(prefill=5))
    for at_s in (0.1 * expected_s, 0.9 * expected_s):
        scheduler.submit(request(1, max_tokens=1), 0.0)
        first = scheduler.plan(0, 0.0)
        scheduler.submit(request(2, max_tokens=1, first=300), at_s)
        second = scheduler.plan(1, at_s)
        for plan in (first, second):
            scheduler.commit(result_of(plan), 2 * expected_s)
    assert [load.other_prefill for load in observed[:2]] == [5, 5]
    assert [load.others for load in observed] == [1, 1, 0, 1]


def test_a_stop_token_ends_a_request_with_stop():
    scheduler = Scheduler(config())
    scheduler.submit(request(1, max_tokens=30), 0.0)
    assert [e.finish for e in run_alone(scheduler, token=STOP)] == [FinishReason.STOP]


def test_the_end_of_the_context_ends_a_request_with_length():
    scheduler = Scheduler(config(max_model_len=8))
    scheduler.submit(request(1, num_prompt=5, max_tokens=30), 0.0)
    assert [e.finish for e in run_alone(scheduler)] == [None, None, FinishReason.LENGTH]


def test_a_second_attempt_goes_on_where_the_emitted_tokens_end():
    scheduler = Scheduler(config())
    scheduler.submit(request(1, max_tokens=4, attempt=2, emitted=(1, 1)), 0.0)
    emitted = run_alone(scheduler)
    assert [(e.attempt, e.index) for e in emitted] == [(2, 2), (2, 3)]


def test_a_repeated_submit_changes_nothing():
    scheduler = Scheduler(config())
    scheduler.submit(request(1), 0.0)
    scheduler.submit(request(1), 0.0)
    assert scheduler.num_waiting == 1


def test_lanes_share_the_running_sequences_evenly():
    scheduler = Scheduler(config(max_batch_tokens=64))
    for key in range(5):
        scheduler.submit(request(key, first=100 * key), 0.0)
    sizes = [len(scheduler.plan(lane, 0.0).sequences) for lane in (0, 1)]
    assert sizes == [3, 2]


def test_a_waiting_request_can_be_cancelled():
    scheduler = Scheduler(config())
    scheduler.submit(request(1), 0.0)
    assert scheduler.cancel(1, 1)
    assert scheduler.plan(0, 0.0) is None
    assert not scheduler.cancel(1, 1)


def test_a_cancel_in_flight_frees_the_blocks_when_the_step_ends():
    scheduler = Scheduler(config())
    scheduler.submit(request(1), 0.0)
    plan = scheduler.plan(0, 0.0)
    assert scheduler.cancel(1, 1)
    assert scheduler.blocks.num_free < 16  # the lane still writes to them
    assert scheduler.commit(result_of(plan), 0.0) == []
    assert scheduler.blocks.num_free == 16


def test_a_cancel_for_another_attempt_is_not_obeyed():
    scheduler = Scheduler(config())
    scheduler.submit(request(1, attempt=2), 0.0)
    assert not scheduler.cancel(1, 1)
    assert scheduler.num_waiting == 1


def test_when_blocks_run_out_the_youngest_prefills_again():
    scheduler = Scheduler(config(num_lanes=1, num_blocks=6, max_model_len=24, max_batch_tokens=32))
    for key in (1, 2):
        scheduler.submit(request(key, num_prompt=8, max_tokens=12, first=100 * key), 0.0)
    finished = [e.key for e in run_alone(scheduler) if e.finish]
    assert finished == [1, 2]
    assert scheduler.num_preemptions > 0
    assert scheduler.blocks.num_free == 6


def test_who_was_preempted_has_no_debt_for_the_time_without_blocks():
    scheduler = Scheduler(config(num_lanes=1, num_blocks=6, max_model_len=24, max_batch_tokens=32))
    for key in (1, 2):
        scheduler.submit(request(key, num_prompt=8, max_tokens=12, first=100 * key), 0.0)
    while not scheduler.num_preemptions:
        plan = scheduler.plan(0, 1.0)
        scheduler.commit(result_of(plan), 1.0)
    (preempted,) = scheduler._waiting
    assert preempted.num_emitted > 0
    assert (preempted.first_token_s, preempted.num_since_first) == (None, 0)


@pytest.fixture
def crowded(monkeypatch):
    """Return a function that makes a scheduler with two prompts, read one after the other."""

    def make(slo=SLO(4.0, 0.05), *, holds_back=True, second=SLO(4.0, 0.05)):  # noqa: B008
        scheduler = Scheduler(config(num_lanes=1, max_batch_tokens=9, holds_back=holds_back))
        monkeypatch.setattr(
            scheduler.pace, "prefill_budget", lambda load, *_: 0 if load.rows else 8
        )
        for key, targets in ((1, slo), (2, second)):
            wanted = request(key, num_prompt=8, max_tokens=12, first=100 * key)
            scheduler.submit(replace(wanted, slo=targets), 0.0)
        return scheduler

    return make


def step(scheduler, now_s, token=1):
    """Return what clients get after a step, as key and index."""
    emitted = scheduler.commit(result_of(scheduler.plan(0, now_s), token), now_s)
    return [(e.key, e.index) for e in emitted]


def test_a_stream_begins_with_several_tokens_while_prompts_are_to_be_read(crowded):
    scheduler = crowded()
    assert [step(scheduler, now_s) for now_s in (0.1, 0.2)] == [[], []]
    assert step(scheduler, 0.3) == [(1, 0), (1, 1), (1, 2)]
    first = scheduler._running[0]
    assert (first.first_token_s, first.num_since_first, first.num_held) == (0.3, 3, 0)
    assert scheduler.pace.due_s(first) == pytest.approx(0.3 + 3 * 0.05 * pace.HEADROOM)
    assert step(scheduler, 0.4) == [(1, 3)]


def test_held_tokens_come_once_nothing_is_to_be_read_or_the_answer_has_ended(crowded):
    scheduler = crowded()
    assert step(scheduler, 0.1) == []
    scheduler.cancel(2, 1)
    assert step(scheduler, 0.2) == [(1, 0), (1, 1)]
    assert step(scheduler, 0.3) == [(1, 2)]
    short = crowded()
    assert step(short, 0.1) == []
    assert step(short, 0.2, STOP) == [(1, 0), (1, 1)]


@pytest.mark.parametrize(
    "how",
    [
        {"slo": SLO(4.0, None)},
        {"slo": SLO(0.2, 0.05)},  # its own first token would be late
        {"second": SLO(60.0, 0.05)},  # the prompt has time
        {"holds_back": False},
    ],
)
def test_tokens_are_held_for_those_in_a_hurry_and_within_targets_only(crowded, how):
    scheduler = crowded(**how)
    assert (1, 0) in step(scheduler, 0.1)
    assert (1, 1) in step(scheduler, 0.2)


def test_held_tokens_come_each_with_its_own_entropy(crowded):
    scheduler = crowded()
    sequence = scheduler._waiting[0]
    sequence.history = History(sequence.request)
    emitted = []
    for entropy in (0.1, 0.2, 0.3, 0.4):
        plan = scheduler.plan(0, 0.0)
        tokens = (Sampled(int(10 * entropy), entropy),) * len(plan.sequences)
        emitted += scheduler.commit(StepResult(plan, tokens), 0.0)
    got = [(e.index, e.token_id, e.entropy, e.finish) for e in emitted]
    assert got == [(0, 1, 0.1, None), (1, 2, 0.2, None), (2, 3, 0.3, None), (3, 4, 0.4, None)]


def test_of_a_request_that_is_cancelled_no_held_token_comes(crowded):
    scheduler = crowded()
    assert step(scheduler, 0.1) == []
    scheduler.cancel(1, 1)
    assert step(scheduler, 0.2) == [(2, 0)]


def prefilled(scheduler, lane=0) -> list[tuple[int, int, int]]:
    """Run everything; return (key, start, number of tokens) of each run of two tokens or more."""
    runs = []
    while (plan := scheduler.plan(lane, 0.0)) is not None:
        runs += [(s.key, s.start, len(s.token_ids)) for s in plan.sequences if len(s.token_ids) > 1]
        scheduler.commit(result_of(plan), 0.0)
    return runs


def test_a_prompt_that_begins_like_an_earlier_one_is_computed_from_where_it_differs():
    scheduler = Scheduler(config())
    scheduler.submit(request(1, num_prompt=14), 0.0)
    assert prefilled(scheduler) == [(1, 0, 14)]
    scheduler.submit(request(2, num_prompt=20), 0.0)
    assert prefilled(scheduler) == [(2, 12, 8)]
    assert (scheduler.num_queried_tokens, scheduler.num_hit_tokens) == (34, 12)


def test_prompts_that_arrive_together_are_computed_once():
    scheduler = Scheduler(config())
    for key in range(4):
        scheduler.submit(request(key, num_prompt=14), 0.0)
    plan = scheduler.plan(0, 0.0)
    assert [(s.key, len(s.token_ids)) for s in plan.sequences] == [(0, 14)]
    assert scheduler.plan(1, 0.0) is None  # all others wait for the step in lane 0
    scheduler.commit(result_of(plan), 0.0)
    assert prefilled(scheduler) == [(key, 12, 2) for key in (1, 2, 3)]
    assert scheduler.blocks.num_free == 16


def test_a_prompt_under_way_does_not_hold_up_another_one():
    scheduler = Scheduler(config())
    for key, first in enumerate((100, 100, 200)):
        scheduler.submit(request(key, num_prompt=8, first=first), 0.0)
    plan = scheduler.plan(0, 0.0)
    assert [planned.key for planned in plan.sequences] == [0, 2]


def test_the_last_token_of_a_prompt_is_computed_again_with_its_block():
    scheduler = Scheduler(config())
    for key in (1, 2):
        scheduler.submit(request(key, num_prompt=12), 0.0)
        assert prefilled(scheduler) == [(key, 0, 12) if key == 1 else (key, 8, 4)]


def test_the_next_turn_of_a_chat_reuses_what_was_generated():
    scheduler = Scheduler(config())
    scheduler.submit(request(1, num_prompt=6, max_tokens=7), 0.0)
    emitted = [e.token_id for e in run_alone(scheduler, token=3)]
    turn = (*request(1, num_prompt=6).prompt_ids, *emitted, 8, 8)
    scheduler.submit(Request(2, turn, SamplingParams(max_tokens=1)), 0.0)
    assert prefilled(scheduler) == [(2, 12, 3)]  # the seventh generated token was never computed


def test_tenants_never_share():
    scheduler = Scheduler(config())
    for key, salt in enumerate("ab"):
        scheduler.submit(replace(request(key, num_prompt=12), salt=salt), 0.0)
        assert prefilled(scheduler) == [(key, 0, 12)]
    assert scheduler.num_hit_tokens == 0


def test_without_prefix_caching_nothing_is_kept():
    scheduler = Scheduler(config(prefix_caching=False))
    for key in (1, 2):
        scheduler.submit(request(key, num_prompt=12), 0.0)
        assert prefilled(scheduler) == [(key, 0, 12)]
    assert scheduler.blocks.num_cached == 0


def test_a_preempted_sequence_finds_its_own_blocks_and_counts_them_as_no_hits():
    scheduler = Scheduler(config(num_lanes=1, num_blocks=8, max_model_len=32, max_batch_tokens=32))
    for key in (1, 2):
        scheduler.submit(request(key, num_prompt=8, max_tokens=16, first=100 * key), 0.0)
    starts = [start for key, start, _ in prefilled(scheduler) if key == 2]
    assert scheduler.num_preemptions > 0
    assert starts[0] == 0 < starts[1]
    assert scheduler.num_hit_tokens == 0


def test_a_cancelled_sequence_leaves_what_it_computed():
    scheduler = Scheduler(config())
    scheduler.submit(request(1, num_prompt=12), 0.0)
    plan = scheduler.plan(0, 0.0)
    scheduler.cancel(1, 1)
    scheduler.commit(result_of(plan), 0.0)
    assert (scheduler.blocks.num_free, scheduler.blocks.num_cached) == (16, 3)


def test_a_later_attempt_counts_what_it_found_of_the_prompt_alone():
    scheduler = Scheduler(config())
    scheduler.submit(request(1, num_prompt=6, max_tokens=9), 0.0)
    run_alone(scheduler)
    scheduler.submit(request(1, num_prompt=6, max_tokens=9, attempt=2, emitted=(1,) * 6), 0.0)
    assert {e.num_cached for e in run_alone(scheduler)} == {6}
    assert scheduler.num_hit_tokens == 8


def test_a_cache_smaller_than_one_context_is_refused():
    with pytest.raises(ConfigError, match="KV cache holds 60 tokens"):
        config(num_blocks=15)


def test_a_budget_without_room_for_prefill_is_refused():
    with pytest.raises(ConfigError, match="max_batch_tokens 8"):
        config(max_batch_tokens=8)


def held(scheduler, key: int) -> list[int]:
    (sequence,) = (s for s in scheduler._running if s.request.key == key)
    return [len(table.owned) for table in sequence.tables]


def test_a_long_sequence_holds_a_window_where_it_sees_no_more():
    cfg = config(windows=(None, 9, 9), num_blocks=40, max_model_len=64, max_batch_tokens=9)
    scheduler, most = Scheduler(cfg), [0, 0, 0]
    scheduler.submit(request(1, num_prompt=40, max_tokens=24), 0.0)
    while (plan := scheduler.plan(0, 0.0)) is not None:
        most = list(map(max, most, held(scheduler, 1)))
        scheduler.commit(result_of(plan), 0.0)
    assert most == [16, 5, 5]  # a window's 8 positions before a row, and 9 rows
    assert scheduler.num_preemptions == 0
    assert scheduler.blocks.num_free == 40


def test_a_prompt_is_admitted_with_the_blocks_its_windows_ever_hold():
    cfg = config(windows=(9,), num_blocks=6, max_model_len=64, max_batch_tokens=9, max_num_seqs=2)
    scheduler = Scheduler(cfg)
    for key in (1, 2):
        scheduler.submit(request(key, num_prompt=60, first=100 * key), 0.0)
    assert [planned.key for planned in scheduler.plan(0, 0.0).sequences] == [1]
    assert held(scheduler, 1) == [5]
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 1)


def test_a_hit_in_a_window_needs_the_blocks_that_the_next_token_sees():
    scheduler = Scheduler(config(windows=(None, 5), num_blocks=24))
    scheduler.submit(request(1, num_prompt=32, max_tokens=1), 0.0)
    assert prefilled(scheduler) == [(1, 0, 16), (1, 16, 16)]
    scheduler.submit(request(2, num_prompt=36), 0.0)
    assert prefilled(scheduler) == [(2, 32, 4)]


def next_token(token_ids):
    """A model of three words: its next token is a function of all before it."""
    return 1000 + (sum(token_ids) + len(token_ids)) % 3


def generated(req: Request, max_model_len: int) -> list[int]:
    """What a request must get, whatever its company."""
    ids = [*req.prompt_ids]
    while len(ids) < min(len(req.prompt_ids) + req.sampling.max_tokens, max_model_len):
        ids.append(next_token(ids))
    return ids[len(req.prompt_ids) :]


def owned(sequence) -> list[int]:
    return [block for table in sequence.tables for block in table.owned]


class Harness:
    """Runs a scheduler, checks every plan, and keeps what each block holds."""

    def __init__(self, cfg: SchedulerConfig, rng: random.Random | None = None) -> None:
        self.config, self.rng = cfg, rng or random.Random(0)
        self.scheduler = Scheduler(cfg)
        self.in_flight: dict[int, StepPlan] = {}
        self.requests: dict[int, Request] = {}
        self.tokens: dict[int, list[int]] = {}
        self.finished: dict[int, FinishReason] = {}
        self.cancelled: set[int] = set()
        # (block, offset) → KV group, whose, tokens up to it
        self.memory: dict[tuple[int, int], object] = {}

    def submit(self, req: Request) -> None:
        self.requests[req.key] = req
        self.scheduler.submit(req, 0.0)

    def cancel(self, key: int) -> None:
        if self.scheduler.cancel(key, 1):
            self.cancelled.add(key)

    def plan(self, lane: int) -> None:
        if plan := self.scheduler.plan(lane, 0.0):
            self.in_flight[lane] = plan
            self.check_plan(plan)
            for planned in plan.sequences:  # from now on the lane may be writing
                for table in planned.block_tables:
                    for slot in self.slots(planned, table, planned.start):
                        self.memory[slot] = None
        self.check_blocks()

    def commit(self, lane: int) -> None:
        plan = self.in_flight.pop(lane)
        sampled = []
        for planned in plan.sequences:
            req = self.requests[planned.key]
            ids = [*req.prompt_ids, *self.tokens.get(planned.key, ())]
            stop = planned.start + len(planned.token_ids)
            assert tuple(ids[planned.start : stop]) == planned.token_ids
            for group, table in enumerate(planned.block_tables):
                window = self.config.windows[group] or stop
                first = max(0, planned.start + 1 - window)
                kv = [(group, req.salt, *ids[: p + 1]) for p in range(first, stop)]
                slots, num_held = self.slots(planned, table, first), planned.start - first
                assert [self.memory[slot] for slot in slots[:num_held]] == kv[:num_held], "wrong KV"
                self.memory.update(zip(slots, kv, strict=True))
            if planned.samples:
                sampled.append(Sampled(next_token(ids)))
        for emitted in self.scheduler.commit(StepResult(plan, tuple(sampled)), 0.0):
            self.take(emitted)
        self.check_blocks()

    def take(self, emitted: Emitted) -> None:
        known = self.tokens.setdefault(emitted.key, [])
        assert emitted.index == len(known), "a token was lost or repeated"
        num_prompt = len(self.requests[emitted.key].prompt_ids)
        assert emitted.num_cached < num_prompt, "the last token of a prompt is always computed"
        known.append(emitted.token_id)
        if emitted.finish:
            assert emitted.key not in self.finished
            self.finished[emitted.key] = emitted.finish

    def slots(self, planned, table, start: int) -> list[tuple[int, int]]:
        """Where a planned sequence's keys and values are, from a position to its run's end."""
        size = self.config.block_size
        stop = planned.start + len(planned.token_ids)
        return [(table[p // size], p % size) for p in range(start, stop)]

    def check_plan(self, plan: StepPlan) -> None:
        assert 0 < plan.num_tokens <= self.config.max_batch_tokens
        assert len(plan.sequences) <= self.config.max_num_seqs
        flying = [s for p in self.in_flight.values() for s in p.sequences]
        keys = [planned.key for planned in flying]
        assert len(keys) == len(set(keys)), "a sequence is in two lanes"
        for planned in plan.sequences:
            stop = planned.start + len(planned.token_ids)
            assert len(planned.block_tables) == len(self.config.windows)
            for table in planned.block_tables:
                assert stop <= len(table) * self.config.block_size
            written = {
                block
                for table in planned.block_tables
                for block, _ in self.slots(planned, table, planned.start)
            }
            others = {b for s in self.running() if s.request.key != planned.key for b in owned(s)}
            assert not written & others, "a block is written that another sequence has"
            assert not any(block in self.scheduler.blocks._index for block in written)

    def running(self):
        return self.scheduler._running

    def check_blocks(self) -> None:
        """Every block is empty, cached or owned, by as many as have it in their tables."""
        pool, num_owners = self.scheduler.blocks, [0] * self.config.num_blocks
        for sequence in self.running():
            assert len(set(owned(sequence))) == len(owned(sequence))
            for block in owned(sequence):
                num_owners[block] += 1
            for table, window in zip(sequence.tables, self.config.windows, strict=True):
                assert window is None or len(table.owned) <= self.most_held(window)
        assert pool._num_owners == num_owners
        empty, cached = set(pool._empty), set(pool._cached)
        assert len(empty) == len(pool._empty)
        assert not empty & cached
        assert empty | cached == {block for block, owners in enumerate(num_owners) if not owners}
        assert pool.num_free == len(empty) + len(cached)
        assert not any(block in pool._index for block in empty)
        assert all(block in pool._index for block in cached)
        assert self.scheduler.num_hit_tokens <= self.scheduler.num_queried_tokens

    def most_held(self, window: int) -> int:
        """The blocks of the window behind a row, and of the rows of a step."""
        size, rows = self.config.block_size, self.config.max_batch_tokens
        return -(-(window - 1) // size) + -(-(rows + size - 1) // size)

    def step(self) -> None:
        for lane in range(self.config.num_lanes):
            if lane not in self.in_flight:
                self.plan(lane)
        if self.in_flight:
            self.commit(self.rng.choice(sorted(self.in_flight)))

    def finish(self) -> None:
        """Run what is left to its end; then every request has its tokens and nothing is owned."""
        work = sum(len(r.prompt_ids) + r.sampling.max_tokens for r in self.requests.values())
        for _ in range(60 * (work + 1)):
            self.step()
            if not self.in_flight and not self.scheduler.num_waiting + self.scheduler.num_running:
                break
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0
        assert self.scheduler.blocks.num_free == self.config.num_blocks
        assert set(self.finished) | self.cancelled == set(self.requests)
        for key, req in self.requests.items():
            expected = generated(req, self.config.max_model_len)
            got = self.tokens.get(key, [])
            assert got == expected[: len(got)]
            assert key in self.cancelled or len(got) == len(expected)


KV_GROUPS = st.lists(st.none() | st.integers(1, 12), min_size=1, max_size=3).map(tuple)


def configs():
    @st.composite
    def draw_config(draw):
        block_size = draw(st.sampled_from([1, 2, 4]))
        max_num_seqs = draw(st.integers(1, 6))
        windows = draw(st.just((None,)) | KV_GROUPS)
        of_longest = len(windows) * 24 // block_size
        return config(
            max_model_len=24,
            block_size=block_size,
            windows=windows,
            num_blocks=draw(st.integers(of_longest, 60 * len(windows) // block_size)),
            num_lanes=draw(st.integers(1, 4)),
            max_num_seqs=max_num_seqs,
            max_batch_tokens=max_num_seqs + draw(st.integers(1, 20)),
            prefix_caching=draw(st.booleans()),
        )

    return draw_config()


# Few enough that prompts begin alike, of whole blocks or not.
prompts = st.lists(st.sampled_from([1, 2]), min_size=1, max_size=20) | st.integers(1, 20).map(
    lambda length: [1] * length
)


class SchedulerMachine(RuleBasedStateMachine):
    """Any order of submit, cancel, plan and commit."""

    @initialize(cfg=configs())
    def start(self, cfg):
        self.harness = Harness(cfg)

    @rule(prompt=prompts, max_tokens=st.integers(1, 24), salt=st.sampled_from("ab"))
    def submit(self, prompt, max_tokens, salt):
        sampling = SamplingParams(max_tokens=max_tokens)
        key = len(self.harness.requests)
        self.harness.submit(Request(key, tuple(prompt), sampling, salt=salt))

    @precondition(lambda self: self.harness.requests)
    @rule(data=st.data())
    def cancel(self, data):
        self.harness.cancel(data.draw(st.sampled_from(sorted(self.harness.requests))))

    @rule(data=st.data())
    def plan(self, data):
        lanes = set(range(self.harness.config.num_lanes)) - set(self.harness.in_flight)
        if lanes:
            self.harness.plan(data.draw(st.sampled_from(sorted(lanes))))

    @precondition(lambda self: self.harness.in_flight)
    @rule(data=st.data())
    def commit(self, data):
        self.harness.commit(data.draw(st.sampled_from(sorted(self.harness.in_flight))))

    def teardown(self):
        if hasattr(self, "harness"):
            self.harness.finish()


TestAnyOrderOfEvents = SchedulerMachine.TestCase
TestAnyOrderOfEvents.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)


@settings(max_examples=150, deadline=None)
@given(cfg=configs(), seed=st.integers(0, 2**32), data=st.data())
def test_under_any_workload_budgets_hold_blocks_are_conserved_and_nobody_starves(cfg, seed, data):
    rng = random.Random(seed)
    harness = Harness(cfg, rng)
    shapes = data.draw(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 24)), max_size=12))
    arrivals = count()
    while shapes:
        if rng.random() < 0.3:
            prompt, out = shapes.pop()
            harness.submit(request(next(arrivals), prompt, out, first=100 * rng.randint(1, 3)))
        if rng.random() < 0.02 and harness.tokens:
            harness.cancel(rng.choice(sorted(harness.tokens)))
        harness.step()
    harness.finish()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), num_lanes=st.integers(1, 3))
def test_under_endless_arrivals_nobody_is_overtaken_for_ever(seed, num_lanes):
    """More work arrives than can be done; whoever came first is still done first, about."""
    rng = random.Random(seed)
    cfg = config(max_model_len=24, num_blocks=8, num_lanes=num_lanes, max_num_seqs=4)
    harness = Harness(cfg, rng)
    for key in range(400):
        harness.submit(request(key, rng.randint(1, 12), rng.randint(1, 10), first=100 * key))
        harness.step()
        newest = max(harness.finished, default=0)
        waiting = [k for k in range(newest) if k not in harness.finished]
        assert all(newest - k <= 3 * cfg.max_num_seqs for k in waiting), f"{waiting} starve"
    assert len(harness.finished) > 20
