"""The attention side of A→F→A: dispatches calls, keeps them until complete, adds them up.

What the attention side holds itself is computed here while the rest of a call is out.
"""

import ctypes
from collections import Counter
from collections.abc import Sequence
from ctypes import Array, c_int64
from dataclasses import dataclass, field

import torch
from torch import Tensor

from afd_server.core.clock import Clock
from afd_server.core.errors import ProtocolError, WorkerFailed
from afd_server.core.model_spec import ModelSpec
from afd_server.core.stage import AHEAD, StageId
from afd_server.core.topology import Member, Placement, Role, column_shard
from afd_server.models.base import FFNCall, Reached
from afd_server.models.forward import join_parts
from afd_server.models.head import Held
from afd_server.telemetry.timeline import EventKind, Timeline
from afd_server.transport.calls import CallClient, NativeWay, Rows
from afd_server.transport.endpoint import Endpoint, Received
from afd_server.transport.messages import Combine, Dispatch, Payload
from afd_server.workers.attention.first_halves import FirstHalves
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
    has its experts. `own` answers the share of the attention side. A call that native code has
    sent has its sum in `answer`, once it is `answered`, and is known there by a `place`. If it has
    a `way`, native code goes on with the answer, so that `stage` and `call` are those that were
    asked for until it comes back (`FFNClient._catch_up`); `first_layer` is what was asked for. It
    computes first halves to `half`.
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
    place: int | None = None
    answer: Tensor | None = None
    half: Tensor | None = None
    is_answered: bool = False
    way: NativeWay | None = None
    first_layer: int = field(init=False)

    def __post_init__(self) -> None:
        self.first_layer = self.stage.layer

    @property
    def is_out(self) -> bool:
        """Tell whether somebody was asked, and not everybody has answered."""
        return (bool(self.parts) or self.place is not None) and not self.is_complete

    @property
    def is_complete(self) -> bool:
        """Tell whether every part was answered."""
        if self.is_answered:
            return True
        if self.shares is None:
            return False
        return all(part.partial is not None for part in self.parts.values())


