"""Composes a server's settings: defaults, then a YAML file, then AFD_* variables, then flags.

The only place that reads the environment.
"""

import argparse
import difflib
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from math import inf
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    get_args,
    get_origin,
    get_type_hints,
)  # Any: settings not yet checked

import yaml
from pydantic import BeforeValidator, TypeAdapter, ValidationError

from afd_server.core.errors import ConfigError
from afd_server.core.model_spec import LoadFormat
from afd_server.core.request import LONGEST_TARGET_MS
from afd_server.policy.admission import SLOMode

ENV_PREFIX = "AFD_"


def _setting(default: Any, text: str) -> Any:  # Any: a dataclass default of any type
    return field(default=default, metadata={"help": text})


def _text_as_integer(value: Any) -> Any:  # Any: settings not yet checked
    """Read the 16 of a flag or a variable; pydantic does so for integers, not for choices."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def _switch_as_text(value: Any) -> Any:  # Any: settings not yet checked
    """Read an unquoted on or off of a YAML file, where they are booleans."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


Count = int | Literal["auto"]  # auto: the server finds the number


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """Everything that `afd-server serve` can be told."""

    model: str = _setting(
        "smollm2-135m-instruct", "a Hugging Face model directory, or a name that `pull` knows"
    )
    load_format: LoadFormat = _setting(
        "auto", "dummy: random weights instead of the model's, for load tests; a directory with "
        "config.json is enough"
    )  # fmt: skip
    attention_workers: Count = _setting(
        1, "workers with the attention half; auto: by the model's shapes and this machine's cores"
    )
    ffn_workers: Count = _setting(
        1, "workers with the FFN half, or auto; 0: the attention workers hold it too (colocated)"
    )
    ffn_parallel: Literal["tensor", "replicate", "expert", "hybrid"] = _setting(
        "tensor", "each FFN worker holds a column shard of every FFN, a full replica, some "
        "experts, or a column shard of some experts"
    )  # fmt: skip
    dense_layers: Literal["auto", "attention", "ffn", "both"] = _setting(
        "auto", "workers that hold the layers without experts, and the shared experts of the "
        "others; both: the FFN workers, but attention workers compute half of each layer without "
        "experts; auto: both on one host without checksums with int8 products, whole FFNs and no "
        "more attention workers than FFN workers, else ffn"
    )  # fmt: skip
    lm_head: Literal["auto", "attention", "ffn", "both"] = _setting(
        "auto", "workers that hold the head and compute logits; both: a part of the vocabulary "
        "each; auto: both on one host without checksums with no more attention workers than FFN "
        "workers, else attention"
    )  # fmt: skip
    expert_replicas: int = _setting(
        1, "FFN workers that hold each expert, with expert; groups of workers, with hybrid"
    )
    hot_experts: str | None = _setting(
        None, "JSON file with the experts that have replicas, {layer: [expert, …]}, as "
        "/debug/experts tells; default: all have them"
    )  # fmt: skip
    expert_shards: int = _setting(2, "FFN workers that share the columns of an expert, with hybrid")
    host: str = _setting("127.0.0.1", "address to serve HTTP on")
    port: int = _setting(8000, "port to serve HTTP on; 0 takes a free one")
    served_model_name: str | None = _setting(None, "what clients call the model")
    max_model_len: int | None = _setting(
        None, "longest sequence in tokens, prompt and output; default: what the model was made for"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = _setting(
        "auto", "of weights that are not quantised; auto is float32, the exact one, on CPUs"
    )
    quantization: Literal["auto", "none", "int8"] = _setting(
        "auto", "of weights and activations in products; auto: int8 with float32 where the native "
        "kernels were built"
    )  # fmt: skip
    kv_cache_dtype: Literal["auto", "float32", "bfloat16", "int8"] = _setting(
        "auto", "of keys and values; auto: as dtype, but with int8 products int8, or bfloat16 "
        "where heads share a latent vector"
    )  # fmt: skip
    launcher: Literal["ray", "local"] = _setting(
        "ray", "start workers as Ray actors or as plain subprocesses"
    )
    ray_address: str | None = _setting(
        None, "of a running Ray cluster; default: start Ray on this machine for this server"
    )
    attention_resources: str = _setting("CPU=1", "Ray resources of one attention worker")
    ffn_resources: str = _setting("CPU=1", "Ray resources of one FFN worker")
    transport: Literal["auto", "zmq", "shm"] = _setting(
        "auto", "between workers: shm is shared memory beside ZeroMQ, on one host; auto: shm with "
        "ipc where it was built and the system allows it"
    )  # fmt: skip
    data_transport: Literal["ipc", "tcp"] = _setting(
        "ipc", "between processes: ipc on one host, tcp between hosts"
    )
    data_host: str = _setting("127.0.0.1", "address to bind tcp on; with Ray, of the head only")
    trusted_network: bool = _setting(
        False, "allow tcp beyond loopback: you say that the network itself is protected"
    )
    frame_checksums: Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch_as_text)] = (
        _setting("auto", "CRC-32 of every payload; auto: with tcp")
    )
    lanes: Count = _setting(
        "auto", "micro-batches of an attention worker in flight; auto: what a calibration at the "
        "start finds best, and 1 when colocated"
    )  # fmt: skip
    max_num_seqs: int = _setting(64, "most sequences of an attention worker in its KV cache")
    max_batch_tokens: int = _setting(256, "most tokens of one micro-batch")
    block_size: Annotated[Literal[1, 2, 4, 8, 16, 32, 64], BeforeValidator(_text_as_integer)] = (
        _setting(16, "tokens of a KV block")
    )
    prefix_caching: bool = _setting(
        True, "keep what was computed for a prompt and reuse it for others that begin alike"
    )
    kv_cache_mb: int = _setting(1024, "memory of an attention worker's KV cache, in MiB")
    max_live_requests: int = _setting(128, "refuse requests above this")
    slo_mode: SLOMode = _setting(
        "enforce", "targets of requests: enforce refuses what would miss them or make others miss "
        "them, best-effort only schedules by them, off knows none"
    )  # fmt: skip
    tpot_slo_ms: float = _setting(
        50.0, "target of requests that name none (x-slo-tpot-ms): mean time between two tokens"
    )
    ttft_slo_ms: float = _setting(
        4000.0, "target of requests that name none (x-slo-ttft-ms): time to the first token"
    )
    max_queued_requests: int = _setting(
        64, "with slo_mode enforce, refuse requests when so many wait for their first token"
    )
    compute_threads: int = _setting(1, "threads of a worker's tensor operations")
    pin_workers: bool = _setting(
        False, "give each worker cores of its own, one for each thread; this machine must have them"
    )
    cache_dir: str | None = _setting(
        None, "where pulled models are kept; default: ~/.cache/afd-server/models"
    )
    start_timeout_s: float = _setting(300.0, "longest wait for all workers to be ready")
    shutdown_timeout_s: float = _setting(5.0, "how long running requests may go on after Ctrl-C")
    log_level: Literal["debug", "info", "warning", "error"] = _setting(
        "warning", "of all processes"
    )

    def __post_init__(self) -> None:
        at_least_one = (
            "attention_workers", "lanes", "max_num_seqs", "max_batch_tokens",
            "kv_cache_mb", "max_live_requests", "compute_threads", "expert_replicas",
            "expert_shards", "max_queued_requests",
        )  # fmt: skip
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in at_least_one:
            if values[name] != "auto" and values[name] < 1:
                raise ConfigError(f"{name} is {values[name]}, must be at least 1")
        if self.ffn_workers != "auto" and self.ffn_workers < 0:
            raise ConfigError(f"ffn_workers is {self.ffn_workers}, must be at least 0")
        if self.max_model_len is not None and self.max_model_len < 2:
            raise ConfigError(f"max_model_len is {self.max_model_len}, must be at least 2")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}, must be in 0 … 65535")
        for name in ("tpot_slo_ms", "ttft_slo_ms"):
            if not 0 < values[name] <= LONGEST_TARGET_MS:
                raise ConfigError(
                    f"{name} is {values[name]}, must be above 0 and at most {LONGEST_TARGET_MS:.0f}"
                )
        for name in ("start_timeout_s", "shutdown_timeout_s"):
            if not 0 <= values[name] < 86400:
                raise ConfigError(f"{name} is {values[name]}, must be in 0 … 86400")

    @property
    def cache_directory(self) -> Path:
        """Return where pulled models are kept."""
        if self.cache_dir is not None:
            return Path(self.cache_dir).expanduser()
        base = os.environ.get("XDG_CACHE_HOME")
        return (Path(base) if base else Path.home() / ".cache") / "afd-server" / "models"


