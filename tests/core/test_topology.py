"""Who is alive: looked up by role and by incarnation."""

import pytest

from afd_server.core.topology import FFNParallel, Member, Role, Topology


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
    ]
