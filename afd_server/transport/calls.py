"""Both ends of FFN calls in native code while a link waits: `native/calls.h`, through ctypes.

They deal with what is exactly right and comes from known peers, and leave the rest to Python, which
reads the same frames with the same checks and writes the same bytes, ten times as slowly.
"""

import ctypes
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from afd_server.core.stage import StageId
from afd_server.transport.ring import Ring, RingLibrary
from afd_server.transport.sockets import NativeSockets

MOST_RINGS = 64  # bits of `bell` and `left`
MOST_EVENTS = 2048
EVENT_BYTES = 40
MOST_CALLS = 64  # out at once; most answers between two looks
_UNSENT = 3  # as calls.h has it


class NativeLayer(NamedTuple):
    """What computes the calls of one layer: function(context, rows, count, out).

    Attributes:
        function, context: addresses; 0 for a layer whose calls are left to Python.
        row_bytes: of one row of a call.
        width: float32 elements of one row of the answer.
    """

    function: int
    context: int
    row_bytes: int
    width: int


class Peer(NamedTuple):
    """A worker at the other end of calls.

    Attributes:
        slot: of the worker, for the timeline.
        expected: what the headers of its calls or answers begin with, before the numbers.
        own: what the headers that are sent to it begin with.
    """

    slot: int
    expected: bytes
    own: bytes


NOBODY = Peer(0, b"", b"")


class NativeEnd(Protocol):
    """One end of calls, as a link sees it."""

    @property
    def answered_ns(self) -> int:
        """Return when the latest answer was given or came, monotonic; 0 if none was."""
        ...

    def use_rings(self, rings: Mapping[str, Ring]) -> None:
        """Look at these peers' rings from now on."""
        ...

    def use_sockets(self, sockets: NativeSockets | None) -> None:
        """Look at these sockets, as they are now, instead of rings; None: at rings again."""
        ...

    def watch(self, longest_ns: int) -> bool:
        """Wait for a while, without the interpreter's lock, and do what can be done.

        Rings are watched; sockets are slept on.

        Returns:
            Whether there is something to do that is left to Python.
        """
        ...

    def take_sleepers(self) -> list[str]:
        """Return the peers that must be woken: they were sent to just when they went to sleep."""
        ...

    def take_left(self) -> list[str]:
        """Return the peers whose oldest record `watch` has left to Python, or whose ring ended."""
        ...


_POINTER, _INTEGER, _DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


class _Peer(ctypes.Structure):
    _fields_ = (
        ("ring", _POINTER), ("memory", _POINTER), ("socket", _POINTER),
        ("route", ctypes.c_char_p), ("expected", ctypes.c_char_p), ("own", ctypes.c_char_p),
        ("route_size", _INTEGER), ("expected_size", _INTEGER), ("own_size", _INTEGER),
        ("slot", _INTEGER),
    )  # fmt: skip


class _Table(ctypes.Structure):
    _fields_ = (
        ("peers", _POINTER), ("count", _INTEGER), ("sockets", _POINTER), ("bell", ctypes.c_uint64),
        ("left", ctypes.c_uint64),
    )  # fmt: skip


class _Layer(ctypes.Structure):
    _fields_ = (
        ("function", _POINTER), ("context", _POINTER),
        ("row_bytes", _INTEGER), ("width", _INTEGER),
    )  # fmt: skip


class _Server(ctypes.Structure):
    _fields_ = (
        ("callers", _POINTER), ("layers", _POINTER), ("events", _POINTER), ("sequence", _POINTER),
        ("num_layers", _INTEGER), ("second_from", _INTEGER), ("slot", _INTEGER),
        ("epoch", _INTEGER), ("most_rows", _INTEGER), ("most_events", _INTEGER),
        ("num_events", _INTEGER), ("num_calls", _INTEGER), ("num_rows", _INTEGER),
        ("idle_since_s", _DOUBLE), ("answered_s", _DOUBLE),
    )  # fmt: skip


class _Out(ctypes.Structure):
    _fields_ = (
        ("state", _INTEGER), ("peer", _INTEGER), ("epoch", _INTEGER), ("step", _INTEGER),
        ("lane", _INTEGER), ("layer", _INTEGER), ("part", _INTEGER), ("rows", _INTEGER),
        ("width", _INTEGER), ("answer", _POINTER), ("way", _POINTER), ("sent_s", _DOUBLE),
        ("shift", _INTEGER), ("is_answered", _INTEGER), ("is_own_due", _INTEGER),
    )  # fmt: skip


