"""ZeroMQ sockets that native code reads and writes: `native/sockets.h`, called through ctypes.

libzmq is the instance that pyzmq has loaded, so one thread can use a socket from both sides.
"""

import ctypes
import sys
from collections.abc import Mapping
from typing import NamedTuple

import zmq

from afd_server.core.errors import ConfigError
from afd_server.transport.messages import Buffer
from afd_server.transport.ring import LIBRARY, NOT_BUILT, RingLibrary

_NAMES = (
    "zmq_msg_init", "zmq_msg_recv", "zmq_msg_data", "zmq_msg_size", "zmq_msg_more",
    "zmq_msg_close", "zmq_send", "zmq_getsockopt", "zmq_poll",
)  # fmt: skip


_NUMBER, _POINTER = ctypes.c_int64, ctypes.c_void_p


class _Functions(ctypes.Structure):
    _fields_ = tuple((name, _POINTER) for name in _NAMES)


class _Held(ctypes.Structure):
    _fields_ = (
        ("socket", _POINTER), ("data", _POINTER), ("size", _NUMBER), ("is_last", _NUMBER),
    )  # fmt: skip


def why_not_native() -> str | None:
    """Return why native code cannot use ZeroMQ's sockets here, or None if it can."""
    if not LIBRARY.is_file():
        return NOT_BUILT
    try:
        _functions()
    except (OSError, AttributeError) as error:
        return f"the libzmq of pyzmq cannot be called: {error}"
    return None


def _functions() -> _Functions:
    """Return the addresses of libzmq's functions, found through the module that is linked to it."""
    path = sys.modules[zmq.backend.Socket.__module__].__file__
    library = ctypes.CDLL(path)
    addresses = (ctypes.cast(getattr(library, name), _POINTER) for name in _NAMES)
    return _Functions(*addresses)


class SocketWay(NamedTuple):
    """How a peer is reached.

    Attributes:
        handle: of the socket.
        route: the peer's name, if others are reached through the same socket.
    """

    handle: int
    route: bytes | None


class NativeSockets:
    """The sockets of a link for native code, and the messages that it read and left to Python.

    Args:
        library: does the work.
        most_messages: that are read at a time.
        router: for all peers without a socket of their own; None if there is none.
        dealers: by peer.

    Raises:
        ConfigError: native code cannot use them; `why_not_native` says so before.
    """

    def __init__(
        self,
        library: RingLibrary,
        most_messages: int,
        router: "zmq.Socket[bytes] | None",
        dealers: Mapping[str, "zmq.Socket[bytes]"],
    ) -> None:
        if (obstacle := why_not_native()) is not None:
            raise ConfigError(obstacle)
        self._library = library
        self._router = None if router is None else router.underlying
        self._dealers: dict[str, int] = {}
        self._peers: dict[int, str] = {}  # by handle
        self._held = _Held()
        functions = _functions()
        address = library.open_sockets(ctypes.addressof(functions), most_messages)
        self.address: int | None = address
        assert self.address is not None, "no memory for a few pointers"
        self.use(dealers)

    def use(self, dealers: Mapping[str, "zmq.Socket[bytes]"]) -> None:
        """Read these, and the router, from now on: before any that is left out is closed."""
        self._dealers = {peer: dealer.underlying for peer, dealer in dealers.items()}
        self._peers = {handle: peer for peer, handle in self._dealers.items()}
        handles = [*([] if self._router is None else [self._router]), *self._peers]
        self._library.use_sockets(self.address, (_POINTER * len(handles))(*handles), len(handles))

    def way_to(self, peer: str) -> SocketWay | None:
        """Return how a peer is reached; None if there is no way."""
        if (dealer := self._dealers.get(peer)) is not None:
            return SocketWay(dealer, None)
        return None if self._router is None else SocketWay(self._router, peer.encode())

    def take(self) -> list[tuple[str, list[Buffer]]]:
        """Return the messages that are held, oldest first, each with its sender's name."""
        received: list[tuple[str, list[Buffer]]] = []
        frames: list[Buffer] = []
        held, peek, pop = self._held, self._library.peek_frame, self._library.pop_frame
        while peek(self.address, ctypes.addressof(held)):
            frames.append(ctypes.string_at(held.data, held.size))
            pop(self.address)
            if not held.is_last:
                continue
            if held.socket == self._router:
                received.append((bytes(frames[0]).decode("ascii", "replace"), frames[1:]))
            elif held.socket in self._peers:  # else it was disconnected meanwhile
                received.append((self._peers[held.socket], frames))
            frames = []
        return received

    def close(self) -> None:
        """Drop what is held, and read nothing any more."""
        if self.address is not None:
            self._library.close_sockets(self.address)
            self.address = None
