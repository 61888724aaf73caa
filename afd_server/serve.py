"""From settings to a running server, and back to nothing.

The process that the user starts: it composes what each room must know, starts supervisor,
workers and gateway, and leaves nothing behind, whatever happens.
"""

import contextlib
import ipaddress
import json
import logging
import os
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from afd_server.cluster.launcher import (
    Launcher,
    LocalLauncher,
    describe_ending,
    start_process,
    stop_processes,
)
from afd_server.cluster.supervisor import Supervisor, new_incarnation
from afd_server.config import (
    ServeConfig,
    num_cores,
    parse_resources,
    prepare_ray_environment,
)
from afd_server.core.attention_spec import GQASpec, KVFormat
from afd_server.core.clock import MonotonicClock
from afd_server.core.errors import AddressInUse, ConfigError, WorkerFailed
from afd_server.core.model_spec import ModelSpec, read_model_spec
from afd_server.core.topology import FFNParallel, Role, column_shard
from afd_server.costmodel.pipeline import CONTEXT_TOKENS
from afd_server.costmodel.pools import PoolSizes, choose_pools
from afd_server.costmodel.stages import estimate_stages
from afd_server.gateway.config import GatewaySpec
from afd_server.policy.blocks import longest_fitting, num_kv_blocks
from afd_server.transport.codec import MAX_PAYLOAD_BYTES
from afd_server.transport.endpoint import Endpoint, Identity
from afd_server.transport.ring import why_unavailable
from afd_server.transport.sockets import why_not_native
from afd_server.transport.zeromq import ZeroMQLink
from afd_server.weights.manifest import model_digest
from afd_server.weights.pull import resolve
from afd_server.workers.config import (
    AttentionConfig,
    Numerics,
    WorkerSpec,
    dense_place,
    ffn_config,
    head_place,
)

log = logging.getLogger(__name__)

NATIVE_LIBRARIES = Path(__file__).parent / "kernels" / "native"
LONGEST_TEMP_DIR = 24  # a path of a socket of Ray's, some 80 bytes below it, must fit into 107


def run_server(config: ServeConfig) -> int:
    """Serve until a signal comes.

    Returns:
        The exit status: 0 after a signal.

    Raises:
        ConfigError: a setting, the model or an address cannot be used.
        WorkerFailed: a process did not start, or the gateway ended.
    """
    stop = _StopRequest()
    # SystemExit is what Ray's own handlers turn a signal into while it starts
    with contextlib.suppress(_Stopped, SystemExit), contextlib.ExitStack() as cleanup:
        listener = cleanup.enter_context(_listener(config))
        directory = _model_directory(config)
        stop.raises_at_once = False
        plan = _Plan(config, directory, read_model_spec(directory))
        runtime_dir = cleanup.enter_context(_runtime_directory())
        link = ZeroMQLink(plan.supervisor, plan.bind(runtime_dir, plan.supervisor, Role.SUPERVISOR))
        cleanup.callback(link.close)
        clock = MonotonicClock()
        identity = Identity(plan.supervisor, plan.digest)
        endpoint = Endpoint(link, identity, clock, with_crc=plan.with_crc)
        launcher = _launcher(config, plan, runtime_dir, stop.check)
        cleanup.callback(launcher.close)
        stop.listen()  # Ray installs handlers of its own
        gateway_spec = plan.gateway_spec(listener, link.address).to_json()
        gateway = start_process(["gateway"], gateway_spec, pass_fds=(listener.fileno(),))
        cleanup.callback(lambda: stop_processes([gateway], config.shutdown_timeout_s + 5))
        specs = plan.worker_specs(runtime_dir, link.address)
        supervisor = Supervisor(specs, plan.gateway, plan.parallel, launcher, endpoint, clock)
        supervisor.start(config.start_timeout_s, lambda: _check(gateway, stop))
        _announce(_url(listener), supervisor.topology.notation, plan.model_name)
        while True:
            _check(gateway, stop)
            supervisor.turn()
    print("stopped", flush=True)
    return 0


class _Stopped(BaseException):
    """A stop signal came; no `except Exception` on its way may take it for an error."""


