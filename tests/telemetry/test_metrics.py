"""The series that operators see."""

from afd_server.telemetry.metrics import GatewayMetrics


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
