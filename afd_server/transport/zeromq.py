"""Frames over ZeroMQ: `ipc` on one host, `tcp` between hosts.

A process binds one ROUTER and opens one DEALER for each peer it connects to; answers travel
back on the way the question came. Waits block and never spin: a spinning wait takes the core
that ZeroMQ's own I/O thread needs. Native code may wait instead, and deal with calls meanwhile.
"""

import errno
import socket as os_socket
from math import ceil
from typing import NamedTuple

import zmq

from afd_server.core.errors import AddressInUse, ConfigError, TransportError
from afd_server.transport.calls import NativeEnd
from afd_server.transport.codec import MAX_PAYLOAD_BYTES
from afd_server.transport.messages import Buffer
from afd_server.transport.ring import RingLibrary
from afd_server.transport.sockets import NativeSockets

CREDITS = 64  # frames queued for one peer before it counts as not keeping up
MAX_PER_RECEIVE = 256  # so that a busy link cannot keep its owner from its work

# ZeroMQ's defaults are unbounded queues, silent drops and connections to lost hosts that stay. Its
# heartbeats are no remedy: with them libzmq 4.3.5 aborts a process whose peer leaves a full queue.
_OPTIONS = {
    zmq.MAXMSGSIZE: MAX_PAYLOAD_BYTES,
    zmq.SNDHWM: CREDITS,
    zmq.RCVHWM: CREDITS,
    zmq.LINGER: 0,
    zmq.TCP_KEEPALIVE: 1,
    zmq.TCP_KEEPALIVE_IDLE: 1,
    zmq.TCP_KEEPALIVE_INTVL: 1,
    zmq.TCP_KEEPALIVE_CNT: 3,
    zmq.TCP_MAXRT: 4000,
    zmq.HANDSHAKE_IVL: 2000,
    zmq.RECONNECT_IVL: 50,
    zmq.RECONNECT_IVL_MAX: 2000,
    zmq.IMMEDIATE: 1,
    zmq.BACKLOG: 100,
}


class _Assistance(NamedTuple):
    """Native code that waits for this link, and the sockets as it knows them."""

    native: NativeEnd
    sockets: NativeSockets


