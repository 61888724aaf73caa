"""Who is alive, where, and holding what."""

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple


class Role(IntEnum):
    """What a process does. The numbers travel on the wire."""

    SUPERVISOR = 0
    GATEWAY = 1
    ATTENTION = 2
    FFN = 3


class FFNParallel(IntEnum):
    """How the FFNs are spread over the FFN pool."""

    TENSOR = 1  # every worker holds a column shard; a call goes to all, their sums are added
    REPLICATE = 2  # every worker holds everything; a call goes to one
    COLOCATED = 3  # no FFN pool: the attention workers hold everything themselves
    EXPERT = 4  # every worker holds some experts; a token goes to the holders of its own
    HYBRID = 5  # groups of workers hold some experts; in a group everybody has a column shard


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

    @property
    def is_on_one_host(self) -> bool:
        """Tell whether only processes of its host can reach it: their clock is its clock."""
        return self.address.startswith("ipc://")


@dataclass(frozen=True, slots=True)
class Placement:
    """Who holds which expert of which layer.

    FFN workers form groups of `num_shards` neighbours: the worker of slot s holds column shard
    s mod `num_shards` of every expert of group s div `num_shards`. A dense layer counts as one
    expert. `holders[layer][expert]` are the groups that hold it, each of them all of it; which
    one computes changes no bit, how many shards there are does.

    One more group, `attention_side`, is each attention worker by itself. What it holds is not
    cut into columns, and no other group holds it. The head is an exception if it is shared: then
    the attention side has the first shard of the vocabulary, and those who hold it the others.
    """

    holders: tuple[tuple[tuple[int, ...], ...], ...]
    num_groups: int
    num_shards: int = 1
    shares_head: bool = False

    def __post_init__(self) -> None:
        for layer, experts in enumerate(self.holders):
            for expert, groups in enumerate(experts):
                valid = len(set(groups)) == len(groups) > 0
                in_pool = set(groups) <= set(range(self.num_groups))
                assert valid and (in_pool or groups == (self.attention_side,)), (
                    f"layer {layer}, expert {expert}: held by {groups} of {self.num_groups} groups"
                )

    @property
    def attention_side(self) -> int:
        """Return the group that every attention worker is by itself."""
        return self.num_groups

    def head_shard(self, shard: int | None) -> tuple[int, int]:
        """Return which of how many parts of the vocabulary a column shard's worker holds.

        Args:
            shard: of an FFN worker; None for the attention side.
        """
        if not self.shares_head:
            return (0, 1) if shard is None else (shard, self.num_shards)
        return 0 if shard is None else shard + 1, self.num_shards + 1

    @property
    def num_away(self) -> int:
        """Return the layers of which the attention side does not hold all."""
        return sum(
            any(groups != (self.attention_side,) for groups in experts) for experts in self.holders
        )

    @property
    def is_away(self) -> bool:
        """Tell whether most layers' calls travel."""
        return 2 * self.num_away > len(self.holders)

    def slots_of(self, group: int) -> range:
        """Return the slots of a group of FFN workers, by column shard."""
        assert group < self.num_groups, f"group {group} of {self.num_groups} has no slots"
        return range(group * self.num_shards, (group + 1) * self.num_shards)

    def experts_of(self, slot: int) -> tuple[tuple[int, ...], ...]:
        """Return the experts that the FFN worker of a slot holds a shard of, by layer."""
        return self.held_by(slot // self.num_shards)

    def held_by(self, group: int) -> tuple[tuple[int, ...], ...]:
        """Return the experts that a group holds, by layer."""
        *layers, head = (
            tuple(expert for expert, groups in enumerate(experts) if group in groups)
            for experts in self.holders
        )
        return *layers, (0,) if self.shares_head and group == self.attention_side else head


def spread_experts(
    experts_by_layer: Sequence[int],
    num_groups: int,
    num_shards: int,
    num_replicas: int,
    at_attention: Container[tuple[int, int]] = (),
    hot: Container[tuple[int, int]] | None = None,
    shares_head: bool = False,
) -> Placement:
    """Deal experts out in turn, each to `num_replicas` groups in a row.

    Groups differ by at most one expert and replica in a layer. Every layer begins at the next
    group, so that dense layers and remainders are spread as well. The attention side holds those
    of `at_attention`, (layer, expert), which leave a gap. With `hot`, those that are not in it
    have one holder. With `shares_head` the attention side has a part of the head as well.
    """
    assert 1 <= num_replicas <= num_groups, f"{num_replicas} replicas in {num_groups} groups"

    def deal(layer: int, num_experts: int) -> Iterator[tuple[int, ...]]:
        first = layer
        for place in ((layer, expert) for expert in range(num_experts)):
            copies = num_replicas if hot is None or place in hot else 1
            groups = tuple(sorted((first + copy) % num_groups for copy in range(copies)))
            yield (num_groups,) if place in at_attention else groups
            first += copies

    holders = tuple(tuple(deal(*layer)) for layer in enumerate(experts_by_layer))
    return Placement(holders, num_groups, num_shards, shares_head)


# Shards start at multiples of this many columns: whole vectors for every kernel, and whole groups
# of quantised activations.
SHARD_ALIGNMENT = 64


class ColumnShard(NamedTuple):
    """Columns start … stop − 1: of an FFN's intermediate ones, or of the vocabulary."""

    start: int
    stop: int


def column_shard(num_columns: int, part: int, num_parts: int) -> ColumnShard:
    """Return the columns of one tensor-parallel part; together the parts cover each column once.

    Boundaries are aligned to `SHARD_ALIGNMENT` columns where there are enough of them.
    """
    assert 0 <= part < num_parts, f"part {part} of {num_parts}"
    aligned = num_columns >= num_parts * SHARD_ALIGNMENT
    unit = SHARD_ALIGNMENT if aligned else 1
    units = -(-num_columns // unit)
    start, stop = (min(num_columns, units * p // num_parts * unit) for p in (part, part + 1))
    return ColumnShard(start, stop)


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
