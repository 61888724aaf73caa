"""What carries frames."""

from typing import Protocol

from afd_server.transport.messages import Buffer


class Link(Protocol):
    """Carries frames between processes, unordered and unreliably as far as callers may assume."""

    @property
    def address(self) -> str:
        """Return where peers connect to."""
        ...

    def connect(self, peer: str, address: str) -> None:
        """Open a way to a peer; repeating it changes nothing.

        Raises:
            TransportError: nobody can be connected to at such an address.
        """
        ...

    def disconnect(self, peer: str) -> None:
        """Give up the way to a peer; frames still on it may be lost."""
        ...

    def send(self, peer: str, frames: list[Buffer]) -> None:
        """Hand frames over without waiting.

        Raises:
            TransportError: the peer cannot be reached now, or does not keep up.
        """
        ...

    def receive(self, timeout_s: float) -> list[tuple[str, list[Buffer]]]:
        """Return what has arrived, with each sender's name; wait up to `timeout_s` for the first.

        A sender's name on a way that it opened is its own claim.
        """
        ...

    def close(self) -> None:
        """Let go of everything at once; unsent frames are dropped."""
        ...
