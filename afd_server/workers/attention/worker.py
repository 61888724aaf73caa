"""The attention worker: takes requests, keeps its lanes going, reports tokens.

One synchronous object driven by `workers.runtime`: messages in, one piece of work at a time.
"""

import logging
import math
from collections import deque
from collections.abc import Sequence

import torch

from afd_server.core.batch import Emitted, StepPlan, StepResult
from afd_server.core.clock import Clock
from afd_server.core.errors import ProtocolError
from afd_server.core.request import (
    GUARD_WINDOWS,
    PRIORITIES,
    SLO,
    FinishReason,
    Request,
    SamplingParams,
)
from afd_server.core.stage import AHEAD, StageId
from afd_server.core.topology import Role
from afd_server.models.base import AttentionHalf, FFNCall
from afd_server.policy.scheduler import Scheduler
from afd_server.telemetry.timeline import EventKind, Timeline
from afd_server.transport.endpoint import Endpoint, Received
from afd_server.transport.messages import (
    TOKEN_COLUMNS,
    Cancel,
    Combine,
    DType,
    ExpertLoad,
    LoadReport,
    Payload,
    Submit,
    TokenChunk,
    float_bits,
)
from afd_server.workers.attention.calibration import Calibration
from afd_server.workers.attention.expert_counts import ExpertCounts
from afd_server.workers.attention.ffn_client import FFNClient
from afd_server.workers.attention.kv_store import KVStore
from afd_server.workers.attention.lanes import Lane, Outcome, Part
from afd_server.workers.attention.sampler import Sampler
from afd_server.workers.tensors import events_payload

log = logging.getLogger(__name__)

TokenRow = tuple[int, ...]  # of a `TokenChunk`


