"""A run as a result file and as a line of a table."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain, count
from math import inf
from typing import Any  # Any: JSON

from afd_server.loadgen.config import BenchConfig
from afd_server.loadgen.environment import environment
from afd_server.loadgen.plan import Point
from afd_server.loadgen.run import Run
from afd_server.workload.report import Outcome, details, summarise

COLUMNS = (
    ("rate", 7), ("conc", 5), ("done", 6), ("refused", 8), ("failed", 7), ("tok/s", 8),
    ("TPOT p50", 9), ("p99", 7), ("TTFT p50", 9), ("p99", 8), ("ITL p99", 8), ("good/s", 7),
    ("attain", 7), ("client", 7),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What a server says of itself; None where it does not."""

    model: str
    max_model_len: int | None
    topology: str | None
    version: str | None


def make_result(
    config: BenchConfig, server: ServerFacts, point: Point, rate_per_s: float, run: Run
) -> dict[str, Any]:
    """Return a run as JSON: the keys of vLLM's `bench serve`, then our own blocks.

    `rate_per_s` is what was offered, infinity if requests were sent when there was room.
    """
    kind = "openai-chat" if config.endpoint_type == "chat" else "openai"
    failed = (record for record in run.records if record.outcome is Outcome.FAILED)
    return {
        "date": datetime.now(UTC).strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": kind,
        "backend": kind,
        "label": config.label,
        "model_id": server.model,
        "tokenizer_id": server.model,
        "request_rate": _finite(rate_per_s),
        "burstiness": _finite(config.burstiness),
        "max_concurrency": point.max_concurrency,
        **summarise(run.records, config.slo),
        "interrupted": run.interrupted,
        "failures": sorted({record.reason for record in failed}),
        "client": run.load.as_json(),
        "server": {"url": config.url, "topology": server.topology, "version": server.version},
        "workload": _workload(config, point),
        "environment": environment(),
        **(details(run.records, config.slo) if config.save_detailed else {}),
    }


def unique_names(names: Sequence[str]) -> list[str]:
    """Return names for files; of equal ones each but the first has a number."""
    found: list[str] = []
    for name in names:
        choices = chain([name], (f"{name}-{number}" for number in count(2)))
        found.append(next(choice for choice in choices if choice not in found))
    return found


def header_line() -> str:
    """Return the columns' heads."""
    return "".join(f"{name:>{width}}" for name, width in COLUMNS)


def summary_line(result: dict[str, Any]) -> str:
    """Return a result under the columns' heads."""
    attainment = result["slo"]["attainment"]
    rate, client = result["request_rate"], result["client"]["cpu_share"]
    cells = [
        rate if rate == "inf" else f"{rate:.4g}",
        result["max_concurrency"] or "-",
        result["completed"],
        result["refused"],
        result["failed"],
        f"{result['output_throughput']:.1f}",
        *(
            f"{result[key]:.1f}" if key in result else "-"
            for key in ("p50_tpot_ms", "p99_tpot_ms", "p50_ttft_ms", "p99_ttft_ms", "p99_itl_ms")
        ),
        f"{result['request_goodput']:.3g}",
        "-" if attainment is None else f"{attainment:.1%}",
        f"{client:.0%}",
    ]
    return "".join(f"{cell:>{width}}" for cell, (_, width) in zip(cells, COLUMNS, strict=True))


def _workload(config: BenchConfig, point: Point) -> dict[str, Any]:
    lengths = {
        "input_len": str(config.input_len),
        "output_len": str(config.output_len),
        "prefix_len": config.prefix_len,
        "num_prefixes": config.num_prefixes,
    }
    return {
        **(lengths if config.trace is None else {"trace": str(config.trace)}),
        "seed": config.seed,
        "point": point.number,
        "slo_mix": [[target * 1000, weight] for target, weight in config.clients.targets],
        "cancel_share": config.clients.cancel_share,
        "cancel_after_s": config.clients.cancel_after_s,
        "extra_body": config.extra_body,
    }


def _finite(number: float) -> float | str:
    return "inf" if number == inf else number
