"""Counts of several workers, which restart and whose reports overtake each other."""

import array

import pytest

from afd_server.core.errors import ProtocolError
from afd_server.core.topology import Member, Role, Topology
from afd_server.gateway.expert_view import ExpertView
from afd_server.telemetry.metrics import GatewayMetrics
from afd_server.transport.messages import DType, ExpertLoad, Payload


class Bench:
    def __init__(self):
        self.metrics = GatewayMetrics("m")
        self.view = ExpertView(self.metrics)

    def report(self, incarnation, *rows):
        data = array.array("q", [count for row in rows for count in row]).tobytes()
        payload = Payload(DType.INT64, (len(rows), len(rows[0])), data)
        self.view.take(incarnation, ExpertLoad(payload))

    def tokens(self, layer, expert):
        labels = {"layer": str(layer), "expert": str(expert)}
        return self.metrics.registry.get_sample_value("afd_expert_tokens_total", labels)

    def imbalance(self, layer):
        labels = {"layer": str(layer)}
        return self.metrics.registry.get_sample_value("afd_expert_imbalance", labels)


def test_counts_of_workers_are_added_and_each_token_is_counted_once():
    bench = Bench()
    bench.report("a", [3, 1], [0, 4])
    bench.report("b", [1, 1], [2, 0])
    bench.report("a", [5, 1], [0, 6])
    bench.report("a", [3, 1], [0, 4])  # overtaken by the one before
    assert [bench.tokens(0, 0), bench.tokens(0, 1)] == [6, 2]
    assert [bench.tokens(1, 0), bench.tokens(1, 1)] == [2, 6]


def test_a_worker_that_starts_again_adds_to_what_its_slot_counted_before():
    bench = Bench()
    bench.report("a", [3, 1])
    bench.view.follow(Topology(2, (Member(Role.ATTENTION, 0, "a2", "", ""),)))
    bench.report("a2", [1, 0])
    assert bench.tokens(0, 0) == 4


def test_imbalance_is_the_busiest_experts_share_of_an_even_one():
    bench = Bench()
    bench.report("a", [5, 5, 5, 5], [20, 0, 0, 0])
    assert (bench.imbalance(0), bench.imbalance(1)) == (1.0, 4.0)
    bench.report("a", [5, 5, 5, 25], [20, 0, 0, 20])
    assert (bench.imbalance(0), bench.imbalance(1)) == (2.5, 2.0)


def test_a_dense_layer_shows_nothing():
    bench = Bench()
    bench.report("a", [0, 0], [1, 1])
    assert bench.imbalance(0) is None
    assert bench.tokens(0, 0) is None


@pytest.mark.parametrize(
    "payload",
    [
        Payload(DType.INT32, (1, 2), bytes(8)),
        Payload(DType.INT64, (2,), bytes(16)),
        Payload(DType.INT64, (1, 3), bytes(24)),
        Payload(DType.INT64, (1, 2), b"\xff" * 16),
    ],
)
def test_what_is_no_table_of_counts_is_refused(payload):
    bench = Bench()
    bench.report("a", [3, 1])
    with pytest.raises(ProtocolError):
        bench.view.take("a", ExpertLoad(payload))


def test_the_hottest_experts_of_each_layer_are_told_and_of_equals_the_lower_ids():
    bench = Bench()
    bench.report("a", [3, 9, 4, 9], [0, 0, 0, 0], [1, 1, 1, 1])
    bench.report("b", [6, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1])
    assert bench.view.hottest(2) == {"0": [0, 1], "2": [0, 3]}
    assert bench.view.hottest(9) == {"0": [0, 1, 2, 3], "2": [0, 1, 2, 3]}
