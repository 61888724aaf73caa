"""One definition of every latency."""

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from afd_server.core.request import SLO
from afd_server.workload.report import (
    Outcome,
    RequestRecord,
    details,
    goodput_within,
    offered_within,
    percentile,
    summarise,
)

TARGET = SLO(tpot_s=0.05)


def record(*chunks, output=None, intended=0.0, slo=SLO()):  # noqa: B008  immutable
    count = len(chunks) if output is None else output
    return RequestRecord(intended, intended, chunks[-1], chunks, 10, count, slo=slo)


def lost(outcome, reason="", end=0.5, retry_after=None, slo=SLO()):  # noqa: B008  immutable
    return RequestRecord(0.0, 0.0, end, (), 10, 0, outcome, reason, retry_after, slo)


def test_tpot_leaves_the_first_token_out():
    assert record(1.0, 1.1, 1.3).tpot_s == pytest.approx(0.15)
    assert record(1.0, 1.3, output=4).tpot_s == pytest.approx(0.1)  # two tokens in one chunk
    assert record(1.0).tpot_s is None


def test_an_answer_ends_with_its_last_token_even_one_without_text():
    silent = RequestRecord(0.0, 0.0, 1.3, (1.0, 1.1), 10, 4)
    assert silent.tpot_s == pytest.approx(0.1)
    assert silent.gaps_s == [pytest.approx(0.1)]
    assert summarise([silent], TARGET)["mean_e2el_ms"] == pytest.approx(1300)


def test_ttft_counts_from_the_intended_send():
    late = RequestRecord(2.0, 2.5, 3.0, (3.0,), 1, 1)
    assert late.ttft_s == pytest.approx(1.0)


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0, 100))
def test_percentiles_are_numpys(values, percent):
    assert percentile(values, percent) == pytest.approx(float(numpy.percentile(values, percent)))


def test_a_summary_keeps_failures_apart_and_counts_goodput():
    records = [record(1.0, 1.04), record(1.0, 1.10), record(1.5), lost(Outcome.FAILED, "gone")]
    summary = summarise(records, TARGET)
    assert (summary["completed"], summary["failed"], summary["num_prompts"]) == (3, 1, 4)
    assert summary["duration"] == pytest.approx(1.5)
    assert summary["request_goodput"] == pytest.approx(2 / 1.5)
    assert summary["output_throughput"] == pytest.approx(5 / 1.5)
    assert summary["mean_tpot_ms"] == summary["median_tpot_ms"] == pytest.approx(70)
    assert summary["std_tpot_ms"] == pytest.approx(30)
    assert summary["p50_ttft_ms"] == pytest.approx(1000)
    assert summary["p99_itl_ms"] == pytest.approx(99.4)
    assert summary["slo"]["attainment"] == pytest.approx(2 / 4)


def test_in_a_window_a_good_request_counts_if_its_answer_begins_there():
    records = [
        record(1.0, 1.04), record(1.98, 2.0, 2.06), record(2.0, 2.05), record(2.01, 2.02),
        record(0.5, 0.52), record(1.0, 1.2), lost(Outcome.FAILED), lost(Outcome.REFUSED),
    ]  # fmt: skip
    assert goodput_within(records, TARGET, 0.5, 2.0) == pytest.approx(3 / 1.5)
    assert goodput_within(records, SLO(ttft_s=1.5), 0.5, 2.0) == pytest.approx(2 / 1.5)
    assert goodput_within([], TARGET, 0.5, 2.0) == 0
    sent = [record(1.0, 1.04, intended=at_s) for at_s in (0.4, 0.6, 2.0, 2.1)]
    assert offered_within(sent, 0.5, 2.0) == pytest.approx(2 / 1.5)


def test_a_run_in_which_nothing_was_done_has_no_latencies_and_no_throughput():
    summary = summarise([lost(Outcome.FAILED)], TARGET)
    assert (summary["completed"], summary["request_throughput"]) == (0, 0.0)
    assert not [key for key in summary if key.endswith("_ttft_ms")]
    assert summarise([], TARGET)["slo"]["attainment"] is None


