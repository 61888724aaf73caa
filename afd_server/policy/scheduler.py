"""Decides what runs in the next step of a lane.

Knows nothing of tensors or wires: it sees sequences, blocks and lanes, and is told the time.
"""

import heapq
from collections import Counter
from dataclasses import dataclass
from math import inf

from afd_server.core.batch import Emitted, PlannedSequence, Sampled, StepPlan, StepResult
from afd_server.core.errors import ConfigError
from afd_server.core.request import FinishReason, Request
from afd_server.core.sequence import Sequence, SequenceState
from afd_server.policy.blocks import BlockPool, longest_fitting
from afd_server.policy.pace import Pace, is_decoding
from afd_server.policy.prefix import extend_chain
from afd_server.policy.step_time import (
    StepLoad,
    beside,
    beside_those_of,
    with_prefill,
    with_row,
)
from afd_server.policy.tables import BlockTables

MOST_TURNS = 8  # waiting sequences that are looked at in a step
HARDLY_BEGUN = 0.3  # of its expected time: what begins until then counts as beside a step
FIRST_TOKENS = 3  # that a client gets together while prompts wait to be read
RESERVED_TOKENS = 512  # at most, of what a running sequence may still want, are kept for it
RESUME_PATIENCE_S = 10.0  # that begun ones wait, after which one of them goes on at anybody's cost


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of one attention worker.

    Attributes:
        max_model_len: longest sequence, prompt and output together, in tokens.
        max_num_seqs: most sequences holding blocks at once.
        max_batch_tokens: most rows of one micro-batch; what decoding leaves of it is prefill.
        num_lanes: micro-batches in flight at once; `open_lanes` may say so later.
        num_blocks: KV blocks of the worker.
        block_size: token positions in a block.
        prefix_caching: whether sequences take over blocks that others have computed.
        holds_back: whether sequences wait, and are refused in the end, that would make others
            miss their targets.
        cuts_steps: whether steps of many rows go in two parts (`policy.ahead`).
        windows: of each KV group, in positions; None sees all.
    """

    max_model_len: int
    max_num_seqs: int
    max_batch_tokens: int
    num_lanes: int
    num_blocks: int
    block_size: int
    prefix_caching: bool
    holds_back: bool = False
    cuts_steps: bool = True
    windows: tuple[int | None, ...] = (None,)

    def __post_init__(self) -> None:
        if self.max_batch_tokens <= self.max_num_seqs:
            raise ConfigError(
                f"max_batch_tokens {self.max_batch_tokens} leaves no room for prefill beside "
                f"max_num_seqs {self.max_num_seqs} decoding sequences; make it larger"
            )
        longest = longest_fitting(
            self.num_blocks,
            self.block_size,
            self.windows,
            self.max_batch_tokens,
            self.max_model_len,
        )
        if longest < self.max_model_len:
            raise ConfigError(
                f"the KV cache holds {longest} tokens, less than one "
                f"sequence of max_model_len {self.max_model_len}; give it more memory or shorten "
                "max_model_len"
            )


class Scheduler:
    """Continuous batching over lanes with paged blocks, chunked prefill and preemption.

    Those whose next token is due first go first, and without targets the older ones; when blocks
    run out the youngest gives up its own and prefills again later. So the oldest always advances,
    and nobody starves. Prompts get what time the targets of decoding sequences leave (`Pace`).

    A sequence never computes a full block that is still held from another one with the same
    salt, nor what it computed itself before it was preempted; for a block that a lane is just
    computing it waits. Its last token is always computed: the next one is predicted from it.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self.blocks = BlockPool(config.num_blocks, config.block_size)
        self.pace = Pace(config.num_lanes)
        self._tables = BlockTables(self.blocks, config.windows, config.max_batch_tokens)
        self._waiting: list[Sequence] = []  # oldest first
        self._running: list[Sequence] = []  # own blocks, oldest first
        self._in_lane: dict[int, list[Sequence]] = {}
        self._begun: dict[int, tuple[StepLoad, float]] = {}  # by lane, its step and since when
        self._filling: dict[int, set[bytes]] = {}  # by lane, the blocks its step will fill
        self._by_key: dict[tuple[int, int], Sequence] = {}
        self._num_arrivals = 0
        self._num_steps = 0
        self._resumed_s = -inf  # when a begun sequence last went on, or none waited to
        self.num_preemptions = 0
        self.num_queried_tokens = 0  # known to sequences when they were first planned
        self.num_hit_tokens = 0  # of these, found computed

    @property
    def cuts_steps(self) -> bool:
        """Tell whether steps go in two parts where these are large enough."""
        return self._config.cuts_steps

    @property
    def num_waiting(self) -> int:
        """Return the sequences that own no blocks yet, or none any more."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Return the sequences that own blocks."""
        return len(self._running)

    @property
    def num_steps(self) -> int:
        """Return the steps planned so far: a sign of progress."""
        return self._num_steps

    @property
    def decode_step_s(self) -> float:
        """Return the expected time of a step when all who own blocks decode."""
        return self.pace.decode_step_s(self._running)

    def open_lanes(self, most: int, fewest: int) -> None:
        """Spread the running sequences over so many lanes from now on, as many as pay."""
        self.pace.open_lanes(most, fewest)

    def number_step(self) -> int:
        """Return a number for a step, which no other step of this worker has."""
        self._num_steps += 1
        return self._num_steps

    def submit(self, request: Request, now_s: float) -> None:
        """Queue a request. A second `Submit` of the same attempt changes nothing."""
        if (request.key, request.attempt) in self._by_key:
            return
        sequence = Sequence(request, self._num_arrivals, now_s, len(self._config.windows))
        assert len(sequence.token_ids) < self._config.max_model_len, "the gateway refuses these"
        self._num_arrivals += 1
        self._by_key[request.key, request.attempt] = sequence
        self._waiting.append(sequence)

    def cancel(self, key: int, attempt: int) -> bool:
        """End a request without further tokens; its blocks are free once no lane uses them.

        Returns:
            False if there is no such attempt (it ended, or never came).
        """
        sequence = self._by_key.get((key, attempt))
        if sequence is None:
            return False
        if sequence.state is SequenceState.IN_FLIGHT:
            sequence.cancelled = True  # `commit` ends it: the lane still writes to its blocks
        else:
            self._end(sequence, FinishReason.CANCELLED)
        return True

    def expire(self, now_s: float) -> list[Request]:
        """Give up those that were held back for too long; return them, to be refused."""
        if not self._config.holds_back:
            return []
        late = [s for s in self._waiting if not s.is_promised and self.pace.due_s(s) < now_s]
        for sequence in late:
            self._end(sequence, FinishReason.REFUSED)
        return [sequence.request for sequence in late]

    def plan(self, lane: int, now_s: float) -> StepPlan | None:
        """Choose the next micro-batch of a free lane, or None if there is nothing to do.

        Each lane takes at most its share of the running sequences, so that lanes stay evenly
        filled as sequences come and go. No more lanes decode than pay; prompts have the others.
        """
        assert lane not in self._in_lane, f"lane {lane} is still in flight"
        self._admit(now_s)
        num_lanes = self.pace.lanes_for([s for s in self._running if is_decoding(s)])
        may_decode = sum(load.rows > 0 for load, _ in self._begun.values()) < num_lanes
        share = -(-len(self._running) // num_lanes)
        budget = self._config.max_batch_tokens
        pace, reads = self.pace, self._num_unread() > 0
        filling = self._filling[lane] = set()
        load = beside(self._loads_beside(lane))
        chosen: list[tuple[Sequence, int]] = []
        for sequence in self._by_urgency():
            if len(chosen) == share or budget == 0:
                break
            if sequence.state is not SequenceState.RUNNING:
                continue  # in flight, or preempted for an older one a moment ago
            self._take_over(sequence)
            if self._is_under_way(sequence):
                continue
            decodes = sequence.num_pending == 1
            if decodes and not may_decode:
                continue
            if decodes and chosen and pace.can_wait(sequence, load, chosen[0][0], reads, now_s):
                continue
            if not decodes and load.rows and num_lanes < pace.most_lanes:
                break
            if not decodes and load.prefill == 0:
                start, ends_s = sequence.num_computed, self._ends_s(load)
                most = min(budget, self._num_unread())
                budget = pace.prefill_budget(load, start, self._running, most, now_s, ends_s)
            num_tokens = min(sequence.num_pending, budget)
            if num_tokens == 0 or not self._reserve(sequence, sequence.num_computed + num_tokens):
                continue
            if decodes:
                load = with_row(load, sequence)
            else:
                load = with_prefill(load, sequence.num_computed, num_tokens)
            self._count_hits(sequence, num_tokens)
            filling.update(self._blocks_filled_by(sequence, num_tokens))
            sequence.state = SequenceState.IN_FLIGHT
            chosen.append((sequence, num_tokens))
            budget -= num_tokens
        if not chosen:
            return None
        return self._begin(lane, chosen, load, now_s)

    def _begin(
        self, lane: int, chosen: list[tuple[Sequence, int]], load: StepLoad, now_s: float
    ) -> StepPlan:
        self._in_lane[lane] = [sequence for sequence, _ in chosen]
        self._begun[lane] = (load, now_s)
        self._note_beside(lane, now_s)
        for sequence in self._in_lane[lane]:
            if sequence.begun_s is None:
                sequence.begun_s = now_s
        if load.prefill:
            self.pace.note_prefill(now_s)
        planned = tuple(_planned(sequence, num_tokens) for sequence, num_tokens in chosen)
        return StepPlan(self.number_step(), lane, planned, self._config.cuts_steps)

    def _note_beside(self, newest: int, now_s: float) -> None:
        """Let steps that have hardly begun know of one that begins: it is beside them too."""
        for lane, (load, begun_s) in self._begun.items():
            if lane == newest or load.others == len(self._begun) - 1:
                continue
            if now_s - begun_s < HARDLY_BEGUN * self.pace.model.predict(load):
                others = beside(self._loads_beside(lane))
                self._begun[lane] = (beside_those_of(load, others), begun_s)

    def _loads_beside(self, lane: int) -> list[StepLoad]:
        return [load for other, (load, _) in self._begun.items() if other != lane]

    def _ends_s(self, load: StepLoad) -> dict[int, float]:
        """Return when the steps of other lanes will end beside a load, by their arrivals."""
        ends_s: dict[int, float] = {}
        for lane, (begun, begun_s) in self._begun.items():
            others = beside([*self._loads_beside(lane), load])
            step_s = self.pace.model.predict(beside_those_of(begun, others))
            ends_s |= dict.fromkeys((s.arrival for s in self._in_lane[lane]), begun_s + step_s)
        return ends_s

    def _num_unread(self, until_s: float = inf) -> int:
        """Return the tokens of prompts that were begun, are due by then and not read yet."""
        unread = (s for s in self._running if s.num_pending > 1)
        return sum(s.num_pending for s in unread if self.pace.due_s(s) <= until_s)

    def expected_s(self, lane: int) -> float:
        """Return the median time of what a lane computes, beside what others do."""
        load, _ = self._begun[lane]
        return self.pace.model.predict(load)

    def commit(self, result: StepResult, now_s: float) -> list[Emitted]:
        """Take in a finished step: advance, extend or end its sequences.

        Returns:
            What the gateway must hear, in the order of the plan; of a sequence whose first
            tokens were held, all of them.
        """
        sequences = self._in_lane.pop(result.plan.lane)
        del self._filling[result.plan.lane]
        load, begun_s = self._begun.pop(result.plan.lane)
        self.pace.model.observe(load, now_s - begun_s)
        sampled = iter(result.tokens)
        emitted = []
        for sequence, planned in zip(sequences, result.plan.sequences, strict=True):
            sequence.state = SequenceState.RUNNING
            sequence.num_computed += len(planned.token_ids)
            self._hand_on(sequence, planned.start)
            self._tables.leave(sequence.tables, sequence.num_computed)
            token = next(sampled) if planned.samples else None
            if sequence.cancelled:
                self._end(sequence, FinishReason.CANCELLED)
            elif token is not None:
                emitted += self._extend(sequence, token, now_s)
        assert next(sampled, None) is None, "more tokens were sampled than planned"
        return emitted

    def _holds(self, sequence: Sequence, now_s: float) -> bool:
        """Tell whether a client should get its first tokens later, but within its target."""
        slo = sequence.request.slo
        if slo.tpot_s is None or not self._config.holds_back:
            return False
        if not sequence.num_emitted == sequence.num_held + 1 < FIRST_TOKENS:
            return False  # the client has some already, or gets them now
        if now_s + FIRST_TOKENS * slo.tpot_s > slo.first_due_s(sequence.arrived_s):
            return False
        return bool(self._waiting) or self._num_unread(slo.first_due_s(now_s)) > 0

    def _admit(self, now_s: float) -> None:
        """Give waiting sequences their place while there are blocks for all they know already.

        No new one overtakes one that was begun. These go on at the same pace, since a worker's
        may come all at once when it dies; but seldom at anybody's cost, so that no stream pauses
        until long ones have ended.
        """
        waiting, num_held_back = self._by_turn(), 0
        if not (waiting and waiting[0].is_promised):
            self._resumed_s = now_s
        while num_held_back < len(waiting) and len(self._running) < self._config.max_num_seqs:
            sequence = waiting[num_held_back]
            is_promised = sequence.is_promised
            is_overdue = is_promised and now_s - self._resumed_s > RESUME_PATIENCE_S
            if not (is_overdue or self._may_begin(sequence, now_s)):
                if is_promised:
                    return
                num_held_back += 1
                continue
            self._take_over(sequence)
            num_computed, num_tokens = sequence.num_computed, len(sequence.token_ids)
            if not self._tables.admit(sequence.tables, num_computed, num_tokens):
                self.blocks.free(sequence.forget_computed())
                return
            self._waiting.remove(sequence)
            sequence.state = SequenceState.RUNNING
            self._running.append(sequence)
            self._running.sort(key=lambda s: s.arrival)
            if is_promised:
                self._resumed_s = now_s
            waiting, num_held_back = self._by_turn(), 0

    def _by_turn(self) -> list[Sequence]:
        """Return who may be next: begun before, then by priority, tenant and deadline.

        They are few: if those are held back, so are the others, unless they ask for much less.
        """
        if not self._waiting:
            return []
        running = Counter(s.request.tenant for s in self._running)

        def turn(sequence: Sequence) -> tuple[bool, int, int, float, int]:
            request, due_s = sequence.request, self.pace.due_s(sequence)
            num_running = running[request.tenant]
            return not sequence.is_promised, request.priority, num_running, due_s, sequence.arrival

        return heapq.nsmallest(MOST_TURNS, self._waiting, key=turn)

    def _may_begin(self, sequence: Sequence, now_s: float) -> bool:
        """Tell whether a sequence can be begun, or go on, without harm to those that run.

        Prompts that were begun and are due no later come first, so that who is waiting may still
        be overtaken by who is in a greater hurry; and blocks are kept for what running ones will
        soon want.
        """
        if not self._config.holds_back:
            return True
        if self._num_unread(self.pace.due_s(sequence)) >= self._config.max_batch_tokens:
            return False
        wanted = sum(
            self._tables.num_wanted(s.tables, len(s.token_ids) + min(s.num_left, RESERVED_TOKENS))
            for s in [*self._running, sequence]
        )
        if self._running and wanted > self.blocks.num_free:
            return False
        return self.pace.fits(sequence, self._running, now_s)

    def _take_over(self, sequence: Sequence) -> None:
        """Let a sequence go on behind the full blocks that others have computed since.

        A table that has its own blocks for them gives these back.
        """
        if not self._config.prefix_caching:
            return
        size = self.blocks.block_size
        first, stop = sequence.num_computed // size, (len(sequence.token_ids) - 1) // size
        self._name_blocks(sequence, stop)
        hit = self._tables.take_over(sequence.tables, sequence.chain, first, stop)
        if hit > first:
            sequence.num_computed = hit * size

    def _is_under_way(self, sequence: Sequence) -> bool:
        """Tell whether a lane is computing the next block of a sequence for another one.

        Its step ends in any case, so whoever waits for it can go on then.
        """
        index = sequence.num_computed // self.blocks.block_size
        if index >= len(sequence.chain):
            return False  # decoding, in the last block, or nothing is shared
        return any(sequence.chain[index] in filling for filling in self._filling.values())

    def _blocks_filled_by(self, sequence: Sequence, num_tokens: int) -> list[bytes]:
        """Return the names of the blocks that the next tokens of a sequence will fill."""
        size, start = self.blocks.block_size, sequence.num_computed
        return sequence.chain[start // size : (start + num_tokens) // size]

    def _hand_on(self, sequence: Sequence, start: int) -> None:
        """Let others find the blocks that a step from position `start` on has filled."""
        if not self._config.prefix_caching:
            return
        size = self.blocks.block_size
        first, stop = start // size, sequence.num_computed // size
        self._name_blocks(sequence, stop)
        self._tables.hand_on(sequence.tables, sequence.chain, first, stop)

    def _name_blocks(self, sequence: Sequence, num_blocks: int) -> None:
        salt, size = sequence.request.salt, self.blocks.block_size
        extend_chain(sequence.chain, sequence.token_ids, size, num_blocks, salt)

    def _count_hits(self, sequence: Sequence, num_tokens: int) -> None:
        """Count what a sequence need not compute; what it once had itself is no hit."""
        if sequence.num_reached == 0:
            self.num_queried_tokens += len(sequence.token_ids)
        num_hits = max(0, sequence.num_computed - sequence.num_reached)
        sequence.num_cached += num_hits
        self.num_hit_tokens += num_hits
        sequence.num_reached = max(sequence.num_reached, sequence.num_computed + num_tokens)

    def _by_urgency(self) -> list[Sequence]:
        """Decoding sequences before prefilling ones, those due first, older before younger."""
        return sorted(
            self._running, key=lambda s: (s.num_pending > 1, self.pace.due_s(s), s.arrival)
        )

    def _reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        """Find blocks for the first `num_tokens` of a sequence, preempting younger ones."""
        while not self._tables.grow(sequence.tables, num_tokens):
            idle = [s for s in self._running if s.state is SequenceState.RUNNING]
            youngest = idle[-1]  # `sequence` is one of them
            if youngest is sequence and len(idle) < len(self._running):
                return False  # those in flight come back and may leave their blocks
            self._preempt(youngest)
            if youngest is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Take a sequence's blocks; as one that was moved, it has a new schedule when it goes on.

        What it could not have meanwhile would be a debt, which shuts out prompts, its own too.
        """
        self._running.remove(sequence)
        self.blocks.free(sequence.forget_computed())
        sequence.begin_anew()
        older = sum(waiting.arrival < sequence.arrival for waiting in self._waiting)
        self._waiting.insert(older, sequence)
        self.num_preemptions += 1

    def _extend(self, sequence: Sequence, token: Sampled, now_s: float) -> list[Emitted]:
        """Take in a new token; return what the client gets now.

        A stream that begins has no slack, so that others' prompts wait, and with a short answer
        no time to catch up. So the first tokens are held while any prompt is to be read: the
        schedule begins when the client gets them.
        """
        token_id, entropy = token
        sequence.append(token_id, now_s, entropy)
        sampling = sequence.request.sampling
        finish = None
        if token_id in sampling.stop_token_ids:
            finish = FinishReason.STOP
        elif (
            sequence.num_emitted >= sampling.max_tokens
            or len(sequence.token_ids) >= self._config.max_model_len
        ):
            finish = FinishReason.LENGTH
        if finish is not None:
            self._end(sequence, finish)
        elif self._holds(sequence, now_s):
            sequence.num_held += 1
            return []
        if sequence.num_held:
            sequence.first_token_s = now_s
        num_new, sequence.num_held = sequence.num_held + 1, 0
        return [_emitted(sequence, back, finish) for back in reversed(range(num_new))]

    def _end(self, sequence: Sequence, finish: FinishReason) -> None:
        if sequence.state is SequenceState.WAITING:
            self._waiting.remove(sequence)
        else:
            self._running.remove(sequence)
        self.blocks.free(sequence.release())
        sequence.state = SequenceState.FINISHED
        sequence.finish = finish
        del self._by_key[sequence.request.key, sequence.request.attempt]


def _planned(sequence: Sequence, num_tokens: int) -> PlannedSequence:
    start = sequence.num_computed
    stop = start + num_tokens
    return PlannedSequence(
        key=sequence.request.key,
        attempt=sequence.request.attempt,
        token_ids=tuple(sequence.token_ids[start:stop]),
        start=start,
        block_tables=tuple([tuple(table.block_ids) for table in sequence.tables]),
        samples=stop == len(sequence.token_ids),
        sampling=sequence.request.sampling,
        history=sequence.history,
    )


def _emitted(sequence: Sequence, back: int, finish: FinishReason | None) -> Emitted:
    """Return what the gateway hears of the token `back` before the last one of a sequence."""
    request, history = sequence.request, sequence.history
    index = sequence.num_emitted - 1 - back
    assert sequence.begun_s is not None, "a token of a sequence that was never planned"
    return Emitted(
        request.key,
        request.attempt,
        index,
        sequence.token_ids[-1 - back],
        None if back else finish,
        num_cached=min(sequence.num_cached, len(request.prompt_ids)),
        queued_s=sequence.begun_s - sequence.arrived_s,
        entropy=None if history is None else history.entropies[index],
    )
