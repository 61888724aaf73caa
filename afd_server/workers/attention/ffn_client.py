"""The attention side of A→F→A: dispatches calls, keeps them until complete, adds them up.

What the attention side holds itself is computed here while the rest of a call is out.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from afd_server.core.clock import Clock
from afd_server.core.errors import ProtocolError, WorkerFailed
from afd_server.core.model_spec import ModelSpec
from afd_server.core.stage import StageId
from afd_server.core.topology import Member, Placement, Role, column_shard
from afd_server.models.base import FFNCall
from afd_server.models.head import Held
from afd_server.telemetry.timeline import EventKind, Timeline
from afd_server.transport.endpoint import Endpoint, Received
from afd_server.transport.messages import Combine, Dispatch, Payload
from afd_server.workers.attention.peer_clock import PeerClock
from afd_server.workers.attention.shares import Share, cut, put_together
from afd_server.workers.tensors import to_payload, to_tensor

RETRY_REFUSED_S = 0.05  # a refusal is mostly a topology that has not arrived yet
PERMANENT_REFUSALS = frozenset({"part", "range", "shape", "dtype", "model", "fingerprint"})


@dataclass(slots=True)
class _Part:
    """What one worker was asked for, and its answer."""

    incarnation: str
    payload: Payload
    num_rows: int
    answer_shape: tuple[int, int]
    partial: Tensor | None = None


@dataclass(slots=True)
class _PendingCall:
    """One lane's call in flight. The input is kept so that any part can be sent again.

    `epoch` is that of its assignment; resends carry the newest one. `live_since_s` is since when
    the worker has had live sequences without a break. Without shares it waits for a topology that
    has its experts. `own` answers the share of the attention side.
    """

    stage: StageId
    call: FFNCall
    live_since_s: float
    epoch: int = 0
    sent_s: float | None = None  # None once it was sent again: which one is answered is unknown
    shares: Sequence[Share] | None = None
    parts: dict[int, _Part] = field(default_factory=dict)  # by the worker's slot
    own: Tensor | None = None
    resend_at: float = 0.0

    @property
    def is_complete(self) -> bool:
        """Tell whether every part was answered."""
        if self.shares is None:
            return False
        return all(part.partial is not None for part in self.parts.values())


class FFNClient:
    """Sends FFN calls to the workers that hold their experts and sums the answers.

    A call is keyed by (own incarnation, epoch, step, lane, layer, part), so it may be sent any
    number of times: the first valid answer to each part counts (invariant I5). A part is what the
    worker of one slot is asked for; a worker that holds nothing of a call is not asked. Partial
    sums are [answers, hidden_size] of `dtype`, logits [rows, part of the vocabulary] float32. `own`
    is what the attention side holds itself.
    """

    def __init__(
        self,
        placement: Placement,
        slot: int,
        own: Held,
        spec: ModelSpec,
        dtype: torch.dtype,
        endpoint: Endpoint,
        clock: Clock,
        timeline: Timeline,
        resend_s: float,
    ) -> None:
        self._placement = placement
        self._own = own
        self._spec = spec
        self._dtype = dtype
        self._slot = slot
        self._endpoint = endpoint
        self._clock = clock
        self._timeline = timeline
        self._resend_s = resend_s
        self._peer_clocks: dict[str, PeerClock] = {}  # by incarnation
        self._pending: dict[int, _PendingCall] = {}  # by lane
        self._pool: dict[int, str] = {}  # incarnations by slot, of an epoch
        self._groups: dict[tuple[int, int], list[int | None]] = {}  # by layer and turn, of an epoch
        self.counters: Counter[str] = Counter()

    @property
    def is_away(self) -> bool:
        """Tell whether most layers' calls travel."""
        return 2 * self._placement.num_away > self._spec.num_layers

    @property
    def num_resends(self) -> int:
        """Return how often something was sent again."""
        return self.counters["resends"]

    def dispatch(self, stage: StageId, call: FFNCall, live_since_s: float) -> bool:
        """Send a lane's call on its way and compute what is held here; the lane has no other one.

        Returns:
            Whether its sum is there already: nothing of it had to travel.
        """
        assert stage.lane not in self._pending, f"lane {stage.lane} already waits"
        pending = _PendingCall(stage, call, live_since_s)
        self._pending[stage.lane] = pending
        self._assign(pending)
        return pending.is_complete

    def accept(self, received: Received, combine: Combine) -> int | None:
        """Take in an answer.

        Returns:
            The lane whose call is complete now, or None.
        """
        pending = self._pending.get(combine.lane)
        part = None if pending is None else pending.parts.get(combine.part)
        if (
            pending is None
            or part is None
            or pending.stage != StageId(combine.step, combine.lane, combine.layer)
            or combine.call_epoch < pending.epoch
            or part.incarnation != received.envelope.source
            or part.partial is not None
        ):
            self.counters["stale"] += 1  # late, repeated, or meant for an earlier epoch
            return None
        if combine.refusal:
            self.counters[f"refused_{combine.refusal}"] += 1
            if combine.refusal in PERMANENT_REFUSALS:
                raise WorkerFailed(
                    f"{received.sender.name} refuses calls of this worker: {combine.refusal}"
                )
            pending.resend_at = self._clock.now() + RETRY_REFUSED_S
            return None
        try:
            partial = to_tensor(
                combine.partial, torch.float32 if pending.call.is_head else self._dtype
            )
        except ProtocolError:
            partial = None
        if partial is None or partial.shape != part.answer_shape:
            self.counters["bad_partial"] += 1  # the resend timer asks again
            return None
        part.partial = partial
        self._record_transfers(pending, part, received.sender, combine)
        return pending.stage.lane if pending.is_complete else None

    def take(self, lane: int) -> Tensor:
        """Return the sum of a complete call, [tokens, hidden] in its dtype, and forget the call."""
        pending = self._pending.pop(lane)
        assert pending.shares is not None, f"lane {lane} has not been assigned"
        answers = [self._answers(pending, share.group) for share in pending.shares]
        return put_together(pending.call, pending.shares, answers)

    def reassign(self) -> None:
        """Follow a new topology: calls that waited for a lost worker start over."""
        topology = self._endpoint.topology
        find = topology.find
        self._pool = {member.slot: member.incarnation for member in topology.pool(Role.FFN)}
        self._groups = {}
        self._peer_clocks = {inc: c for inc, c in self._peer_clocks.items() if find(inc)}
        for pending in self._pending.values():
            if pending.is_complete:
                continue  # its lane is about to take the sum
            alive = all(find(part.incarnation) for part in pending.parts.values())
            if pending.shares is None or not alive:
                self._assign(pending)

    def resend_due(self) -> None:
        """Send again what has gone unanswered for too long."""
        now = self._clock.now()
        for pending in self._pending.values():
            if pending.parts and pending.resend_at <= now and not pending.is_complete:
                self.counters["resends"] += 1
                self._send(pending)
                pending.sent_s = None

    def next_resend_s(self) -> float | None:
        """Return the seconds until `resend_due` has something to do; None if nothing waits."""
        due = [
            pending.resend_at
            for pending in self._pending.values()
            if pending.parts and not pending.is_complete
        ]
        return max(0.0, min(due) - self._clock.now()) if due else None

    def _answers(self, pending: _PendingCall, group: int) -> list[Tensor]:
        """Return what a group answered, by column shard."""
        if group == self._placement.attention_side:
            answers = [pending.own]
        else:
            answers = [pending.parts[slot].partial for slot in self._placement.slots_of(group)]
        there = [answer for answer in answers if answer is not None]
        assert len(there) == len(answers), f"the sum of lane {pending.stage.lane} is not complete"
        return there

    def _record_transfers(
        self, pending: _PendingCall, part: _Part, ffn: Member, combine: Combine
    ) -> None:
        """Note how long a part's call and answer were under way."""
        sent_s, back_s = pending.sent_s, self._endpoint.received_s
        if sent_s is None:
            return
        taken_s = combine.taken_us / 1e6
        computed_s = (combine.taken_us + combine.held_us) / 1e6
        clock = self._peer_clocks.setdefault(ffn.incarnation, PeerClock())
        there_s, back_again_s = clock.directions(sent_s, taken_s, computed_s, back_s)
        rows, record = part.num_rows, self._timeline.record
        record(EventKind.A_TO_F, sent_s, sent_s + there_s, pending.stage, rows, ffn.slot)
        record(EventKind.F_TO_A, back_s - back_again_s, back_s, pending.stage, rows, ffn.slot)

    def _assign(self, pending: _PendingCall) -> None:
        """Choose who computes a call under the present topology, send its parts, compute the rest.

        While the topology lacks one of its experts the call simply waits for the next one.
        """
        call, placement = pending.call, self._placement
        pending.epoch = self._endpoint.topology.epoch
        pending.shares = cut(call, self._groups_of(call.layer, pending.stage.lane))
        pending.parts = {}
        own = None
        for share in pending.shares or ():
            if share.group == placement.attention_side:
                own = share
                continue
            payload = to_payload(share.rows)
            for shard, slot in enumerate(placement.slots_of(share.group)):
                shape = (share.num_answers, self._answer_width(call, shard))
                pending.parts[slot] = _Part(self._pool[slot], payload, share.rows.shape[0], shape)
        if pending.parts:
            self._send(pending)
        if own is not None and pending.own is None:  # it is the same whoever else is there
            pending.own = self._compute(pending.stage, own.rows)

    def _answer_width(self, call: FFNCall, shard: int) -> int:
        if not call.is_head:
            return self._spec.hidden_size
        part = column_shard(self._spec.vocab_size, shard, self._placement.num_shards)
        return part.stop - part.start

    def _compute(self, stage: StageId, rows: Tensor) -> Tensor:
        begin_s = self._clock.now()
        answers = self._own.answer(stage.layer, rows)
        self._timeline.record(EventKind.FFN, begin_s, self._clock.now(), stage, rows.shape[0])
        return answers

    def _groups_of(self, layer: int, lane: int) -> Sequence[int | None]:
        """Return the group to ask for each expert of a layer: its live holders take turns.

        Turns go by this worker's slot and the lane, so that one call asks few groups.
        """
        turn = self._slot + lane
        groups = self._groups.get((layer, turn))
        if groups is None:
            placement = self._placement
            alive = {
                group
                for group in range(placement.num_groups)
                if all(slot in self._pool for slot in placement.slots_of(group))
            } | {placement.attention_side}
            groups = self._groups[layer, turn] = []
            for holders in placement.holders[layer]:
                there = [group for group in holders if group in alive]
                groups.append(there[turn % len(there)] if there else None)
        return groups

    def _send(self, pending: _PendingCall) -> None:
        now = pending.sent_s = self._clock.now()
        pending.resend_at = now + self._resend_s
        live_us = int((now - pending.live_since_s) * 1e6)
        for slot, part in pending.parts.items():
            if part.partial is None:
                message = Dispatch(*pending.stage, slot, live_us, part.payload)
                if not self._endpoint.try_send(part.incarnation, message):
                    pending.resend_at = self._clock.now() + RETRY_REFUSED_S
