"""Every Prometheus series, declared once.

Names of vLLM where it has the same thing, so that its dashboards and scalers work unchanged;
`afd_*` for what only a disaggregated server has.
"""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from afd_server.telemetry.timeline import EventKind

# Fine around 50 ms, with an exact edge there: `le="0.05"` is the attainment of the TPOT target.
TPOT_BUCKETS_S = (
    0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.035, 0.04, 0.0425, 0.045, 0.0475, 0.05, 0.0525,
    0.055, 0.06, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
TTFT_BUCKETS_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0,
)  # fmt: skip
STAGE_BUCKETS_S = (
    0.00001, 0.00002, 0.00005, 0.0001, 0.0002, 0.0003, 0.0005, 0.001, 0.002, 0.003, 0.005, 0.01,
    0.02, 0.05, 0.1, 0.2, 0.5, 1.0,
)  # fmt: skip
FINISHES = ("stop", "length", "abort", "refused", "error")
REFUSALS = (
    "expected_wait", "queue_full", "queue_timeout", "target_out_of_reach", "max_live_requests",
    "starting", "stopping",
)  # fmt: skip


class Durations:
    """One labelled series of a `DurationHistogram`."""

    def __init__(self, labels: tuple[str, ...], edges_s: tuple[float, ...]) -> None:
        self.labels = labels
        self._edges_s = edges_s
        self._counts = [0] * (len(edges_s) + 1)
        self._sum_s = 0.0

    def observe(self, duration_s: float) -> None:
        """Count a duration."""
        self._counts[bisect_left(self._edges_s, duration_s)] += 1
        self._sum_s += duration_s

    def cumulative(self) -> tuple[list[tuple[str, float]], float]:
        """Return the buckets as Prometheus wants them, and the sum in seconds."""
        total, buckets = 0, []
        for edge, count in zip((*map(str, self._edges_s), "+Inf"), self._counts, strict=True):
            total += count
            buckets.append((edge, float(total)))
        return buckets, self._sum_s


class DurationHistogram(Collector):
    """A histogram without locks, for series that take thousands of values a second.

    The library's takes a microsecond for each of them, this one a fifth. It belongs to one
    thread, as everything in the gateway does.
    """

    def __init__(
        self,
        name: str,
        documentation: str,
        labels: tuple[str, ...],
        edges_s: tuple[float, ...],
        registry: CollectorRegistry,
    ) -> None:
        self._name, self._documentation, self._labels = name, documentation, labels
        self._edges_s = edges_s
        self._series: list[Durations] = []
        registry.register(self)

    def series(self, *values: str) -> Durations:
        """Add a series with these label values."""
        self._series.append(Durations(values, self._edges_s))
        return self._series[-1]

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = HistogramMetricFamily(self._name, self._documentation, labels=self._labels)
        for series in self._series:
            family.add_metric(series.labels, *series.cumulative())
        yield family