class FFNClient:
    """Sends FFN calls to the workers that hold their experts and sums the answers.

    A call is keyed by (own incarnation, epoch, step, lane, layer, part), so it may be sent any
    number of times: the first valid answer to each part counts (invariant I5). A part is what the
    worker of one slot is asked for; a worker that holds nothing of a call is not asked. Partial
    sums are [answers, hidden_size] of `dtype`, logits [rows, part of the vocabulary] float32. `own`
    is what the attention side holds itself. With `first_halves` native code asks for the second
    half of an FFN alone and computes the first meanwhile; whatever Python sends asks for all.
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
        native: CallClient | None = None,
        first_halves: FirstHalves | None = None,
    ) -> None:
        self._native = native
        self._quarantined: frozenset[str] = frozenset()
        self._calls: dict[int, _PendingCall] = {}  # that native code has sent, by place
        self._ready: list[int] = []  # lanes whose calls it has completed
        self._callees: dict[int, tuple[int, Array[c_int64]]] = {}  # by lane: generation, by layer
        self._idle_since_s: float | None = None
        self._placement = placement
        self._own = own
        self._first_halves = first_halves
        self._second_from = spec.num_layers + 1
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
    def idle_since_s(self) -> float | None:
        """Return since when there has been nothing to compute; None while there is."""
        return self._idle_since_s if self._native is None else self._native.idle_since_s

    @idle_since_s.setter
    def idle_since_s(self, since_s: float | None) -> None:
        if self._native is None:
            self._idle_since_s = since_s
        else:
            self._native.idle_since_s = since_s

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
        if self._native is not None and self._call(self._native, pending):
            return False
        self._assign(pending)
        return pending.is_complete

    def take_ready(self) -> list[int]:
        """Return the lanes whose calls native code has completed since the last time."""
        if self._native is None:
            return []
        if self._endpoint.quarantined != self._quarantined:
            self._follow()
        self._collect(self._native)
        if self._native.has_events:
            self.note_events()
        ready, self._ready = self._ready, []
        return ready

    def note_events(self) -> None:
        """Put into the timeline what native code did, and how its calls went."""
        if self._native is not None:
            self._timeline.extend(self._native.take_events())

    def accept(self, received: Received, combine: Combine) -> int | None:
        """Take in an answer.

        Returns:
            The lane whose call is complete now, or None.
        """
        pending = self._pending.get(combine.lane)
        if pending is not None and pending.place is not None and not pending.is_answered:
            self._give_up(pending)
        part = None if pending is None else pending.parts.get(combine.part)
        half, layer = divmod(combine.layer, self._second_from)
        if (
            pending is None
            or part is None
            or (half and not (half == 1 and self._holds_half(layer)))
            or pending.stage != StageId(combine.step, combine.lane, layer)
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
        if half and self._first_halves is not None:  # native code asked, and has given it up
            partial = self._first_halves.compute(layer, pending.call.rows) + partial
        part.partial = partial
        self._record_transfers(pending, part, received.sender, combine)
        return pending.stage.lane if pending.is_complete else None

    def take(self, lane: int) -> Tensor | Reached:
        """Return the sum of a complete call, [tokens, hidden] in its dtype, and forget the call.

        The sum is that of a later layer if native code went on from the answer.
        """
        pending = self._pending.pop(lane)
        if pending.is_answered:
            assert pending.answer is not None, f"lane {lane} was answered nowhere"
            there = [part for part in (pending.own, pending.answer) if part is not None]
            total = join_parts(pending.call, there)
        else:
            assert pending.shares is not None, f"lane {lane} has not been assigned"
            answers = [self._answers(pending, share.group) for share in pending.shares]
            total = put_together(pending.call, pending.shares, answers)
        layer = pending.stage.layer
        return total if layer == pending.first_layer else Reached(layer, total)

    def reassign(self) -> None:
        """Follow a new topology: calls that waited for a lost worker start over."""
        topology = self._endpoint.topology
        find = topology.find
        self._pool = {member.slot: member.incarnation for member in topology.pool(Role.FFN)}
        self._groups = {}
        self._peer_clocks = {inc: c for inc, c in self._peer_clocks.items() if find(inc)}
        self._follow()
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
            if pending.is_out and pending.resend_at <= now:
                if self._native is not None and pending.place is not None:
                    pending.resend_at = self._native.sent_s(pending.place) + self._resend_s
                    if pending.resend_at > now:
                        continue  # it has gone on
                    self._give_up(pending)
                self.counters["resends"] += 1
                self._send(pending)
                pending.sent_s = None

    def next_resend_s(self) -> float | None:
        """Return the seconds until `resend_due` has something to do; None if nothing waits."""
        due = [pending.resend_at for pending in self._pending.values() if pending.is_out]
        return max(0.0, min(due) - self._clock.now()) if due else None

    def _answers(self, pending: _PendingCall, group: int) -> list[Tensor]:
        """Return what a group answered, by column shard."""
        if group == self._placement.attention_side:
            answers = [pending.own]
        else:
            answers = [pending.parts[slot].partial for slot in self._placement.slots_of(group)]
            if self._shares(pending.call):
                answers.insert(0, pending.own)
        there = [answer for answer in answers if answer is not None]
        assert len(there) == len(answers), f"the sum of lane {pending.stage.lane} is not complete"
        return there

    def _record_transfers(
        self, pending: _PendingCall, part: _Part, ffn: Member, combine: Combine
    ) -> None:
        """Note how long a part's call and answer were under way."""
        if pending.sent_s is not None:
            taken_s = combine.taken_us / 1e6
            computed_s = (combine.taken_us + combine.held_us) / 1e6
            sent_s, back_s = pending.sent_s, self._endpoint.received_s
            clock = self._peer_clocks.setdefault(ffn.incarnation, PeerClock())
            there_s, back_again_s = clock.directions(sent_s, taken_s, computed_s, back_s)
            record, stage = self._timeline.record, pending.stage
            record(EventKind.A_TO_F, sent_s, sent_s + there_s, stage, part.num_rows, ffn.slot)
            record(EventKind.F_TO_A, back_s - back_again_s, back_s, stage, part.num_rows, ffn.slot)

    def _follow(self) -> None:
        """Let native code call those who are in the topology and listened to."""
        if self._native is not None:
            self._collect(self._native)
            for pending in list(self._calls.values()):
                self._give_up(pending)
            self._quarantined = self._endpoint.quarantined
            self._native.follow(self._endpoint.topology.epoch, self._endpoint.pool(Role.FFN))

    def _collect(self, native: CallClient) -> None:
        """Take note of the answers that have come, before anything is given up."""
        for place in native.take_ready():
            pending = self._calls.get(place)
            if pending is None:
                continue
            if not native.is_sent(place):
                self._give_up(pending)
                self._assign(pending)
                continue
            self._catch_up(native, pending)
            del self._calls[place]
            pending.is_answered = True
            self._ready.append(pending.stage.lane)

    def _call(self, native: CallClient, pending: _PendingCall) -> bool:
        """Have a call sent by native code, if it goes to one worker as it is."""
        stage, call = pending.stage, pending.call
        if call.num_chosen or call.rows.dtype is not torch.uint8:
            return False
        peer = self._callee(call.layer, stage.lane)
        if peer is None:
            return False
        assert self._dtype is torch.float32, "native rows, native sums"
        now, rows = self._clock.now(), call.rows.contiguous()
        answer = torch.empty(rows.shape[0], self._answer_width(call, shard=0))
        pending.call = call._replace(rows=rows)
        pending.way = None if call.way is None else self._way(native, pending, answer)
        place = 2 * (stage.lane % AHEAD) + (stage.lane >= AHEAD)
        if not native.call(
            place,
            peer,
            stage,
            int((now - pending.live_since_s) * 1e6),
            Rows(rows.data_ptr(), *rows.shape),
            Rows(answer.data_ptr(), *answer.shape),
            pending.way,
        ):
            return False
        pending.epoch = self._endpoint.topology.epoch
        pending.sent_s, pending.resend_at = now, now + self._resend_s
        pending.place, pending.answer = place, answer
        self._calls[place] = pending
        if self._shares(call):
            pending.own = self._compute(stage, rows)
        return True

    def _give_up(self, pending: _PendingCall) -> None:
        """Go on with a call of native code in Python; an answer under way is still good."""
        assert self._native is not None and pending.place is not None
        is_under_way = self._native.give_up(pending.place)
        self._catch_up(self._native, pending)
        if not is_under_way:
            pending.resend_at = self._clock.now()
        del self._calls[pending.place]
        pending.place = pending.answer = pending.half = pending.way = None
        self._cut(pending)

    def _way(self, native: CallClient, pending: _PendingCall, answer: Tensor) -> NativeWay:
        """Return how native code is to go on from a call."""
        stage, call = pending.stage, pending.call
        assert call.way is not None, "the call does not say how"
        generation, callees = self._callees.get(stage.lane, (0, None))
        if callees is None or generation != native.generation:
            callees = native.places_of(
                [self._callee(layer, stage.lane) for layer in range(self._spec.num_layers)]
            )
            self._callees[stage.lane] = native.generation, callees
        layers, hidden, progress = call.way
        return NativeWay(
            layers.function,
            layers.contexts,
            layers.blocks,
            layers.seen,
            ctypes.addressof(callees),
            progress.end,
            call.rows.shape[1],
            hidden.data_ptr(),
            call.rows.data_ptr(),
            pending.live_since_s,
            *self._halves(pending, answer),
            progress.attended,
            progress.ahead,
        )

    def _holds_half(self, layer: int) -> bool:
        return self._first_halves is not None and self._first_halves.holds(layer)

    def _halves(self, pending: _PendingCall, answer: Tensor) -> tuple[int, int, int, int]:
        """Return the end of a way: who computes the first halves of FFNs, and to where."""
        if self._first_halves is None:
            return 0, 0, 0, 0
        pending.half = torch.empty_like(answer)
        function, contexts = self._first_halves.function, self._first_halves.contexts
        return function, contexts, pending.half.data_ptr(), self._second_from

    def _callee(self, layer: int, lane: int) -> str | None:
        """Return the incarnation that has all of a dense layer; None if there is none."""
        group, *others = self._groups_of(layer, lane)
        placement = self._placement
        if others or group in (None, placement.attention_side) or placement.num_shards > 1:
            return None
        assert group is not None, "a group of FFN workers"
        return self._pool[placement.slots_of(group)[0]]

    def _catch_up(self, native: CallClient, pending: _PendingCall) -> None:
        """Take note of the layer that native code has come to; the rows were replaced."""
        assert pending.place is not None, "native code knows it by its place"
        layer = native.layer(pending.place)
        if layer != pending.stage.layer:
            pending.stage = pending.stage._replace(layer=layer)
            pending.call = pending.call._replace(layer=layer)
            pending.sent_s = native.sent_s(pending.place)
            pending.resend_at = pending.sent_s + self._resend_s

    def _assign(self, pending: _PendingCall) -> None:
        """Choose who computes a call under the present topology, send its parts, compute the rest.

        While the topology lacks one of its experts the call simply waits for the next one.
        """
        pending.epoch = self._endpoint.topology.epoch
        own = self._cut(pending)
        if pending.parts:
            self._send(pending)
        if own is not None and pending.own is None:  # it is the same whoever else is there
            pending.own = self._compute(pending.stage, own.rows)

    def _cut(self, pending: _PendingCall) -> Share | None:
        """Cut a call into shares and parts; return the share of the attention side."""
        call, placement = pending.call, self._placement
        pending.shares = cut(call, self._groups_of(call.layer, pending.stage.lane))
        pending.parts = {}
        own = None
        if self._shares(call):
            own = Share(placement.attention_side, call.rows, None, call.rows.shape[0])
        for share in pending.shares or ():
            if share.group == placement.attention_side:
                own = share
                continue
            payload = to_payload(share.rows)
            for shard, slot in enumerate(placement.slots_of(share.group)):
                shape = (share.num_answers, self._answer_width(call, shard))
                pending.parts[slot] = _Part(self._pool[slot], payload, share.rows.shape[0], shape)
        return own

    def _answer_width(self, call: FFNCall, shard: int) -> int:
        if not call.is_head:
            return self._spec.hidden_size
        part = column_shard(self._spec.vocab_size, *self._placement.head_shard(shard))
        return part.stop - part.start

    def _shares(self, call: FFNCall) -> bool:
        """Tell whether the attention side computes a part of what others are asked for."""
        return call.is_head and self._placement.shares_head

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
