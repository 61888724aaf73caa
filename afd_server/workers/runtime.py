"""What every worker process does, whichever half it holds.

Reports to the supervisor, follows the topology, answers the gateway, and gives the worker its
messages and its turns. One loop, one thread; every wait has a limit.
"""

import gc
import hashlib
import logging
import os
from collections.abc import Callable
from typing import Protocol

import torch

from afd_server.core.attention_spec import GQASpec
from afd_server.core.clock import Clock, MonotonicClock
from afd_server.core.errors import AFDError, ConfigError, ModelError
from afd_server.core.model_spec import ModelSpec, read_model_spec
from afd_server.core.topology import Member, Role, column_shard
from afd_server.costmodel.stages import attention_products
from afd_server.kernels.cpu import native_kernels
from afd_server.kernels.fingerprint import kernel_fingerprint
from afd_server.kernels.reference import reference
from afd_server.kernels.selftest import check_rows
from afd_server.kernels.table import Kernels
from afd_server.models.base import FFNShare
from afd_server.models.catalogue import ARCHITECTURES
from afd_server.models.head import Held
from afd_server.policy.blocks import num_kv_blocks
from afd_server.policy.scheduler import Scheduler, SchedulerConfig
from afd_server.telemetry.timeline import Timeline
from afd_server.transport.base import Link
from afd_server.transport.calls import CallClient, CallServer, NativeLayer
from afd_server.transport.endpoint import Endpoint, Identity, Received
from afd_server.transport.messages import (
    ExpertLoad,
    Heartbeat,
    LoadReport,
    ProcessState,
    TopologyUpdate,
)
from afd_server.transport.ring import RingLibrary
from afd_server.transport.shm import SharedMemoryLink
from afd_server.transport.sockets import why_not_native
from afd_server.transport.zeromq import ZeroMQLink
from afd_server.weights.checkpoint import Checkpoint
from afd_server.weights.dummy import DummyWeights
from afd_server.weights.manifest import DUMMY_SEED, model_digest
from afd_server.weights.packed import PackedWeights, pack_path
from afd_server.workers.attention.calibration import Calibration
from afd_server.workers.attention.expert_counts import ExpertCounts
from afd_server.workers.attention.ffn_client import FFNClient
from afd_server.workers.attention.first_halves import FirstHalves
from afd_server.workers.attention.kv_store import KVStore
from afd_server.workers.attention.sampler import Sampler
from afd_server.workers.attention.worker import AttentionWorker
from afd_server.workers.config import Numerics, WorkerSpec, placement_of
from afd_server.workers.ffn.worker import FFNWorker
from afd_server.workers.tensors import TORCH_DTYPES, row_dtype

log = logging.getLogger(__name__)

HEARTBEAT_S = 0.25
MAX_GARBAGE = 200_000  # young objects that a worker without a pause may gather: about 30 MB
TIDY_AFTER_S = 5.0  # nothing was done for so long: nobody will feel a full collection
HEAD_SLICE = 512  # tokens of the vocabulary that the kernels are tried with
FAREWELL_S = 2.0  # how long a failing worker tries to say why


class Worker(Protocol):
    """Either half's worker, as its loop sees it."""

    @property
    def num_steps(self) -> int:
        """Return a count that grows while there is progress."""
        ...

    @property
    def is_ready(self) -> bool:
        """Tell whether requests are served at once; messages are taken in before."""
        ...

    @property
    def is_between_steps(self) -> bool:
        """Tell, after `advance`, whether a pause now would fall into no step of its own."""
        ...

    def handle(self, received: Received) -> None:
        """Take in a message."""
        ...

    def advance(self) -> bool:
        """Do one piece of work; tell whether there is more."""
        ...

    def wait_s(self) -> float | None:
        """Return how long the worker may sleep; None: until a message comes."""
        ...

    def follow_topology(self) -> None:
        """React to the endpoint's new topology."""
        ...

    def load(self, num_bad_frames: int) -> LoadReport:
        """Return the present load, and the timeline since the last call."""
        ...

    def expert_load(self) -> ExpertLoad | None:
        """Return how tokens were routed since the start; None without gates."""
        ...


