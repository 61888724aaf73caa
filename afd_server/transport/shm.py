"""Frames between processes of one host: a ring in shared memory for each peer, ZeroMQ for the rest.

ZeroMQ makes the connections, carries the handshake, whatever does not fit into a ring, and what
is for a reader that sleeps. A waiting process first watches its rings for a short while, if the
waits of late were short, and then sleeps in ZeroMQ: an idle process uses no CPU.
"""

import contextlib
import logging
import mmap
import os
import select
import struct
import time
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

from afd_server.core.errors import TransportError
from afd_server.transport.calls import MOST_RINGS, NativeEnd
from afd_server.transport.messages import Buffer
from afd_server.transport.ring import (
    Put,
    Ring,
    RingBroken,
    RingGone,
    RingLibrary,
    Watch,
    create_memory,
    open_memory,
)
from afd_server.transport.zeromq import MAX_PER_RECEIVE, ZeroMQLink

log = logging.getLogger(__name__)

MAX_RINGS = 1024  # as many as a topology has members

# How long it pays to watch, more than a lane's stage takes on a slow machine: whoever sleeps is
# woken 0.1 to 0.5 ms late, and then keeps the other side waiting, so that it would sleep as well.
LONGEST_WATCH_NS = 5_000_000
LONGEST_COUNTED_NS = 20_000_000  # so that one long wait is forgotten after some short ones
LOOK_EVERY_NS = 1_000_000  # at ZeroMQ and at the peers' lives, while there are records or a watch

# The link's own frames: each is the only frame of its message and begins with a byte that no
# MessagePack list begins with. The last byte of the mark is the version.
_CONTROL = struct.Struct("<8sB16sii")
_MARK = b"\xc1afd-sh\x01"


class _Kind(IntEnum):
    OFFER = 1  # the token's memory is behind this descriptor of this process
    ACCEPT = 2  # it is mapped, by this process
    REFUSE = 3  # it cannot be
    BELL = 4  # a record was put for you just when you went to sleep


@dataclass(frozen=True, slots=True)
class _Offer:
    """Memory that a peer has not accepted yet."""

    token: bytes
    memory: mmap.mmap
    descriptor: int

    @property
    def frame(self) -> bytes:
        return _CONTROL.pack(_MARK, _Kind.OFFER, self.token, os.getpid(), self.descriptor)


@dataclass(frozen=True, slots=True)
class _Way:
    """A ring in use. `life` is readable once the peer's process has ended."""

    token: bytes
    ring: Ring
    life: int


