"""Records through memory that two processes share: `native/ring.cpp`, called through ctypes.

Knows nothing of peers and links. The memory is a sealed memfd: it has no name that could be left
behind, and nobody can shrink it under a reader. Linux only.
"""

import ctypes
import fcntl
import mmap
import os
import struct
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any  # Any: functions of a library, typed by hand

from afd_server.core.errors import ConfigError, TransportError
from afd_server.transport.messages import Buffer

LIBRARY = Path(__file__).parent / "native" / "libafd_ring.so"
INTERFACE = 3  # as `afd_ring_interface` of native/ring.cpp
NOT_BUILT = f"{LIBRARY.name} was not built: the installation found no C++ compiler"

CAPACITY = 16 * 2**20  # of a direction; pages are taken as they are first used
MAX_RECORD_BYTES = 4 * 2**20  # the rest is dominated by copying, which ZeroMQ does as well
MAX_RECORDS = 64  # unread, in a direction; as ring.cpp has it, the credits of ZeroMQ
MAX_FRAMES = 8
MEMORY_BYTES = 4096 + 2 * CAPACITY

_NAME = "afd-ring"
_TOKEN_PLACE = slice(4096 - 16, 4096)  # the end of the page of counters
_CLOSED = -3  # as ring.cpp has it
_NUM_FRAMES = struct.Struct("<I")


class RingGone(TransportError):
    """The other side has closed its end; this one is of no use any more."""


class RingBroken(RingGone):
    """What the other side wrote makes no sense."""


class Put(IntEnum):
    """What became of a record."""

    TAKEN = 0
    WAKE = 1  # taken, but the reader has just gone to sleep and must be woken
    FULL = 2  # not taken: the reader does not keep up
    ASLEEP = 3  # not taken: what wakes the reader may as well be the message
    TOO_LARGE = 4  # not taken


def why_unavailable() -> str | None:
    """Return why this process cannot share memory with others, or None if it can."""
    if not LIBRARY.is_file():
        return NOT_BUILT
    try:
        memory, descriptor = create_memory(bytes(16))
        try:
            open_memory(os.getpid(), descriptor, bytes(16)).close()
            os.close(os.pidfd_open(os.getpid()))
        finally:
            memory.close()
            os.close(descriptor)
    except (OSError, AttributeError, TransportError) as error:  # AttributeError: not on Linux
        return f"this system does not let processes share memory: {error}"
    return None


def create_memory(token: bytes) -> tuple[mmap.mmap, int]:
    """Make memory for two rings; return it mapped, and the descriptor for the other side.

    Args:
        token: 16 random bytes that the other side must know.

    Raises:
        OSError: the system has none to give.
    """
    descriptor = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, MEMORY_BYTES)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _seals())
        memory = mmap.mmap(descriptor, MEMORY_BYTES)
        memory[_TOKEN_PLACE] = token
        return memory, descriptor
    except OSError:
        os.close(descriptor)
        raise


def open_memory(pid: int, number: int, token: bytes) -> mmap.mmap:
    """Map the memory behind another process's descriptor.

    Raises:
        OSError: there is no such process or descriptor, or it is not for us.
        TransportError: it is no memory that `create_memory` made.
    """
    path = f"/proc/{pid}/fd/{number}"
    target = str(Path(path).readlink())
    if not target.startswith(f"/memfd:{_NAME}"):  # to open something else may have effects
        raise TransportError(f"{path} is no memory of ours")
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        facts = os.fstat(descriptor)
        if facts.st_uid != os.geteuid() or facts.st_size != MEMORY_BYTES:
            raise TransportError(f"{path} is of user {facts.st_uid}, {facts.st_size} bytes")
        if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _seals() != _seals():
            raise TransportError(f"{path} could shrink while it is read")
        memory = mmap.mmap(descriptor, MEMORY_BYTES)
        if memory[_TOKEN_PLACE] != token:
            memory.close()
            raise TransportError(f"{path} is other memory than was offered")
        return memory
    finally:
        os.close(descriptor)


class RingLibrary:
    """The functions of the library, with their types.

    Raises:
        ConfigError: the library was not built, or from other sources than this package.
    """

    def __init__(self) -> None:
        if not LIBRARY.is_file():
            raise ConfigError(NOT_BUILT)
        # what takes a microsecond keeps the interpreter's lock; the long wait lets it go
        short, long = ctypes.PyDLL(str(LIBRARY)), ctypes.CDLL(str(LIBRARY))
        if not hasattr(short, "afd_ring_interface") or short.afd_ring_interface() != INTERFACE:
            raise ConfigError(
                f"{LIBRARY} was built from other sources than this package; install it again"
            )
        handle, number = ctypes.c_void_p, ctypes.c_int64
        self.open = _typed(short.afd_ring_open, handle, handle, number, number)
        self.close = _typed(short.afd_ring_close, None, handle)
        self.reserve = _typed(short.afd_ring_reserve, number, handle, number)
        self.commit = _typed(short.afd_ring_commit, number, handle, number)
        self.peek = _typed(short.afd_ring_peek, number, handle)
        self.advance = _typed(short.afd_ring_advance, None, handle)
        self.watch = _typed(long.afd_ring_watch, number, handle, number, number)
        self.serve = _typed(long.afd_serve, number, handle, number)
        self.wait = _typed(long.afd_await, number, handle, number)
        numbers = [number] * 8
        memory = handle
        self.call = _typed(
            short.afd_call,
            number,
            handle,
            *numbers,
            memory,
            number,
            number,
            memory,
            number,
            handle,
        )
        self.open_sockets = _typed(short.afd_sockets_open, handle, handle, number)
        self.close_sockets = _typed(short.afd_sockets_close, None, handle)
        self.use_sockets = _typed(short.afd_sockets_use, None, handle, handle, number)
        self.peek_frame = _typed(short.afd_sockets_peek, number, handle, handle)
        self.pop_frame = _typed(short.afd_sockets_pop, None, handle)
        self.doze = _typed(short.afd_ring_doze, number, handle, number)
        self.wake = _typed(short.afd_ring_wake, None, handle, number)