class _StopRequest:
    """Remembers SIGINT and SIGTERM; a further one breaks the stopping off.

    While a model is fetched it raises `_Stopped` at once, wherever the main thread is. Later it
    only waits to be asked: inside of Ray's calls an exception from a signal handler is an error.
    """

    def __init__(self) -> None:
        self._is_set = False
        self.raises_at_once = True
        self.listen()

    def listen(self) -> None:
        """Take the signals over, again after a library took them."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    def check(self) -> None:
        """Raise `_Stopped` if a signal has come."""
        if self._is_set:
            raise _Stopped

    def _receive(self, _number: int, _frame: object) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)
        print("stopping", flush=True)
        self._is_set = True
        if self.raises_at_once:
            raise _Stopped


class _Plan:
    """What each process must be told, derived from settings and model once.

    Raises:
        ConfigError: settings do not fit the model or each other.
    """

    def __init__(self, config: ServeConfig, directory: Path, model: ModelSpec) -> None:
        self._config = config
        self._directory = directory.resolve()
        self.supervisor = new_incarnation()
        self.gateway = new_incarnation()
        self.digest = model_digest(directory, config.load_format)
        self.model_name = config.served_model_name or self._directory.name
        self.max_model_len = config.max_model_len or model.max_position
        self.numerics = _resolve_numerics(config, model)
        self.transport = _resolve_transport(config)
        self.parallel = FFNParallel[config.ffn_parallel.upper()]
        if config.ffn_workers == 0:
            self.parallel = FFNParallel.COLOCATED
        sizes = _pool_sizes(config, model, self.parallel, self.numerics)
        self.counts = {Role.ATTENTION: sizes.num_attention, Role.FFN: sizes.num_ffn}
        self.num_lanes = None if config.lanes == "auto" else config.lanes
        if self.parallel is FFNParallel.COLOCATED and self.num_lanes is None:
            self.num_lanes = 1  # no lane is ever away, and each reads all weights again
        checksums = {"on": True, "off": False, "auto": config.data_transport == "tcp"}
        self.with_crc = checksums[config.frame_checksums]
        ffn = ffn_config(self.parallel, sizes.num_ffn, config.expert_replicas, config.expert_shards)
        is_native = self.numerics.kernels == "native" and self.numerics.weights == "int8"
        has_native_calls = not self.with_crc and _can_call_natively(config, self.transport)
        dense_layers, shares_dense = dense_place(
            config.dense_layers,
            sizes.num_attention,
            sizes.num_ffn,
            ffn.num_parts,
            is_native and has_native_calls,
        )
        lm_head, shares_head = head_place(
            config.lm_head,
            sizes.num_attention,
            sizes.num_ffn,
            (self.transport == "shm" or has_native_calls) and dense_layers is Role.FFN,
        )
        self.ffn = replace(
            ffn,
            dense_layers=dense_layers,
            shares_dense=shares_dense,
            lm_head=lm_head,
            shares_head=shares_head,
            hot_experts=_hot_experts(config, model),
        )
        if config.lm_head == "auto" and self._logit_bytes(model) > MAX_PAYLOAD_BYTES:
            self.ffn = replace(self.ffn, lm_head=Role.ATTENTION, shares_head=False)
        self.num_spare_workers = self.ffn.num_replicas - 1 if config.hot_experts is None else 0
        self._check(model)

    def bind(self, runtime_dir: Path, incarnation: str, role: Role) -> str:
        """Return where a process listens."""
        config = self._config
        if config.data_transport == "ipc":
            return f"ipc://{runtime_dir}/{incarnation}.ipc"
        on_other_nodes = config.launcher == "ray" and config.ray_address is not None
        if role in (Role.ATTENTION, Role.FFN) and on_other_nodes:
            return "tcp://{node}:*"  # the Ray launcher fills in each node's address
        return f"tcp://{config.data_host}:*"

    def worker_specs(self, runtime_dir: Path, supervisor_address: str) -> list[WorkerSpec]:
        """Return the specs of both pools."""
        return [
            self._worker_spec(role, slot, runtime_dir, supervisor_address)
            for role, count in self.counts.items()
            for slot in range(count)
        ]

    def gateway_spec(self, listener: socket.socket, supervisor_address: str) -> GatewaySpec:
        """Return the gateway's spec."""
        config = self._config
        return GatewaySpec(
            incarnation=self.gateway,
            listen_fd=listener.fileno(),
            url=_url(listener),
            supervisor=self.supervisor,
            supervisor_address=supervisor_address,
            model_path=str(self._directory),
            model_digest=self.digest,
            served_model_name=self.model_name,
            max_model_len=self.max_model_len,
            max_live_requests=config.max_live_requests,
            num_attention=self.counts[Role.ATTENTION],
            num_ffn=self.counts[Role.FFN],
            # however many are lost, an expert has a holder as long as so many are there
            num_ffn_parts=self.counts[Role.FFN] - self.num_spare_workers,
            with_crc=self.with_crc,
            shutdown_timeout_s=config.shutdown_timeout_s,
            log_level=config.log_level,
            load_format=config.load_format,
            max_queued_requests=config.max_queued_requests,
            ttft_slo_s=config.ttft_slo_ms / 1e3,
            tpot_slo_s=config.tpot_slo_ms / 1e3,
            slo_mode=config.slo_mode,
        )

    def _worker_spec(
        self, role: Role, slot: int, runtime_dir: Path, supervisor_address: str
    ) -> WorkerSpec:
        config, incarnation = self._config, new_incarnation()
        return WorkerSpec(
            role=role,
            slot=slot,
            incarnation=incarnation,
            supervisor=self.supervisor,
            supervisor_address=supervisor_address,
            bind=self.bind(runtime_dir, incarnation, role),
            model_path=str(self._directory),
            model_digest=self.digest,
            numerics=self.numerics,
            compute_threads=config.compute_threads,
            transport=self.transport,
            with_crc=self.with_crc,
            attention=AttentionConfig(
                num_lanes=self.num_lanes,
                max_model_len=self.max_model_len,
                max_num_seqs=config.max_num_seqs,
                max_batch_tokens=config.max_batch_tokens,
                block_size=config.block_size,
                kv_cache_bytes=config.kv_cache_mb * 2**20,
                prefix_caching=config.prefix_caching,
                holds_back=config.slo_mode == "enforce",
                calibrates=config.slo_mode != "off",
            ),
            ffn=self.ffn,
            load_format=config.load_format,
            cores=self._cores_of(role, slot),
        )

    def _cores_of(self, role: Role, slot: int) -> tuple[int, ...]:
        """Return a worker's own cores; whoever takes its place gets them too."""
        if not self._config.pin_workers:
            return ()
        place = slot if role is Role.ATTENTION else self.counts[Role.ATTENTION] + slot
        threads = self._config.compute_threads
        return tuple(sorted(os.sched_getaffinity(0))[place * threads : (place + 1) * threads])

    def _check_cores(self) -> None:
        config = self._config
        if not config.pin_workers:
            return
        if config.ray_address is not None:
            raise ConfigError(
                "pin_workers gives out the cores of this machine; it does not go with ray_address"
            )
        wanted = sum(self.counts.values()) * config.compute_threads
        if wanted > num_cores():
            raise ConfigError(
                f"pin_workers: {sum(self.counts.values())} workers of {config.compute_threads} "
                f"compute_threads want {wanted} cores of their own, and there are {num_cores()}; "
                "lower one of these, or set pin_workers to false"
            )

    def _check(self, model: ModelSpec) -> None:
        config = self._config
        self._check_cores()
        if self.max_model_len > model.max_position:
            raise ConfigError(
                f"max_model_len is {self.max_model_len}, but the model was made for at most "
                f"{model.max_position} tokens"
            )
        blocks = num_kv_blocks(
            model.kv_slot_bytes(self.numerics.kv),
            config.block_size,
            config.kv_cache_mb * 2**20,
        )
        longest = longest_fitting(
            blocks,
            config.block_size,
            tuple(group.window for group in model.kv_groups),
            config.max_batch_tokens,
            self.max_model_len,
        )
        if longest < self.max_model_len:
            raise ConfigError(
                f"kv_cache_mb {config.kv_cache_mb} holds {longest} tokens, but "
                f"max_model_len is {self.max_model_len}; raise the first or lower the second"
            )
        if config.max_batch_tokens <= config.max_num_seqs:
            raise ConfigError(
                f"max_batch_tokens is {config.max_batch_tokens}, must be more than max_num_seqs "
                f"({config.max_num_seqs})"
            )
        self._check_placement(model)
        self._check_messages(model)
        self._check_network()

    def _check_messages(self, model: ModelSpec) -> None:
        """Refuse what could make an answer of an FFN worker too long."""
        config = self._config
        # float32 partial sums, of a token's experts one each
        num_chosen = max(model.num_chosen(layer) for layer in range(model.num_layers))
        rows = config.max_batch_tokens * max(1, num_chosen)
        payload = rows * model.hidden_size * 4
        if payload > MAX_PAYLOAD_BYTES:
            raise ConfigError(
                f"max_batch_tokens {config.max_batch_tokens} makes activations of {payload} bytes, "
                f"a message holds {MAX_PAYLOAD_BYTES}; lower it"
            )
        if config.ffn_workers == 0 or self.ffn.lm_head is Role.ATTENTION:
            return
        payload = self._logit_bytes(model)
        if payload > MAX_PAYLOAD_BYTES:
            raise ConfigError(
                f"the FFN workers hold a part of lm_head, and max_num_seqs {config.max_num_seqs} "
                f"makes logits of {payload} bytes, a message holds {MAX_PAYLOAD_BYTES}; lower "
                "max_num_seqs, or set lm_head to attention"
            )

    def _logit_bytes(self, model: ModelSpec) -> int:
        """Return the most that an FFN worker answers a call of the head with.

        That is float32 logits of its part of the vocabulary, of each sequence in a micro-batch.
        """
        parts = self.ffn.num_parts + self.ffn.shares_head
        shards = [column_shard(model.vocab_size, part, parts) for part in range(parts)]
        return self._config.max_num_seqs * max(s.stop - s.start for s in shards) * 4

    def _check_placement(self, model: ModelSpec) -> None:
        config, columns = self._config, model.smallest_intermediate_size
        if self.ffn.num_parts > columns:
            raise ConfigError(
                f"{self.ffn.num_parts} FFN workers share an FFN's columns, but it has only "
                f"{columns}; use --ffn-parallel replicate"
            )
        num_ffn = self.counts[Role.FFN]
        if self.parallel is FFNParallel.HYBRID and num_ffn % config.expert_shards:
            raise ConfigError(
                f"ffn_workers is {num_ffn}, no multiple of expert_shards "
                f"({config.expert_shards}), which --ffn-parallel hybrid needs"
            )
        all_at_attention = self.ffn.dense_layers is self.ffn.lm_head is Role.ATTENTION
        if num_ffn and all_at_attention and model.experts is None:
            raise ConfigError(
                f"dense_layers is attention, but {model.model_type} has no others, and nothing is "
                f"left for ffn_workers ({num_ffn}); set it to 0, or dense_layers to ffn"
            )
        by_expert = self.parallel in (FFNParallel.EXPERT, FFNParallel.HYBRID)
        if by_expert and model.experts is None:
            raise ConfigError(
                f"ffn_parallel is {config.ffn_parallel}, but {model.model_type} has no experts; "
                "use tensor or replicate"
            )
        if by_expert and config.expert_replicas > self.ffn.num_groups:
            raise ConfigError(
                f"expert_replicas is {config.expert_replicas}, but only {self.ffn.num_groups} "
                "holders of experts are there; raise ffn_workers"
            )
        if config.hot_experts is not None and not (by_expert and config.expert_replicas > 1):
            raise ConfigError(
                "hot_experts names experts to be replicated; it goes with --ffn-parallel expert or "
                "hybrid, and expert_replicas above 1"
            )
        if not by_expert and config.expert_replicas > 1:
            raise ConfigError(
                f"expert_replicas is {config.expert_replicas}, which goes with --ffn-parallel "
                f"expert or hybrid, not {config.ffn_parallel}"
            )

    def _check_network(self) -> None:
        config = self._config
        if config.ray_address is not None and config.launcher != "ray":
            raise ConfigError("ray_address is set, but the launcher is local; use --launcher ray")
        if config.data_host in ("0.0.0.0", "::", "*"):
            raise ConfigError(
                f"data_host {config.data_host} is no address that peers can connect to; "
                "name an interface of this host"
            )
        on_one_host = _is_loopback((config.ray_address or "").rpartition(":")[0])
        if config.ray_address and not on_one_host and _is_loopback(config.data_host):
            raise ConfigError(
                f"workers on other hosts cannot reach data_host {config.data_host}; "
                "give an address of this host that they can"
            )
        beyond_loopback = not _is_loopback(config.data_host)
        if config.data_transport == "tcp" and beyond_loopback and not config.trusted_network:
            raise ConfigError(
                "tcp beyond loopback is neither encrypted nor authenticated; if the network "
                "itself is protected, say so with --trusted-network"
            )
        if config.data_transport == "ipc" and config.ray_address is not None:
            raise ConfigError(
                "a Ray cluster may place workers on other hosts, which ipc does not reach; "
                "use --data-transport tcp"
            )


