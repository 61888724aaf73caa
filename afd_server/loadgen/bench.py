"""`afd-server bench`: makes the runs, writes their results and says a line about each."""

import asyncio
import json
import resource
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any  # Any: JSON

import uvloop
from tqdm import tqdm

from afd_server.core.errors import ConfigError, TransportError
from afd_server.loadgen.client import BodyStyle, Client
from afd_server.loadgen.config import BenchConfig
from afd_server.loadgen.http import Origin, find_origin, get_json
from afd_server.loadgen.plan import Plan, Point
from afd_server.loadgen.results import (
    ServerFacts,
    header_line,
    make_result,
    summary_line,
    unique_names,
)
from afd_server.loadgen.run import Run, run_load
from afd_server.workload.limits import FixedLimit
from afd_server.workload.report import Outcome, RequestRecord
from afd_server.workload.search import RateSearch, missed_targets

Say = Callable[[str], None]

FAILED, INTERRUPTED = 1, 130  # exit statuses; 128 + SIGINT


def run_bench(config: BenchConfig, say: Say) -> int:
    """Do what is asked for, saying the results line by line.

    Returns:
        The exit status: 0, FAILED if a request failed or no rate held, INTERRUPTED.

    Raises:
        ConfigError: settings do not fit each other or the server.
        TransportError: no server of OpenAI's API answers, or not the first request.
    """
    _check_output(config.output)
    _allow_connections()
    plan = Plan(config)
    headers = {"authorization": f"Bearer {config.api_key}"} if config.api_key else {}
    origin = find_origin(config.url, headers)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        server = runner.run(_ask_server(origin, config))
        if server.max_model_len is not None:
            plan.check_lengths(server.model, server.max_model_len)
        bench = _Bench(config, plan, origin, server, say)
        runner.run(bench.warm_up())
        say(header_line())
        return runner.run(bench.find_goodput() if config.find_goodput else bench.sweep())


def _check_output(path: Path | None) -> None:
    """Refuse what cannot be written before an hour's work."""
    if path is not None and path.is_dir():
        raise ConfigError(f"{path} cannot be written: it is a directory")
    if path is not None and not path.parent.is_dir():
        raise ConfigError(f"{path} cannot be written: there is no such directory")


