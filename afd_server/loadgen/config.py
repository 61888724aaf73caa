"""What `afd-server bench` can be told."""

import argparse
import json
from dataclasses import dataclass, field
from math import inf, isfinite
from pathlib import Path
from typing import Any, Literal, get_args  # Any: argparse's values, JSON fields for a body

from afd_server.core.errors import ConfigError
from afd_server.core.request import SLO
from afd_server.workload.lengths import Lengths, UniformLengths, parse_lengths
from afd_server.workload.offers import Clients, parse_targets
from afd_server.workload.trace import MOONCAKE_BLOCK_TOKENS

EndpointType = Literal["completions", "chat"]

OF_A_TRACE = ("burstiness", "input_len", "output_len", "prefix_len", "num_prefixes")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchConfig:
    """A load, the server it is put on and how that is judged.

    A rate is in requests/s; infinity sends as soon as there is room, None (of a trace) when
    recorded. Several rates or widths are several runs.
    """

    url: str = "http://127.0.0.1:8000"
    model: str | None = None
    endpoint_type: EndpointType = "completions"
    api_key: str | None = None
    request_rate: tuple[float | None, ...] = (1.0,)
    max_concurrency: tuple[int | None, ...] = (None,)
    burstiness: float = 1.0
    num_prompts: int | None = None
    duration_s: float = 60.0
    input_len: Lengths = UniformLengths(128, 128)
    output_len: Lengths = UniformLengths(128, 128)
    prefix_len: int = 0
    num_prefixes: int = 1
    trace: Path | None = None
    trace_block_size: int = MOONCAKE_BLOCK_TOKENS
    vocabulary: range = range(100, 40000)
    tpot_slo_ms: float = 50.0
    ttft_slo_ms: float | None = None
    clients: Clients = field(default_factory=Clients)
    find_goodput: bool = False
    num_warmups: int = 1
    timeout_s: float = 600.0
    extra_body: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    label: str = ""
    output: Path | None = None
    save_detailed: bool = False

    def __post_init__(self) -> None:
        if not self.burstiness >= 0.01:  # gaps below are nothing but zeros and one eternity
            raise ConfigError(f"burstiness is {self.burstiness}, must be at least 0.01")
        positive = ("duration_s", "tpot_slo_ms", "timeout_s", "trace_block_size",
                    "num_prefixes")  # fmt: skip
        for name in positive:
            if not 0 < getattr(self, name) < inf:
                raise ConfigError(f"{name} is {getattr(self, name)}, must be above 0 and finite")
        if self.num_prompts is not None and self.num_prompts < 1:
            raise ConfigError(f"num_prompts is {self.num_prompts}, must be at least 1")
        if self.ttft_slo_ms is not None and not 0 < self.ttft_slo_ms < inf:
            raise ConfigError(f"ttft_slo_ms is {self.ttft_slo_ms}, must be above 0 and finite")
        for name in ("prefix_len", "num_warmups"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, must be at least 0")
        for rate in self.request_rate:
            if rate is not None and not rate > 0:
                raise ConfigError(f"request_rate is {rate}, must be above 0 or inf")
        if self.trace is None and None in self.request_rate:
            raise ConfigError("request_rate is None, which only a trace may have")
        for width in self.max_concurrency:
            if width is not None and width < 1:
                raise ConfigError(f"max_concurrency is {width}, must be at least 1")
        if not 0 <= self.clients.cancel_share <= 1:
            raise ConfigError(f"cancel_share is {self.clients.cancel_share}, must be in 0 … 1")
        if not 0 < self.clients.cancel_after_s < inf:
            raise ConfigError(
                f"cancel_after_s is {self.clients.cancel_after_s}, must be above 0 and finite"
            )
        if self.find_goodput:
            self._check_search()

    def _check_search(self) -> None:
        rates, widths = self.request_rate, self.max_concurrency
        if len(rates) > 1 or len(widths) > 1:
            raise ConfigError("find_goodput takes one request_rate, to begin with, and one width")
        if rates[0] is not None and not isfinite(rates[0]):
            raise ConfigError("find_goodput needs a request_rate to begin with, not inf")
        if self.num_prompts is not None:
            raise ConfigError("find_goodput goes by duration_s, num_prompts would depend on rates")

    @property
    def slo(self) -> SLO:
        """Return the targets of requests that carry none."""
        ttft_s = None if self.ttft_slo_ms is None else self.ttft_slo_ms / 1000
        return SLO(ttft_s, self.tpot_slo_ms / 1000)


def add_bench_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every setting of a benchmark."""
    defaults = BenchConfig()

    def add(flag: str, text: str, **options: Any) -> None:  # Any: argparse's options
        parser.add_argument(flag, help=text, default=argparse.SUPPRESS, **options)

    add("--url", f"of the server (default: {defaults.url})")
    add("--model", "name in the requests (default: the first that the server lists)")
    add("--endpoint-type", "prompts as token ids, or as chat messages of about the same length "
        "(default: completions)", choices=get_args(EndpointType))  # fmt: skip
    add("--api-key", "bearer token (default: the variable OPENAI_API_KEY)")
    add("--request-rate", "requests/s; inf: as soon as there is room; several, as in 1,2,4: one "
        "run each; of a trace: its mean rate, default as recorded (default: 1)")  # fmt: skip
    add("--max-concurrency", "most requests under way; several, as in 1,8,16: one run each")
    add("--burstiness", "1: Poisson arrivals; less: bursts; inf: evenly spaced (default: 1)",
        type=float, metavar="X")  # fmt: skip
    add("--num-prompts", "requests of a run (default: what duration and rate give; without a "
        "rate 4 a stream, at least 32; of a trace all)", type=int, metavar="N")  # fmt: skip
    add("--duration-s", "seconds in which a run's requests arrive (default: 60)", type=float,
        metavar="X")  # fmt: skip
    for side in ("input", "output"):
        add(f"--{side}-len", f"{side} tokens: 128, 64:256 (uniform) or "
            "lognormal:MEDIAN:SIGMA:LONGEST (default: 128)", metavar="LENGTHS")  # fmt: skip
    add("--prefix-len", "tokens in front of every prompt, shared (default: 0)", type=int,
        metavar="N")  # fmt: skip
    add("--num-prefixes", "how many different such prefixes (default: 1)", type=int, metavar="N")
    add("--trace", "requests of this file in Mooncake's JSON lines instead", type=Path,
        metavar="FILE")  # fmt: skip
    add("--trace-block-size", "tokens of a hash id in it (default: 512)", type=int, metavar="N")
    add("--token-ids", "the first and last token ids of prompts (default: 100:39999)",
        metavar="LOW:HIGH")  # fmt: skip
    add("--tpot-slo-ms", "target of requests that carry none (default: 50)", type=float,
        metavar="X")  # fmt: skip
    add("--ttft-slo-ms", "target of all, beside it (default: none)", type=float, metavar="X")
    add("--slo-mix", "TPOT targets that requests carry in x-slo-tpot-ms, with weights, as in "
        "20:1,50:2", metavar="MIX")  # fmt: skip
    add("--cancel-share", "of requests that their client gives up (default: 0)", type=float,
        metavar="X")  # fmt: skip
    add("--cancel-after-s", "after so long (default: 1)", type=float, metavar="X")
    add("--find-goodput", "search for the highest rate with p99 TPOT within the target",
        action="store_true")  # fmt: skip
    add("--num-warmups", "requests before, not measured (default: 1)", type=int, metavar="N")
    add("--timeout-s", "longest that a request may take (default: 600)", type=float, metavar="X")
    add("--extra-body", "JSON fields for every request; null leaves a field out", metavar="JSON")
    add("--seed", "of arrivals, lengths, prompts and choices (default: 0)", type=int, metavar="N")
    add("--label", "what is measured; plots compare by it", metavar="TEXT")
    add("--output", "JSON result; of several runs FILE-r2.json and so on", type=Path,
        metavar="FILE")  # fmt: skip
    add("--save-detailed", "with what each request did, for plots over time and CDFs",
        action="store_true")  # fmt: skip


def bench_config(flags: dict[str, Any]) -> BenchConfig:
    """Return the settings of flags as `add_bench_flags` leaves them.

    Raises:
        ConfigError: a value is wrong; the text names it.
    """
    values = dict(flags)
    if "trace" in values:
        own = [name for name in OF_A_TRACE if name in values]
        if own:
            raise ConfigError(f"{own[0]} cannot be given with trace, which has its own")
    for name in ("input_len", "output_len"):
        if name in values:
            values[name] = parse_lengths(values[name], name)
    if "request_rate" in values:
        values["request_rate"] = _numbers(values["request_rate"], "request_rate", float)
    elif "trace" in values:
        values["request_rate"] = (None,)
    has_duration = "trace" not in values and set(values.get("request_rate", ())) != {inf}
    if "duration_s" in values and not (has_duration or values.get("find_goodput")):
        raise ConfigError(
            "duration_s has no effect on a trace or the rate inf: say with num_prompts how much "
            "to send"
        )
    if "max_concurrency" in values:
        values["max_concurrency"] = _numbers(values["max_concurrency"], "max_concurrency", int)
    if "token_ids" in values:
        values["vocabulary"] = _token_ids(values.pop("token_ids"))
    if "extra_body" in values:
        values["extra_body"] = _json_object(values["extra_body"], "extra_body")
    clients: dict[str, Any] = {
        name: values.pop(name) for name in ("cancel_share", "cancel_after_s") if name in values
    }
    if "slo_mix" in values:
        clients["targets"] = parse_targets(values.pop("slo_mix"), "slo_mix")
    return BenchConfig(clients=Clients(**clients), **values)


def _numbers(text: str, setting: str, kind: type[float] | type[int]) -> tuple[float, ...]:
    try:
        numbers = tuple(map(kind, text.split(",")))
    except ValueError as error:
        raise ConfigError(f"{setting} is {text!r}; write numbers, as in 1,2,4") from error
    if any(number != number or number == -inf for number in numbers):
        raise ConfigError(f"{setting} is {text!r}; write numbers, as in 1,2,4")
    return numbers


def _token_ids(text: str) -> range:
    try:
        lowest, highest = map(int, text.split(":"))
    except ValueError:
        lowest, highest = 0, -1
    if not 0 <= lowest <= highest:
        raise ConfigError(f"token_ids is {text!r}, must be LOW:HIGH from 0, as in 100:39999")
    return range(lowest, highest + 1)


def _json_object(text: str, setting: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{setting} is {text!r}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{setting} is {text!r}, must be a JSON object")
    return value