class NativeWay(ctypes.Structure):
    """How a micro-batch goes on from an answer without Python, to the call of the next layer.

    Attributes:
        function: of `kernels.table.NativeAttention`.
        contexts, blocks, seen: addresses of arrays of addresses for it, by layer.
        peers: address of an array from `CallClient.places_of`, by layer.
        num_layers: that it goes through; it ends before the layer of this number.
        row_bytes: of one row of a call.
        hidden, data: addresses of the residual and of the call's rows; both are replaced.
        live_since_s: since when there has been live work.
        first_half, first_halves: function, and address of an array of contexts by layer, 0 where
            there is none, that compute the first half of a layer's FFN here; 0 if nothing does.
        own: address of memory for that.
        second_from: by how much the number of a layer is higher of whose FFN the second half alone
            is asked for.
        attended: address of the number of layers whose keys are written, which is kept up to date.
        ahead: address of that of the micro-batch that goes ahead, which this one waits for in each
            layer; 0 if it follows none.
    """

    _fields_ = (
        ("function", _POINTER), ("contexts", _POINTER), ("blocks", _POINTER), ("seen", _POINTER),
        ("peers", _POINTER), ("num_layers", _INTEGER), ("row_bytes", _INTEGER),
        ("hidden", _POINTER), ("data", _POINTER), ("live_since_s", _DOUBLE),
        ("first_half", _POINTER), ("first_halves", _POINTER), ("own", _POINTER),
        ("second_from", _INTEGER), ("attended", _POINTER), ("ahead", _POINTER),
    )  # fmt: skip


class _Client(ctypes.Structure):
    _fields_ = (
        ("peers", _POINTER), ("outs", _POINTER), ("ready", _POINTER),
        ("sequence", _POINTER), ("events", _POINTER),
        ("num_outs", _INTEGER), ("num_ready", _INTEGER), ("most_events", _INTEGER),
        ("num_events", _INTEGER),
        ("idle_since_s", _DOUBLE), ("answered_s", _DOUBLE),
    )  # fmt: skip


class _Peers:
    """The peers of an end, as far as it can reach them, in a table for native code."""

    def __init__(self) -> None:
        self._rings: Mapping[str, Ring] = {}
        self._sockets: NativeSockets | None = None
        self._known: Mapping[str, Peer] = {}
        self._entries = (_Peer * 0)()
        self._table = _Table()
        self.places: dict[str, int] = {}  # in the table, of the known ones

    def follow(self, known: Mapping[str, Peer]) -> None:
        self._known = known
        self._set_up()

    def use_rings(self, rings: Mapping[str, Ring]) -> None:
        self._rings = rings
        self._set_up()

    def use_sockets(self, sockets: NativeSockets | None) -> None:
        self._sockets = sockets
        self._set_up()

    @property
    def address(self) -> int:
        return ctypes.addressof(self._table)

    def slot(self, peer: str) -> int:
        return self._known[peer].slot

    def take_sleepers(self) -> list[str]:
        bell, self._table.bell = int(self._table.bell), 0
        return self._names_of(bell)

    def take_left(self) -> list[str]:
        left, self._table.left = int(self._table.left), 0
        return self._names_of(left)

    def _names_of(self, bits: int) -> list[str]:
        return [peer for bit, peer in enumerate(self._rings) if bits >> bit & 1] if bits else []

    def _set_up(self) -> None:
        entries = self._ring_entries() if self._sockets is None else self._entries_of(self._sockets)
        self._entries = (_Peer * len(entries))(*entries.values())
        self._table.peers, self._table.count = ctypes.addressof(self._entries), len(entries)
        self._table.left = 0  # the next look says so again, of the rings as they are now
        self._table.sockets = None if self._sockets is None else self._sockets.address
        self.places = {name: i for i, name in enumerate(entries) if name in self._known}

    def _ring_entries(self) -> dict[str, _Peer]:
        assert len(self._rings) <= MOST_RINGS, f"{len(self._rings)} rings"
        return {
            name: _entry(self._known.get(name, NOBODY), ring.handle, ring.address)
            for name, ring in self._rings.items()
        }

    def _entries_of(self, sockets: NativeSockets) -> dict[str, _Peer]:
        return {
            name: _entry(peer, socket=way.handle, route=way.route)
            for name, peer in self._known.items()
            if (way := sockets.way_to(name)) is not None
        }


def _entry(
    peer: Peer,
    ring: int | None = None,
    memory: int | None = None,
    socket: int | None = None,
    route: bytes | None = None,
) -> _Peer:
    slot, expected, own = peer
    sizes = len(route or b""), len(expected), len(own)
    return _Peer(ring, memory, socket, route, expected, own, *sizes, slot)


