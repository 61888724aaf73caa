"""The attention side of A→F→A: dispatches calls, keeps them until complete, adds them up."""

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from afd_server.core.clock import Clock
from afd_server.core.errors import ProtocolError, WorkerFailed
from afd_server.core.stage import StageId
from afd_server.core.topology import FFNParallel, Member, Role
from afd_server.models.base import FFNCall
from afd_server.models.forward import add_in_part_order
from afd_server.telemetry.timeline import EventKind, Timeline
from afd_server.transport.endpoint import Endpoint, Received
from afd_server.transport.messages import Combine, Dispatch, Payload
from afd_server.workers.attention.peer_clock import PeerClock
from afd_server.workers.config import FFNConfig
from afd_server.workers.tensors import to_payload, to_tensor

RETRY_REFUSED_S = 0.05  # a refusal is mostly a topology that has not arrived yet
PERMANENT_REFUSALS = frozenset({"part", "range", "shape", "dtype", "model", "fingerprint"})


@dataclass(slots=True)
class _PendingCall:
    """One lane's call in flight. The input is kept so that any part can be sent again.

    `epoch` is that of its assignment; resends carry the newest one. `live_since_s` is since when
    the worker has had live sequences without a break.
    """

    stage: StageId
    num_rows: int
    payload: Payload
    live_since_s: float
    epoch: int = 0
    sent_s: float | None = None  # None once it was sent again: which one is answered is unknown
    targets: dict[int, str] = field(default_factory=dict)  # part → incarnation
    partials: dict[int, Tensor] = field(default_factory=dict)
    resend_at: float = 0.0


class FFNClient:
    """Sends FFN calls to the workers that hold their parts and sums the answers.

    A call is keyed by (own incarnation, epoch, step, lane, layer, part), so it may be sent any
    number of times: the first valid answer to each part counts (invariant I5). Partial sums are
    [rows, hidden_size] of `dtype`.
    """

    def __init__(
        self,
        config: FFNConfig,
        slot: int,
        hidden_size: int,
        dtype: torch.dtype,
        endpoint: Endpoint,
        clock: Clock,
        timeline: Timeline,
        resend_s: float,
    ) -> None:
        self._config = config
        self._hidden_size = hidden_size
        self._dtype = dtype
        self._slot = slot
        self._endpoint = endpoint
        self._clock = clock
        self._timeline = timeline
        self._resend_s = resend_s
        self._peer_clocks: dict[str, PeerClock] = {}  # by incarnation
        self._pending: dict[int, _PendingCall] = {}  # by lane
        self.counters: Counter[str] = Counter()

    @property
    def num_resends(self) -> int:
        """Return how often something was sent again."""
        return self.counters["resends"]

    def dispatch(self, stage: StageId, call: FFNCall, live_since_s: float) -> bool:
        """Send a lane's call on its way; the lane has no other one.

        Returns:
            False: its sum is not there yet.
        """
        assert stage.lane not in self._pending, f"lane {stage.lane} already waits"
        pending = _PendingCall(stage, call.rows.shape[0], to_payload(call.rows), live_since_s)
        self._pending[stage.lane] = pending
        self._assign(pending)
        return False

    def accept(self, received: Received, combine: Combine) -> int | None:
        """Take in an answer.

        Returns:
            The lane whose call is complete now, or None.
        """
        pending = self._pending.get(combine.lane)
        if (
            pending is None
            or pending.stage != StageId(combine.step, combine.lane, combine.layer)
            or combine.call_epoch < pending.epoch
            or pending.targets.get(combine.part) != received.envelope.source
            or combine.part in pending.partials
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
            partial = to_tensor(combine.partial, self._dtype)
        except ProtocolError:
            partial = None
        if partial is None or partial.shape != (pending.num_rows, self._hidden_size):
            self.counters["bad_partial"] += 1  # the resend timer asks again
            return None
        pending.partials[combine.part] = partial
        self._record_transfers(pending, received.sender, combine)
        return pending.stage.lane if self._is_complete(pending) else None

    def take(self, lane: int) -> Tensor:
        """Return the sum of a complete call, [tokens, hidden] in its dtype, and forget the call."""
        pending = self._pending.pop(lane)
        partials = [pending.partials[part] for part in range(self._config.num_parts)]
        return add_in_part_order(partials)

    def reassign(self) -> None:
        """Follow a new topology: calls that waited for a lost worker start over."""
        find = self._endpoint.topology.find
        self._peer_clocks = {inc: c for inc, c in self._peer_clocks.items() if find(inc)}
        for pending in self._pending.values():
            if self._is_complete(pending):
                continue  # its lane is about to take the sum
            alive = all(find(incarnation) for incarnation in pending.targets.values())
            if not pending.targets or not alive:
                self._assign(pending)

    def resend_due(self) -> None:
        """Send again what has gone unanswered for too long."""
        now = self._clock.now()
        for pending in self._pending.values():
            if pending.targets and pending.resend_at <= now and not self._is_complete(pending):
                self.counters["resends"] += 1
                self._send(pending)
                pending.sent_s = None

    def next_resend_s(self) -> float | None:
        """Return the seconds until `resend_due` has something to do; None if nothing waits."""
        due = [
            pending.resend_at
            for pending in self._pending.values()
            if pending.targets and not self._is_complete(pending)
        ]
        return max(0.0, min(due) - self._clock.now()) if due else None

    def _record_transfers(self, pending: _PendingCall, ffn: Member, combine: Combine) -> None:
        """Note how long a part's call and answer were under way."""
        sent_s, back_s = pending.sent_s, self._endpoint.received_s
        if sent_s is None:
            return
        taken_s = combine.taken_us / 1e6
        computed_s = (combine.taken_us + combine.held_us) / 1e6
        clock = self._peer_clocks.setdefault(ffn.incarnation, PeerClock())
        there_s, back_again_s = clock.directions(sent_s, taken_s, computed_s, back_s)
        rows, record = pending.num_rows, self._timeline.record
        record(EventKind.A_TO_F, sent_s, sent_s + there_s, pending.stage, rows, ffn.slot)
        record(EventKind.F_TO_A, back_s - back_again_s, back_s, pending.stage, rows, ffn.slot)

    def _is_complete(self, pending: _PendingCall) -> bool:
        return len(pending.partials) == self._config.num_parts

    def _assign(self, pending: _PendingCall) -> None:
        """Choose the workers of a call under the present topology and send all parts.

        While the topology lacks a part the call simply waits for the next one.
        """
        topology = self._endpoint.topology
        pool = {member.slot: member.incarnation for member in topology.pool(Role.FFN)}
        pending.epoch = topology.epoch
        pending.partials = {}
        if self._config.parallel is FFNParallel.REPLICATE:
            slots = sorted(pool)
            chosen = slots[(self._slot + pending.stage.lane) % len(slots)] if slots else None
            pending.targets = {} if chosen is None else {0: pool[chosen]}
        else:
            parts = range(self._config.num_parts)
            complete = all(part in pool for part in parts)
            pending.targets = {part: pool[part] for part in parts} if complete else {}
        self._send(pending)

    def _send(self, pending: _PendingCall) -> None:
        now = pending.sent_s = self._clock.now()
        pending.resend_at = now + self._resend_s
        live_us = int((now - pending.live_since_s) * 1e6)
        step, lane, layer = pending.stage
        for part, incarnation in pending.targets.items():
            if part not in pending.partials:
                message = Dispatch(step, lane, layer, part, live_us, pending.payload)
                if not self._endpoint.try_send(incarnation, message):
                    pending.resend_at = self._clock.now() + RETRY_REFUSED_S