class ZeroMQLink:
    """A bound ROUTER and a DEALER for each connected peer.

    Args:
        name: this process's incarnation; the routing id its peers see.
        bind: `ipc:///path` in a directory that only its owner may enter, or `tcp://host:port`
            with port `*` for a free one; None for a process that only connects.

    Raises:
        AddressInUse: somebody else is bound there.
        ConfigError: the address is none that ZeroMQ can bind.
    """

    def __init__(self, name: str, bind: str | None) -> None:
        self._name = name
        self._context = zmq.Context(io_threads=1)
        self._poller = zmq.Poller()
        self._dealers: dict[str, zmq.Socket[bytes]] = {}
        self._addresses: dict[str, str] = {}
        self._router: zmq.Socket[bytes] | None = None
        self._assistance: _Assistance | None = None
        if bind is not None:
            self._router = self._bind(bind)

    @property
    def address(self) -> str:
        if self._router is None:
            return ""
        return self._router.getsockopt_string(zmq.LAST_ENDPOINT)

    def filenos(self) -> list[int]:
        """Return descriptors that become readable when something may have arrived (edges only)."""
        return [int(socket.getsockopt(zmq.FD)) for socket in self._sockets()]

    def assist(self, native: NativeEnd) -> None:
        """Let native code deal with calls while this link waits, and read the sockets for it.

        Raises:
            ConfigError: native code cannot use them (`sockets.why_not_native`).
        """
        sockets = NativeSockets(RingLibrary(), MAX_PER_RECEIVE, self._router, self._dealers)
        self._end_assistance()
        self._assistance = _Assistance(native, sockets)
        native.use_sockets(sockets)

    def connect(self, peer: str, address: str) -> None:
        if self._addresses.get(peer) == address:
            return
        self.disconnect(peer)
        dealer = self._socket(zmq.DEALER)
        dealer.setsockopt_string(zmq.IDENTITY, self._name)
        try:
            dealer.connect(address)
        except zmq.ZMQError as error:
            dealer.close()
            raise TransportError(f"{peer} cannot be reached at {address!r}: {error}") from error
        self._dealers[peer], self._addresses[peer] = dealer, address
        self._poller.register(dealer, zmq.POLLIN)
        self._see_sockets()

    def disconnect(self, peer: str) -> None:
        dealer = self._dealers.pop(peer, None)
        if dealer is not None:
            del self._addresses[peer]
            self._poller.unregister(dealer)
            self._see_sockets()
            dealer.close()

    def send(self, peer: str, frames: list[Buffer]) -> None:
        dealer = self._dealers.get(peer)
        try:
            if dealer is not None:
                _send_now(dealer, frames)
            elif self._router is not None:
                _send_now(self._router, [peer.encode(), *frames])
            else:
                raise TransportError(f"{peer} was never connected")
        except zmq.Again as error:
            raise TransportError(f"{peer} is not connected or does not keep up") from error
        except zmq.ZMQError as error:
            raise TransportError(f"{peer} cannot be reached: {error}") from error

    def receive(self, timeout_s: float) -> list[tuple[str, list[Buffer]]]:
        if self._assistance is not None:
            self._assistance.native.watch(int(timeout_s * 1e9))
            return self._assistance.sockets.take()
        received: list[tuple[str, list[Buffer]]] = []
        for socket, _ in self._poller.poll(ceil(timeout_s * 1000)):
            peer = next((p for p, dealer in self._dealers.items() if dealer is socket), None)
            while len(received) < MAX_PER_RECEIVE:
                try:
                    frames: list[Buffer] = list(socket.recv_multipart(zmq.NOBLOCK))
                except zmq.Again:
                    break
                if peer is not None:
                    received.append((peer, frames))
                else:
                    route = bytes(frames[0]).decode("ascii", "replace")
                    received.append((route, frames[1:]))
        return received

    def close(self) -> None:
        self._end_assistance()
        self._context.destroy(linger=0)

    def _see_sockets(self) -> None:
        """Have native code use the sockets that there are now."""
        if self._assistance is not None:
            native, sockets = self._assistance
            sockets.use(self._dealers)
            native.use_sockets(sockets)

    def _end_assistance(self) -> None:
        if self._assistance is not None:
            self._assistance.native.use_sockets(None)
            self._assistance.sockets.close()
            self._assistance = None

    def _sockets(self) -> list["zmq.Socket[bytes]"]:
        return [*([self._router] if self._router else []), *self._dealers.values()]

    def _bind(self, bind: str) -> "zmq.Socket[bytes]":
        router = self._socket(zmq.ROUTER)
        router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        router.setsockopt(zmq.ROUTER_HANDOVER, 1)  # else who connects again may not be heard
        try:
            if bind.startswith("ipc://") and _is_served(bind.removeprefix("ipc://")):
                raise zmq.ZMQError(zmq.EADDRINUSE)
            router.bind(bind)
        except zmq.ZMQError as error:
            self.close()
            if error.errno == zmq.EADDRINUSE:
                raise AddressInUse(f"{bind} is in use by another process") from error
            raise ConfigError(f"cannot listen on {bind}: {error}") from error
        self._poller.register(router, zmq.POLLIN)
        return router

    def _socket(self, kind: int) -> "zmq.Socket[bytes]":
        socket = self._context.socket(kind)
        for option, value in _OPTIONS.items():
            socket.setsockopt(option, value)
        return socket


def _send_now(socket: "zmq.Socket[bytes]", frames: list[Buffer]) -> None:
    """Send without waiting, on what the peer has read by now.

    libzmq takes note of returned credits about once a millisecond only, so a burst to a peer
    that keeps up is refused too; asking for the events makes it look again.
    """
    try:
        socket.send_multipart(frames, zmq.NOBLOCK)
    except zmq.Again:
        socket.getsockopt(zmq.EVENTS)
        socket.send_multipart(frames, zmq.NOBLOCK)


def _is_served(path: str) -> bool:
    """Say whether somebody listens on a socket path.

    libzmq unlinks whatever is at the path and binds there. That is right for what a killed
    process left behind, but it would cut a living one off without a word.
    """
    with os_socket.socket(os_socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            return probe.connect_ex(path) in (0, errno.EAGAIN)  # EAGAIN: the backlog is full
        except OSError:  # no path at all, such as one that is too long
            return False
