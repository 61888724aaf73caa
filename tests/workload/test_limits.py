"""A limit finds how many requests a server can take at once, and no more."""

import heapq

import pytest

from afd_server.core.request import SLO
from afd_server.workload.limits import AIMD, DECREASE, FixedLimit
from afd_server.workload.report import Outcome, RequestRecord

TARGET = SLO(tpot_s=0.05)


def answer(sent_s=0.0, end_s=5.0, tpot_s=0.04, outcome=Outcome.COMPLETED):
    times_s = (end_s - 10 * tpot_s, end_s)
    return RequestRecord(sent_s, sent_s, end_s, times_s, 8, 11, outcome)


def late(sent_s, end_s):
    return answer(sent_s, end_s, tpot_s=0.06)


def test_a_fixed_limit_stays():
    limit = FixedLimit(4)
    limit.note(late(0.0, 5.0), 4)
    assert limit.width == 4


def test_a_window_of_answers_in_time_makes_the_limit_wider_by_one():
    limit = AIMD(4, TARGET)
    for _ in range(5):  # one more: each adds one over the limit, which grows meanwhile
        assert limit.width == 4
        limit.note(answer(), 4)
    assert limit.width == 5


def test_answers_in_time_while_there_is_room_to_spare_change_nothing():
    limit = AIMD(4, TARGET)
    for _ in range(100):
        limit.note(answer(), 3)
    assert limit.width == 4


@pytest.mark.parametrize(
    "missed", [answer(tpot_s=0.06), answer(outcome=Outcome.FAILED)], ids=["late", "failed"]
)
def test_an_answer_that_missed_the_target_makes_it_narrower_by_a_share(missed):
    limit = AIMD(20, TARGET)
    limit.note(missed, 20)
    assert limit.width == int(DECREASE * 20)


def test_what_was_sent_before_it_shrank_does_not_shrink_it_again():
    limit = AIMD(20, TARGET)
    for sent_s in (0.0, 1.0, 4.9):
        limit.note(late(sent_s, 5.0 + sent_s), 20)
    assert limit.width == 18
    limit.note(late(6.0, 12.0), 18)
    assert limit.width == 16


def test_one_request_may_always_be_under_way():
    limit = AIMD(1, TARGET)
    limit.note(late(0.0, 5.0), 1)
    assert limit.width == 1


def test_a_requests_own_target_is_the_one_that_counts():
    limit = AIMD(20, TARGET)
    times_s = (4.4, 5.0)
    limit.note(RequestRecord(0.0, 0.0, 5.0, times_s, 8, 11, slo=SLO(tpot_s=0.1)), 20)
    assert limit._limit > 20


def test_it_settles_at_what_the_server_can_take():
    """Every step takes 2.5 ms for each request under way: 20 of them keep 50 ms."""
    limit, now_s, widths = AIMD(4, TARGET), 0.0, []
    under_way: list[tuple[float, float, float]] = []
    for _ in range(4000):
        while len(under_way) < limit.width:
            tpot_s = 0.0025 * (len(under_way) + 1)
            heapq.heappush(under_way, (now_s + 100 * tpot_s, now_s, tpot_s))
        now_s, sent_s, tpot_s = under_way[0]
        limit.note(answer(sent_s, now_s, tpot_s), len(under_way))
        heapq.heappop(under_way)
        widths.append(limit.width)
    settled = widths[1000:]
    assert min(settled) >= 16
    assert max(settled) <= 21