class AttentionWorker:
    """Attention half, KV blocks and scheduler behind one endpoint.

    Args:
        model: the attention half.
        kv: as many blocks as the scheduler hands out.
        scheduler: decides; this class does.
        sampler: turns logits into tokens.
        calibration: comes before all requests, in one lane, and says how many are opened then;
            None if there is nothing to find out.
        num_lanes: micro-batches in flight without a calibration.
        vocab_size: token ids at or above it are refused.
        max_model_len: so are sequences of this length.
        ffn: has FFN calls computed.
        expert_counts: takes every call.
        endpoint: towards the gateway.
        clock: dates what goes into the timeline.
        timeline: takes stages, steps and waits.
    """

    def __init__(
        self,
        model: AttentionHalf,
        kv: KVStore,
        scheduler: Scheduler,
        sampler: Sampler,
        calibration: Calibration | None,
        num_lanes: int,
        vocab_size: int,
        max_model_len: int,
        ffn: FFNClient,
        expert_counts: ExpertCounts,
        endpoint: Endpoint,
        clock: Clock,
        timeline: Timeline,
    ) -> None:
        self._model = model
        self._kv = kv
        self._scheduler = scheduler
        self._ffn = ffn
        self._expert_counts = expert_counts
        self._endpoint = endpoint
        self._clock = clock
        self._timeline = timeline
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._connected: set[str] = set()
        self._sampler = sampler
        self._calibration = calibration
        num_open = num_lanes if calibration is None else 1
        self._lanes = [Lane(index, sampler) for index in range(num_open)]
        self._idle: list[Lane] = list(self._lanes)
        self._runnable: deque[Part] = deque()  # of an idle lane, not begun, or with their sum in
        self._owners: dict[tuple[int, int], str] = {}  # (key, attempt) → gateway
        self._num_rows = 0
        self._live_since_s: float | None = None  # None while no lane has a step
        self._has_ended_step = False  # with the latest piece of work

    @property
    def num_steps(self) -> int:
        return self._scheduler.num_steps

    @property
    def is_ready(self) -> bool:
        return self._calibration is None

    @property
    def is_between_steps(self) -> bool:
        # of several lanes some are nearly always out: it is a step's end in any of them
        return self._has_ended_step or len(self._idle) == len(self._lanes)

    def handle(self, received: Received) -> None:
        """Take in a message meant for an attention worker; nothing is computed here."""
        message = received.message
        if isinstance(message, Submit):
            self._submit(received.envelope.source, message)
        elif isinstance(message, Cancel):
            self._cancel(message.key, message.attempt)
        elif isinstance(message, Combine):
            index = self._ffn.accept(received, message)
            if index is not None:
                self._runnable.append(self._lanes[index % AHEAD].part(index))

    def advance(self) -> bool:
        """Run a part of a step to the next boundary that its calls have to cross, or to its end.

        Returns:
            Whether another part could run at once.
        """
        for index in self._ffn.take_ready():
            self._runnable.append(self._lanes[index % AHEAD].part(index))
        self._ffn.resend_due()
        self._has_ended_step = False
        if not self._runnable:
            return False
        part, begin_s = self._runnable.popleft(), self._clock.now()
        if part.lane.must_wait(part):
            part.is_held = True
        else:
            if self._ffn.idle_since_s is not None:
                self._timeline.record(EventKind.WAIT, self._ffn.idle_since_s, begin_s)
                self._ffn.idle_since_s = None
            if part.lane.is_idle:
                self._start(part.lane, begin_s)
            else:
                answer = self._ffn.take(part.index) if part.num_stages else None
                self._go_on(part, begin_s, part.resume(answer))
        is_waiting = not self._runnable and len(self._idle) < len(self._lanes)
        if is_waiting and self._ffn.idle_since_s is None:
            self._ffn.idle_since_s = self._clock.now()
        return bool(self._runnable)

    def wait_s(self) -> float | None:
        """Return how long the worker may sleep without missing a resend; None: for ever."""
        return self._ffn.next_resend_s()

    def follow_topology(self) -> None:
        """React to a new topology of the endpoint: lost FFN workers, lost gateways."""
        topology = self._endpoint.topology
        link, pool = self._endpoint.link, topology.pool(Role.FFN)
        for gone in self._connected - {member.incarnation for member in pool}:
            link.disconnect(gone)
        for member in pool:
            link.connect(member.incarnation, member.address)
        self._connected = {member.incarnation for member in pool}
        self._ffn.reassign()
        if self._calibration is not None:
            self._wake_idle()
        for (key, attempt), gateway in list(self._owners.items()):
            if topology.find(gateway) is None:
                self._cancel(key, attempt)

    def load(self, num_bad_frames: int) -> LoadReport:
        """Return the present load and what was done since the last report."""
        self._ffn.note_events()
        scheduler, events = self._scheduler, events_payload(self._timeline)
        return LoadReport(
            steps=scheduler.num_steps,
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            free_blocks=scheduler.blocks.num_free,
            cached_blocks=scheduler.blocks.num_cached,
            num_blocks=scheduler.blocks.num_blocks,
            preemptions=scheduler.num_preemptions,
            queried_tokens=scheduler.num_queried_tokens,
            hit_tokens=scheduler.num_hit_tokens,
            rows=self._num_rows,
            bad_frames=num_bad_frames,
            resends=self._ffn.num_resends,
            dropped_events=self._timeline.num_dropped,
            clock_us=int(self._clock.now() * 1e6),
            step_us=int(scheduler.decode_step_s * 1e6),
            alone_us=int(scheduler.pace.alone_s * 1e6),
            decode_lanes=scheduler.pace.num_lanes,
            slowness_permille=int(scheduler.pace.model.slowness * 1e3),
            events=events,
        )

    def expert_load(self) -> ExpertLoad | None:
        """Return how the gates chose since the start; None without gates."""
        return self._expert_counts.report()

    def _start(self, lane: Lane, begin_s: float) -> None:
        """Give an idle lane its next step, if there is one."""
        self._refuse(self._scheduler.expire(begin_s))
        plan = self._plan(lane, begin_s)
        if plan is None:
            self._idle.append(lane)
            if len(self._idle) == len(self._lanes):
                self._live_since_s = None
            return
        if self._live_since_s is None:
            self._live_since_s = begin_s
        if self._calibration is None:
            self._num_rows += plan.num_tokens
        planned_s = self._clock.now()
        first, *others = lane.start(plan, self._model, self._kv, begin_s)
        self._runnable.extend(others)
        self._go_on(first, planned_s, first.resume(None))

    def _plan(self, lane: Lane, now_s: float) -> StepPlan | None:
        """Choose an idle lane's next step; of requests once the calibration is over."""
        calibration = self._calibration
        if calibration is not None:
            plan = calibration.plan(lane.index)
            if calibration.is_alone_over:
                self._open_lanes(calibration)
                plan = calibration.plan(lane.index)
            if not calibration.is_over:
                return plan
            calibration.end()
            self._calibration = None
        return self._scheduler.plan(lane.index, now_s)

    def _open_lanes(self, calibration: Calibration) -> None:
        """Go on with as many lanes as there should be."""
        num_lanes = calibration.open_lanes(len(self._endpoint.topology.pool(Role.ATTENTION)))
        opened = [Lane(index, self._sampler) for index in range(len(self._lanes), num_lanes)]
        self._lanes += opened
        self._runnable += [lane.rest for lane in opened]

    def _go_on(self, part: Part, begin_s: float, outcome: Outcome) -> None:
        """Send a part's call and run on while sums are there at once; or end it."""
        record = self._timeline.record
        while isinstance(outcome, tuple):
            stage, call = outcome
            rows = part.num_rows if call is None else call.rows.shape[0]
            record(EventKind.ATTENTION, begin_s, self._clock.now(), stage, rows)
            is_complete = call is not None and self._dispatch(stage, call)
            follower = part.lane.rest
            if follower.is_held and not part.lane.must_wait(follower):
                follower.is_held = False
                self._runnable.append(follower)
            if not is_complete:
                return
            if part.lane.must_wait(part):
                part.is_held = True
                return
            begin_s = self._clock.now()
            outcome = part.resume(self._ffn.take(part.index))
        stage = StageId(part.step, part.index, 0)
        record(EventKind.SAMPLE, begin_s, self._clock.now(), stage, part.num_samples)
        if outcome is not None:
            self._finish(part.lane, outcome)

    def _dispatch(self, stage: StageId, call: FFNCall) -> bool:
        """Send a call; tell whether its sum is there already."""
        assert self._live_since_s is not None, "a lane runs, so there is live work"
        if self._calibration is None:
            self._expert_counts.count(call)
        return self._ffn.dispatch(stage, call, self._live_since_s)

    def _finish(self, lane: Lane, result: StepResult) -> None:
        """Commit and report a step."""
        plan, record = result.plan, self._timeline.record
        stage = StageId(plan.step, lane.index, 0)
        self._ffn.note_events()
        end_s = self._clock.now()
        if self._calibration is not None:
            self._calibration.commit(plan, end_s - lane.begun_s)
        else:
            expected_end_s = lane.begun_s + self._scheduler.expected_s(lane.index)
            record(EventKind.EXPECTED, lane.begun_s, expected_end_s, stage, plan.num_tokens)
            self._report(self._scheduler.commit(result, end_s))
        record(EventKind.STEP, lane.begun_s, end_s, stage, plan.num_tokens)
        self._has_ended_step = True
        self._runnable.append(lane.rest)
        self._wake_idle()

    def _submit(self, gateway: str, submit: Submit) -> None:
        try:
            request = _request_of(submit, self._vocab_size, self._max_model_len)
        except ProtocolError as error:  # fails this request alone
            log.warning("refused request %d: %s", submit.key, error)
            self._send_rows(gateway, [_sign(submit.key, submit.attempt, FinishReason.ERROR)])
            return
        self._scheduler.submit(request, self._clock.now())
        self._owners[request.key, request.attempt] = gateway
        self._send_rows(gateway, [_sign(request.key, request.attempt)])
        self._wake_idle()

    def _refuse(self, requests: Sequence[Request]) -> None:
        for request in requests:
            owner = self._owners.pop((request.key, request.attempt), None)
            if owner is not None:
                row = _sign(request.key, request.attempt, FinishReason.REFUSED)
                self._send_rows(owner, [row])

    def _cancel(self, key: int, attempt: int) -> None:
        self._scheduler.cancel(key, attempt)
        self._owners.pop((key, attempt), None)
        self._wake_idle()  # its blocks may let another one in

    def _wake_idle(self) -> None:
        self._runnable.extend(lane.rest for lane in self._idle)
        self._idle.clear()

    def _report(self, emitted: Sequence[Emitted]) -> None:
        by_gateway: dict[str, list[TokenRow]] = {}
        for token in emitted:
            owner = self._owners.get((token.key, token.attempt))
            if owner is None:
                continue  # cancelled while in flight
            row = (
                token.key,
                token.attempt,
                token.index,
                1,
                token.token_id,
                token.finish or 0,
                token.num_cached,
                0 if token.entropy is None else float_bits(token.entropy),
                int(token.queued_s * 1e6),
            )
            by_gateway.setdefault(owner, []).append(row)
            if token.finish is not None:
                del self._owners[token.key, token.attempt]
        for gateway, rows in by_gateway.items():
            self._send_rows(gateway, rows)

    def _send_rows(self, gateway: str, rows: Sequence[TokenRow]) -> None:
        # what is lost here the gateway misses by its index, and asks again
        data = torch.tensor(rows, dtype=torch.int64).numpy().tobytes()
        chunk = TokenChunk(Payload(DType.INT64, (len(rows), TOKEN_COLUMNS), data))
        self._endpoint.try_send(gateway, chunk)


