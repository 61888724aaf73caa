"""Live requests: the journal, and what keeps them going until their last token.

Knows token ids only. A token is in the journal before anybody hears of it (invariant I2), and
counts only if it is the next one of the current attempt (I4).
"""

import asyncio
import logging
import math
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from afd_server.core.clock import Clock
from afd_server.core.errors import AFDError, Overloaded, ProtocolError, WorkerFailed
from afd_server.core.request import FinishReason, Request, SamplingParams, time_per_token_s
from afd_server.core.topology import Member, Role, Topology
from afd_server.gateway.asker import Asker
from afd_server.policy.admission import FirstTokenQueue
from afd_server.policy.pace import EXPECTED_GROWTH
from afd_server.policy.router import PrefixMap, choose_worker, prefix_blocks
from afd_server.telemetry.metrics import GatewayMetrics
from afd_server.transport.endpoint import Endpoint
from afd_server.transport.messages import (
    TOKEN_COLUMNS,
    Cancel,
    DType,
    TokenChunk,
    bits_float,
    submit_of,
)

log = logging.getLogger(__name__)

ASK_AGAIN_AFTER_S = 2.0  # of silence: repeat the submit, which is harmless and gets an answer
MOVE_AFTER_S = 6.0  # of silence: three unanswered submits; another worker takes over
GIVE_UP_AFTER_S = 30.0  # without any attention worker to send a request to
MAX_ATTEMPTS = 4
LEAST_TTFT_S = 0.001  # goes over the wire as what is left of a target when nothing is
_FINISHES = (
    0, FinishReason.STOP, FinishReason.LENGTH, FinishReason.ERROR, FinishReason.REFUSED
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Timing:
    """How a request was served, in seconds; `tpot_s` is None for fewer than two tokens."""

    ttft_s: float
    tpot_s: float | None
    queue_s: float
    slo_met: bool


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """A journalled token of a choice, and whether it was the last.

    `num_cached` is how many tokens of the prompt its attempt found computed, `timing` how the
    request was served up to this token.
    """

    choice: int
    token_id: int
    finish: FinishReason | None
    num_cached: int
    timing: Timing | None = None


@dataclass(frozen=True, slots=True)
class FailureEvent:
    """A choice ended without its last token; `reason` is what it is counted by."""

    choice: int
    error: AFDError
    reason: str


Event = TokenEvent | FailureEvent


class EventQueue(asyncio.Queue[Event]):
    """The events of the choices of one HTTP request, and whether any of them has had a token."""

    has_begun = False


@dataclass(slots=True)
class JournalEntry:
    """All that is needed to go on with a request anywhere: its parameters and tokens so far."""

    key: int
    choice: int
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    asker: Asker
    events: EventQueue
    started_s: float  # when it was journalled
    patience_from_s: float  # it is begun within its target from here on, or refused
    heard_s: float  # any sign of life of the present attempt
    asked_s: float | None  # the last submit; None if it could not be sent
    emitted_ids: list[int] = field(default_factory=list)
    emitted_entropies: list[float] = field(default_factory=list)  # with GUARD
    attempt: int = 0
    fruitless: int = 0  # attempts since the last token
    worker: str | None = None
    queue_s: float = 0.0
    first_token_s: float | None = None
    last_token_s: float | None = None

    @property
    def num_live_tokens(self) -> int:
        """Return the tokens this request takes of a worker: of its prompt, and of what is to come.

        Who gives no limit may want all that the context leaves, and hardly ever does.
        """
        num_left = self.sampling.max_tokens - len(self.emitted_ids)
        return len(self.prompt_ids) + min(num_left, EXPECTED_GROWTH)


class Generations:
    """The journal of live requests and the way to the attention pool.

    Args:
        endpoint: towards the attention workers.
        clock: for silence and latencies.
        metrics: told of every token.
    """

    def __init__(self, endpoint: Endpoint, clock: Clock, metrics: GatewayMetrics) -> None:
        self._endpoint = endpoint
        self._clock = clock
        self._metrics = metrics
        self._live: dict[int, JournalEntry] = {}
        self.queue = FirstTokenQueue()
        self._prefixes = PrefixMap()
        self._step_s: dict[str, float] = {}  # by attention worker, what it expects of a step
        self._next_key = secrets.randbits(62)  # unlike those of a gateway before this one

    @property
    def num_live(self) -> int:
        """Return the requests that have not ended."""
        return len(self._live)

    def start(
        self,
        choice: int,
        prompt_ids: tuple[int, ...],
        sampling: SamplingParams,
        asker: Asker,
        events: EventQueue,
    ) -> int:
        """Journal a request and send it to an attention worker.

        Returns:
            Its key, for `abandon`.
        """
        now = self._clock.now()
        entry = JournalEntry(
            key=self._next_key,
            choice=choice,
            prompt_ids=prompt_ids,
            sampling=sampling,
            asker=asker,
            events=events,
            started_s=now,
            patience_from_s=asker.arrived_s,
            heard_s=now,
            asked_s=now,
        )
        self._next_key += 1
        self._live[entry.key] = entry
        due_s = asker.slo.first_due_s(asker.arrived_s)
        self.queue.enter(entry.key, asker.priority, asker.tenant, due_s, now)
        self._metrics.started(len(prompt_ids))
        self._assign(entry)
        return entry.key

    def abandon(self, key: int, reason: str) -> None:
        """End a request that needs no more tokens; does nothing if it has ended."""
        entry = self._live.get(key)
        if entry is not None:
            self._cancel_attempt(entry)
            self._end(entry, reason)

    def fail_all(self, error: AFDError) -> None:
        """End every live request with an error."""
        for entry in list(self._live.values()):
            self._cancel_attempt(entry)
            self._fail(entry, error)

    def take(self, source: str, chunk: TokenChunk) -> None:
        """Journal the tokens of a chunk and pass them on."""
        if chunk.rows.dtype is not DType.INT64 or chunk.rows.shape[1:] != (TOKEN_COLUMNS,):
            raise ProtocolError(f"token rows of shape {chunk.rows.shape}", "shape")
        values = memoryview(chunk.rows.data).cast("q")
        for start in range(0, len(values), TOKEN_COLUMNS):
            row = values[start : start + TOKEN_COLUMNS]
            key, attempt, index, count, token_id, finish, num_cached, bits, queued_us = row
            entry = self._live.get(key)
            if entry is None or (entry.attempt, entry.worker) != (attempt, source):
                self._metrics.fenced()
                continue
            if finish not in _FINISHES or not 0 <= num_cached <= len(entry.prompt_ids):
                raise ProtocolError(f"finish reason {finish}, {num_cached} cached", "range")
            if not (0 <= bits < 2**32 and math.isfinite(bits_float(bits))):
                raise ProtocolError(f"{bits} are no bits of a number", "range")
            if queued_us < 0:
                raise ProtocolError(f"queued for {queued_us} microseconds", "range")
            entry.heard_s = self._clock.now()
            if finish == FinishReason.ERROR:
                self._fail(entry, WorkerFailed("the attention worker cannot take this request"))
            elif finish == FinishReason.REFUSED:
                self._refuse_or_renew(entry)
            elif count == 1:
                ending = FinishReason(finish) if finish else None
                event = TokenEvent(entry.choice, token_id, ending, num_cached)
                if not entry.emitted_ids:
                    since_s = entry.started_s - entry.asker.arrived_s  # its text was tokenised
                    entry.queue_s = since_s + queued_us / 1e6
                self._take_token(entry, index, event, bits_float(bits))

    def expect_step(self, worker: str, step_s: float) -> None:
        """Note what an attention worker expects of a step in which all that it has decode."""
        self._step_s[worker] = step_s

    def follow(self, topology: Topology) -> None:
        """Give requests of lost workers to others, and waiting ones to new workers."""
        self._step_s = {w: s for w, s in self._step_s.items() if topology.find(w) is not None}
        for entry in list(self._live.values()):
            if entry.worker is None or topology.find(entry.worker) is None:
                self._assign(entry)

    def ask_again(self) -> None:
        """Repeat the submit of silent requests: one of the messages may have been lost.

        A worker that still has the attempt says so; one that does not takes it up from the
        journalled tokens.
        """
        now = self._clock.now()
        for entry in list(self._live.values()):
            if entry.worker is None:
                if now - entry.heard_s > GIVE_UP_AFTER_S:
                    self._fail(entry, WorkerFailed("no attention worker is there"))
            elif now - entry.heard_s > MOVE_AFTER_S:
                self._cancel_attempt(entry)
                self._assign(entry, avoid=entry.worker)
            elif (
                entry.asked_s is None or now - max(entry.heard_s, entry.asked_s) > ASK_AGAIN_AFTER_S
            ):
                self._submit(entry)

    def _take_token(
        self, entry: JournalEntry, index: int, event: TokenEvent, entropy: float
    ) -> None:
        expected = len(entry.emitted_ids)
        if index < expected:
            self._metrics.fenced()
            return
        if index > expected:  # a chunk was lost; what follows it cannot be used
            log.warning("request %d misses token %d, got %d", entry.key, expected, index)
            self._cancel_attempt(entry)
            self._assign(entry)
            return
        entry.emitted_ids.append(event.token_id)
        if entry.sampling.guard_window:
            entry.emitted_entropies.append(entropy)
        entry.fruitless = 0
        self._time_token(entry)
        if event.finish is not None:
            self._end(entry, event.finish.name.lower())
        entry.events.put_nowait(replace(event, timing=_timing_of(entry)))

    def _time_token(self, entry: JournalEntry) -> None:
        now = self._clock.now()
        if entry.last_token_s is None:
            entry.first_token_s = now
            entry.events.has_begun = True
            self.queue.serve(entry.key, now)
            self._metrics.first_token(now - entry.asker.arrived_s)
        else:
            self._metrics.next_token(now - entry.last_token_s)
        entry.last_token_s = now

    def _assign(self, entry: JournalEntry, avoid: str | None = None) -> None:
        """Begin a new attempt with the best worker, or wait for one to appear.

        `avoid` is taken only if there is no other.
        """
        if entry.fruitless == MAX_ATTEMPTS:
            self._fail(
                entry, WorkerFailed(f"gave up after {MAX_ATTEMPTS} attempts without a token")
            )
            return
        pool = self._endpoint.topology.pool(Role.ATTENTION)
        workers = [member for member in pool if member.incarnation != avoid] or pool
        worker = self._choose_worker(entry, workers)
        entry.worker = worker.incarnation if worker else None
        if worker is None:
            return
        entry.attempt += 1
        entry.fruitless += 1
        entry.heard_s = self._clock.now()
        if entry.attempt > 1:
            self._metrics.resubmitted()
        self._submit(entry)

    def _choose_worker(self, entry: JournalEntry, workers: Sequence[Member]) -> Member | None:
        """Return the worker that has the least to do with a request on top, if there is any."""
        if len(workers) < 2:
            return choose_worker(workers, {})
        blocks = prefix_blocks(entry.prompt_ids, entry.asker.salt)
        work = Counter({w.incarnation: 0 for w in workers})
        for other in self._live.values():
            if other.worker is not None and other is not entry:
                work[other.worker] += other.num_live_tokens
        for worker in workers:
            work[worker.incarnation] -= self._prefixes.num_tokens(blocks, worker.incarnation)
        target_s = entry.asker.slo.tpot_s or math.inf
        late = {name for name, step_s in self._step_s.items() if step_s > target_s}
        chosen = choose_worker(workers, work, late)
        if chosen is not None:
            self._prefixes.note(blocks, chosen.incarnation)
        return chosen

    def _submit(self, entry: JournalEntry) -> None:
        assert entry.worker is not None
        sent = self._endpoint.try_send(entry.worker, submit_of(self._request_of(entry)))
        # a connection that is not up yet: try again at the next turn
        entry.asked_s = self._clock.now() if sent else None

    def _cancel_attempt(self, entry: JournalEntry) -> None:
        if entry.worker is not None:
            self._endpoint.try_send(entry.worker, Cancel(entry.key, entry.attempt))

    def _fail(self, entry: JournalEntry, error: AFDError) -> None:
        self._end(entry, "error")
        entry.events.put_nowait(FailureEvent(entry.choice, error, "error"))

    def _refuse_or_renew(self, entry: JournalEntry) -> None:
        """Refuse what was not begun in time, but for the rest of what its client has begun to get.

        No dialect can refuse one choice of several, and failing all would waste those that are
        under way.
        """
        if entry.events.has_begun:
            entry.patience_from_s = self._clock.now()
            entry.fruitless = 0  # the worker is well
            self._assign(entry)
        else:
            self._refuse(entry)

    def _refuse(self, entry: JournalEntry) -> None:
        waited_s = self._clock.now() - entry.asker.arrived_s
        self._end(entry, "refused")  # before the others are counted
        error = Overloaded(
            f"the request waited for {waited_s:.1f} s and was not begun; try again later",
            self.queue.retry_after_s(self._clock.now()),
            "queue_timeout",
        )
        entry.events.put_nowait(FailureEvent(entry.choice, error, "refused"))

    def _end(self, entry: JournalEntry, reason: str) -> None:
        del self._live[entry.key]
        self.queue.leave(entry.key)
        timing = _timing_of(entry)
        if reason == "refused":  # itself, or a choice beside it
            self._metrics.refused("queue_timeout")
        self._metrics.finished(reason, timing.tpot_s if timing else None)
        if timing is not None:
            self._metrics.judged(timing.slo_met)

    def _request_of(self, entry: JournalEntry) -> Request:
        """Return a request as it stands: the rest of the way, and of the time."""
        asker, slo = entry.asker, entry.asker.slo
        if slo.ttft_s is not None:
            waited_s = self._clock.now() - entry.patience_from_s
            slo = replace(slo, ttft_s=max(LEAST_TTFT_S, slo.ttft_s - waited_s))
        return Request(
            key=entry.key,
            prompt_ids=entry.prompt_ids,
            sampling=entry.sampling,
            attempt=entry.attempt,
            emitted_ids=tuple(entry.emitted_ids),
            emitted_entropies=tuple(entry.emitted_entropies),
            slo=slo,
            salt=asker.salt,
            tenant=asker.tenant,
            priority=asker.priority,
        )


def _timing_of(entry: JournalEntry) -> Timing | None:
    """Return how a request was served so far; None before its first token."""
    if entry.first_token_s is None or entry.last_token_s is None:
        return None
    ttft_s = entry.first_token_s - entry.asker.arrived_s
    times_s = (entry.first_token_s, entry.last_token_s)
    tpot_s = time_per_token_s(times_s, len(entry.emitted_ids))
    return Timing(ttft_s, tpot_s, entry.queue_s, entry.asker.slo.is_met(ttft_s, tpot_s))
