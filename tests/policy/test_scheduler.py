"""The scheduler under random workloads: budget kept, blocks conserved, nobody starves."""

import random
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afd_server.core.batch import Emitted, StepPlan, StepResult
from afd_server.core.errors import ConfigError
from afd_server.core.request import FinishReason, Request, SamplingParams
from afd_server.policy.scheduler import Scheduler, SchedulerConfig

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
            **changes,
        }
    )


def request(key, num_prompt=5, max_tokens=4, attempt=1, emitted=()):
    sampling = SamplingParams(max_tokens=max_tokens, stop_token_ids=(STOP,))
    return Request(key, tuple(range(100, 100 + num_prompt)), sampling, attempt, emitted)


def result_of(plan, token=1):
    return StepResult(plan, tuple(token for planned in plan.sequences if planned.samples))


def run_alone(scheduler, token=1, lane=0) -> list[Emitted]:
    emitted = []
    while (plan := scheduler.plan(lane)) is not None:
        emitted += scheduler.commit(result_of(plan, token))
    return emitted


def test_a_long_prompt_is_prefilled_in_chunks_and_then_decoded_token_by_token():
    scheduler = Scheduler(config())
    scheduler.submit(request(1, num_prompt=40, max_tokens=3))
    sizes = []
    while (plan := scheduler.plan(0)) is not None:
        sizes.append((plan.sequences[0].start, plan.num_tokens, plan.sequences[0].samples))
        scheduler.commit(result_of(plan))
    assert sizes == [(0, 16, False), (16, 16, False), (32, 8, True), (40, 1, True), (41, 1, True)]


def test_the_last_of_max_tokens_ends_a_request_with_length():
    scheduler = Scheduler(config())
    scheduler.submit(request(1, max_tokens=3))
    emitted = run_alone(scheduler)
    assert [(e.index, e.finish) for e in emitted] == [
        (0, None),
        (1, None),
        (2, FinishReason.LENGTH),
    ]
    assert scheduler.blocks.num_free == 16


def test_a_stop_token_ends_a_request_with_stop():
    scheduler = Scheduler(config())
    scheduler.submit(request(1, max_tokens=30))
    assert [e.finish for e in run_alone(scheduler, token=STOP)] == [FinishReason.STOP]


def test_the_end_of_the_context_ends_a_request_with_length():
    scheduler = Scheduler(config(max_model_len=8))
    scheduler.submit(request(1, num_prompt=5, max_tokens=30))
    assert [e.finish for e in run_alone(scheduler)] == [None, None, FinishReason.LENGTH]


def test_a_second_attempt_goes_on_where_the_emitted_tokens_end():
    scheduler = Scheduler(config())
    scheduler.submit(request(1, max_tokens=4, attempt=2, emitted=(1, 1)))
    emitted = run_alone(scheduler)
    assert [(e.attempt, e.index) for e in emitted] == [(2, 2), (2, 3)]


def test_a_repeated_submit_changes_nothing():
    scheduler = Scheduler(config())
    scheduler.submit(request(1))
    scheduler.submit(request(1))
    assert scheduler.num_waiting == 1


def test_lanes_share_the_running_sequences_evenly():
    scheduler = Scheduler(config(max_batch_tokens=64))
    for key in range(5):
        scheduler.submit(request(key))
    sizes = [len(scheduler.plan(lane).sequences) for lane in (0, 1)]
    assert sizes == [3, 2]


def test_a_waiting_request_can_be_cancelled():
    scheduler = Scheduler(config())
    scheduler.submit(request(1))
    assert scheduler.cancel(1, 1)
    assert scheduler.plan(0) is None
    assert not scheduler.cancel(1, 1)


def test_a_cancel_in_flight_frees_the_blocks_when_the_step_ends():
    scheduler = Scheduler(config())
    scheduler.submit(request(1))
    plan = scheduler.plan(0)
    assert scheduler.cancel(1, 1)
    assert scheduler.blocks.num_free < 16  # the lane still writes to them
    assert scheduler.commit(result_of(plan)) == []
    assert scheduler.blocks.num_free == 16


def test_a_cancel_for_another_attempt_is_not_obeyed():
    scheduler = Scheduler(config())
    scheduler.submit(request(1, attempt=2))
    assert not scheduler.cancel(1, 1)
    assert scheduler.num_waiting == 1


def test_when_blocks_run_out_the_youngest_prefills_again():
    scheduler = Scheduler(config(num_lanes=1, num_blocks=6, max_model_len=24, max_batch_tokens=32))
    for key in (1, 2):
        scheduler.submit(request(key, num_prompt=8, max_tokens=12))
    finished = [e.key for e in run_alone(scheduler) if e.finish]
    assert finished == [1, 2]
    assert scheduler.num_preemptions > 0
    assert scheduler.blocks.num_free == 6


def test_a_cache_smaller_than_one_context_is_refused():
    with pytest.raises(ConfigError, match="KV cache holds 60 tokens"):
        config(num_blocks=15)


