"""One process's place on the wire: says who it is, and believes only whom it should.

The second half of the checks on receipt: membership, numerics and who may say what. The first
half is `codec`.
"""

import ctypes
import logging
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from afd_server.core.clock import Clock
from afd_server.core.errors import ProtocolError, TransportError
from afd_server.core.topology import Member, Role, Topology
from afd_server.transport.base import Link
from afd_server.transport.calls import Peer
from afd_server.transport.codec import (
    Envelope,
    Header,
    HeaderReader,
    decode,
    encode,
    header_beginning,
)
from afd_server.transport.messages import (
    EMPTY,
    Buffer,
    Cancel,
    Combine,
    Dispatch,
    ExpertLoad,
    Heartbeat,
    LoadReport,
    Message,
    Submit,
    TokenChunk,
    TopologyUpdate,
)

log = logging.getLogger(__name__)

MAX_BAD_FRAMES, BAD_FRAME_WINDOW_S, QUARANTINE_S = 3, 10.0, 30.0

_SENDERS: dict[type[Message], frozenset[Role]] = {
    Submit: frozenset({Role.GATEWAY}),
    Cancel: frozenset({Role.GATEWAY}),
    TokenChunk: frozenset({Role.ATTENTION}),
    LoadReport: frozenset({Role.ATTENTION, Role.FFN}),
    ExpertLoad: frozenset({Role.ATTENTION}),
    Dispatch: frozenset({Role.ATTENTION}),
    Combine: frozenset({Role.FFN}),
    Heartbeat: frozenset({Role.GATEWAY, Role.ATTENTION, Role.FFN}),
    TopologyUpdate: frozenset({Role.SUPERVISOR}),
}


@dataclass(frozen=True, slots=True)
class Identity:
    """What every frame of a process says of it."""

    incarnation: str
    model_digest: str
    fingerprint: str = ""


class Received(NamedTuple):
    """A message that passed every check, and its sender."""

    envelope: Envelope
    sender: Member
    message: Message


