"""The series that operators see; our own histogram says what the library's would."""

import re

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from afd_server.telemetry.metrics import FINISHES, REFUSALS, DurationHistogram, GatewayMetrics
from afd_server.telemetry.timeline import EventKind

EDGES_S = (0.001, 0.01, 0.1)


@given(st.lists(st.sampled_from([0.0, 0.0005, 0.001, 0.0011, 0.01, 0.05, 0.1, 3.0])))
def test_a_duration_histogram_renders_as_the_librarys_does(values):
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    series = DurationHistogram("x_seconds", "Text", ("pool",), EDGES_S, ours).series("ffn")
    other = Histogram("x_seconds", "Text", ("pool",), buckets=EDGES_S, registry=theirs)
    other = other.labels("ffn")
    for value in values:
        series.observe(value)
        other.observe(value)
    expected = re.sub(r"(# .* x_seconds_created .*|x_seconds_created.*)\n", "",
                      generate_latest(theirs).decode())  # fmt: skip
    assert generate_latest(ours).decode() == expected


def test_bubbles_are_counted_by_pool_and_stages_of_either_pool_together():
    metrics = GatewayMetrics("m")
    for pool in ("attention", "ffn"):
        metrics.spans(pool)[EventKind.FFN].observe(0.5)
        metrics.spans(pool)[EventKind.WAIT].observe(0.25)
    value = metrics.registry.get_sample_value
    assert value("afd_ffn_seconds_count") == 2
    assert value("afd_bubble_seconds_count", {"pool": "attention"}) == 1
    assert value("afd_bubble_seconds_sum", {"pool": "ffn"}) == 0.25


def test_what_is_counted_by_a_known_label_has_its_series_from_the_start():
    text = GatewayMetrics("m").render().decode().splitlines()
    for reason in REFUSALS:
        assert f'afd_refused_requests_total{{reason="{reason}"}} 0.0' in text
    for reason in FINISHES:
        name = f'vllm:request_success_total{{finished_reason="{reason}",model_name="m"}}'
        assert f"{name} 0.0" in text
    for met in ("yes", "no"):
        assert f'afd_requests_by_slo_total{{met="{met}"}} 0.0' in text


def test_prefix_cache_figures_are_counted_by_worker_and_for_all():
    metrics = GatewayMetrics("m")
    metrics.prefix_cache("attention/0", 100, 60)
    metrics.prefix_cache("attention/1", 50, 0)
    metrics.prefix_cache("attention/0", -5, -5)  # an older report, overtaken
    text = metrics.render().decode().splitlines()
    assert 'vllm:prefix_cache_queries_total{model_name="m"} 150.0' in text
    assert 'vllm:prefix_cache_hits_total{model_name="m"} 60.0' in text
    assert 'afd_prefix_cache_queries_tokens_total{worker="attention/0"} 100.0' in text
    assert 'afd_prefix_cache_hits_tokens_total{worker="attention/0"} 60.0' in text
    assert 'afd_prefix_cache_hits_tokens_total{worker="attention/1"} 0.0' in text