def test_a_budget_without_room_for_prefill_is_refused():
    with pytest.raises(ConfigError, match="max_batch_tokens 8"):
        config(max_batch_tokens=8)


class Harness:
    """Runs a scheduler with lanes that finish in random order, checking every plan."""

    def __init__(self, cfg: SchedulerConfig, rng: random.Random) -> None:
        self.config, self.rng = cfg, rng
        self.scheduler = Scheduler(cfg)
        self.in_flight: dict[int, StepPlan] = {}
        self.tokens: dict[int, list[int]] = {}
        self.finished: dict[int, FinishReason] = {}

    def check(self, plan: StepPlan) -> None:
        assert 0 < plan.num_tokens <= self.config.max_batch_tokens
        assert len(plan.sequences) <= self.config.max_num_seqs
        flying = [s for p in self.in_flight.values() for s in p.sequences]
        owners: dict[int, int] = {}
        for planned in flying:
            for block in planned.block_ids:
                assert owners.setdefault(block, planned.key) == planned.key, (
                    "a block has two owners"
                )
        owned = [block for s in self.scheduler._running for block in s.block_ids]
        assert len(owned) == len(set(owned))
        assert len(owned) + self.scheduler.blocks.num_free == self.config.num_blocks
        keys = [planned.key for planned in flying]
        assert len(keys) == len(set(keys)), "a sequence is in two lanes"
        for planned in plan.sequences:
            stop = planned.start + len(planned.token_ids)
            assert stop <= len(planned.block_ids) * self.config.block_size

    def step(self) -> None:
        for lane in range(self.config.num_lanes):
            if lane not in self.in_flight and (plan := self.scheduler.plan(lane)):
                self.in_flight[lane] = plan
                self.check(plan)
        if self.in_flight:
            lane = self.rng.choice(sorted(self.in_flight))
            plan = self.in_flight.pop(lane)
            # the token is a function of the position, as a model's would be
            tokens = tuple(1000 + s.start + len(s.token_ids) for s in plan.sequences if s.samples)
            for emitted in self.scheduler.commit(StepResult(plan, tokens)):
                known = self.tokens.setdefault(emitted.key, [])
                assert emitted.index == len(known), "a token was lost or repeated"
                known.append(emitted.token_id)
                if emitted.finish:
                    assert emitted.key not in self.finished
                    self.finished[emitted.key] = emitted.finish


@settings(max_examples=150, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_under_any_workload_budgets_hold_blocks_are_conserved_and_nobody_starves(data, seed):
    rng = random.Random(seed)
    block_size = data.draw(st.sampled_from([1, 2, 4]))
    max_num_seqs = data.draw(st.integers(1, 6))
    cfg = config(
        max_model_len=24,
        block_size=block_size,
        num_blocks=data.draw(st.integers(24 // block_size, 60 // block_size)),
        num_lanes=data.draw(st.integers(1, 4)),
        max_num_seqs=max_num_seqs,
        max_batch_tokens=max_num_seqs + data.draw(st.integers(1, 20)),
    )
    harness = Harness(cfg, rng)
    shapes = data.draw(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 24)), max_size=12))
    cancelled: set[int] = set()
    arrivals = count()
    todo = list(shapes)
    work = sum(prompt + out for prompt, out in shapes)
    for _ in range(60 * (work + 1)):
        if todo and rng.random() < 0.3:
            prompt, out = todo.pop()
            harness.scheduler.submit(request(next(arrivals), prompt, out))
        if rng.random() < 0.02 and harness.tokens:
            key = rng.choice(sorted(harness.tokens))
            if harness.scheduler.cancel(key, 1):
                cancelled.add(key)
        harness.step()
        if (
            not todo
            and not harness.in_flight
            and not harness.scheduler.num_waiting + harness.scheduler.num_running
        ):
            break
    assert harness.scheduler.blocks.num_free == cfg.num_blocks
    assert harness.scheduler.num_running == harness.scheduler.num_waiting == 0
    assert set(harness.finished) | cancelled == set(range(len(shapes)))
    for key, (prompt, out) in enumerate(reversed(shapes)):
        if key not in cancelled:
            expected = min(out, 24 - prompt)
            assert harness.tokens[key] == [1000 + prompt + i for i in range(expected)]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), num_lanes=st.integers(1, 3))
def test_under_endless_arrivals_nobody_is_overtaken_for_ever(seed, num_lanes):
    """More work arrives than can be done; whoever came first is still done first, about."""
    rng = random.Random(seed)
    cfg = config(max_model_len=24, num_blocks=8, num_lanes=num_lanes, max_num_seqs=4)
    harness = Harness(cfg, rng)
    for key in range(400):
        harness.scheduler.submit(request(key, rng.randint(1, 12), rng.randint(1, 10)))
        harness.step()
        newest = max(harness.finished, default=0)
        waiting = [k for k in range(newest) if k not in harness.finished]
        assert all(newest - k <= 3 * cfg.max_num_seqs for k in waiting), f"{waiting} starve"
    assert len(harness.finished) > 20