def add_flags(parser: argparse.ArgumentParser, names: Sequence[str] | None = None) -> None:
    """Add a flag for every setting (the model is positional), or for those named."""
    hints = get_type_hints(ServeConfig)
    for setting in fields(ServeConfig):
        if setting.name == "model" or (names is not None and setting.name not in names):
            continue
        text = f"{setting.metadata['help']}{_default_text(setting)}"
        flag = f"--{setting.name.replace('_', '-')}"
        if hints[setting.name] is bool:
            parser.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text
            )
            continue
        choices = get_args(hints[setting.name]) if _is_literal(hints[setting.name]) else None
        metavar = "{" + ",".join(map(str, choices)) + "}" if choices else "X"
        parser.add_argument(flag, default=argparse.SUPPRESS, metavar=metavar, help=text)


def load_config(flags: Mapping[str, Any], environment: Mapping[str, str]) -> ServeConfig:
    """Merge the sources and check every value.

    Args:
        flags: by setting's name; `config` may name the YAML file.
        environment: of the process.

    Raises:
        ConfigError: a key is unknown or a value wrong; the text names it and its source.
    """
    flags = dict(flags)
    env = {
        name.removeprefix(ENV_PREFIX).lower(): value
        for name, value in environment.items()
        if name.startswith(ENV_PREFIX)
    }
    path = flags.pop("config", None) or env.pop("config", None)
    env.pop("config", None)
    sources: list[tuple[str, Mapping[str, Any]]] = []
    if path is not None:
        sources.append((str(path), _read_yaml(Path(path))))
    sources += [("environment", env), ("command line", flags)]
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for source, values in sources:
        _refuse_unknown(source, values)
        merged |= values
        origin |= dict.fromkeys(values, source)
    try:
        return _ADAPTER.validate_python(merged)
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        # each of the types that a setting may have says what it misses
        wrong = [e["msg"] for e in error.errors() if e["loc"][0] == name]
        raise ConfigError(
            f"{name} is {merged.get(name)!r} ({origin.get(name)}): {'; or: '.join(wrong)}"
        ) from error
    except ConfigError as error:  # out of range: it begins with the name, but knows no source
        name = str(error).split()[0]
        raise ConfigError(f"{error} ({origin[name]})") from error


