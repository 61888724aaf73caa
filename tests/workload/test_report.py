"""One definition of every latency."""

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from afd_server.workload.arrivals import poisson_arrivals
from afd_server.workload.report import RequestRecord, percentile, summarise


def record(*chunks, output=None, intended=0.0, error=None):
    return RequestRecord(
        intended, intended, chunks, 10, len(chunks) if output is None else output, error
    )


def test_tpot_leaves_the_first_token_out():
    assert record(1.0, 1.1, 1.3).tpot_s == pytest.approx(0.15)
    assert record(1.0, 1.3, output=4).tpot_s == pytest.approx(0.1)  # two tokens in one chunk
    assert record(1.0).tpot_s is None


def test_ttft_counts_from_the_intended_send():
    late = RequestRecord(2.0, 2.5, (3.0,), 1, 1)
    assert late.ttft_s == pytest.approx(1.0)


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0, 100))
def test_percentiles_are_numpys(values, percent):
    assert percentile(values, percent) == pytest.approx(float(numpy.percentile(values, percent)))


def test_a_summary_keeps_failures_apart_and_counts_goodput():
    records = [record(1.0, 1.04), record(1.0, 1.10), record(1.5), record(error="refused")]
    summary = summarise(records, tpot_slo_s=0.05)
    assert (summary["completed"], summary["failed"]) == (3, 1)
    assert summary["duration"] == pytest.approx(1.5)
    assert summary["request_goodput"] == pytest.approx(2 / 1.5)
    assert summary["output_throughput"] == pytest.approx(5 / 1.5)
    assert summary["mean_tpot_ms"] == pytest.approx(70)
    assert summary["p50_ttft_ms"] == pytest.approx(1000)
    assert summary["p99_itl_ms"] == pytest.approx(99.4)


def test_nothing_done_is_said_plainly():
    assert summarise([record(error="x")], 0.05) == {"completed": 0, "failed": 1}


def test_poisson_gaps_have_the_mean_of_the_rate_and_a_seed_repeats_them():
    times = list(poisson_arrivals(4.0, 4000, seed=1))
    assert times == sorted(times)
    assert times[-1] / 4000 == pytest.approx(0.25, rel=0.05)
    assert times == list(poisson_arrivals(4.0, 4000, seed=1))