def test_refusals_have_reasons_and_times_of_their_own_and_do_not_count_against_attainment():
    refused = [
        lost(Outcome.REFUSED, "slo", end=0.010, retry_after=1.0),
        lost(Outcome.REFUSED, "slo", end=0.030, retry_after=2.0),
        lost(Outcome.REFUSED, "queue", end=0.020),
    ]
    slo = summarise([record(1.0, 1.04), *refused], TARGET)["slo"]
    assert (slo["admitted"], slo["attainment"]) == (1, 1.0)
    assert slo["refusals"] == {
        "count": 3, "share": 0.75, "by_reason": {"slo": 2, "queue": 1}, "with_retry_after": 2,
        "p50_ms": pytest.approx(20), "p99_ms": pytest.approx(29.8),
    }  # fmt: skip


def test_cancelled_and_unfinished_requests_are_counted_and_not_judged():
    others = [lost(Outcome.CANCELLED), lost(Outcome.UNFINISHED)]
    summary = summarise([record(1.0, 1.04), *others], TARGET)
    assert (summary["cancelled"], summary["unfinished"]) == (1, 1)
    assert (summary["slo"]["admitted"], summary["slo"]["attainment"]) == (3, 1.0)


def test_a_request_is_judged_by_its_own_targets_first():
    assert not record(1.0, 1.04, slo=SLO(tpot_s=0.02)).is_good(TARGET)
    assert record(1.0, 1.08, slo=SLO(tpot_s=0.1)).is_good(TARGET)
    assert not record(1.0, 1.04).is_good(SLO(ttft_s=0.9, tpot_s=0.05))
    assert record(1.0, 1.04).is_good(SLO())


def test_classes_are_reported_each_against_its_target():
    strict, loose = SLO(tpot_s=0.02), SLO(tpot_s=0.1)
    records = [
        record(1.0, 1.01, slo=strict), record(1.0, 1.03, slo=strict), record(1.0, 1.09, slo=loose),
        lost(Outcome.REFUSED, slo=strict),
    ]  # fmt: skip
    first, second = summarise(records, TARGET)["slo"]["classes"]
    assert (first["tpot_ms"], first["num_prompts"], first["refused"]) == (20.0, 3, 1)
    assert (first["attainment"], second["attainment"]) == (0.5, 1.0)
    assert second["p99_tpot_ms"] == pytest.approx(90)


def test_ttft_that_grows_with_time_is_seen():
    steady = [record(at + 0.1, intended=float(at)) for at in range(10)]
    queueing = [record(at * 1.25 + 0.1, intended=float(at)) for at in range(10)]
    assert summarise(steady, TARGET)["slo"]["ttft_growth"] == pytest.approx(0)
    assert summarise(queueing, TARGET)["slo"]["ttft_growth"] == pytest.approx(0.25)
    assert summarise(steady[:2], TARGET)["slo"]["ttft_growth"] is None


def test_peaks_are_those_of_a_second_and_of_a_moment():
    together = [record(0.2, 0.4, 1.5), record(0.3, 0.6, output=4)]
    after = RequestRecord(1.5, 1.5, 1.9, (1.9,), 1, 1)
    summary = summarise([*together, after], TARGET)
    assert summary["max_output_tokens_per_s"] == pytest.approx(6)  # 2 + 4, then 1 + 1
    assert summary["max_concurrent_requests"] == 2


def test_details_line_up_request_by_request_from_the_first_send():
    lists = details([record(5.0, 5.1, intended=4.0), lost(Outcome.REFUSED, "slo")], TARGET)
    assert {len(values) for values in lists.values()} == {2}
    assert lists["intended_times"] == [4.0, 0.0]
    assert lists["ttfts"] == [1.0, 0.0]
    assert lists["itls"] == [[pytest.approx(0.1)], []]
    assert lists["outcomes"] == ["completed", "refused"]
    assert lists["tpots"] == [pytest.approx(0.1), None]
    assert lists["good"] == [False, False]
