"""The FFN worker: gathers dispatches of a layer, computes once, answers each peer.

It keeps no state between calls, so any call may be repeated anywhere (invariant I5).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from afd_server.core.clock import Clock
from afd_server.core.errors import ProtocolError
from afd_server.core.model_spec import ModelSpec
from afd_server.core.stage import StageId
from afd_server.core.topology import Role
from afd_server.kernels.table import RowFormat
from afd_server.models.head import Held
from afd_server.models.routing import CHOICE_BYTES, ELSEWHERE, answers_of, experts_of
from afd_server.policy.gather import gather
from afd_server.telemetry.timeline import EventKind, Timeline
from afd_server.transport.calls import CallServer
from afd_server.transport.endpoint import Endpoint, Received
from afd_server.transport.messages import EMPTY, Combine, Dispatch, LoadReport
from afd_server.workers.tensors import events_payload, to_payload, to_tensor


@dataclass(frozen=True, slots=True)
class _WaitingCall:
    """A checked dispatch. `key` names it uniquely: peer, epoch, step, lane, layer, part."""

    key: tuple[str, int, int, int, int, int]
    stage: StageId
    peer: int  # the sender's slot
    activations: Tensor  # the rows of an `FFNCall`
    num_answers: int
    taken_s: float
    live_since_s: float  # since when the sender has had live sequences

    @property
    def layer(self) -> int:
        """Return what is asked for; in the `stage` is the layer that it belongs to."""
        return self.key[4]

    @property
    def rows(self) -> int:
        return self.activations.shape[0]


class FFNWorker:
    """One part of the FFNs, and of the head, behind an endpoint.

    Args:
        held: the part's weights.
        spec: of the model, to check calls against.
        slot: which part this is; calls for another are refused.
        experts: which of each layer this part has; the last are those of the head. Layers behind it
            are those before it again, of whose FFN the second half alone is asked for (`Held`).
        row_format: of the rows that calls carry.
        endpoint: towards the attention pool.
        max_gather_rows: most rows computed together.
        clock: dates what goes into the timeline.
        timeline: takes what was computed, and waits.
        server: answers calls of layers that are computed natively before they get here; None
            without it.
    """

    def __init__(
        self,
        held: Held,
        spec: ModelSpec,
        slot: int,
        experts: Sequence[Sequence[int]],
        row_format: RowFormat,
        endpoint: Endpoint,
        max_gather_rows: int,
        clock: Clock,
        timeline: Timeline,
        server: CallServer | None = None,
    ) -> None:
        self._held = held
        self._spec = spec
        self._slot = slot
        self._num_chosen = [*map(spec.num_chosen, range(spec.num_layers)), 0]
        self._experts = [frozenset((*of_layer, ELSEWHERE)) for of_layer in experts]
        self._row_format = row_format
        self._endpoint = endpoint
        self._max_gather_rows = max_gather_rows
        self._clock = clock
        self._timeline = timeline
        self._waits_since_s: float | None = clock.now()  # None while calls are there
        self._waiting: dict[tuple[str, int, int, int, int, int], _WaitingCall] = {}
        self._server = server
        if server is not None:
            server.idle_since_s = self._waits_since_s
        self._quarantined: frozenset[str] = frozenset()
        self._num_calls = 0
        self._num_rows = 0

    @property
    def num_steps(self) -> int:
        return self._num_calls + (self._server.num_calls if self._server is not None else 0)

    @property
    def is_ready(self) -> bool:
        return True

    @property
    def is_between_steps(self) -> bool:
        return not self._waiting

    def handle(self, received: Received) -> None:
        """Queue a dispatch, or refuse it with the reason; a repetition in the queue is dropped."""
        message = received.message
        if not isinstance(message, Dispatch):
            return
        envelope = received.envelope
        try:
            activations = self._checked(message)
            num_answers = self._num_answers(message.layer, activations)
        except ProtocolError as error:
            self._endpoint.counters[f"refused_{error.reason}"] += 1
            call_key = (message.step, message.lane, message.layer, message.part, envelope.epoch)
            self._endpoint.try_send(envelope.source, Combine(*call_key, 0, 0, error.reason, EMPTY))
            return
        layer = message.layer % self._held.second_from
        stage = StageId(message.step, message.lane, layer)
        key = (envelope.source, envelope.epoch, message.step, message.lane, message.layer,
               message.part)  # fmt: skip
        taken_s = self._endpoint.received_s
        live_since_s = taken_s - message.live_us / 1e6
        slot = received.sender.slot
        call = _WaitingCall(key, stage, slot, activations, num_answers, taken_s, live_since_s)
        self._waiting.setdefault(key, call)

    def advance(self) -> bool:
        """Compute the oldest group of calls and answer them.

        Returns:
            Whether more calls wait.
        """
        if self._server is not None:
            self._follow(self._server)
        if not self._waiting:
            return False
        begin_s = self._clock.now()
        self._record_wait(begin_s)
        group = gather(self._waiting.values(), self._max_gather_rows)[0]
        is_alone = len(group) == 1
        rows = group[0].activations if is_alone else torch.cat([c.activations for c in group])
        answers = self._held.answer(group[0].layer, rows)
        end_s = self._clock.now()
        by_call = (answers,) if is_alone else torch.split(answers, [c.num_answers for c in group])
        for call, partial in zip(group, by_call, strict=True):
            source, epoch, step, lane, layer, part = call.key
            taken_us, held_us = int(call.taken_s * 1e6), int((end_s - call.taken_s) * 1e6)
            answer = Combine(
                step, lane, layer, part, epoch, taken_us, held_us, "", to_payload(partial)
            )
            self._endpoint.try_send(source, answer)  # lost answers are asked for again
            del self._waiting[call.key]
        self._num_calls += len(group)
        self._num_rows += rows.shape[0]
        self._record(group, begin_s, end_s)
        self._waits_since_s = None if self._waiting else self._clock.now()
        if self._server is not None:
            self._server.idle_since_s = self._waits_since_s
        return bool(self._waiting)

    def wait_s(self) -> float | None:
        """Return None: an FFN worker only answers."""
        return None

    def follow_topology(self) -> None:
        """Drop the calls of peers that are gone."""
        topology = self._endpoint.topology
        for key in [key for key in self._waiting if topology.find(key[0]) is None]:
            del self._waiting[key]
        if self._server is not None:
            self._server.follow(topology.epoch, self._endpoint.pool(Role.ATTENTION))

    def load(self, num_bad_frames: int) -> LoadReport:
        """Return the present load and what was done; `running` counts the calls that wait."""
        num_native_rows = 0
        if self._server is not None:
            self._timeline.extend(self._server.take_events())
            num_native_rows = self._server.num_rows
        events = events_payload(self._timeline)
        return LoadReport(
            steps=self.num_steps,
            running=len(self._waiting),
            waiting=0,
            free_blocks=0,
            cached_blocks=0,
            num_blocks=0,
            preemptions=0,
            queried_tokens=0,
            hit_tokens=0,
            rows=self._num_rows + num_native_rows,
            bad_frames=num_bad_frames,
            resends=0,
            dropped_events=self._timeline.num_dropped,
            clock_us=int(self._clock.now() * 1e6),
            step_us=0,
            alone_us=0,
            decode_lanes=0,
            slowness_permille=0,
            events=events,
        )

    def expert_load(self) -> None:
        """Return None: the gates are on the attention side."""

    def _follow(self, server: CallServer) -> None:
        """Keep up with what the native side did, and with whom it must not listen to."""
        self._timeline.extend(server.take_events())
        if self._waits_since_s is not None and server.idle_since_s is not None:
            self._waits_since_s = max(self._waits_since_s, server.idle_since_s)
        quarantined = self._endpoint.quarantined
        if quarantined != self._quarantined:
            self._quarantined = quarantined
            server.follow(self._endpoint.topology.epoch, self._endpoint.pool(Role.ATTENTION))

    def _record_wait(self, now_s: float) -> None:
        """Note how long there was live work and nothing to compute."""
        if self._waits_since_s is None:
            return
        live_since_s = min(call.live_since_s for call in self._waiting.values())
        begin_s = max(self._waits_since_s, live_since_s)
        if begin_s < now_s:
            self._timeline.record(EventKind.WAIT, begin_s, now_s)

    def _record(self, group: Sequence[_WaitingCall], begin_s: float, end_s: float) -> None:
        oldest, *others = group
        rows, record = sum(call.rows for call in group), self._timeline.record
        record(EventKind.FFN, begin_s, end_s, oldest.stage, rows, oldest.peer)
        for call in others:
            record(EventKind.GATHERED, begin_s, end_s, call.stage, call.rows, call.peer)

    def _checked(self, dispatch: Dispatch) -> Tensor:
        if dispatch.part != self._slot:
            raise ProtocolError(f"part {dispatch.part}, this is {self._slot}", "part")
        layer, num_layers = dispatch.layer, self._spec.num_layers
        second = layer - self._held.second_from
        if second >= num_layers or (second >= 0 and not self._held.has_halves(second)):
            raise ProtocolError(f"layer {layer} of {num_layers}", "range")
        shape = dispatch.activations.shape
        width, dtype = self._row_format.size(self._spec.hidden_size), self._row_format.dtype
        num_chosen = self._num_chosen[layer] if second < 0 else 0
        if num_chosen:
            width, dtype = width * dtype.itemsize + num_chosen * CHOICE_BYTES, torch.uint8
        if len(shape) != 2 or shape[0] == 0 or shape[1] != width:
            raise ProtocolError(f"shape {shape}, a row is {width}", "shape")
        return to_tensor(dispatch.activations, dtype)

    def _num_answers(self, layer: int, activations: Tensor) -> int:
        """Return how many rows a checked call will be answered with."""
        layer %= self._held.second_from
        num_chosen, held = self._num_chosen[layer], self._experts[layer]
        if not num_chosen:
            if len(held) == 1:
                raise ProtocolError(f"layer {layer} is held by others", "part")
            return activations.shape[0]
        experts = experts_of(activations, num_chosen)
        if not held.issuperset(torch.unique(experts).tolist()):
            raise ProtocolError(f"layer {layer}: an expert is held by others", "part")
        answers = answers_of(experts)
        if not bool(answers.any(1).all()):
            raise ProtocolError(f"layer {layer}: a row asks for no expert", "range")
        return int(answers.sum())
