"""Who is alive: looked up by role and by incarnation."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afd_server.core.topology import (
    ColumnShard,
    FFNParallel,
    Member,
    Placement,
    Role,
    Topology,
    column_shard,
    spread_experts,
)


def member(role, slot, incarnation=None):
    return Member(role, slot, incarnation or f"{role.name}{slot}", "", "")


CROWD = (
    member(Role.FFN, 1),
    member(Role.ATTENTION, 1),
    member(Role.GATEWAY, 0),
    member(Role.ATTENTION, 0),
    member(Role.FFN, 0),
    member(Role.ATTENTION, 2),
)


def test_a_pool_is_in_slot_order_whatever_the_order_of_arrival():
    topology = Topology(1, CROWD)
    assert [m.slot for m in topology.pool(Role.ATTENTION)] == [0, 1, 2]
    assert [m.slot for m in topology.pool(Role.FFN)] == [0, 1]
    assert topology.pool(Role.SUPERVISOR) == ()


def test_a_member_is_found_by_its_incarnation_and_not_by_its_slot():
    restarted = member(Role.FFN, 0, "second life")
    topology = Topology(2, (restarted,))
    assert topology.find("second life") is restarted
    assert topology.find("FFN0") is None


@pytest.mark.parametrize(
    ("members", "notation"), [(CROWD, "3A2F"), ((), "0A0F"), (CROWD[:2], "1A1F")]
)
def test_the_notation_counts_workers_only(members, notation):
    assert Topology(1, members).notation == notation


def test_names_are_for_people():
    assert member(Role.FFN, 1).name == "ffn/1"
    assert member(Role.SUPERVISOR, 0).name == "supervisor/0"


def test_an_ffn_is_split_unless_it_is_said_to_be_replicated():
    assert Topology(1, ()).ffn_parallel is FFNParallel.TENSOR


def test_the_numbers_on_the_wire_do_not_change():
    assert [(role.name, int(role)) for role in Role] == [
        ("SUPERVISOR", 0),
        ("GATEWAY", 1),
        ("ATTENTION", 2),
        ("FFN", 3),
    ]
    assert [(p.name, int(p)) for p in FFNParallel] == [
        ("TENSOR", 1),
        ("REPLICATE", 2),
        ("COLOCATED", 3),
        ("EXPERT", 4),
        ("HYBRID", 5),
    ]


@st.composite
def spreads(draw):
    num_groups = draw(st.integers(1, 9))
    by_layer = draw(st.lists(st.integers(1, 50), min_size=1, max_size=4))
    return by_layer, num_groups, draw(st.integers(1, 3)), draw(st.integers(1, num_groups))


@given(spreads())
def test_every_expert_has_its_replicas_and_no_group_has_two_more_than_another(spread):
    by_layer, num_groups, num_shards, num_replicas = spread
    placement = spread_experts(*spread)
    assert [len(experts) for experts in placement.holders] == by_layer
    for experts in placement.holders:
        assert all(len(set(groups)) == num_replicas for groups in experts)
        load = [sum(g in groups for groups in experts) for g in range(num_groups)]
        assert max(load) - min(load) <= 1


@given(spreads())
def test_what_a_slot_holds_is_what_its_group_holds(spread):
    placement = spread_experts(*spread)
    for group in range(placement.num_groups):
        expected = [
            [expert for expert, groups in enumerate(experts) if group in groups]
            for experts in placement.holders
        ]
        for slot in placement.slots_of(group):
            assert [list(experts) for experts in placement.experts_of(slot)] == expected


@given(spreads(), st.randoms())
def test_losing_fewer_groups_than_there_are_replicas_loses_no_expert(spread, rng):
    placement, (_, num_groups, _, num_replicas) = spread_experts(*spread), spread
    lost = set(rng.sample(range(num_groups), num_replicas - 1))
    assert all(set(groups) - lost for groups in itertools.chain(*placement.holders))


def test_forty_eight_experts_over_five_workers_are_ten_or_nine_each():
    placement = spread_experts([48], 5, 1, 1)
    assert [len(placement.experts_of(slot)[0]) for slot in range(5)] == [10, 10, 10, 9, 9]


def test_the_dense_layers_of_a_model_lie_with_different_workers():
    placement = spread_experts([1, 1, 1], 3, 1, 1)
    assert [placement.experts_of(slot) for slot in range(3)] == [
        ((0,), (), ()), ((), (0,), ()), ((), (), (0,)),
    ]  # fmt: skip


@given(spreads())
def test_with_hot_experts_only_these_have_replicas_and_groups_still_differ_by_one(spread):
    by_layer, num_groups, _, num_replicas = spread
    hot = {(layer, expert) for layer in range(len(by_layer)) for expert in range(0, 50, 3)}
    for layer, experts in enumerate(spread_experts(*spread, hot=hot).holders):
        copies = [num_replicas if (layer, e) in hot else 1 for e in range(len(experts))]
        assert [len(set(groups)) for groups in experts] == copies
        load = [sum(g in groups for groups in experts) for g in range(num_groups)]
        assert max(load) - min(load) <= 1


@given(spreads())
def test_what_the_attention_side_holds_leaves_the_rest_where_it_was(spread):
    by_layer, num_groups, *_ = spread
    named = {(layer, expert) for layer in range(len(by_layer)) for expert in range(0, 50, 2)}
    before, after = spread_experts(*spread), spread_experts(*spread, named)
    assert after.attention_side == num_groups
    for layer, num_experts in enumerate(by_layer):
        for expert in range(num_experts):
            expected = before.holders[layer][expert]
            if (layer, expert) in named:
                expected = (after.attention_side,)
            assert after.holders[layer][expert] == expected
        assert after.held_by(after.attention_side)[layer] == tuple(range(0, num_experts, 2))
    with pytest.raises(AssertionError, match="has no slots"):
        after.slots_of(after.attention_side)


@pytest.mark.parametrize("groups", [(), (4,), (0, 0), (-1,), (0, 3)])
def test_an_expert_without_a_holder_or_with_one_that_is_not_there_is_a_mistake(groups):
    with pytest.raises(AssertionError, match="layer 0, expert 1"):
        Placement((((0,), groups),), num_groups=3)


@given(st.integers(1, 5000), st.integers(1, 40))
def test_shards_cover_every_column_once_in_order(columns, num_parts):
    num_parts = min(num_parts, columns)
    shards = [column_shard(columns, part, num_parts) for part in range(num_parts)]
    assert shards[0].start == 0
    assert shards[-1].stop == columns
    assert all(a.stop == b.start for a, b in zip(shards, shards[1:], strict=False))
    assert all(shard.start < shard.stop for shard in shards)


def test_shards_begin_at_whole_vectors_where_they_can():
    assert column_shard(1536, 1, 5) == ColumnShard(256, 576)


@pytest.mark.parametrize(("num_away", "is_away"), [(0, False), (2, False), (3, True), (4, True)])
def test_steps_travel_if_most_layers_do(num_away, is_away):
    away, here = ((0,), (1,)), ((1,), (1,))
    placement = Placement((away,) * num_away + (here,) * (4 - num_away), num_groups=1)
    assert (placement.num_away, placement.is_away) == (num_away, is_away)
