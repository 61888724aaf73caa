"""Who is alive, where, and holding what."""

from dataclasses import dataclass
from enum import IntEnum


class Role(IntEnum):
    """What a process does. The numbers travel on the wire."""

    SUPERVISOR = 0
    GATEWAY = 1
    ATTENTION = 2
    FFN = 3


class FFNParallel(IntEnum):
    """How a dense FFN is spread over the FFN pool."""

    TENSOR = 1  # every worker holds a column shard; a call goes to all, their sums are added
    REPLICATE = 2  # every worker holds everything; a call goes to one
    COLOCATED = 3  # no FFN pool: the attention workers hold everything themselves


@dataclass(frozen=True, slots=True)
class Member:
    """One process at one moment of its slot's life.

    `slot` is its place in the pool and survives a restart; `incarnation` does not: 8 random
    bytes in hex, drawn anew for every process.
    """

    role: Role
    slot: int
    incarnation: str
    address: str
    fingerprint: str

    @property
    def name(self) -> str:
        """Return the short form used in logs and status, such as `ffn/1`."""
        return f"{self.role.name.lower()}/{self.slot}"


@dataclass(frozen=True, slots=True)
class Topology:
    """The members at one epoch. Only the supervisor makes a new one."""

    epoch: int
    members: tuple[Member, ...]
    ffn_parallel: FFNParallel = FFNParallel.TENSOR

    def pool(self, role: Role) -> tuple[Member, ...]:
        """Return the members of one role in slot order."""
        return tuple(sorted((m for m in self.members if m.role == role), key=lambda m: m.slot))

    def find(self, incarnation: str) -> Member | None:
        """Return the member of this incarnation, or None if the table does not hold it."""
        return next((m for m in self.members if m.incarnation == incarnation), None)

    @property
    def notation(self) -> str:
        """Return the field's shorthand: `2A1F` is 2 attention and 1 FFN worker."""
        return f"{len(self.pool(Role.ATTENTION))}A{len(self.pool(Role.FFN))}F"
