"""The command line: serve · pull · status, and the processes that serve starts."""

import argparse
import json
import logging
import signal
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any  # Any: argparse's namespace, JSON of a running server

from afd_server.cluster.launcher import die_with_parent
from afd_server.config import add_flags, load_config, process_environment
from afd_server.core.errors import AFDError, ConfigError
from afd_server.telemetry.log import configure_logging

log = logging.getLogger(__name__)


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
    commands = parser.add_subparsers(dest="command", required=True, metavar="{serve,pull,status}")
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
    url = f"{flags['url'].rstrip('/')}/status"
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            status = json.load(response)
    except (urllib.error.URLError, ValueError, OSError) as error:
        raise ConfigError(f"no afd-server answers at {url}: {error}") from error
    print(f"model      {status['model']}")
    print(f"topology   {status['topology']}  epoch {status['epoch']}")
    print(f"requests   {status['live_requests']} live")
    for worker in status["workers"]:
        load = "  ".join(f"{name} {value}" for name, value in worker["load"].items())
        print(f"{worker['name']:<12} {worker['incarnation']}  {load}")
    for sentence in status["trouble"]:
        print(f"trouble    {sentence}")
    return 1 if status["trouble"] else 0


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
    "worker": _worker,
    "gateway": _gateway,
}
