"""Which layers share block tables, so that what left their window can be given back.

Knows nothing of blocks: only which layers see how far.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from afd_server.core.attention_spec import AttentionSpec, GQASpec


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers that share block tables.

    Attributes:
        layers: their indices.
        window: how many positions a token sees in them, the latest and its own among them; None
            for all.
    """

    layers: tuple[int, ...]
    window: int | None


def kv_groups(attention: Sequence[AttentionSpec]) -> tuple[KVGroup, ...]:
    """Divide the layers of a model; if none has a window, into one group.

    A block is memory for the layers of one group, whichever needs it. So all groups are of one
    size, that of the layers of some window, and layers of another window make several groups:
    12 layers that see all and 33 with a window give four groups of 12, the last with three
    places to spare. Of the sizes the one that leaves least to spare is taken.

    Layers whose keys and values differ in shape cannot stand in for each other: then all layers
    are one group that sees as far as any of them.
    """
    by_window: dict[int | None, list[int]] = {}
    for layer, spec in enumerate(attention):
        by_window.setdefault(_window(spec), []).append(layer)
    if len({spec.kv for spec in attention}) > 1:
        bounds = [window for window in by_window if window is not None]
        furthest = None if None in by_window else max(bounds)
        return (KVGroup(tuple(range(len(attention))), furthest),)
    size = min(map(len, by_window.values()), key=lambda size: _places(by_window.values(), size))
    return tuple(
        KVGroup(tuple(layers[start : start + size]), window)
        for window, layers in by_window.items()
        for start in range(0, len(layers), size)
    )


def _window(spec: AttentionSpec) -> int | None:
    return spec.window if isinstance(spec, GQASpec) else None


def _places(runs: Iterable[Sequence[int]], size: int) -> tuple[int, int]:
    """Return the layers for which groups of a size have room, then the number of groups."""
    num_groups = sum(-(-len(layers) // size) for layers in runs)
    return num_groups * size, num_groups
