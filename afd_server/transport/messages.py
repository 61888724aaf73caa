"""The nine messages. A tenth needs a page in docs/decisions.

Fields are ints, floats, short strings and enums; a message ends in at most one `Payload`.
"""

import array
import struct
from dataclasses import dataclass
from enum import IntEnum
from math import prod

from afd_server.core.request import PRIORITIES, Request
from afd_server.core.topology import Role, Topology

Buffer = bytes | bytearray | memoryview


class DType(IntEnum):
    """Element types of a payload. The numbers travel on the wire."""

    NONE = 0
    UINT8 = 1
    INT32 = 2
    INT64 = 3
    FLOAT32 = 4
    BFLOAT16 = 5

    @property
    def itemsize(self) -> int:
        """Return the bytes of one element."""
        return _ITEM_BYTES[self]


_ITEM_BYTES = {
    DType.NONE: 0,
    DType.UINT8: 1,
    DType.INT32: 4,
    DType.INT64: 8,
    DType.FLOAT32: 4,
    DType.BFLOAT16: 2,
}


@dataclass(frozen=True, slots=True)
class Payload:
    """A tensor as raw little-endian bytes in row-major order; at most three dimensions."""

    dtype: DType
    shape: tuple[int, ...]
    data: Buffer

    @property
    def nbytes(self) -> int:
        """Return the size that dtype and shape promise."""
        return prod(self.shape) * self.dtype.itemsize


EMPTY = Payload(DType.NONE, (), b"")
TOKEN_COLUMNS = 9


@dataclass(frozen=True, slots=True)
class Submit:
    """Gateway → attention: generate. Repeating it is harmless and asks for a sign of life.

    Only requests with the same `salt` share computed blocks. Those of the lowest `rank` (the place
    of their priority among all) go first, and among these the `tenant` with the fewest running
    ones. `tokens` is int32: prompt, then already emitted, then with GUARD (`guard_window` above 0)
    the bits of a float32 for each of these, its entropy, then stop token ids. `ttft_s` is what is
    left of that target; 0 is "no target".
    """

    key: int
    attempt: int
    num_prompt: int
    num_emitted: int
    max_tokens: int
    top_k: int
    guard_window: int
    seed: int
    choice: int
    temperature: float
    top_p: float
    min_p: float
    top_n_sigma: float
    min_k: float
    ttft_s: float
    tpot_s: float
    rank: int
    salt: str
    tenant: str
    tokens: Payload


@dataclass(frozen=True, slots=True)
class Cancel:
    """Gateway → attention: nobody waits for this attempt any more."""

    key: int
    attempt: int


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """Attention → gateway: what one step gave.

    `rows` is int64 [n, TOKEN_COLUMNS]: key, attempt, index, number of tokens (0 or 1), token id,
    finish reason (0: goes on), prompt tokens that this attempt found computed, with GUARD the
    bits of the entropy as a float32, else 0, and the microseconds that the attempt waited to be
    begun. A row without token and finish only says that the attempt is alive.
    """

    rows: Payload


@dataclass(frozen=True, slots=True)
class LoadReport:
    """Worker → gateway, in answer to its heartbeat. `steps` grows while there is progress.

    `free_blocks` counts the `cached_blocks`, which nobody owns and others may still take over.
    Of the `queried_tokens` that requests brought with them, `hit_tokens` were found computed.
    `events` is uint8 [n, 40]: what the worker did since its last report
    (`telemetry.timeline`), on its own clock, which reads `clock_us` now. An attention worker
    expects `step_us` of a step in which all that run decode, and `alone_us` of one with a single
    sequence; what runs was last spread over `decode_lanes`, and steps take `slowness_permille` of
    what their costs say. For an FFN worker these are 0.
    """

    steps: int
    running: int
    waiting: int
    free_blocks: int
    cached_blocks: int
    num_blocks: int
    preemptions: int
    queried_tokens: int
    hit_tokens: int
    rows: int
    bad_frames: int
    resends: int
    dropped_events: int
    clock_us: int
    step_us: int
    alone_us: int
    decode_lanes: int
    slowness_permille: int
    events: Payload


@dataclass(frozen=True, slots=True)
class ExpertLoad:
    """Attention → gateway, beside its `LoadReport`: how its gates chose since it started.

    `tokens` is int64 [layers, experts]; a dense layer's row is zero. Nothing is sent for a model
    without experts.
    """

    tokens: Payload


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Attention → FFN: rows of one layer for one part, the worker of slot `part`.

    In a dense layer the rows are prepared ones, in a routed one the bytes of
    `models.routing.join`, with `ELSEWHERE` for experts that another worker was asked for.
    `live_us` is how long the sender has had live sequences without a break.
    """

    step: int
    lane: int
    layer: int
    part: int
    live_us: int
    activations: Payload


@dataclass(frozen=True, slots=True)
class Combine:
    """FFN → attention: the partial sum [answers, hidden] of a dispatch, or why not.

    A row has one answer; in a routed layer with some of its experts elsewhere, one for each of
    those that are there (`models.routing.answers_of`). Of the head it is the logits of the part.

    `call_epoch` is the epoch under which the dispatch was sent. `refusal` is empty unless the
    dispatch was refused. `taken_us` is when the dispatch was taken in, on the FFN worker's own
    clock, and `held_us` for how long it waited and was computed; both 0 with a refusal.
    """

    step: int
    lane: int
    layer: int
    part: int
    call_epoch: int
    taken_us: int
    held_us: int
    refusal: str
    partial: Payload


class ProcessState(IntEnum):
    """Where a process is in its life. The numbers travel on the wire."""

    STARTING = 1
    READY = 2
    FAILED = 3


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Any process → supervisor, and gateway → workers: I live, and this far I have come.

    `detail` says what went wrong when the state is FAILED.
    """

    role: Role
    slot: int
    state: ProcessState
    steps: int
    address: str
    detail: str


@dataclass(frozen=True, slots=True)
class TopologyUpdate:
    """Supervisor → everybody: who is alive now."""

    topology: Topology


Message = (
    Submit
    | Cancel
    | TokenChunk
    | LoadReport
    | Dispatch
    | Combine
    | Heartbeat
    | TopologyUpdate
    | ExpertLoad
)


def submit_of(request: Request) -> Submit:
    """Lay a request out for the wire."""
    sampling = request.sampling
    ids = array.array("i", request.prompt_ids)
    ids.extend(request.emitted_ids)
    ids.frombytes(array.array("f", request.emitted_entropies).tobytes())
    ids.extend(sampling.stop_token_ids)
    return Submit(
        key=request.key,
        attempt=request.attempt,
        num_prompt=len(request.prompt_ids),
        num_emitted=len(request.emitted_ids),
        max_tokens=sampling.max_tokens,
        top_k=sampling.top_k,
        guard_window=sampling.guard_window,
        seed=sampling.seed,
        choice=sampling.choice,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        top_n_sigma=sampling.top_n_sigma,
        min_k=sampling.min_k,
        ttft_s=request.slo.ttft_s or 0.0,
        tpot_s=request.slo.tpot_s or 0.0,
        rank=PRIORITIES.index(request.priority),
        salt=request.salt,
        tenant=request.tenant,
        tokens=Payload(DType.INT32, (len(ids),), ids.tobytes()),
    )


def float_bits(value: float) -> int:
    """Return a float32 as an integer for a token row."""
    return int.from_bytes(struct.pack("<f", value), "little")


def bits_float(bits: int) -> float:
    """Return what `float_bits` was given; `bits` is in [0, 2^32)."""
    (value,) = struct.unpack("<f", bits.to_bytes(4, "little"))
    return float(value)