class CallServer:
    """Answers the dispatches of some layers for one part.

    Args:
        layers: of the model and its head, in order, and then of each layer the second half of its
            FFN; whoever made them keeps them valid.
        second_from: of how many layers there is all.
        slot: the part.
        most_rows: computed together; a call with more is left to Python.
        sequence: counts the messages of this process.
    """

    def __init__(
        self,
        library: RingLibrary,
        layers: Sequence[NativeLayer],
        second_from: int,
        slot: int,
        most_rows: int,
        sequence: ctypes.c_int64,
    ) -> None:
        self._library = library
        self._layers = (_Layer * len(layers))(*(_Layer(*layer) for layer in layers))
        self._events = ctypes.create_string_buffer(MOST_EVENTS * EVENT_BYTES)
        self._sequence = sequence
        self._peers = _Peers()
        self._state = _Server(
            callers=self._peers.address,
            layers=ctypes.addressof(self._layers),
            events=ctypes.addressof(self._events),
            sequence=ctypes.addressof(sequence),
            num_layers=len(layers),
            second_from=second_from,
            slot=slot,
            most_rows=most_rows,
            most_events=MOST_EVENTS,
        )
        self._address = ctypes.addressof(self._state)

    @property
    def num_calls(self) -> int:
        """Return the calls answered."""
        return int(self._state.num_calls)

    @property
    def num_rows(self) -> int:
        """Return the rows computed."""
        return int(self._state.num_rows)

    @property
    def answered_ns(self) -> int:
        """Return when the latest call was answered, monotonic; 0 if none was."""
        return int(self._state.answered_s * 1e9)

    @property
    def idle_since_s(self) -> float | None:
        """Return since when there has been nothing to compute; None while there is."""
        return float(self._state.idle_since_s) or None

    @idle_since_s.setter
    def idle_since_s(self, since_s: float | None) -> None:
        self._state.idle_since_s = since_s or 0.0

    def follow(self, epoch: int, callers: Mapping[str, Peer]) -> None:
        """Answer these peers from now on, under this epoch, and nobody else."""
        self._state.epoch = epoch
        self._peers.follow(callers)

    def use_rings(self, rings: Mapping[str, Ring]) -> None:
        """Look at these peers' rings from now on."""
        self._peers.use_rings(rings)

    def use_sockets(self, sockets: NativeSockets | None) -> None:
        """Look at these sockets, as they are now, instead of rings; None: at rings again."""
        self._peers.use_sockets(sockets)

    def watch(self, longest_ns: int) -> bool:
        """Answer calls for a while; see `NativeEnd`."""
        return bool(self._library.serve(self._address, longest_ns))

    def take_sleepers(self) -> list[str]:
        """Return the peers that must be woken: they were answered just when they went to sleep."""
        return self._peers.take_sleepers()

    def take_left(self) -> list[str]:
        """Return the peers whose oldest record is left to Python; see `NativeEnd`."""
        return self._peers.take_left()

    def take_events(self) -> bytes:
        """Return the new events, as a timeline keeps them."""
        size, self._state.num_events = self._state.num_events * EVENT_BYTES, 0
        return self._events.raw[:size] if size else b""


