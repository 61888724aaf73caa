"""Finds what steps take, and the number of lanes: made-up steps before any request runs."""

import logging
from collections import defaultdict, deque
from collections.abc import Iterable
from statistics import median_low
from typing import NamedTuple

from afd_server.core.batch import PlannedSequence, StepPlan
from afd_server.core.clock import Clock
from afd_server.core.request import SamplingParams
from afd_server.costmodel.pipeline import (
    CONTEXT_TOKENS,
    LaneChoice,
    LayerTimes,
    MeasuredStages,
    StageTimes,
    choose_lanes,
    quickest,
)
from afd_server.policy.ahead import MIN_ROWS
from afd_server.policy.scheduler import Scheduler
from afd_server.policy.step_time import StepLoad, load_of
from afd_server.telemetry.timeline import Event, EventKind, Timeline, read_events
from afd_server.workers.attention.kv_store import KVStore

log = logging.getLogger(__name__)

FEW = 2  # rows of the smallest steps
NUM_ROUNDS = 6  # one step of each size in a round; the first one warms up
TOGETHER_ROUNDS = 7  # of each size, beside other lanes; the outer ones are not beside their like
PREFILL_TOKENS = (4 * MIN_ROWS, 12 * MIN_ROWS)  # of a prompt in a step
LONGEST_S = 1.5  # no further step after this, once each size was timed; again for lanes together
UNMEASURED = 2  # micro-batches: one computes while the other is away

Tables = tuple[tuple[int, ...], ...]  # of blocks, for each KV group


class _Step(NamedTuple):
    """What to compute, whether it is worth knowing how long it takes, and whether in one part."""

    sequences: tuple[PlannedSequence, ...]
    counts: bool
    is_whole: bool = False