def _sign(key: int, attempt: int, finish: int = 0) -> TokenRow:
    """Return a token row without a token."""
    return (key, attempt, 0, 0, 0, finish, 0, 0, 0)


def _request_of(submit: Submit, vocab_size: int, max_model_len: int) -> Request:
    """Check a submit against what this worker can do.

    Raises:
        ProtocolError: no gateway of ours sends this.
    """
    counts = (submit.num_prompt, submit.num_emitted)
    num_known = sum(counts)
    num_all = num_known + (submit.num_emitted if submit.guard_window else 0)  # with entropies
    if submit.tokens.dtype is not DType.INT32 or len(submit.tokens.shape) != 1:
        raise ProtocolError("the tokens are no row of int32", "dtype")
    tokens = memoryview(submit.tokens.data).cast("B").cast("i")
    if (
        not 1 <= submit.num_prompt <= num_known <= num_all <= len(tokens)
        or num_known >= max_model_len
    ):
        raise ProtocolError(f"{counts} of {len(tokens)} tokens", "range")
    ids, stop_ids = tokens[:num_known], tokens[num_all:]
    entropies = tuple(tokens[num_known:num_all].cast("B").cast("f"))
    if not all(0 <= token < vocab_size for token in (*ids, *stop_ids)):
        raise ProtocolError("a token id is outside of the vocabulary", "range")
    if not submit.num_emitted < submit.max_tokens:
        raise ProtocolError("nothing is left to generate", "range")
    not_negative = min(submit.temperature, submit.top_n_sigma, submit.min_k) >= 0
    if not (not_negative and 0 < submit.top_p <= 1 and 0 <= submit.min_p <= 1):
        raise ProtocolError("a sampling parameter is out of range", "range")
    if not (0 <= submit.ttft_s < math.inf and 0 <= submit.tpot_s < math.inf):
        raise ProtocolError("a target is out of range", "range")
    if submit.rank >= len(PRIORITIES):
        raise ProtocolError(f"rank {submit.rank}", "range")
    can_guard = submit.guard_window in GUARD_WINDOWS and submit.temperature > 0
    if not ((submit.guard_window == 0 or can_guard) and all(map(math.isfinite, entropies))):
        raise ProtocolError("GUARD with these parameters and entropies", "range")
    sampling = SamplingParams(
        max_tokens=submit.max_tokens,
        temperature=submit.temperature,
        top_p=submit.top_p,
        top_k=submit.top_k,
        min_p=submit.min_p,
        top_n_sigma=submit.top_n_sigma,
        min_k=submit.min_k,
        guard_window=submit.guard_window,
        seed=submit.seed,
        choice=submit.choice,
        stop_token_ids=tuple(stop_ids),
    )
    return Request(
        key=submit.key,
        attempt=submit.attempt,
        prompt_ids=tuple(ids[: submit.num_prompt]),
        emitted_ids=tuple(ids[submit.num_prompt :]),
        emitted_entropies=entropies,
        sampling=sampling,
        slo=SLO(submit.ttft_s or None, submit.tpot_s or None),
        salt=submit.salt,
        tenant=submit.tenant,
        priority=PRIORITIES[submit.rank],
    )