class CallClient:
    """Sends the calls of prepared uint8 rows, and takes float32 answers.

    A call is known by a place below `MOST_CALLS`, which is free again when its answer has come. One
    that has a way goes on from there: an answer computes the call of the next layer, which is then
    out at the same place, as far as the way goes.

    Args:
        sequence: counts the messages of this process.

    Attributes:
        generation: counts the changes of places of peers.
    """

    def __init__(self, library: RingLibrary, sequence: ctypes.c_int64) -> None:
        self._library = library
        self._outs = (_Out * MOST_CALLS)()
        self._ready = (_INTEGER * MOST_CALLS)()
        self._events = ctypes.create_string_buffer(MOST_EVENTS * EVENT_BYTES)
        self._sequence = sequence
        self._peers = _Peers()
        self._state = _Client(
            peers=self._peers.address,
            outs=ctypes.addressof(self._outs),
            events=ctypes.addressof(self._events),
            most_events=MOST_EVENTS,
            ready=ctypes.addressof(self._ready),
            sequence=ctypes.addressof(sequence),
            num_outs=MOST_CALLS,
        )
        self._address = ctypes.addressof(self._state)
        self._epoch = 0
        self._sleepers: list[str] = []  # of an earlier generation
        self.generation = 0

    @property
    def answered_ns(self) -> int:
        """Return when the latest answer came, monotonic; 0 if none did."""
        return int(self._state.answered_s * 1e9)

    @property
    def idle_since_s(self) -> float | None:
        """Return since when there has been nothing to compute; None while there is."""
        return float(self._state.idle_since_s) or None

    @idle_since_s.setter
    def idle_since_s(self, since_s: float | None) -> None:
        self._state.idle_since_s = since_s or 0.0

    def follow(self, epoch: int, answerers: Mapping[str, Peer]) -> None:
        """Call these peers from now on, under this epoch, and nobody else.

        Calls that are out are given up, as they are with every change of rings and sockets.
        """
        self._epoch = epoch
        self._peers.follow(answerers)
        self._forget()

    def use_rings(self, rings: Mapping[str, Ring]) -> None:
        """Look at these peers' rings from now on."""
        self._sleepers = self.take_sleepers()
        self._peers.use_rings(rings)
        self._forget()

    def use_sockets(self, sockets: NativeSockets | None) -> None:
        """Look at these sockets, as they are now, instead of rings; None: at rings again."""
        self._peers.use_sockets(sockets)
        self._forget()

    def places_of(self, peers: Sequence[str | None]) -> "ctypes.Array[ctypes.c_int64]":
        """Return where native code finds peers in this generation; -1 for nobody it may call."""
        return (_INTEGER * len(peers))(*(self._peers.places.get(peer or "", -1) for peer in peers))

    def call(
        self,
        place: int,
        peer: str,
        stage: StageId,
        live_us: int,
        rows: "Rows",
        answer: "Rows",
        way: NativeWay | None = None,
    ) -> bool:
        """Send a call, unless the peer cannot be reached this way now.

        Args:
            place: free, and below `MOST_CALLS`; of who follows another one, a lower one than that.
            peer: the worker's incarnation.
            stage: of the call.
            live_us: as a `Dispatch` has it.
            rows: the call's.
            answer: memory for the answer, until that is ready or the call is given up.
            way: how to go on with it, kept as long; None if the caller does that.
        """
        to = self._peers.places.get(peer)
        if to is None or place >= MOST_CALLS:
            return False
        return bool(self._library.call(
            self._address, place, to, self._epoch, *stage, self._peers.slot(peer), live_us,
            *rows, answer.address, answer.width, None if way is None else ctypes.addressof(way),
        ))  # fmt: skip

    def layer(self, place: int) -> int:
        """Return the layer of the latest call at a place."""
        return int(self._outs[place].layer)

    def sent_s(self, place: int) -> float:
        """Return when the latest call at a place was sent."""
        return float(self._outs[place].sent_s)

    def is_sent(self, place: int) -> bool:
        """Tell whether the latest call at a place was sent: its answer is out, or has come."""
        return bool(self._outs[place].state != _UNSENT)

    def give_up(self, place: int) -> bool:
        """Forget a call that is out; its answer is left to Python.

        Returns:
            False if that has come already, while the other half was still to be computed, or
            another micro-batch was still ahead.
        """
        out = self._outs[place]
        out.state = 0
        return not out.is_answered

    def watch(self, longest_ns: int) -> bool:
        """Take answers for a while; see `NativeEnd`."""
        return bool(self._library.wait(self._address, longest_ns))

    def take_sleepers(self) -> list[str]:
        """Return the peers that must be woken: they were called just when they went to sleep."""
        sleepers, self._sleepers = self._sleepers + self._peers.take_sleepers(), []
        return sleepers

    def take_left(self) -> list[str]:
        """Return the peers whose oldest record is left to Python; see `NativeEnd`."""
        return self._peers.take_left()

    def take_ready(self) -> list[int]:
        """Return the places of the calls that native code has done with since the last time.

        Their answers have come, but for those that were not sent (`is_sent`).
        """
        count, self._state.num_ready = self._state.num_ready, 0
        return self._ready[:count]

    @property
    def has_events(self) -> bool:
        """Tell whether events should be taken now."""
        return bool(self._state.num_events > MOST_EVENTS // 2)

    def take_events(self) -> bytes:
        """Return the new events, as a timeline keeps them."""
        size, self._state.num_events = self._state.num_events * EVENT_BYTES, 0
        return self._events.raw[:size] if size else b""

    def _forget(self) -> None:
        self.generation += 1
        for out in self._outs:  # they name a peer by its place; Python takes what they still get
            out.state = 0


class Rows(NamedTuple):
    """Rows in memory: [count, width], of bytes in a call and of float32 in an answer."""

    address: int
    num_rows: int
    width: int