class Endpoint:
    """Sends and receives messages over a link.

    Args:
        link: carries the frames.
        identity: of this process; `identify` completes it once the numerics are known.
        clock: dates bad frames.
        introduced: members known before any topology is (the supervisor, or to the supervisor
            the processes it starts). Their fingerprint is not checked.
        with_crc: whether payloads carry a CRC-32.
    """

    def __init__(
        self,
        link: Link,
        identity: Identity,
        clock: Clock,
        introduced: tuple[Member, ...] = (),
        with_crc: bool = True,
    ) -> None:
        self.link = link
        self.identity = identity
        self.topology = Topology(0, ())
        self.counters: Counter[str] = Counter()
        self.received_s = 0.0  # when the latest messages were taken off the link
        self._clock = clock
        self._introduced = {member.incarnation: member for member in introduced}
        self._with_crc = with_crc
        self.sequence = ctypes.c_int64(0)  # of the messages sent; native code counts on
        self._reader = HeaderReader()
        self._bad_at: defaultdict[str, deque[float]] = defaultdict(
            lambda: deque(maxlen=MAX_BAD_FRAMES)
        )
        self._quarantined_until: dict[str, float] = {}

    def introduce(self, member: Member) -> None:
        """Listen to a process that is in no topology yet."""
        self._introduced[member.incarnation] = member

    def dismiss(self, incarnation: str) -> None:
        """Stop listening to an introduced process."""
        self._introduced.pop(incarnation, None)

    def identify(self, fingerprint: str) -> None:
        """Put the fingerprint of this process's numerics on every frame from now on."""
        current = self.identity
        self.identity = Identity(current.incarnation, current.model_digest, fingerprint)

    def send(self, peer: str, message: Message) -> None:
        """Send to an incarnation.

        Raises:
            TransportError: it cannot be reached now.
        """
        self.link.send(peer, encode(self.envelope(), message, self._with_crc))

    def envelope(self) -> Envelope:
        """Return the envelope of this process's next message."""
        self.sequence.value += 1
        identity = self.identity
        return Envelope(
            identity.incarnation,
            self.topology.epoch,
            self.sequence.value,
            identity.model_digest,
            identity.fingerprint,
        )

    def try_send(self, peer: str, message: Message) -> bool:
        """Send what will be repeated anyway; count and report a failure instead of raising."""
        try:
            self.send(peer, message)
        except TransportError:
            self.counters["unsent"] += 1
            return False
        return True

    def receive(self, timeout_s: float) -> Iterator[Received]:
        """Yield the messages that pass every check; the others are counted and dropped.

        Each is checked when the one before it has been dealt with, so a new topology counts for
        the messages that arrived together with it.
        """
        arrived = self.link.receive(timeout_s)
        self.received_s = self._clock.now()
        for route, frames in arrived:
            if self.received_s < self._quarantined_until.get(route, 0.0):
                self.counters["bad_quarantined"] += 1
                continue
            header = None
            try:
                header = self._header(frames)
                received = self._believe(route, header, frames[1])
            except ProtocolError as error:
                self._refuse(route, header, error)
                continue
            yield received

    def _header(self, frames: list[Buffer]) -> Header:
        if len(frames) != 2:
            raise ProtocolError(f"{len(frames)} frames instead of 2", "size")
        return self._reader.read(frames[0])

    def _believe(self, route: str, header: Header, data: Buffer) -> Received:
        """Check in the order of docs/protocol.md: range and size, membership, then CRC."""
        envelope = header.envelope
        if envelope.source != route:
            raise ProtocolError(f"{route} speaks as {envelope.source}", "source")
        if envelope.model_digest != self.identity.model_digest:
            raise ProtocolError(
                f"{route} serves model {envelope.model_digest}, we {self.identity.model_digest}",
                "model",
            )
        sender = self.topology.find(route)
        if sender is None:
            sender = self._introduced.get(route)
            if sender is None:
                raise ProtocolError(f"{route} is in no topology", "unknown_source")
        elif sender.fingerprint != envelope.fingerprint:
            raise ProtocolError(f"{route} computes as {envelope.fingerprint}", "fingerprint")
        if sender.role not in _SENDERS[header.kind]:
            raise ProtocolError(f"{sender.name} sent a {header.kind.__name__}", "role")
        return Received(envelope, sender, decode(header, data, self._with_crc))

    def _refuse(self, route: str, header: Header | None, error: ProtocolError) -> None:
        """Count a bad frame, answer a dispatch with the reason, and stop hearing who insists.

        A stranger is no offender: a topology may simply not have reached us yet, and whoever
        invents names must not fill our memory or our log.
        """
        self.counters[f"bad_{error.reason}"] += 1
        if route in self._introduced or self.topology.find(route) is not None:
            log.warning("dropped a frame from %s: %s", route, error)
            times = self._bad_at[route]
            times.append(self._clock.now())
            if len(times) == MAX_BAD_FRAMES and times[-1] - times[0] <= BAD_FRAME_WINDOW_S:
                log.error("%s: bad frames; not listening for %d s", route, QUARANTINE_S)
                self._quarantined_until[route] = self._clock.now() + QUARANTINE_S
                times.clear()
        if header is not None and header.kind is Dispatch:
            step, lane, layer, part, _ = header.values
            epoch = header.envelope.epoch
            refusal = Combine(step, lane, layer, part, epoch, 0, 0, error.reason, EMPTY)
            self.try_send(route, refusal)

    def pool(self, role: Role) -> dict[str, Peer]:
        """Return the other pool's workers that are listened to, and how headers of calls look.

        Args:
            role: of the other pool: this worker answers the attention pool, or calls the FFN pool.
        """
        own = self.identity
        theirs, ours = (Dispatch, Combine) if role is Role.ATTENTION else (Combine, Dispatch)
        beginning = header_beginning(ours, own.incarnation, own.model_digest, own.fingerprint)
        quarantined = self.quarantined
        return {
            member.incarnation: Peer(
                member.slot,
                header_beginning(theirs, member.incarnation, own.model_digest, member.fingerprint),
                beginning,
            )
            for member in self.topology.pool(role)
            if member.incarnation not in quarantined
        }

    @property
    def quarantined(self) -> frozenset[str]:
        """Return the peers that are not listened to at present."""
        if not self._quarantined_until:
            return frozenset()
        now = self._clock.now()
        return frozenset(route for route, until in self._quarantined_until.items() if now < until)

    @property
    def num_bad_frames(self) -> int:
        """Return the frames dropped so far."""
        return sum(count for name, count in self.counters.items() if name.startswith("bad_"))
