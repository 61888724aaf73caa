"""The search finds the highest rate that holds, and says why others do not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afd_server.core.request import SLO
from afd_server.workload.report import Outcome, RequestRecord, summarise
from afd_server.workload.search import RateSearch, missed_targets


def search_for(limit, first, **options):
    search, tried = RateSearch(first, **options), []
    while (rate := search.next_rate()) is not None:
        tried.append(rate)
        search.note(rate, holds=rate <= limit)
    return search, tried


@given(st.floats(0.01, 1000), st.floats(0.01, 1000))
def test_the_limit_is_found_within_the_precision(limit, first):
    search, _ = search_for(limit, first, precision=0.05, most_points=40)
    assert limit / 1.05 <= search.best <= limit < search.lowest_missed <= search.best * 1.05


@pytest.mark.parametrize("limit", [1.5 * 2**14, 1.5 / 2**15])
def test_a_limit_far_from_the_first_rate_is_found_as_precisely(limit):
    search, tried = search_for(limit, 1.0)
    assert limit / 1.05 <= search.best <= limit < search.lowest_missed
    assert len(tried) > 16


def test_a_limit_is_not_looked_for_without_end():
    search, tried = search_for(1e9, 1.0, most_points=5)
    assert (search.best, search.lowest_missed, tried) == (16.0, None, [1.0, 2.0, 4.0, 8.0, 16.0])
    search, tried = search_for(0.0, 1.0, most_points=3)
    assert (search.best, search.lowest_missed, tried) == (None, 0.25, [1.0, 0.5, 0.25])


def record(at, tpot=0.04, ttft=0.1, outcome=Outcome.COMPLETED, slo=None):
    chunks = (at + ttft, at + ttft + tpot)
    return RequestRecord(at, at, chunks[-1], chunks, 10, 2, outcome, "full", None, slo or SLO())


def missed(records, slo=None):
    return list(missed_targets(summarise(records, slo or SLO(tpot_s=0.05))))


def test_a_run_within_its_targets_misses_nothing():
    assert missed([record(at) for at in range(10)]) == []


def test_a_slow_run_and_one_that_refused_failed_or_did_not_end_say_so():
    good = [record(at) for at in range(10)]
    assert missed([record(at, tpot=0.06) for at in range(9)]) == ["p99 TPOT 60.0 ms, target 50"]
    assert missed([*good, record(10, outcome=Outcome.REFUSED)]) == ["9.1% refused"]
    assert missed([*good, record(10, outcome=Outcome.FAILED)]) == ["1 failed"]
    assert missed([*good, record(10, outcome=Outcome.UNFINISHED)]) == ["1 unfinished"]
    assert missed([record(0, outcome=Outcome.CANCELLED)]) == ["nothing completed"]
    assert missed(good, SLO(ttft_s=0.05, tpot_s=0.05)) == ["p99 TTFT 100 ms, target 50"]


def test_a_queue_that_only_grows_is_no_rate_that_holds():
    queueing = [record(at, ttft=0.1 + 0.2 * at) for at in range(20)]
    assert missed(queueing) == ["TTFT grows by 0.20 s a second"]


def test_each_class_is_held_to_its_own_target():
    strict = [record(at, slo=SLO(tpot_s=0.02)) for at in range(5)]
    loose = [record(at, slo=SLO(tpot_s=0.1)) for at in range(5)]
    assert missed([*strict, *loose]) == ["p99 TPOT 40.0 ms, target 20"]


def test_failures_of_a_class_count_too():
    failed = record(3, outcome=Outcome.FAILED, slo=SLO(tpot_s=0.02))
    assert missed([record(0), failed]) == [pytest.approx("1 failed")]