class WorkerLoop:
    """Drives one worker: its messages, its turns, its heartbeat."""

    def __init__(self, spec: WorkerSpec, worker: Worker, endpoint: Endpoint, clock: Clock) -> None:
        self._spec = spec
        self._worker = worker
        self._endpoint = endpoint
        self._clock = clock
        self._next_beat_s = self._next_collection_s = self._worked_s = clock.now()
        self._num_steps_seen = worker.num_steps
        self._is_tidy = False
        self._has_work = False

    def turn(self, longest_wait_s: float) -> None:
        """Wait for messages unless there is work, take them in, do one piece of work."""
        for received in self._endpoint.receive(self._wait_s(longest_wait_s)):
            message = received.message
            if isinstance(message, TopologyUpdate):
                self._follow(message)
            elif isinstance(message, Heartbeat):
                report = self._worker.load(self._endpoint.num_bad_frames)
                self._endpoint.try_send(received.envelope.source, report)
                if (expert_load := self._worker.expert_load()) is not None:
                    self._endpoint.try_send(received.envelope.source, expert_load)
            else:
                self._worker.handle(received)
        self._has_work = self._worker.advance()
        now_s = self._clock.now()
        if now_s >= self._next_beat_s:
            self._beat()
        if now_s >= self._next_collection_s and not gc.isenabled():
            self._collect(now_s)

    def _wait_s(self, longest_s: float) -> float:
        if self._has_work:
            return 0.0
        until_beat = max(0.0, self._next_beat_s - self._clock.now())
        own = self._worker.wait_s()
        return min(longest_s, until_beat, own if own is not None else longest_s)

    def _follow(self, update: TopologyUpdate) -> None:
        if update.topology.epoch > self._endpoint.topology.epoch:
            self._endpoint.topology = update.topology
            self._worker.follow_topology()
            self._has_work = True
            log.info("epoch %d: %s", update.topology.epoch, update.topology.notation)

    def _beat(self) -> None:
        self._next_beat_s = self._clock.now() + HEARTBEAT_S
        address, steps = self._endpoint.link.address, self._worker.num_steps
        state = ProcessState.READY if self._worker.is_ready else ProcessState.STARTING
        beat = _heartbeat(self._spec, state, address, steps)
        self._endpoint.try_send(self._spec.supervisor, beat)

    def _collect(self, now_s: float) -> None:
        """Collect what is young between steps; everything once after the last of them."""
        if not (self._worker.is_between_steps or gc.get_count()[0] > MAX_GARBAGE):
            return
        self._next_collection_s = now_s + HEARTBEAT_S
        if (num_steps := self._worker.num_steps) != self._num_steps_seen:
            self._num_steps_seen, self._worked_s, self._is_tidy = num_steps, now_s, False
        is_full = not self._is_tidy and now_s - self._worked_s >= TIDY_AFTER_S
        self._is_tidy |= is_full
        gc.collect(2 if is_full else 1)


def run_worker(spec: WorkerSpec, should_stop: Callable[[], bool]) -> None:
    """Be a worker until told to stop.

    Raises:
        AFDError: it cannot start; the supervisor was told why.
    """
    torch.set_num_threads(spec.compute_threads)
    torch.set_grad_enabled(False)
    clock = MonotonicClock()
    link = _link(spec)  # has started its threads, which go where there is room
    if spec.cores:
        os.sched_setaffinity(0, spec.cores)
    supervisor = Member(Role.SUPERVISOR, 0, spec.supervisor, spec.supervisor_address, "")
    identity = Identity(spec.incarnation, spec.model_digest)
    endpoint = Endpoint(link, identity, clock, (supervisor,), spec.with_crc)
    try:
        worker = _load(spec, endpoint, clock)
        loop = WorkerLoop(spec, worker, endpoint, clock)
        gc.collect()
        gc.freeze()  # what was loaded lives on; no collection need look at it
        gc.disable()  # `WorkerLoop` collects between steps
        log.info("%s is ready", spec.name)
        while not should_stop():
            loop.turn(longest_wait_s=HEARTBEAT_S)
    except Exception as error:
        if not isinstance(error, AFDError):
            log.exception("%s failed", spec.name)
        _say_farewell(spec, endpoint, clock, error)
        raise
    finally:
        link.close()


def _link(spec: WorkerSpec) -> Link:
    link = ZeroMQLink(spec.incarnation, spec.bind)
    link.connect(spec.supervisor, spec.supervisor_address)  # before: it gets no shared memory
    return SharedMemoryLink(link) if spec.transport == "shm" else link


def _say_farewell(spec: WorkerSpec, endpoint: Endpoint, clock: Clock, error: Exception) -> None:
    """Tell the supervisor why this process ends, if it can still be reached."""
    text = str(error) if isinstance(error, AFDError) else f"{type(error).__name__}: {error}"
    beat = _heartbeat(spec, ProcessState.FAILED, "", 0, ascii(text)[1:-1][:500])
    give_up_s = clock.now() + FAREWELL_S
    while not endpoint.try_send(spec.supervisor, beat) and clock.now() < give_up_s:
        endpoint.link.receive(0.05)
    endpoint.link.receive(0.1)  # lets the I/O thread hand it over before the link closes


