"""Which waiting FFN calls are computed together."""

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar


class LayerCall(Protocol):
    """What gathering needs to know of a dispatch."""

    @property
    def layer(self) -> int:
        """Return the layer whose weights the call needs."""
        ...

    @property
    def rows(self) -> int:
        """Return its rows."""
        ...


Call = TypeVar("Call", bound=LayerCall)


def gather(waiting: Iterable[Call], max_rows: int) -> list[Sequence[Call]]:
    """Put calls of the same layer together, so that its weights are read once.

    Groups come in order of their first call, calls in order of arrival. A group holds at most
    `max_rows` rows unless a single call has more.
    """
    groups: list[list[Call]] = []
    open_groups: dict[int, list[Call]] = {}
    for call in waiting:
        group = open_groups.get(call.layer)
        if group is None or sum(other.rows for other in group) + call.rows > max_rows:
            group = open_groups[call.layer] = []
            groups.append(group)
        group.append(call)
    return list(groups)