class Calibration:
    """Plans steps of few rows and of many, in turns, and chooses lanes by what they took.

    The sequences are as many as the worker takes at most, all decoding; in other steps one reads a
    part of a prompt, near its beginning and far from it. What a stage takes is seen in steps that
    go in one part; where those of requests go in two, these are timed as well. When the lanes are
    open, they run beside each other, with few rows and then with many. The scheduler learns what
    all these took, but for those that requests have in two parts only.

    Blocks come from the pool and go back to it, zeroed; nothing of them is entered into the
    prefix index, and the steps have numbers of their own, so that a late answer to one is never
    taken for an answer to a request's.

    Args:
        scheduler: of the worker; has no sequence in a lane until the calibration is over.
        kv: the blocks.
        max_num_seqs, max_model_len: of the worker's requests.
        vocab_size: of the model.
        num_layers: of the model, that FFN workers hold a part of.
        num_lanes: how many there are to be; None to choose.
        num_replicas: FFN workers that take turns at what one of them could do.
        timeline: where the worker and its FFN client record their stages.
        clock: ends a calibration that takes long.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        kv: KVStore,
        max_num_seqs: int,
        max_model_len: int,
        vocab_size: int,
        num_layers: int,
        num_lanes: int | None,
        num_replicas: int,
        timeline: Timeline,
        clock: Clock,
    ) -> None:
        # groups share blocks here, unlike those of requests: what they hold means nothing
        pool, groups = scheduler.blocks, 1 + max(kv.group_of)
        self._scheduler = scheduler
        self._num_layers = num_layers
        self._num_lanes = num_lanes
        self._num_replicas = num_replicas
        self._timeline = timeline
        self._clock = clock
        self._num_streams = min(max_num_seqs, pool.num_blocks)
        longest = pool.num_blocks // self._num_streams * pool.block_size
        context = min(CONTEXT_TOKENS, max_model_len, longest)
        self._tables: list[list[int]] = [[] for _ in range(self._num_streams)]
        for table in self._tables:
            has_room = pool.grow(table, context)
            assert has_room, "the pool has a whole share for each"
            kv.clear(table)
        self._sequences = [
            # different tokens, so that gates choose different experts
            _made_up(
                (number * vocab_size // self._num_streams,), context - 1, (tuple(table),) * groups
            )
            for number, table in enumerate(self._tables)
        ]
        every_block = tuple(block for table in self._tables for block in table)
        longest = min(len(every_block) * pool.block_size, max_model_len)
        few, many = (min(tokens, longest) for tokens in PREFILL_TOKENS)
        prefilling = [  # the first tokens of a prompt, and those at the end of the longest one
            (_made_up((0,) * count, start, (every_block,) * groups),)
            for start, count in sorted({(0, few), (longest - few, few), (0, many)})
        ]
        sizes = sorted({min(FEW, self._num_streams), -(-self._num_streams // 4), self._num_streams})
        decoding = [tuple(self._sequences[:size]) for size in sizes]
        self._sizes = sizes
        whole = [_Step(step, True, is_whole=True) for step in decoding]
        cut = [_Step(step, True) for step in decoding if self._goes_in_two(len(step))]
        reading = [_Step(step, True) for step in prefilling]
        warming = [step._replace(counts=False) for step in [*whole, *cut, reading[0]]]
        needed = [*whole, *cut, *reading]  # however long they take
        further = [*whole, *cut, reading[0], *[*whole, *cut] * (NUM_ROUNDS - 3)]
        self._queues = {0: deque([*warming, *needed, *further])}
        self._num_needed = len(warming) + len(needed)
        self._late_s: float | None = None
        self._is_open = False
        self._in_flight: dict[int, tuple[StepLoad, bool]] = {}  # by lane, and whether it counts
        self._seconds: defaultdict[StepLoad, list[float]] = defaultdict(list)
        self._measured: defaultdict[int, list[LayerTimes]] = defaultdict(list)  # by rows
        self._num_steps = 0
        self._num_recorded = 0

    @property
    def is_alone_over(self) -> bool:
        """Tell whether it is time to open the lanes."""
        return not (self._is_open or self._in_flight or self._queues[0])

    @property
    def is_over(self) -> bool:
        """Tell whether it has been found out what there is to find out."""
        return self._is_open and not self._in_flight and not any(self._queues.values())

    def plan(self, lane: int) -> StepPlan | None:
        """Return the next step of a lane, if there is one."""
        queue, now = self._queues[lane], self._clock.now()
        if self._late_s is None:
            self._late_s = now + LONGEST_S
        if now > self._late_s and self._num_steps >= self._num_needed:
            queue.clear()
        if not queue:
            return None
        sequences, counts, is_whole = queue.popleft()
        may_be_cut = self._scheduler.cuts_steps and not is_whole
        plan = StepPlan(self._scheduler.number_step(), lane, sequences, may_be_cut)
        load = load_of(plan, (load for load, _ in self._in_flight.values()))
        is_beside_its_like = load.other_rows == load.rows * (len(self._queues) - 1)
        self._in_flight[lane] = (load, counts and is_beside_its_like)
        self._num_recorded = self._timeline.num_recorded
        return plan

    def commit(self, plan: StepPlan, seconds: float) -> None:
        """Take in a finished step: how long it took, and what the timeline says of its stages."""
        load, counts = self._in_flight.pop(plan.lane)
        if counts and (plan.may_be_cut or not self._goes_in_two(plan.num_tokens)):
            self._seconds[load].append(seconds)
        if counts and load.prefill == 0 and not (plan.may_be_cut or self._is_open):
            self._note_stages(len(plan.sequences))
        self._num_steps += 1

    def open_lanes(self, num_attention: int) -> int:
        """Say how many lanes each of so many attention workers is to have, and load these."""
        num_lanes = self._choose(num_attention) if self._num_lanes is None else self._num_lanes
        self._scheduler.open_lanes(num_lanes, fewest=self._num_lanes or 1)
        self._queues = {lane: deque() for lane in range(num_lanes)}
        self._is_open, self._late_s = True, None
        if 1 < num_lanes <= self._num_streams:
            for lane, queue in self._queues.items():
                for size in sorted({max(1, size // num_lanes) for size in self._sizes}):
                    own = self._sequences[lane::num_lanes][:size]
                    outer, inner = _Step(tuple(own), False), _Step(tuple(own), True)
                    queue += [outer, *[inner] * (TOGETHER_ROUNDS - 2), outer]
        return num_lanes

    def end(self) -> None:
        """Give the blocks back, and have the scheduler learn what was found out."""
        for table in self._tables:
            self._scheduler.blocks.free(table)
        # not the least: of lanes together one is quick whenever another one was held up
        typical = {load: median_low(seconds) for load, seconds in self._seconds.items()}
        self._scheduler.pace.model.calibrate(typical.items())
        log.debug("steps take, in seconds: %s", typical)

    def _goes_in_two(self, num_rows: int) -> bool:
        return self._scheduler.cuts_steps and num_rows >= 2 * MIN_ROWS

    def _note_stages(self, num_rows: int) -> None:
        events = list(read_events(self._timeline.since(self._num_recorded)))
        is_whole = len(events) == self._timeline.num_recorded - self._num_recorded
        times = layer_times(events, self._num_layers) if is_whole else None
        if times is not None:
            self._measured[num_rows].append(times)

    def _choose(self, num_attention: int) -> int:
        """Return the number of lanes for each of so many attention workers, and log why."""
        if len(self._measured) < len(self._sizes):
            log.warning(
                "lanes for %d micro-batches, uncalibrated: calls had to be sent again, or their "
                "transfers are more than the timeline holds",
                UNMEASURED,
            )
            return self._lanes_of(min(UNMEASURED, self._num_streams))
        few, many = min(self._measured), max(self._measured)
        measured = MeasuredStages(
            few, quickest(self._measured[few]), many, quickest(self._measured[many])
        )
        choice = choose_lanes(measured, self._num_streams, num_attention / self._num_replicas)
        num_lanes = self._lanes_of(choice.num_lanes)
        log.info("%s", _sentence(num_lanes, measured, choice, self._num_streams))
        return num_lanes

    def _lanes_of(self, num_micro_batches: int) -> int:
        """Return how many lanes have so many in flight: one has two where steps are cut."""
        return -(-num_micro_batches // 2) if self._scheduler.cuts_steps else num_micro_batches


def layer_times(events: Iterable[Event], num_layers: int) -> LayerTimes | None:
    """Return what the layers of a step took that ran alone, in a single lane.

    The FFN workers have one while they hold its calls, the attention worker has the step from its
    first stage to its last token, less the time that it slept for want of an answer. A call is
    under way for what remains of that sleep: what either end does to send and to take in counts
    as occupied.

    Returns:
        None if a call was sent again: nobody knows which one was answered.
    """
    of_kind: defaultdict[int, list[Event]] = defaultdict(list)
    for event in events:
        of_kind[event.kind].append(event)
    taken_s = {(call.layer, call.peer): call.end_s for call in of_kind[EventKind.A_TO_F]}
    held_s: defaultdict[int, float] = defaultdict(float)  # by layer, by whoever took longest
    answered_s: dict[int, float] = {}  # by layer, when the last answer came
    for answer in of_kind[EventKind.F_TO_A]:
        layer = answer.layer
        held_s[layer] = max(held_s[layer], answer.begin_s - taken_s[layer, answer.peer])
        answered_s[layer] = answer.end_s
    if len(answered_s) < num_layers:
        return None
    begin_s = min(stage.begin_s for stage in of_kind[EventKind.ATTENTION])
    end_s = of_kind[EventKind.SAMPLE][-1].end_s
    layers = sorted(answered_s)
    asleep_s = [0.0] * len(layers)  # in each, until its answer came
    for wait in of_kind[EventKind.WAIT]:
        for index, layer in enumerate(layers):
            if wait.begin_s < answered_s[layer]:
                asleep_s[index] += min(wait.end_s, answered_s[layer]) - wait.begin_s
                break
    ffn_s = [held_s[layer] for layer in layers]
    transfer_s = [max(0.0, a - f) / 2 for a, f in zip(asleep_s, ffn_s, strict=True)]
    return LayerTimes(end_s - begin_s - sum(asleep_s), ffn_s, transfer_s)


def _made_up(token_ids: tuple[int, ...], start: int, tables: Tables) -> PlannedSequence:
    """Return a greedy sequence whose tokens from a position on are to be computed."""
    sampling = SamplingParams(max_tokens=1, temperature=0.0)
    return PlannedSequence(0, 0, token_ids, start, tables, True, sampling)


def _sentence(
    num_lanes: int, measured: MeasuredStages, choice: LaneChoice, num_streams: int
) -> str:
    def shown(rows: int, times: StageTimes) -> str:
        return (
            f"{rows} rows: T_a {times.attention_s * 1e6:.0f}, T_f {times.ffn_s * 1e6:.0f}, "
            f"T_c {times.transfer_s * 1e6:.0f} µs"
        )

    expected = ", ".join(f"{seconds * 1e6:.0f}" for seconds in choice.layer_s)
    return (
        f"lanes: {num_lanes} ({shown(measured.few_rows, measured.few)}; "
        f"{shown(measured.many_rows, measured.many)}; {num_streams} streams through a layer "
        f"as 1, 2, … micro-batches: {expected} µs)"
    )