def _heartbeat(
    spec: WorkerSpec, state: ProcessState, address: str, steps: int, detail: str = ""
) -> Heartbeat:
    return Heartbeat(spec.role, spec.slot, state, steps, address, detail)


def _load(spec: WorkerSpec, endpoint: Endpoint, clock: Clock) -> Worker:
    found = model_digest(spec.model_directory, spec.load_format)
    if found != spec.model_digest:
        raise ModelError(
            f"{spec.model_path} holds model {found}, the server serves {spec.model_digest}; "
            "give every host the same files"
        )
    model_spec = read_model_spec(spec.model_directory)
    build = build_attention_worker if spec.role is Role.ATTENTION else build_ffn_worker
    kernels = select_kernels(spec.numerics)
    _self_test(spec, kernels, model_spec)
    worker = build(spec, model_spec, kernels, endpoint, clock)
    endpoint.identify(numerics_fingerprint(spec, kernels))
    return worker


def _self_test(spec: WorkerSpec, kernels: Kernels, model: ModelSpec) -> None:
    """Try the kernels on the shapes of the model's layers, most of which are alike."""
    hidden, num_parts = model.hidden_size, spec.ffn.num_parts if spec.role is Role.FFN else 1
    products, heads = {(hidden, HEAD_SLICE)}, set()
    for layer, attention in enumerate(model.attention):
        products.update(attention_products(attention, hidden))
        window = attention.window if isinstance(attention, GQASpec) else None
        heads.add((attention.num_heads, attention.kv.num_heads, attention.kv.key_dim, window))
        for expert in {0, model.experts_by_layer[layer] - 1}:  # the last may be shared
            columns = model.ffn_shape(layer, expert).intermediate_size
            shard = column_shard(columns, spec.slot % num_parts, num_parts)
            inner = shard.stop - shard.start
            products.update(((hidden, 2 * inner), (inner, hidden)))
    kv_dtype = TORCH_DTYPES[spec.numerics.kv]
    check_rows(kernels, sorted(products), sorted(heads, key=str), kv_dtype)


def select_kernels(numerics: Numerics) -> Kernels:
    """Return the kernels for these formats.

    Raises:
        ConfigError: they were not built on this machine.
    """
    if numerics.kernels == "reference":
        return reference(TORCH_DTYPES[numerics.weights])
    return native_kernels(numerics.weights)


