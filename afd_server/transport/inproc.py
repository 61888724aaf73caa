"""The in-process twin: the same frames between objects of one process, with faults on demand.

Everything is driven by `receive`: no threads, no clock, so a run is repeatable by its seed.
"""

import random
from collections import defaultdict
from dataclasses import dataclass

from afd_server.core.errors import TransportError
from afd_server.transport.messages import Buffer


@dataclass(frozen=True, slots=True)
class Faults:
    """What may happen to a frame; chances in [0, 1].

    Attributes:
        seed: of the run.
        drop: the frame never arrives.
        duplicate: it arrives twice.
        corrupt: one payload byte is flipped.
        max_delay: it waits for up to so many `receive` calls of its receiver, which also
            changes the order of frames.
    """

    seed: int = 0
    drop: float = 0.0
    duplicate: float = 0.0
    corrupt: float = 0.0
    max_delay: int = 0


@dataclass(slots=True)
class _Parcel:
    sender: str
    frames: list[Buffer]
    wait: int


class InProcessNetwork:
    """Connects `InProcessLink`s by name."""

    def __init__(self, faults: Faults | None = None) -> None:
        self._faults = faults or Faults()
        self._random = random.Random(self._faults.seed)
        self._boxes: defaultdict[str, list[_Parcel]] = defaultdict(list)
        self._open: set[str] = set()

    def link(self, name: str) -> "InProcessLink":
        """Return a new link; its name is its peers' name for it."""
        self._open.add(name)
        return InProcessLink(self, name)

    def post(self, sender: str, receiver: str, frames: list[Buffer]) -> None:
        """Put frames into the receiver's box, or lose them, as the faults say."""
        if receiver not in self._open:
            raise TransportError(f"{receiver} is not there")
        faults, chance = self._faults, self._random.random
        if chance() < faults.drop:
            return
        copies = 2 if chance() < faults.duplicate else 1
        for _ in range(copies):
            copied: list[Buffer] = [bytes(frame) for frame in frames]
            if chance() < faults.corrupt and len(copied[-1]) > 0:
                copied[-1] = self._flip(copied[-1])
            wait = self._random.randint(0, faults.max_delay)
            self._boxes[receiver].append(_Parcel(sender, copied, wait))

    def collect(self, receiver: str) -> list[tuple[str, list[Buffer]]]:
        """Take what is due for a receiver; the rest comes one call nearer."""
        box = self._boxes[receiver]
        due = [parcel for parcel in box if parcel.wait == 0]
        box[:] = [parcel for parcel in box if parcel.wait > 0]
        for parcel in box:
            parcel.wait -= 1
        return [(parcel.sender, parcel.frames) for parcel in due]

    def lose_everything_for(self, receiver: str) -> None:
        """Drop what is under way to a receiver."""
        self._boxes.pop(receiver, None)

    def shut(self, name: str) -> None:
        """Take a link off the network."""
        self._open.discard(name)
        self._boxes.pop(name, None)

    def _flip(self, frame: Buffer) -> bytes:
        flipped = bytearray(frame)
        flipped[self._random.randrange(len(flipped))] ^= 1 << self._random.randrange(8)
        return bytes(flipped)


class InProcessLink:
    """One process's end of an `InProcessNetwork`."""

    def __init__(self, network: InProcessNetwork, name: str) -> None:
        self._network = network
        self._name = name

    @property
    def address(self) -> str:
        return f"inproc://{self._name}"

    def connect(self, peer: str, address: str) -> None:
        """Do nothing: everybody on the network is in reach."""

    def disconnect(self, peer: str) -> None:
        """Do nothing: see `connect`."""

    def send(self, peer: str, frames: list[Buffer]) -> None:
        self._network.post(self._name, peer, frames)

    def receive(self, timeout_s: float) -> list[tuple[str, list[Buffer]]]:
        return self._network.collect(self._name)

    def close(self) -> None:
        self._network.shut(self._name)