class GatewayMetrics:
    """The gateway's series, in a registry of their own.

    Args:
        model_name: the value of the `model_name` label.
    """

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        label = ("model_name",)
        self._prompt = Counter(
            "vllm:prompt_tokens", "Prompt tokens taken", label, registry=registry
        ).labels(model_name)
        self._generated = Counter(
            "vllm:generation_tokens", "Tokens generated", label, registry=registry
        ).labels(model_name)
        self._finished = Counter(
            "vllm:request_success", "Ended requests", (*label, "finished_reason"), registry=registry
        )
        self._ttft = Histogram(
            "vllm:time_to_first_token_seconds", "Arrival to first token", label,
            buckets=TTFT_BUCKETS_S, registry=registry,
        ).labels(model_name)  # fmt: skip
        self._gap = Histogram(
            "vllm:inter_token_latency_seconds", "Between two tokens", label,
            buckets=TPOT_BUCKETS_S, registry=registry,
        ).labels(model_name)  # fmt: skip
        self._tpot = Histogram(
            "vllm:request_time_per_output_token_seconds", "Mean gap of one request", label,
            buckets=TPOT_BUCKETS_S, registry=registry,
        ).labels(model_name)  # fmt: skip
        self._running = Gauge(
            "vllm:num_requests_running", "Requests holding KV blocks", label, registry=registry
        ).labels(model_name)
        self._waiting = Gauge(
            "vllm:num_requests_waiting", "Requests waiting for blocks", label, registry=registry
        ).labels(model_name)
        self._kv_usage = Gauge(
            "vllm:kv_cache_usage_perc",
            "Share of KV blocks in use, 0 to 1",
            label,
            registry=registry,
        ).labels(model_name)
        self._queries = Counter(
            "vllm:prefix_cache_queries", "Known tokens looked up", label, registry=registry
        ).labels(model_name)
        self._hits = Counter(
            "vllm:prefix_cache_hits", "Known tokens found computed", label, registry=registry
        ).labels(model_name)
        self._worker_queries = Counter(
            "afd_prefix_cache_queries_tokens", "Known tokens looked up", ("worker",),
            registry=registry,
        )  # fmt: skip
        self._worker_hits = Counter(
            "afd_prefix_cache_hits_tokens", "Known tokens found computed", ("worker",),
            registry=registry,
        )  # fmt: skip
        self._preemptions = Gauge(
            "afd_preemptions", "Preemptions since the workers started", registry=registry
        )
        self._epoch = Gauge(
            "afd_topology_epoch", "Epoch of the topology followed", registry=registry
        )
        self._workers = Gauge("afd_workers", "Live workers", ("pool",), registry=registry)
        self._rows = Gauge(
            "afd_worker_rows", "Rows computed since start", ("worker",), registry=registry
        )
        self._resends = Gauge(
            "afd_ffn_resends", "FFN calls sent again", ("worker",), registry=registry
        )
        self._bad_frames = Gauge(
            "afd_bad_frames", "Frames refused", ("process",), registry=registry
        )
        self._resubmits = Counter("afd_resubmits", "Attempts after the first", registry=registry)
        self._dropped = Counter(
            "afd_fenced_tokens", "Tokens of no current attempt", registry=registry
        )
        self._admitted = Counter(
            "afd_admitted_requests", "Requests taken, each choice as one", registry=registry
        )
        self._refused = Counter(
            "afd_refused_requests",
            "Requests refused, each choice as one",
            ("reason",),
            registry=registry,
        )
        self._judged = Counter(
            "afd_requests_by_slo", "Ended requests that had tokens, by whether targets were met",
            ("met",), registry=registry,
        )  # fmt: skip
        self._queued = Gauge(
            "afd_queued_requests", "Admitted requests without a first token", registry=registry
        )
        self._expected_wait = Gauge(
            "afd_expected_wait_seconds", "Until all who wait have their first token",
            registry=registry,
        )  # fmt: skip
        self._expected_step = Gauge(
            "afd_expected_step_seconds", "A step in which all that run decode", ("worker",),
            registry=registry,
        )  # fmt: skip
        self._expected_alone = Gauge(
            "afd_expected_alone_step_seconds", "A step of a single sequence", ("worker",),
            registry=registry,
        )  # fmt: skip
        self._decode_lanes = Gauge(
            "afd_decode_lanes", "Lanes in which sequences decode", ("worker",), registry=registry
        )
        self._slowness = Gauge(
            "afd_step_slowness_ratio", "What steps take lately, by what their load costs",
            ("worker",), registry=registry,
        )  # fmt: skip
        self._busy = Gauge(
            "afd_pool_busy_ratio",
            "Share of the last seconds in which the pool's workers computed",
            ("pool",),
            registry=registry,
        )
        self._lost_events = Gauge(
            "afd_timeline_dropped_events", "Events that no report took", ("worker",),
            registry=registry,
        )  # fmt: skip
        self._expert_tokens = Counter(
            "afd_expert_tokens", "Tokens that a gate sent to an expert", ("layer", "expert"),
            registry=registry,
        )  # fmt: skip
        self._expert_imbalance = Gauge(
            "afd_expert_imbalance",
            "Tokens of a layer's busiest expert over the mean of its experts, since the start",
            ("layer",),
            registry=registry,
        )
        for counter, values in (
            (self._finished, tuple((model_name, reason) for reason in FINISHES)),
            (self._refused, tuple((reason,) for reason in REFUSALS)),
            (self._judged, (("yes",), ("no",))),
        ):
            for labels in values:
                counter.labels(*labels)  # there from the start: a rate needs a zero to rise from
        self._spans = self._declare_spans()
        self._model_name = model_name

    def started(self, num_prompt_tokens: int) -> None:
        """Count a request that was taken."""
        self._admitted.inc()
        self._prompt.inc(num_prompt_tokens)

    def refused(self, reason: str, num_choices: int = 1) -> None:
        """Count a request that was not taken, or not begun."""
        self._refused.labels(reason).inc(num_choices)

    def first_token(self, ttft_s: float) -> None:
        """Count a request's first token."""
        self._generated.inc()
        self._ttft.observe(ttft_s)

    def next_token(self, gap_s: float) -> None:
        """Count a further token."""
        self._generated.inc()
        self._gap.observe(gap_s)

    def finished(self, reason: str, tpot_s: float | None) -> None:
        """Count an ended request; `tpot_s` is None if it had fewer than two tokens."""
        self._finished.labels(self._model_name, reason).inc()
        if tpot_s is not None:
            self._tpot.observe(tpot_s)

    def judged(self, slo_met: bool) -> None:
        """Count a request by whether it kept its targets."""
        self._judged.labels("yes" if slo_met else "no").inc()

    def queue(self, num_waiting: int, drain_s: float) -> None:
        """Show how many wait for a first token, and how long until all have it."""
        self._queued.set(num_waiting)
        self._expected_wait.set(drain_s)

    def controller(
        self, worker: str, step_s: float, alone_s: float, decode_lanes: int, slowness: float
    ) -> None:
        """Show what an attention worker expects of its steps, and how it lays them out."""
        self._expected_step.labels(worker).set(step_s)
        self._expected_alone.labels(worker).set(alone_s)
        self._decode_lanes.labels(worker).set(decode_lanes)
        self._slowness.labels(worker).set(slowness)

    def resubmitted(self) -> None:
        """Count a new attempt of a request."""
        self._resubmits.inc()

    def fenced(self) -> None:
        """Count a token that belonged to no current attempt."""
        self._dropped.inc()

    def topology(self, epoch: int, num_attention: int, num_ffn: int) -> None:
        """Show the topology."""
        self._epoch.set(epoch)
        self._workers.labels("attention").set(num_attention)
        self._workers.labels("ffn").set(num_ffn)

    def load(self, running: int, waiting: int, kv_usage: float, preemptions: int) -> None:
        """Show the attention pool's load, summed over its workers."""
        self._running.set(running)
        self._waiting.set(waiting)
        self._kv_usage.set(kv_usage)
        self._preemptions.set(preemptions)

    def worker(
        self, name: str, rows: int, resends: int, bad_frames: int, dropped_events: int
    ) -> None:
        """Show one worker's counters."""
        self._rows.labels(name).set(rows)
        self._resends.labels(name).set(resends)
        self._bad_frames.labels(name).set(bad_frames)
        self._lost_events.labels(name).set(dropped_events)

    def spans(self, pool: str) -> Mapping[int, Durations]:
        """Return where the events of a pool's timelines count, by kind; not every kind does."""
        return self._spans[pool]

    def busy_ratio(self, pool: str, ratio: float) -> None:
        """Show how busy a pool is."""
        self._busy.labels(pool).set(ratio)

    def prefix_cache(self, worker: str, num_queried: int, num_hit: int) -> None:
        """Count what an attention worker looked up and found since its last report.

        Reports may overtake each other; an older one adds nothing.
        """
        for queries, hits in (
            (self._queries, self._hits),
            (self._worker_queries.labels(worker), self._worker_hits.labels(worker)),
        ):
            queries.inc(max(0, num_queried))
            hits.inc(max(0, num_hit))

    def expert_tokens(self, layer: int, new_tokens: Sequence[int], imbalance: float) -> None:
        """Count the tokens that a layer's experts got, and show how uneven it has been so far."""
        for expert, tokens in enumerate(new_tokens):
            self._expert_tokens.labels(str(layer), str(expert)).inc(tokens)
        self._expert_imbalance.labels(str(layer)).set(imbalance)

    def render(self) -> bytes:
        """Return the exposition text."""
        return generate_latest(self.registry)

    def _declare_spans(self) -> dict[str, dict[int, Durations]]:
        """Declare the histograms of the timeline; return each series by pool and kind."""

        def declare(
            name: str, text: str, label: str = "", edges: tuple[float, ...] = STAGE_BUCKETS_S
        ) -> DurationHistogram:
            labels = (label,) if label else ()
            return DurationHistogram(name, text, labels, edges, self.registry)

        transfer = declare(
            "afd_transfer_seconds", "An FFN call or its answer under way", "direction"
        )
        bubble = declare("afd_bubble_seconds", "Live work and nothing to compute", "pool")
        of_both: dict[int, Durations] = {
            EventKind.ATTENTION: declare("afd_attention_seconds", "A lane in one layer").series(),
            EventKind.FFN: declare("afd_ffn_seconds", "A group of FFN calls computed").series(),
            EventKind.SAMPLE: declare("afd_sampling_seconds", "Sampling, without logits").series(),
            EventKind.STEP: declare(
                "afd_lane_step_seconds", "A whole step of a lane", edges=TPOT_BUCKETS_S
            ).series(),
            EventKind.EXPECTED: declare(
                "afd_expected_lane_step_seconds",
                "What such a step was expected to take",
                edges=TPOT_BUCKETS_S,
            ).series(),
            EventKind.A_TO_F: transfer.series("a_to_f"),
            EventKind.F_TO_A: transfer.series("f_to_a"),
        }
        return {
            pool: {**of_both, EventKind.WAIT: bubble.series(pool)} for pool in ("attention", "ffn")
        }
