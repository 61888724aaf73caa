"""FFN calls answered by native code while a link waits: `native/calls.h`, called through ctypes.

It answers what is exactly right, from known callers, and leaves the rest to Python, which reads
the same frames with the same checks and answers in the same bytes, ten times as slowly.
"""

import ctypes
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from afd_server.transport.ring import Ring, RingLibrary

MOST_RINGS = 64  # bits of `bell`
MOST_EVENTS = 2048
EVENT_BYTES = 40


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


class Caller(NamedTuple):
    """A worker whose calls are answered.

    Attributes:
        slot: of the worker, for the events.
        expected: what the header of its dispatches begins with, before the changing numbers.
        reply: what the header of the answers to it begins with.
    """

    slot: int
    expected: bytes
    reply: bytes


_POINTER, _INTEGER, _DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


class _Caller(ctypes.Structure):
    _fields_ = (
        ("ring", _POINTER), ("memory", _POINTER),
        ("expected", ctypes.c_char_p), ("reply", ctypes.c_char_p),
        ("expected_size", _INTEGER), ("reply_size", _INTEGER), ("slot", _INTEGER),
    )  # fmt: skip


class _Layer(ctypes.Structure):
    _fields_ = (
        ("function", _POINTER), ("context", _POINTER),
        ("row_bytes", _INTEGER), ("width", _INTEGER),
    )  # fmt: skip


class _Server(ctypes.Structure):
    _fields_ = (
        ("callers", _POINTER), ("layers", _POINTER), ("events", _POINTER), ("sequence", _POINTER),
        ("num_callers", _INTEGER), ("num_layers", _INTEGER), ("slot", _INTEGER),
        ("epoch", _INTEGER), ("most_rows", _INTEGER), ("most_events", _INTEGER),
        ("num_events", _INTEGER), ("num_calls", _INTEGER), ("num_rows", _INTEGER),
        ("idle_since_s", _DOUBLE), ("answered_s", _DOUBLE), ("bell", ctypes.c_uint64),
    )  # fmt: skip


class CallServer:
    """Answers the dispatches of some layers for one part.

    Args:
        layers: of the model, in order; whoever made them keeps them valid.
        slot: the part.
        most_rows: computed together; a call with more is left to Python.
        sequence: counts the messages of this process.
    """

    def __init__(
        self,
        library: RingLibrary,
        layers: Sequence[NativeLayer],
        slot: int,
        most_rows: int,
        sequence: ctypes.c_int64,
    ) -> None:
        self._library = library
        self._layers = (_Layer * len(layers))(*(_Layer(*layer) for layer in layers))
        self._events = ctypes.create_string_buffer(MOST_EVENTS * EVENT_BYTES)
        self._sequence = sequence
        self._state = _Server(
            layers=ctypes.addressof(self._layers),
            events=ctypes.addressof(self._events),
            sequence=ctypes.addressof(sequence),
            num_layers=len(layers),
            slot=slot,
            most_rows=most_rows,
            most_events=MOST_EVENTS,
        )
        self._address = ctypes.addressof(self._state)
        self._rings: Mapping[str, Ring] = {}
        self._callers: Mapping[str, Caller] = {}
        self._entries = (_Caller * 0)()
        self._set_up()

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

    def follow(self, epoch: int, callers: Mapping[str, Caller]) -> None:
        """Answer these peers from now on, under this epoch, and nobody else."""
        self._state.epoch = epoch
        self._callers = callers
        self._set_up()

    def use_rings(self, rings: Mapping[str, Ring]) -> None:
        """Look at these peers' rings from now on."""
        self._rings = rings
        self._set_up()

    def serve(self, longest_ns: int) -> bool:
        """Watch the rings for a while, without the interpreter's lock, and answer calls.

        Returns:
            Whether there is something to do that is left to Python.
        """
        return bool(self._library.serve(self._address, longest_ns))

    def take_sleepers(self) -> list[str]:
        """Return the peers that must be woken: they were answered just when they went to sleep."""
        bell, self._state.bell = int(self._state.bell), 0
        return [peer for bit, peer in enumerate(self._rings) if bell >> bit & 1] if bell else []

    def take_events(self) -> bytes:
        """Return the new events, as a timeline keeps them."""
        size, self._state.num_events = self._state.num_events * EVENT_BYTES, 0
        return self._events.raw[:size] if size else b""

    def _set_up(self) -> None:
        assert len(self._rings) <= MOST_RINGS, f"{len(self._rings)} rings"
        nobody = Caller(0, b"", b"")
        entries = []
        for peer, ring in self._rings.items():
            caller = self._callers.get(peer, nobody)
            sizes = len(caller.expected), len(caller.reply)
            entries.append(
                _Caller(
                    ring.handle, ring.address, caller.expected, caller.reply, *sizes, caller.slot
                )
            )
        self._entries = (_Caller * len(entries))(*entries)
        self._state.callers = ctypes.addressof(self._entries)
        self._state.num_callers = len(entries)