def num_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0))


def process_environment() -> Mapping[str, str]:
    """Return the environment of this process."""
    return os.environ


def prepare_ray_environment(token_file: Path) -> None:
    """Guard and quieten a Ray that this process starts for itself.

    Ray listens on every interface and runs code for whoever reaches it, so it gets a token of
    its own; it sends no usage reports and holds no log lines back.
    """
    token_file.touch(mode=0o600)
    token_file.write_text(secrets.token_hex(32))
    os.environ |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }


def parse_resources(text: str, setting: str) -> dict[str, float]:
    """Read `CPU=1,accelerator=0.5`.

    Raises:
        ConfigError: it is not of that form.
    """
    resources: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        name, equals, amount = part.partition("=")
        try:
            resources[name.strip()] = float(amount)
        except ValueError:
            equals = ""
        if not equals or not name.strip() or not 0 < resources[name.strip()] < inf:
            raise ConfigError(f"{setting} is {text!r}; write it as in CPU=1,accelerator=0.5")
    if not resources:
        raise ConfigError(f"{setting} is empty; write it as in CPU=1")
    return resources


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"config file {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no UTF-8, or no such date
        raise ConfigError(f"config file {path} is not valid YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"config file {path} holds no mapping of settings to values")
    return {str(key).replace("-", "_"): value for key, value in content.items()}


def _refuse_unknown(source: str, values: Mapping[str, Any]) -> None:
    known = [setting.name for setting in fields(ServeConfig)]
    for name in values:
        if name not in known:
            shown = f"{ENV_PREFIX}{name.upper()}" if source == "environment" else name
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"unknown setting {shown} ({source}){hint}")


def _default_text(setting: "Field[Any]") -> str:
    assert setting.default is not MISSING
    return "" if setting.default is None else f" (default: {setting.default})"


def _is_literal(hint: object) -> bool:
    return get_origin(hint) is Literal


_ADAPTER = TypeAdapter(ServeConfig)