class SharedMemoryLink:
    """Puts rings beside the connections of a ZeroMQ link.

    To every peer that it is told to connect to under an `ipc` address it offers a ring, and takes
    the rings that are offered to it. Peers that the ZeroMQ link knows already stay without one.

    Args:
        link: of this process; closed with this one.

    Raises:
        ConfigError: the native part was not built.
    """

    def __init__(self, link: ZeroMQLink) -> None:
        self._link = link
        self._library = RingLibrary()
        self._addresses: dict[str, str] = {}
        self._offers: dict[str, _Offer] = {}
        self._ways: dict[str, _Way] = {}
        self._watch = Watch(self._library, ())
        self._native: NativeEnd | None = None
        self._lives = select.poll()
        self._next_look_ns = 0
        self._usual_wait_ns = LONGEST_COUNTED_NS

    @property
    def address(self) -> str:
        return self._link.address

    @property
    def peers_in_memory(self) -> frozenset[str]:
        """Return the peers that are reached without ZeroMQ."""
        return frozenset(self._ways)

    def assist(self, native: NativeEnd) -> None:
        """Let native code deal with calls while this link looks for messages."""
        self._native = native
        self._see_rings()

    def connect(self, peer: str, address: str) -> None:
        if self._addresses.get(peer) == address:
            return
        self.disconnect(peer)
        self._link.connect(peer, address)
        self._addresses[peer] = address
        if address.startswith("ipc://"):
            self._offer(peer)

    def disconnect(self, peer: str) -> None:
        self._addresses.pop(peer, None)
        self._drop(peer)
        self._link.disconnect(peer)

    def send(self, peer: str, frames: list[Buffer]) -> None:
        way = self._ways.get(peer)
        if way is not None:
            try:
                put = way.ring.put(frames)
            except RingGone as error:
                self._lose(peer, error)
                raise TransportError(f"{peer} has gone: {error}") from error
            if put is Put.TAKEN:
                return
            if put is Put.WAKE:
                self._link.send(peer, [_control(_Kind.BELL, way.token)])
                return
            if put is Put.FULL:
                raise TransportError(f"{peer} does not keep up")
        elif peer in self._offers:
            self._link.send(peer, [self._offers[peer].frame])  # again until it is answered
        self._link.send(peer, frames)

    def receive(self, timeout_s: float) -> list[tuple[str, list[Buffer]]]:
        now_ns = time.monotonic_ns()
        is_due = self._native is not None and self._watch_rings(0)
        received = self._take()
        if received or is_due or (self._native is not None and timeout_s <= 0):
            return received if now_ns < self._next_look_ns else received + self._look(0.0)
        if timeout_s <= 0 or not self._ways:
            return self._look(timeout_s)
        received = self._wait(now_ns, now_ns + int(timeout_s * 1e9))
        since_ns = now_ns if self._native is None else max(now_ns, self._native.answered_ns)
        waited_ns = min(time.monotonic_ns() - since_ns, LONGEST_COUNTED_NS)
        self._usual_wait_ns += (waited_ns - self._usual_wait_ns) // 8
        return received

    def close(self) -> None:
        for peer in [*self._offers, *self._ways]:
            self._drop(peer)
        self._link.close()

    def _wait(self, now_ns: int, until_ns: int) -> list[tuple[str, list[Buffer]]]:
        """Watch the rings if that usually ends soon, then sleep."""
        is_short = self._usual_wait_ns <= LONGEST_WATCH_NS
        stop_ns = min(now_ns + LONGEST_WATCH_NS, until_ns) if is_short else now_ns
        while now_ns < stop_ns:
            if self._watch_rings(min(LOOK_EVERY_NS, stop_ns - now_ns)):
                return self._take()
            if received := self._look(0.0):
                return received
            now_ns = time.monotonic_ns()
            if self._native is not None:
                busy_until_ns = self._native.answered_ns + LONGEST_WATCH_NS
                stop_ns = max(stop_ns, min(busy_until_ns, until_ns))
        if self._watch.announce_sleep():
            if self._native is not None:
                self._watch_rings(0)
            return self._take()
        received = self._look(max(0, until_ns - now_ns) / 1e9)
        self._watch.end_sleep()
        if self._native is not None:
            self._watch_rings(0)
        return received + self._take()

    def _watch_rings(self, longest_ns: int) -> bool:
        """Watch the rings, and have calls dealt with; tell if something is left to do."""
        native = self._native
        if native is None:
            return self._watch.look(longest_ns)
        self._wake(native)
        is_due = native.watch(longest_ns)
        self._wake(native)
        return is_due

    def _wake(self, native: NativeEnd) -> None:
        for peer in native.take_sleepers():
            if peer in self._ways:
                with contextlib.suppress(TransportError):  # it has gone, or asks again
                    self._link.send(peer, [_control(_Kind.BELL, self._ways[peer].token)])

    def _see_rings(self) -> None:
        """Watch the rings that there are now."""
        rings = {peer: way.ring for peer, way in self._ways.items()}
        if self._native is not None and len(rings) > MOST_RINGS:
            log.warning("%d rings: calls are dealt with in Python", len(rings))
            self._native.use_rings({})
            self._native = None
        if self._native is not None:
            self._native.use_rings(rings)
        self._watch = Watch(self._library, list(rings.values()))

    def _take(self) -> list[tuple[str, list[Buffer]]]:
        """Empty the rings, up to a limit; lose the peers whose ring is of no use any more.

        Native code has every record first: an answer that came a moment ago is its own, and it goes
        on from there.
        """
        received: list[tuple[str, list[Buffer]]] = []
        if self._native is None:
            self._take_from(self._ways, MAX_PER_RECEIVE, received)
            return received
        while len(received) < MAX_PER_RECEIVE and (left := self._native.take_left()):
            self._take_from(left, 1, received)
            self._watch_rings(0)
        return received

    def _take_from(
        self, peers: Iterable[str], most: int, received: list[tuple[str, list[Buffer]]]
    ) -> None:
        """Add up to so many records of each of some peers, and no more than are taken at once."""
        lost: dict[str, RingGone] = {}
        for peer in peers:
            if (way := self._ways.get(peer)) is None:
                continue
            try:
                for _ in range(min(most, MAX_PER_RECEIVE - len(received))):
                    if (frames := way.ring.take()) is None:
                        break
                    received.append((peer, frames))
            except RingGone as error:
                lost[peer] = error
        for peer, why in lost.items():
            self._lose(peer, why)

    def _look(self, timeout_s: float) -> list[tuple[str, list[Buffer]]]:
        """Take what came over ZeroMQ, heed the link's own frames, see who has died."""
        received = []
        for peer, frames in self._link.receive(timeout_s):
            if not (len(frames) == 1 and self._heed(peer, frames[0])):
                received.append((peer, frames))
        ended = {descriptor for descriptor, _ in self._lives.poll(0)}
        for peer in [peer for peer, way in self._ways.items() if way.life in ended]:
            self._lose(peer, RingGone("its process has ended"))
        self._next_look_ns = time.monotonic_ns() + LOOK_EVERY_NS
        return received

    def _heed(self, peer: str, frame: Buffer) -> bool:
        """Act on a frame of a link; tell whether it is one."""
        if len(frame) != _CONTROL.size or bytes(frame[: len(_MARK)]) != _MARK:
            return False
        _, kind, token, pid, descriptor = _CONTROL.unpack(frame)
        offer = self._offers.get(peer)
        if kind == _Kind.OFFER:
            self._answer(peer, token, pid, descriptor)
        elif kind == _Kind.ACCEPT and offer is not None and offer.token == token:
            self._begin(peer, offer, pid)
        elif kind == _Kind.REFUSE and offer is not None and offer.token == token:
            log.warning("%s cannot map our memory; it is reached over ZeroMQ", peer)
            self._drop(peer)
        return kind in set(_Kind)

    def _offer(self, peer: str) -> None:
        token = os.urandom(16)
        try:
            self._offers[peer] = _Offer(token, *create_memory(token))
        except OSError as error:
            raise TransportError(f"no memory to share with {peer}: {error}") from error

    def _answer(self, peer: str, token: bytes, pid: int, descriptor: int) -> None:
        """Map a peer's memory and say so; a repeated offer gets the same answer."""
        way = self._ways.get(peer)
        answer = _Kind.ACCEPT
        if way is None or way.token != token:
            try:
                self._accept(peer, token, pid, descriptor)
            except (OSError, TransportError) as error:
                log.warning("refused shared memory of %s: %s", peer, error)
                answer = _Kind.REFUSE
        with contextlib.suppress(TransportError):  # the offer will be repeated
            self._link.send(peer, [_control(answer, token)])

    def _accept(self, peer: str, token: bytes, pid: int, descriptor: int) -> None:
        if peer in self._addresses:
            raise TransportError("the way to it is ours to change")
        self._drop(peer)
        if len(self._ways) == MAX_RINGS:
            raise TransportError(f"there are {MAX_RINGS} rings already")
        life = os.pidfd_open(pid)  # before the memory is opened: the same process then
        try:
            memory = open_memory(pid, descriptor, token)
        except (OSError, TransportError):
            os.close(life)
            raise
        self._add(peer, _Way(token, Ring(self._library, memory, side=1), life))

    def _begin(self, peer: str, offer: _Offer, pid: int) -> None:
        """Use the memory that a peer has accepted."""
        try:
            life = os.pidfd_open(pid)
        except OSError as error:
            self._lose(peer, error)
            return
        del self._offers[peer]
        os.close(offer.descriptor)
        self._add(peer, _Way(offer.token, Ring(self._library, offer.memory, side=0), life))

    def _add(self, peer: str, way: _Way) -> None:
        self._ways[peer] = way
        self._lives.register(way.life, select.POLLIN)
        self._see_rings()
        log.info("%s is reached through shared memory", peer)

    def _lose(self, peer: str, why: Exception) -> None:
        """Go back to ZeroMQ; should the peer come back, it is offered new memory."""
        level = logging.WARNING if isinstance(why, RingBroken) else logging.INFO
        log.log(level, "no shared memory with %s any more: %s", peer, why)
        self._drop(peer)
        if peer in self._addresses:
            self._offer(peer)

    def _drop(self, peer: str) -> None:
        offer, way = self._offers.pop(peer, None), self._ways.pop(peer, None)
        if offer is not None:
            offer.memory.close()
            os.close(offer.descriptor)
        if way is not None:
            self._see_rings()
            self._lives.unregister(way.life)
            os.close(way.life)
            way.ring.close()


def _control(kind: _Kind, token: bytes) -> bytes:
    return _CONTROL.pack(_MARK, kind, token, os.getpid(), -1)
