"""Layers of one window share block tables; groups of one size share memory."""

import pytest

from afd_server.core.attention_spec import GQASpec, MFASpec, RopeSpec
from afd_server.core.kv_groups import KVGroup, kv_groups

ROPE = RopeSpec(16, 1e4)


def layer(window=None, num_kv_heads=2):
    return GQASpec(8, num_kv_heads, 16, ROPE, window)


@pytest.mark.parametrize("spec", [layer(), layer(9), MFASpec(4, 16, 24, ROPE, reuses_keys=True)])
def test_layers_that_see_equally_far_are_one_group(spec):
    window = getattr(spec, "window", None)
    assert kv_groups((spec,) * 5) == (KVGroup((0, 1, 2, 3, 4), window),)


def test_three_sliding_layers_for_each_full_one_are_four_groups_of_the_full_ones_size():
    groups = kv_groups(([layer()] + [layer(512)] * 3) * 11 + [layer()])
    assert [(len(group.layers), group.window) for group in groups] == [
        (12, None), (12, 512), (12, 512), (9, 512),
    ]  # fmt: skip
    assert groups[0].layers == tuple(range(0, 45, 4))
    assert sorted(index for group in groups for index in group.layers) == list(range(45))


def test_almost_as_many_layers_of_one_kind_as_of_the_other_are_two_groups():
    groups = kv_groups([layer()] * 11 + [layer(64)] * 12)
    assert [len(group.layers) for group in groups] == [11, 12]


def test_every_window_has_its_own_groups():
    groups = kv_groups([layer(8), layer(4), layer(8), layer(4), layer(4), layer(4)])
    assert groups == (KVGroup((0, 2), 8), KVGroup((1, 3), 4), KVGroup((4, 5), 4))


@pytest.mark.parametrize(("windows", "furthest"), [((None, 8), None), ((4, 8), 8)])
def test_layers_that_cannot_stand_in_for_each_other_are_one_group_that_sees_the_furthest(
    windows, furthest
):
    specs = [layer(window, num_kv_heads) for num_kv_heads, window in enumerate(windows, 1)]
    assert kv_groups(specs) == (KVGroup((0, 1), furthest),)