def _hot_experts(config: ServeConfig, model: ModelSpec) -> tuple[tuple[int, int], ...] | None:
    """Read which experts have replicas, as (layer, expert).

    Raises:
        ConfigError: the file cannot be read, or names what the model does not have.
    """
    if config.hot_experts is None:
        return None
    wanted = "expected a JSON object from layers to lists of experts"
    try:
        named = json.loads(Path(config.hot_experts).read_text("utf-8"))
        hot = tuple((int(layer), int(expert)) for layer in named for expert in named[layer])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"hot_experts {config.hot_experts}: {error}; {wanted}") from error
    by_layer = dict(enumerate(model.experts_by_layer))
    for layer, expert in hot:
        if not 0 <= expert < by_layer.get(layer, 0):
            raise ConfigError(
                f"hot_experts {config.hot_experts}: {model.model_type} has no expert {expert} in "
                f"layer {layer}; {wanted}"
            )
    return hot


def _model_directory(config: ServeConfig) -> Path:
    if config.load_format == "auto":
        return resolve(config.model, config.cache_directory)
    directory = Path(config.model)
    if not directory.is_dir():
        raise ConfigError(
            f"load_format is dummy, which needs a directory with config.json; {config.model!r} is "
            "no directory"
        )
    return directory


def _pool_sizes(
    config: ServeConfig, model: ModelSpec, parallel: FFNParallel, numerics: Numerics
) -> PoolSizes:
    """Return the workers of both pools, and log why where they are ours to choose."""
    attention, ffn = config.attention_workers, config.ffn_workers
    if attention != "auto" and ffn != "auto":
        return PoolSizes(attention, ffn)
    if config.ray_address is not None:
        name = "attention_workers" if attention == "auto" else "ffn_workers"
        raise ConfigError(
            f"{name} is auto, which counts the cores of this machine, but ray_address is set; "
            "give a number"
        )
    cores = num_cores()
    num_workers = max(1, cores // config.compute_threads)
    if parallel is FFNParallel.COLOCATED:
        log.info("%d cores: %d colocated attention workers", cores, num_workers)
        return PoolSizes(num_workers, 0)
    rows = -(-config.max_num_seqs // 2)
    times = estimate_stages(model, numerics.weights, numerics.kv, rows, CONTEXT_TOKENS)
    unit = config.expert_shards if parallel is FFNParallel.HYBRID else 1
    by_expert = parallel in (FFNParallel.EXPERT, FFNParallel.HYBRID)
    least = unit * (config.expert_replicas if by_expert else 1)
    most = model.smallest_intermediate_size if parallel is FFNParallel.TENSOR else num_workers
    sizes = choose_pools(
        times,
        num_workers,
        None if attention == "auto" else attention,
        None if ffn == "auto" else ffn,
        range(least, max(least, min(most, num_workers)) + 1, unit),
    )
    log.info(
        "%d cores: %d attention and %d FFN workers, because one core takes %.0f µs for attention "
        "and %.0f µs for the FFN in a layer (estimated, %d rows after %d tokens each)",
        cores, *sizes, times.attention_s * 1e6, times.ffn_s * 1e6, rows, CONTEXT_TOKENS,
    )  # fmt: skip
    return sizes


def _resolve_numerics(config: ServeConfig, model: ModelSpec) -> Numerics:
    """Choose the formats: int8 where it can be, that is with native kernels that were built."""
    native = any(NATIVE_LIBRARIES.glob("*.so"))
    dtype = config.dtype if config.dtype == "bfloat16" else "float32"
    if config.quantization == "int8" and dtype != "float32":
        raise ConfigError(f"quantization int8 goes with dtype float32, not {dtype}")
    if config.quantization == "int8" and not native:
        raise ConfigError(
            f"quantization int8 needs the native kernels, and none are in {NATIVE_LIBRARIES}: "
            "install g++ and reinstall, or use --quantization none"
        )
    if not native:
        log.warning(
            "there are no native kernels in %s: everything is computed by torch in %s, many times "
            "slower than in int8; install g++ and reinstall",
            NATIVE_LIBRARIES, dtype,
        )  # fmt: skip
    elif config.compute_threads > 1:
        log.warning(
            "compute_threads is %d, but native kernels start no thread: a worker hardly gains by "
            "more than one, while pools and cores are shared out for all; give more workers",
            config.compute_threads,
        )
    quantised = config.quantization != "none" and native and dtype == "float32"
    # a latent vector has one scale for parts of different size, and is attended to by torch
    is_plain = all(isinstance(attention, GQASpec) for attention in model.attention)
    kv_dtype: KVFormat = dtype
    if quantised:
        kv_dtype = "int8" if is_plain else "bfloat16"
    return Numerics(
        kernels="native" if native else "reference",
        weights="int8" if quantised else dtype,
        kv=kv_dtype if config.kv_cache_dtype == "auto" else config.kv_cache_dtype,
    )


def _resolve_transport(config: ServeConfig) -> str:
    """Choose shared memory where it can be."""
    if config.transport == "zmq":
        return "zmq"
    obstacle = (
        "it goes with data_transport ipc" if config.data_transport != "ipc" else why_unavailable()
    )
    if config.transport == "shm" and obstacle is not None:
        raise ConfigError(f"transport is shm, but {obstacle}; use --transport zmq")
    return "shm" if obstacle is None else "zmq"


def _can_call_natively(config: ServeConfig, transport: str) -> bool:
    """Tell whether native code could send and answer calls without checksums."""
    return config.data_transport == "ipc" and (transport == "shm" or why_not_native() is None)


def _launcher(
    config: ServeConfig, plan: _Plan, runtime_dir: Path, check: Callable[[], None]
) -> Launcher:
    if config.launcher == "local":
        return LocalLauncher(config.log_level)
    if config.ray_address is None:
        prepare_ray_environment(runtime_dir / "ray-token")
    from afd_server.cluster.ray_launcher import RayConfig, RayLauncher

    return RayLauncher(
        RayConfig(
            address=config.ray_address,
            temp_dir=runtime_dir / "ray",
            resources={
                Role.ATTENTION: parse_resources(config.attention_resources, "attention_resources"),
                Role.FFN: parse_resources(config.ffn_resources, "ffn_resources"),
            },
            counts=plan.counts,
            log_level=config.log_level,
        ),
        check,
    )


@contextlib.contextmanager
def _listener(config: ServeConfig) -> Iterator[socket.socket]:
    """Bind the HTTP address before anything is started; the gateway inherits the socket."""
    try:
        facts = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(f"host {config.host!r} cannot be resolved: {error.strerror}") from error
    with socket.socket(facts[0], socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(facts[4])
            listener.listen(1024)
        except OSError as error:
            raise AddressInUse(
                f"cannot serve on {config.host} port {config.port}: {error.strerror}; "
                "choose another with --port"
            ) from error
        yield listener


@contextlib.contextmanager
def _runtime_directory() -> Iterator[Path]:
    """Make a directory for sockets and Ray's files that only this user may enter."""
    parent = tempfile.gettempdir()
    parent = parent if len(parent) <= LONGEST_TEMP_DIR else "/tmp"
    path = Path(tempfile.mkdtemp(prefix="afd-", dir=parent))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _check(gateway: "subprocess.Popen[bytes]", stop: _StopRequest) -> None:
    stop.check()
    ending = describe_ending(gateway)
    if ending is not None:
        raise WorkerFailed(f"the gateway ended ({ending})")


def _announce(url: str, notation: str, model: str) -> None:
    question = {
        "model": model,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "max_tokens": 32,
        "temperature": 0,
    }
    print(
        f"ready: {url}  topology {notation}  model {model}\n"
        f"try:   curl {url}/v1/chat/completions -H 'content-type: application/json' "
        f"-d {shlex.quote(json.dumps(question))}",
        flush=True,
    )


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