_NOT_TAKEN = {-1: Put.FULL, -2: Put.ASLEEP}  # as ring.cpp has them


class Ring:
    """One end of two rings of records, one for each direction.

    Args:
        library: does the work.
        memory: zeroed, mapped by both sides; the ring closes it.
        side: 0 for the process that made the memory, 1 for the other.
    """

    def __init__(self, library: RingLibrary, memory: mmap.mmap, side: int) -> None:
        self._library = library
        self._memory = memory
        self._view = memoryview(memory)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self.handle: int | None = library.open(self.address, CAPACITY, side)
        assert self.handle is not None, "no memory for a few counters"

    def put(self, frames: Sequence[Buffer]) -> Put:
        """Publish a record.

        Raises:
            RingGone: nobody reads it any more.
        """
        views = [memoryview(frame).cast("B") for frame in frames]
        lengths = [view.nbytes for view in views]
        head = struct.pack(f"<{1 + len(lengths)}I", len(lengths), *lengths)
        size = len(head) + sum(lengths)
        if len(lengths) > MAX_FRAMES or size > MAX_RECORD_BYTES:
            return Put.TOO_LARGE
        place = self._library.reserve(self.handle, size)
        if place < 0:
            if place in _NOT_TAKEN:
                return _NOT_TAKEN[place]
            raise _gone(place)
        stop = place + len(head)
        self._view[place:stop] = head
        for view, length in zip(views, lengths, strict=True):
            place, stop = stop, stop + length
            self._view[place:stop] = view
        return Put.WAKE if self._library.commit(self.handle, size) else Put.TAKEN

    def take(self) -> list[Buffer] | None:
        """Return the frames of the oldest record, copied out once; None if there is none.

        Raises:
            RingGone: there will be no more.
        """
        found = self._library.peek(self.handle)
        if found == 0:
            return None
        if found < 0:
            raise _gone(found)
        place, size = found >> 32, found & 0xFFFFFFFF
        record = bytes(self._view[place : place + size])
        self._library.advance(self.handle)
        return _frames_of(record)

    def close(self) -> None:
        """Tell the other side, and give the memory back."""
        if self.handle is not None:
            self._library.close(self.handle)
            self.handle = None
            self._view.release()
            self._memory.close()


class Watch:
    """Waits for records in any of some rings, which stay open as long as it is used."""

    def __init__(self, library: RingLibrary, rings: Sequence[Ring]) -> None:
        self._library = library
        self._count = len(rings)
        self._handles = (ctypes.c_void_p * self._count)(*(ring.handle for ring in rings))

    def look(self, longest_ns: int) -> bool:
        """Watch closely for a while, without the interpreter's lock.

        Returns:
            Whether a record, or the end of a ring, is due.
        """
        return bool(self._library.watch(self._handles, self._count, longest_ns))

    def announce_sleep(self) -> bool:
        """Say that this reader sleeps; tell if a record is due, so that it must not."""
        return bool(self._library.doze(self._handles, self._count))

    def end_sleep(self) -> None:
        """Say that it is awake."""
        self._library.wake(self._handles, self._count)


def _typed(function: Any, result: Any, *arguments: Any) -> Any:
    function.restype, function.argtypes = result, arguments
    return function


def _gone(code: int) -> RingGone:
    return RingGone("it was closed") if code == _CLOSED else RingBroken("its counters are wrong")


def _frames_of(record: bytes) -> list[Buffer]:
    """Cut a record into its frames.

    Raises:
        RingBroken: it is none that `Ring.put` made.
    """
    try:
        (count,) = _NUM_FRAMES.unpack_from(record)
        lengths = struct.unpack_from(f"<{min(count, MAX_FRAMES)}I", record, _NUM_FRAMES.size)
    except struct.error as error:
        raise RingBroken(f"a record of {len(record)} bytes: {error}") from error
    place = _NUM_FRAMES.size * (1 + len(lengths))
    if count != len(lengths) or place + sum(lengths) != len(record):
        raise RingBroken(f"a record of {len(record)} bytes with {count} frames")
    view, frames = memoryview(record), list[Buffer]()
    for length in lengths:
        frames.append(view[place : place + length])
        place += length
    return frames


def _seals() -> int:
    return fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