def numerics_fingerprint(spec: WorkerSpec, kernels: Kernels) -> str:
    """Return the fingerprint of a worker: kernels, weights, and what is cut into columns."""
    ffn = spec.ffn
    parts = (
        kernel_fingerprint(kernels, row_dtype(spec.numerics), TORCH_DTYPES[spec.numerics.kv]),
        spec.model_digest,
        spec.compute_threads,
        ffn.num_parts,
        # what the attention side holds is whole
        (ffn.dense_layers, ffn.lm_head, ffn.shares_head) if ffn.num_parts > 1 else (),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def build_attention_worker(
    spec: WorkerSpec, model_spec: ModelSpec, kernels: Kernels, endpoint: Endpoint, clock: Clock
) -> Worker:
    """Load the attention half and what else it holds; set up its scheduler and blocks.

    Raises:
        ModelError: the checkpoint does not hold what the model needs.
        ConfigError: the KV cache cannot hold one sequence.
    """
    config, dtype = spec.attention, row_dtype(spec.numerics)
    kv_dtype = TORCH_DTYPES[spec.numerics.kv]
    slot_bytes = model_spec.kv_slot_bytes(spec.numerics.kv)
    num_blocks = num_kv_blocks(slot_bytes, config.block_size, config.kv_cache_bytes)
    if num_blocks < 1:
        raise ConfigError(f"kv_cache_bytes {config.kv_cache_bytes} is less than one block")
    placement = placement_of(spec.ffn, model_spec)
    scheduler = Scheduler(
        SchedulerConfig(
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs,
            max_batch_tokens=config.max_batch_tokens,
            num_lanes=config.num_lanes or 1,
            num_blocks=num_blocks,
            block_size=config.block_size,
            prefix_caching=config.prefix_caching,
            holds_back=config.holds_back,
            cuts_steps=placement.is_away,
            windows=tuple(group.window for group in model_spec.kv_groups),
        )
    )
    experts = placement.held_by(placement.attention_side)
    share = FFNShare(experts=experts, head=placement.head_shard(None))
    weights = _weights(spec, kernels, share)
    architecture = ARCHITECTURES[model_spec.model_type]
    model = architecture.attention(model_spec, weights, kernels, config.max_model_len)
    kv = KVStore(model_spec, num_blocks, config.block_size, kv_dtype, model_spec.kv_groups)
    timeline = Timeline()
    native = None
    if (link := _link_for_native_calls(spec, endpoint)) is not None:
        native = CallClient(RingLibrary(), endpoint.sequence)
        link.assist(native)
    shares_dense = spec.ffn.shares_dense and native is not None
    ffn = FFNClient(
        placement,
        spec.slot,
        Held(architecture, model_spec, weights, kernels, share),
        model_spec,
        dtype,
        endpoint,
        clock,
        timeline,
        config.resend_s,
        native,
        FirstHalves(architecture, model_spec, weights, kernels) if shares_dense else None,
    )
    weights.keep()
    calibration = None
    if config.num_lanes is None or config.calibrates:
        calibration = Calibration(
            scheduler,
            kv,
            config.max_num_seqs,
            config.max_model_len,
            model_spec.vocab_size,
            placement.num_away,
            config.num_lanes,
            spec.ffn.num_replicas,
            timeline,
            clock,
        )
    return AttentionWorker(
        model,
        kv,
        scheduler,
        Sampler(kernels),
        calibration,
        config.num_lanes or 1,
        model_spec.vocab_size,
        config.max_model_len,
        ffn,
        ExpertCounts(
            model_spec.num_layers, model_spec.experts.num_experts if model_spec.experts else 0
        ),
        endpoint,
        clock,
        timeline,
    )


def build_ffn_worker(
    spec: WorkerSpec, model_spec: ModelSpec, kernels: Kernels, endpoint: Endpoint, clock: Clock
) -> Worker:
    """Load this worker's part of the FFNs and the head.

    Raises:
        ModelError: the checkpoint does not hold what the model needs.
    """
    placement = placement_of(spec.ffn, model_spec)
    experts, shard = placement.experts_of(spec.slot), spec.slot % spec.ffn.num_parts
    share = FFNShare(shard, spec.ffn.num_parts, experts, placement.head_shard(shard))
    weights = _weights(spec, kernels, share)
    held = Held(ARCHITECTURES[model_spec.model_type], model_spec, weights, kernels, share)
    weights.keep()
    server = None
    if (link := _link_for_native_calls(spec, endpoint)) is not None:
        calls = map(held.native, range(held.second_from + model_spec.num_layers))
        layers = [
            NativeLayer(call.function, call.context, call.row_bytes, call.width)
            if call is not None
            else NativeLayer(0, 0, 0, 0)
            for call in calls
        ]
        server = CallServer(
            RingLibrary(),
            layers,
            held.second_from,
            spec.slot,
            spec.ffn.max_gather_rows,
            endpoint.sequence,
        )
        link.assist(server)
    return FFNWorker(
        held,
        model_spec,
        spec.slot,
        experts,
        kernels.row_format,
        endpoint,
        spec.ffn.max_gather_rows,
        clock,
        Timeline(),
        server,
    )


def _link_for_native_calls(
    spec: WorkerSpec, endpoint: Endpoint
) -> SharedMemoryLink | ZeroMQLink | None:
    """Return the link if native code can send and answer calls over it.

    It makes no checksums, and takes the clocks of both ends for one, as they are on one host.
    """
    link = endpoint.link
    if spec.with_crc:
        return None
    if isinstance(link, SharedMemoryLink):
        return link
    if not isinstance(link, ZeroMQLink) or not link.address.startswith("ipc://"):
        return None
    if (obstacle := why_not_native()) is not None:
        log.warning("calls go through Python: %s", obstacle)
        return None
    return link


def _weights(spec: WorkerSpec, kernels: Kernels, share: FFNShare) -> PackedWeights:
    """Return this worker's weights: from the checkpoint, from an earlier start, or random ones.

    `share` is what it holds of the FFNs and the head.
    """
    directory, dtype = spec.model_directory, row_dtype(spec.numerics)
    if spec.load_format == "dummy":
        return PackedWeights(DummyWeights(dtype, DUMMY_SEED), kernels, None)
    path = None
    if spec.numerics.kernels == "native":  # the reference keeps tensors as the checkpoint does
        first_halves = spec.role is Role.ATTENTION and spec.ffn.shares_dense
        identity = (spec.model_digest, kernels.name, spec.role.name, share, first_halves)
        path = pack_path(directory, *identity)
    return PackedWeights(Checkpoint(directory, dtype), kernels, path)
