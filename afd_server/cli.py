"""The command line: serve · pull · status · trace · bench, and the processes that serve starts."""

import argparse
import json
import logging
import signal
import sys
import time
import urllib.request
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any  # Any: argparse's namespace, JSON of a running server

from afd_server.cluster.launcher import die_with_parent
from afd_server.config import add_flags, load_config, process_environment
from afd_server.core.errors import AFDError, ConfigError
from afd_server.loadgen.config import add_bench_flags, bench_config
from afd_server.telemetry.log import configure_logging
from afd_server.telemetry.trace import summarise_trace

log = logging.getLogger(__name__)

LONGEST_TRACE_S = 30  # what a gateway keeps


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a subcommand; an error of ours becomes one line and exit status 1."""
    parsed = vars(_parser().parse_args(arguments))
    command = parsed.pop("command")
    try:
        status = _COMMANDS[command](parsed)
    except ConfigError as error:
        print(f"afd-server: {error}", file=sys.stderr)
        status = 2
    except AFDError as error:
        print(f"afd-server: {error}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    sys.exit(status)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="afd-server", description=__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=version("afd-server"))
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="{serve,pull,status,trace,bench}"
    )
    serve = commands.add_parser(
        "serve", help="start a server", description=_SERVE_TEXT, allow_abbrev=False
    )
    serve.add_argument("model", nargs="?", default=argparse.SUPPRESS, help=_MODEL_TEXT)
    serve.add_argument("--config", metavar="FILE", help="YAML file of settings")
    add_flags(serve)
    pull = commands.add_parser("pull", help="fetch and convert a model once", allow_abbrev=False)
    pull.add_argument("model", help=_MODEL_TEXT)
    add_flags(pull, ["cache_dir"])
    status = commands.add_parser("status", help="show a running server", allow_abbrev=False)
    status.add_argument("--url", default="http://127.0.0.1:8000", help="of its gateway")
    trace = commands.add_parser(
        "trace", help="record what every worker of a running server does", allow_abbrev=False
    )
    trace.add_argument("--url", default="http://127.0.0.1:8000", help="of its gateway")
    trace.add_argument("--seconds", type=float, default=5.0, help="for how long (default: 5)")
    trace.add_argument(
        "-o", "--output", type=Path, default=Path("trace.json"), metavar="FILE",
        help="Chrome's format, for ui.perfetto.dev (default: trace.json)",
    )  # fmt: skip
    bench = commands.add_parser(
        "bench", help="put load on a server and measure it", allow_abbrev=False
    )
    add_bench_flags(bench)
    report = bench.add_subparsers(dest="action", metavar="{report}").add_parser(
        "report", help="draw plots of result files", allow_abbrev=False
    )
    report.add_argument("results", nargs="+", type=Path, metavar="FILE", help="of --output")
    report.add_argument(
        "-d", "--directory", type=Path, default=Path(), help="for the PNG files (default: here)"
    )
    for name in ("worker", "gateway"):  # started by serve, with a spec on standard input
        internal = commands.add_parser(name)
        internal.add_argument("--log-level", default="warning")
        internal.add_argument("--parent", type=int, required=True)
    return parser


_MODEL_TEXT = "a Hugging Face model directory, or a name (default: smollm2-135m-instruct)"
_SERVE_TEXT = (
    "Every flag has an environment twin, AFD_ and its name in capitals, and a key in the YAML "
    "file of --config. Flags win over the environment, the environment over the file."
)


def _serve(flags: dict[str, Any]) -> int:
    from afd_server.serve import run_server

    config = load_config(
        {name: value for name, value in flags.items() if value is not None}, process_environment()
    )
    configure_logging("serve", config.log_level)
    return run_server(config)


def _pull(flags: dict[str, Any]) -> int:
    from afd_server.weights.pull import pull

    name = flags.pop("model")
    environment = process_environment()
    known = {k: v for k, v in environment.items() if k == "AFD_CACHE_DIR"}
    config = load_config({k: v for k, v in flags.items() if v is not None}, known)
    configure_logging("pull", "info")
    print(pull(name, config.cache_directory))
    return 0


def _status(flags: dict[str, Any]) -> int:
    status = _ask(flags["url"], "/status")
    print(f"model      {status['model']}")
    print(f"topology   {status['topology']}  epoch {status['epoch']}")
    print(f"requests   {status['live_requests']} live")
    for worker in status["workers"]:
        load = "  ".join(f"{name} {value}" for name, value in worker["load"].items())
        print(f"{worker['name']:<12} {worker['incarnation']}  {load}")
    for sentence in status["trouble"]:
        print(f"trouble    {sentence}")
    return 1 if status["trouble"] else 0


def _trace(flags: dict[str, Any]) -> int:
    seconds, output = flags["seconds"], flags["output"]
    if not 0 < seconds <= LONGEST_TRACE_S:
        raise ConfigError(f"seconds is {seconds:g}, must be in 0 … {LONGEST_TRACE_S}")
    _ask(flags["url"], "/version")  # before the wait
    try:
        with output.open("a", encoding="utf-8") as file:
            time.sleep(seconds)
            trace = _ask(flags["url"], f"/debug/trace?seconds={seconds:g}")
            file.truncate(0)
            json.dump(trace, file)
    except OSError as error:
        raise ConfigError(f"{output} cannot be written: {error.strerror}") from error
    print("\n".join(summarise_trace(trace["traceEvents"])))
    print(f"{output}: open it at https://ui.perfetto.dev")
    return 0


def _bench(flags: dict[str, Any]) -> int:
    from afd_server.loadgen.bench import run_bench
    from afd_server.loadgen.plots import draw_report

    if flags.pop("action") == "report":
        for path in draw_report(flags["results"], flags["directory"]):
            print(path)
        return 0
    key = process_environment().get("OPENAI_API_KEY")
    return run_bench(bench_config({"api_key": key, **flags}), print)


def _ask(server: str, path: str) -> Any:  # Any: JSON
    url = f"{server.rstrip('/')}{path}"
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            return json.load(response)
    except (OSError, ValueError) as error:  # URLError is an OSError; ValueError: no JSON, no URL
        raise ConfigError(f"no afd-server answers at {url}: {error}") from error


def _worker(flags: dict[str, Any]) -> int:
    from afd_server.workers.config import parse_worker_spec
    from afd_server.workers.runtime import run_worker

    die_with_parent(flags["parent"])
    spec = parse_worker_spec(sys.stdin.read())
    configure_logging(spec.name, flags["log_level"])
    stop = _StopSignal()
    run_worker(spec, stop.is_set)
    return 0


def _gateway(flags: dict[str, Any]) -> int:
    from afd_server.gateway.app import run_gateway
    from afd_server.gateway.config import parse_gateway_spec

    die_with_parent(flags["parent"])
    run_gateway(parse_gateway_spec(sys.stdin.read()))
    return 0


class _StopSignal:
    """Remembers a SIGTERM; a worker's SIGINT is its terminal's, not meant for it."""

    def __init__(self) -> None:
        self._received = False
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, _number: int, _frame: object) -> None:
        self._received = True

    def is_set(self) -> bool:
        return self._received


_COMMANDS = {
    "serve": _serve,
    "pull": _pull,
    "status": _status,
    "trace": _trace,
    "bench": _bench,
    "worker": _worker,
    "gateway": _gateway,
}
