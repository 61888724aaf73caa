"""What a run sends: from settings, or a trace, to offers."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, count, islice, repeat
from math import ceil, inf

from afd_server.core.errors import ConfigError
from afd_server.loadgen.config import BenchConfig
from afd_server.workload.arrivals import arrival_times, stretch
from afd_server.workload.offers import (
    Clients,
    Offer,
    Shape,
    make_offers,
    synthetic_shapes,
    trace_shapes,
)
from afd_server.workload.trace import TraceEntry, parse_trace

FEWEST_PROMPTS = 10  # of a rate's run: fewer have no p99 to speak of


@dataclass(frozen=True, slots=True)
class Point:
    """One run of a sweep; `number` tells its draws from those of the others."""

    number: int
    rate_per_s: float | None
    max_concurrency: int | None

    @property
    def name(self) -> str:
        """Return what its result file is called after."""
        parts = [] if self.rate_per_s in (None, inf) else [f"r{self.rate_per_s:.4g}"]
        parts += [] if self.max_concurrency is None else [f"c{self.max_concurrency}"]
        return "-".join(parts) or "all"


class Plan:
    """Makes the offers of every run of a command."""

    def __init__(self, config: BenchConfig) -> None:
        """Read the trace, if there is one.

        Raises:
            ConfigError: it cannot be read, is none, or has no rate and is to be replayed at one.
        """
        self._config = config
        self._trace = _read_trace(config)
        if self._trace and (config.num_prompts or 0) > len(self._trace):
            raise ConfigError(
                f"num_prompts is {config.num_prompts}, but {config.trace} has {len(self._trace)}"
            )
        self._trace = self._trace[: config.num_prompts]
        at_once = sum(entry.at_s == self._trace[0].at_s for entry in self._trace)
        self._fewest = max(FEWEST_PROMPTS, at_once + 1)  # one more: a mean rate needs two times
        if self._trace and at_once == len(self._trace) and set(config.request_rate) != {inf}:
            raise ConfigError(
                f"the {at_once} requests to replay of {config.trace} have the same timestamp"
            )

    def check_lengths(self, model: str, max_model_len: int) -> None:
        """Refuse lengths that the model cannot take, before anything is sent."""
        config = self._config
        if config.trace is None:
            longest = config.prefix_len + config.input_len.longest + config.output_len.longest
            if longest > max_model_len:
                raise ConfigError(
                    f"prefix_len {config.prefix_len}, input_len up to {config.input_len.longest} "
                    f"and output_len up to {config.output_len.longest} make {longest} tokens, "
                    f"but max_model_len of {model} is {max_model_len}"
                )
        lengths = [entry.num_input_tokens + entry.num_output_tokens for entry in self._trace]
        too_long = sum(length > max_model_len for length in lengths)
        if too_long:
            raise ConfigError(
                f"{too_long} of {len(lengths)} requests of {config.trace} are longer than "
                f"max_model_len {max_model_len} of {model}; the longest has {max(lengths)}"
            )

    def warm_up(self) -> Iterator[Offer]:
        """Return the offers before the first run."""
        shapes = islice(self._shapes("warm-up"), self._config.num_warmups)
        return make_offers(repeat(None), shapes, Clients(), "warm-up")

    def offers(self, point: Point) -> tuple[Iterator[Offer], int]:
        """Return a run's offers and how many they are."""
        config, seed = self._config, f"{self._config.seed} {point.number}"
        shapes, num_offers = self._shapes(seed), self._count(point)
        if self._trace and point.rate_per_s != inf:
            times: Iterator[float | None] = iter(self._trace_times_s(num_offers, point.rate_per_s))
        elif point.rate_per_s == inf:
            times = repeat(None)
        else:
            assert point.rate_per_s is not None, "only a trace has a rate of its own"
            rate, arrivals = point.rate_per_s, f"{seed} arrivals"
            times = iter(arrival_times(rate, config.burstiness, num_offers, arrivals))
        return islice(make_offers(times, shapes, config.clients, seed), num_offers), num_offers

    def recorded_rate(self) -> float:
        """Return the mean rate of what is replayed of the trace."""
        return (len(self._trace) - 1) / (self._trace[-1].at_s - self._trace[0].at_s)

    def limit_s(self, rate_per_s: float) -> float:
        """Return when to end a run of a search: a server that holds the rate is done by then."""
        config = self._config
        arrivals_s = max(config.duration_s, self._fewest / rate_per_s)
        longest = max((entry.num_output_tokens for entry in self._trace),
                      default=config.output_len.longest)  # fmt: skip
        slowest_ms = max([config.tpot_slo_ms, *(1000 * t for t, _ in config.clients.targets)])
        return 2 * arrivals_s + longest * slowest_ms / 1000

    def _count(self, point: Point) -> int:
        config, rate = self._config, point.rate_per_s
        if self._trace and not config.find_goodput:
            return len(self._trace)
        if config.num_prompts is not None:
            return config.num_prompts
        if rate is None or rate == inf:
            return max(32, 4 * (point.max_concurrency or 0))
        return max(self._fewest, ceil(rate * config.duration_s))

    def _shapes(self, seed: str) -> Iterator[Shape]:
        config = self._config
        if self._trace:
            size, rounds = config.trace_block_size, (f"{config.seed} {n}" for n in count())
            return chain.from_iterable(trace_shapes(self._trace, size, each) for each in rounds)
        return synthetic_shapes(
            config.input_len, config.output_len, seed,
            prefix_tokens=config.prefix_len, num_prefixes=config.num_prefixes,
            prefix_seed=str(config.seed),
        )  # fmt: skip

    def _trace_times_s(self, num_offers: int, rate_per_s: float | None) -> list[float]:
        """Return when to send; a search may need more than there is, and repeats the trace."""
        rate = self.recorded_rate()
        period_s = len(self._trace) / rate
        rounds = (divmod(number, len(self._trace)) for number in range(num_offers))
        times_s = [number * period_s + self._trace[place].at_s for number, place in rounds]
        return stretch(times_s, rate_per_s or rate)


def _read_trace(config: BenchConfig) -> list[TraceEntry]:
    if config.trace is None:
        return []
    try:
        lines = config.trace.read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:  # ValueError: no UTF-8
        raise ConfigError(f"trace {config.trace} cannot be read: {error}") from error
    return parse_trace(lines, config.trace_block_size, str(config.trace))
