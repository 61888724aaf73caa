"""All that a worker process is told at its start."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from afd_server.core.attention_spec import KVFormat
from afd_server.core.errors import ConfigError
from afd_server.core.model_spec import LoadFormat, ModelSpec
from afd_server.core.topology import FFNParallel, Placement, Role, spread_experts


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """Settings of an attention worker; token counts unless the name says otherwise.

    `num_lanes` is None if the worker is to find out, which it can with an FFN pool only.
    `resend_s` is how long an FFN call may go unanswered before it is sent again; `holds_back` as
    in `policy.scheduler`; with `calibrates` the scheduler learns at the start what steps take.
    """

    num_lanes: int | None
    max_model_len: int
    max_num_seqs: int
    max_batch_tokens: int
    block_size: int
    kv_cache_bytes: int
    prefix_caching: bool
    resend_s: float = 2.0
    holds_back: bool = False
    calibrates: bool = False


@dataclass(frozen=True, slots=True)
class FFNConfig:
    """Settings of an FFN worker, and what attention workers must know of the pool.

    `num_parts` is the number of column shards: 1 when workers hold whole FFNs. `num_groups` groups
    of so many workers hold the experts, `num_replicas` groups each of them
    (`core.topology.Placement`). `max_gather_rows` limits the rows computed together.
    `dense_layers` is the pool that holds the layers without experts and the shared experts of the
    others; with `shares_dense` the attention side computes the first half of each layer without
    experts wherever native code asks for the second. `lm_head` is the pool that holds the head;
    with `shares_head` the attention side has a part of it as well. `hot_experts` are those, (layer,
    expert), that have the replicas; None: all have them.
    """

    parallel: FFNParallel
    num_parts: int
    num_groups: int = 1
    num_replicas: int = 1
    max_gather_rows: int = 1024
    dense_layers: Role = Role.FFN
    shares_dense: bool = False
    lm_head: Role = Role.ATTENTION
    shares_head: bool = False
    hot_experts: tuple[tuple[int, int], ...] | None = None


def ffn_config(
    parallel: FFNParallel, num_workers: int, num_replicas: int = 1, num_shards: int = 2
) -> FFNConfig:
    """Return how so many FFN workers share the FFNs.

    Args:
        parallel: how FFNs are spread.
        num_workers: of the FFN pool; with `HYBRID` a multiple of `num_shards`.
        num_replicas: groups that hold an expert; of account if workers hold experts.
        num_shards: workers of a group; of account with `HYBRID`.
    """
    match parallel:
        case FFNParallel.TENSOR:
            return FFNConfig(parallel, num_workers)
        case FFNParallel.REPLICATE:
            return FFNConfig(parallel, 1, num_workers, num_workers)
        case FFNParallel.COLOCATED:
            return FFNConfig(parallel, 1)
        case FFNParallel.EXPERT:
            return FFNConfig(parallel, 1, num_workers, num_replicas)
        case FFNParallel.HYBRID:
            return FFNConfig(parallel, num_shards, num_workers // num_shards, num_replicas)


def dense_place(
    setting: Literal["auto", "attention", "ffn", "both"],
    num_attention: int,
    num_ffn: int,
    num_shards: int,
    is_native: bool,
) -> tuple[Role, bool]:
    """Return the pool that holds dense layers, and whether the attention side computes halves.

    `auto` has both compute where that can be, and attention workers have the time.

    Args:
        setting: what was asked for.
        num_attention: workers of that pool.
        num_ffn: workers of the other.
        num_shards: that an FFN is cut into for FFN workers.
        is_native: whether native code sends and answers calls.

    Raises:
        ConfigError: both are to compute, and cannot.
    """
    can_share = is_native and num_shards == 1 and num_ffn > 0
    if setting == "both" and not can_share:
        raise ConfigError(
            "dense_layers is both, which needs workers on one host (data_transport ipc) without "
            "checksums, native int8 kernels and whole FFNs (one FFN worker, or ffn_parallel "
            "replicate); set it to ffn"
        )
    if setting == "auto":
        setting = "both" if can_share and num_attention <= num_ffn else "ffn"
    return Role.ATTENTION if setting == "attention" else Role.FFN, setting == "both"


def head_place(
    setting: Literal["auto", "attention", "ffn", "both"],
    num_attention: int,
    num_ffn: int,
    is_near: bool,
) -> tuple[Role, bool]:
    """Return the pool that holds the head, and whether the attention side has a part of it as well.

    `auto` has both compute where logits come soon, and FFN workers have the time.

    Args:
        setting: what was asked for.
        num_attention: workers of that pool.
        num_ffn: workers of the other.
        is_near: whether they share memory or native calls, and FFN workers hold what is dense.
    """
    if setting == "auto":
        setting = "both" if is_near and num_attention <= num_ffn else "attention"
    return Role.ATTENTION if setting == "attention" else Role.FFN, setting == "both"


def placement_of(config: FFNConfig, model: ModelSpec) -> Placement:
    """Return who holds what: every worker works it out for itself.

    Behind the last layer comes the head, with the parts of the vocabulary for columns.
    """
    experts = model.placed_by_layer
    at_attention, hot = set(), set(config.hot_experts or ())
    for layer, num_experts in enumerate(experts):
        for expert in range(num_experts):
            if _side_of(layer, expert, config, model) is Role.ATTENTION:
                at_attention.add((layer, expert))
            if not _is_chosen(layer, expert, model):
                hot.add((layer, expert))  # everybody goes there
    return spread_experts(
        experts,
        config.num_groups,
        config.num_parts,
        config.num_replicas,
        at_attention,
        None if config.hot_experts is None else hot,
        config.shares_head and config.parallel is not FFNParallel.COLOCATED,
    )


def _side_of(layer: int, expert: int, config: FFNConfig, model: ModelSpec) -> Role:
    """Return the pool that holds an expert of a layer; shared ones are held as dense layers are."""
    if config.parallel is FFNParallel.COLOCATED:
        return Role.ATTENTION
    if layer == model.num_layers:
        return config.lm_head
    return Role.FFN if _is_chosen(layer, expert, model) else config.dense_layers


def _is_chosen(layer: int, expert: int, model: ModelSpec) -> bool:
    """Tell whether a gate chooses who goes to an expert, rather than everybody."""
    experts = model.experts
    if experts is None or layer == model.num_layers or not experts.is_routed[layer]:
        return False
    return expert < experts.num_experts


@dataclass(frozen=True, slots=True)
class Numerics:
    """The formats of a pool.

    Attributes:
        kernels: `native`, or `reference` where no native ones were built.
        weights: `int8`, `float32` or `bfloat16`. With int8 the rows of products are int8 as well.
        kv: `float32`, `bfloat16` or `int8`, of keys and values.
    """

    kernels: Literal["native", "reference"]
    weights: Literal["int8", "float32", "bfloat16"]
    kv: KVFormat


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """One worker process.

    Attributes:
        supervisor, supervisor_address: whom to report to.
        bind: where to listen: `ipc://…` or `tcp://host:*`.
        model_digest: what the checkpoint at `model_path` must turn out to be.
        numerics: what is computed in which format.
        compute_threads: of tensor operations; more threads than owned cores slow everything.
        transport: between workers: `zmq`, or `shm` for shared memory beside it.
        with_crc: whether frames carry checksums.
        load_format: where the weights come from.
        cores: of its own; empty if it shares all of them.
    """

    role: Role
    slot: int
    incarnation: str
    supervisor: str
    supervisor_address: str
    bind: str
    model_path: str
    model_digest: str
    numerics: Numerics
    compute_threads: int
    transport: str
    with_crc: bool
    attention: AttentionConfig
    ffn: FFNConfig
    load_format: LoadFormat = "auto"
    cores: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """Return the short form used in logs, such as `attention/0`."""
        return f"{self.role.name.lower()}/{self.slot}"

    @property
    def model_directory(self) -> Path:
        """Return `model_path` as a path."""
        return Path(self.model_path)

    def to_json(self) -> str:
        """Return the spec as text for another process."""
        return _ADAPTER.dump_json(self).decode()


def parse_worker_spec(text: str) -> WorkerSpec:
    """Read what `to_json` wrote."""
    return _ADAPTER.validate_json(text)


_ADAPTER = TypeAdapter(WorkerSpec)