def _allow_connections() -> None:
    """Let this process have as many connections as it may: each request has one of its own."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def _ask_server(origin: Origin, config: BenchConfig) -> ServerFacts:
    card = await _model_card(origin, config.model)
    length = card.get("max_model_len")
    topology = version = None
    try:  # of afd-server; others have no such paths
        topology = (await get_json(origin, "/status"))["topology"]
        version = (await get_json(origin, "/version"))["version"]
    except (TransportError, KeyError, TypeError):
        pass
    return ServerFacts(card["id"], length if type(length) is int else None, topology, version)


async def _model_card(origin: Origin, wanted: str | None) -> dict[str, Any]:
    """Return what the server says of a model; one named may be an alias that it does not list."""
    cards: list[dict[str, Any]] = []
    try:
        listed = (await get_json(origin, "/v1/models"))["data"]
        cards = [card for card in listed if wanted in (None, card["id"])]
    except (TransportError, KeyError, TypeError) as error:
        if wanted is None:
            raise TransportError(f"no model is known, give --model: {error}") from error
    if not cards and wanted is None:
        raise TransportError("the server lists no model, give --model")
    return cards[0] if cards else {"id": wanted}


class _Bench:
    """The runs of one command."""

    def __init__(
        self, config: BenchConfig, plan: Plan, origin: Origin, server: ServerFacts, say: Say
    ) -> None:
        self._config = config
        self._plan = plan
        self._origin = origin
        self._server = server
        self._say = say

    async def warm_up(self) -> None:
        """Send some requests; they show whether the load can be served at all.

        Raises:
            TransportError: one of them was not served.
        """
        run = await run_load(self._client(), self._plan.warm_up())
        if run.interrupted:
            raise KeyboardInterrupt
        for record in run.records:
            if record.outcome is not Outcome.COMPLETED:
                raise TransportError(f"a first request was not served: {record.reason}")

    async def sweep(self) -> int:
        """Make a run of each rate and width."""
        pairs = [(r, w) for r in self._config.request_rate for w in self._config.max_concurrency]
        points = [Point(number, *pair) for number, pair in enumerate(pairs)]
        names = unique_names([point.name for point in points])
        status = 0
        for point, name in zip(points, names, strict=True):
            result, run = await self._measure(point, None)
            self._say(summary_line(result))
            self._write(result, name if len(points) > 1 else None)
            self._warn(run)
            if run.interrupted:
                return INTERRUPTED
            status = max(status, FAILED if result["failed"] else 0)
        return status

    async def find_goodput(self) -> int:
        """Search for the highest rate that holds; the result is its run, with all points."""
        (first,), (width,) = self._config.request_rate, self._config.max_concurrency
        search = RateSearch(first or self._plan.recorded_rate())
        points: list[dict[str, Any]] = []
        best: dict[str, Any] = {}
        interrupted = False
        while not interrupted and (rate := search.next_rate()) is not None:
            result, run = await self._measure(
                Point(len(points), rate, width), self._plan.limit_s(rate)
            )
            interrupted = run.interrupted
            missed = ["interrupted"] if interrupted else list(missed_targets(result))
            if not interrupted:
                search.note(rate, holds=not missed)
            self._say(f"{summary_line(result)}  {'; '.join(missed) or 'holds'}")
            self._warn(run)
            best = best if missed else result
            points.append(result | {"holds": not missed, "missed": missed})
        found = {"goodput_rate": search.best, "lowest_missed_rate": search.lowest_missed}
        self._write(best | found | {"points": points, "interrupted": interrupted}, None)
        self._say(self._conclusion(search, interrupted))
        if interrupted:
            return INTERRUPTED
        return FAILED if search.best is None else 0

    def _conclusion(self, search: RateSearch, interrupted: bool) -> str:
        target = f"{self._config.tpot_slo_ms:g} ms"
        if self._config.clients.targets:
            target = "the target of each class"
        if search.best is None:
            return f"no rate tried{' so far' * interrupted} keeps p99 TPOT within {target}"
        found = f"{search.best:.4g} requests/s with p99 TPOT within {target}"
        if interrupted:
            return f"goodput so far: {found}"
        return f"goodput: {found}" if search.lowest_missed else f"goodput: at least {found}"

    async def _measure(self, point: Point, limit_s: float | None) -> tuple[dict[str, Any], Run]:
        offers, count = self._plan.offers(point)
        with tqdm(total=count, unit="req", leave=False, disable=None, desc=point.name) as bar:

            def note(record: RequestRecord) -> None:
                bar.update()
                if record.outcome is not Outcome.COMPLETED:
                    bar.set_postfix_str(f"{record.outcome}: {record.reason}"[:60])

            width = point.max_concurrency
            limit = None if width is None else FixedLimit(width)
            run = await run_load(self._client(), offers, limit=limit, limit_s=limit_s, note=note)
        rate = self._plan.recorded_rate() if point.rate_per_s is None else point.rate_per_s
        return make_result(self._config, self._server, point, rate, run), run

    def _client(self) -> Client:
        config = self._config
        style = BodyStyle(
            config.endpoint_type, self._server.model, config.vocabulary, secrets.token_hex(8),
            config.extra_body,
        )  # fmt: skip
        return Client(self._origin, style, config.timeout_s)

    def _write(self, result: dict[str, Any], name: str | None) -> None:
        path = self._config.output
        if path is None:
            return
        if name is not None:
            path = path.with_name(f"{path.stem}-{name}{path.suffix}")
        try:
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error.strerror}") from error

    def _warn(self, run: Run) -> None:
        load = run.load
        if load.is_bottleneck:
            self._say(
                "  the client is the bottleneck, figures may be its own and not the server's: "
                f"{load.cpu_share:.0%} of a CPU, p99 of sends "
                f"{load.p99_lateness_s * 1000:.0f} ms late"
            )
        for reason in sorted({r.reason for r in run.records if r.outcome is Outcome.FAILED})[:3]:
            self._say(f"  failed: {reason}")
        if run.interrupted:
            self._say("  interrupted: what had been answered is counted, the result is partial")
