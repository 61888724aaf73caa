from typing import NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from afd_server.policy.gather import gather


class Call(NamedTuple):
    name: int
    layer: int
    rows: int


def test_calls_of_one_layer_are_computed_together():
    calls = [Call(0, 3, 1), Call(1, 5, 1), Call(2, 3, 2)]
    assert gather(calls, max_rows=8) == [[calls[0], calls[2]], [calls[1]]]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9))), st.integers(1, 20))
def test_every_call_is_in_one_group_of_its_layer_within_the_limit(shapes, max_rows):
    calls = [Call(i, layer, rows) for i, (layer, rows) in enumerate(shapes)]
    groups = gather(calls, max_rows)
    assert sorted(c.name for group in groups for c in group) == list(range(len(calls)))
    for group in groups:
        assert len({c.layer for c in group}) == 1
        assert len(group) == 1 or sum(c.rows for c in group) <= max_rows
        assert [c.name for c in group] == sorted(c.name for c in group)
