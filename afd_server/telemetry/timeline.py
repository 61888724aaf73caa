"""The stage timeline: what a worker did and when, kept in a ring of fixed size.

Knows nothing of models or wires. Times are seconds on the clock of the worker that records.
"""

import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple

from afd_server.core.errors import ProtocolError
from afd_server.core.stage import StageId

_EVENT = struct.Struct("<ddQIIIHH")
EVENT_BYTES = _EVENT.size

CAPACITY = 4096  # events between two reports: 16,000 a second, some five times a busy worker's
LONGEST_S = 3600.0  # no event lasts longer; what says so is no event of ours
NOWHERE = StageId(0, 0, 0)  # of an event that belongs to no stage


class EventKind(IntEnum):
    """What a span of time was spent on. The numbers travel on the wire."""

    ATTENTION = 1  # a lane in one layer: from its plan or FFN sum to its FFN call, or the head's
    SAMPLE = 2  # a lane's sampling, from its logits on; no layer
    STEP = 3  # a lane's whole step: planning, every layer, logits, sampling, reporting; no layer
    A_TO_F = 4  # an FFN call on its way: from before it is sent until the FFN worker takes it in
    F_TO_A = 5  # a partial sum on its way: from its computation until the worker takes it in
    FFN = 6  # a group of calls computed; stage and peer are those of the oldest call
    GATHERED = 7  # each further call of the group before, over the same time
    WAIT = 8  # nothing to compute though there is live work; no stage
    EXPECTED = 9  # as `STEP`, but what it was expected to take, given what was beside it


class Event(NamedTuple):
    """One span. `peer` is the slot of the worker at the other end of a call, else 0."""

    begin_s: float
    end_s: float
    step: int
    rows: int
    lane: int
    kind: int
    layer: int
    peer: int


class Timeline:
    """The latest events of one worker; the oldest give way, and are counted.

    Recording allocates nothing and takes about half a microsecond.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._ring = bytearray(capacity * EVENT_BYTES)
        self._next = 0  # where in the ring the next event goes
        self.num_recorded = 0  # since the start
        self._num_drained = 0  # of these, taken or dropped
        self._num_dropped = 0

    @property
    def num_dropped(self) -> int:
        """Return the events that nobody drained in time, since the start."""
        return self._num_dropped

    def record(
        self,
        kind: EventKind,
        begin_s: float,
        end_s: float,
        stage: StageId = NOWHERE,
        rows: int = 0,
        peer: int = 0,
    ) -> None:
        """Note that something happened from `begin_s` to `end_s`."""
        step, lane, layer = stage
        _EVENT.pack_into(
            self._ring, self._next, begin_s, end_s, step, rows, lane, kind, layer, peer
        )
        self._next = (self._next + EVENT_BYTES) % len(self._ring)
        self.num_recorded += 1

    def extend(self, events: bytes) -> None:
        """Note events that native code has recorded, as `drain` returns them."""
        self.num_recorded += len(events) // EVENT_BYTES
        while events:
            room = len(self._ring) - self._next
            part, events = events[:room], events[room:]
            self._ring[self._next : self._next + len(part)] = part
            self._next = (self._next + len(part)) % len(self._ring)

    def drain(self) -> bytes:
        """Return the events since the last call as `read_events` takes them, in their order."""
        data = self.since(self._num_drained)
        self._num_dropped += self.num_recorded - self._num_drained - len(data) // EVENT_BYTES
        self._num_drained = self.num_recorded
        return data

    def since(self, num_recorded: int) -> bytes:
        """Return, as `drain` does, the events after the first so many, as far as they are kept."""
        num_kept = min(self.num_recorded - num_recorded, len(self._ring) // EVENT_BYTES)
        begin, end = self._next - num_kept * EVENT_BYTES, self._next
        if begin >= 0:
            return bytes(self._ring[begin:end])
        return bytes(self._ring[begin:] + self._ring[:end])


def read_events(data: bytes) -> Iterator[Event]:
    """Yield the events of a `drain`.

    Raises:
        ProtocolError: no worker of ours recorded this.
    """
    if len(data) % EVENT_BYTES:
        raise ProtocolError(f"{len(data)} bytes are no whole number of events", "size")
    for event in map(Event._make, _EVENT.iter_unpack(data)):
        if not (event.kind in _KINDS and 0 <= event.end_s - event.begin_s <= LONGEST_S):
            raise ProtocolError(f"{event} is no event", "range")
        yield event


_KINDS = frozenset(EventKind)
