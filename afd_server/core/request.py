"""What a client asked for, in tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from math import inf

GUARD_WINDOWS = range(2, 65)  # the paper's runs had 7
LONGEST_TARGET_MS = 3_600_000.0
PRIORITIES = range(-1000, 1001)  # lower ones go first


class FinishReason(IntEnum):
    """Why a request ended. The numbers travel on the wire."""

    STOP = 1  # an end-of-sequence or stop token
    LENGTH = 2  # max_tokens or the context is used up
    CANCELLED = 3  # the client went away
    ERROR = 4  # this request alone failed
    REFUSED = 5  # it could not be begun in time


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose the next token.

    `temperature` 0 means greedy. `top_k` 0, `top_p` 1, `min_p` 0, `top_n_sigma` 0 and
    `min_k` 0 mean "off"; `min_k` is the τ of Min-k. With `guard_window`, unless 0, GUARD chooses
    the candidates, and no filter does. `seed` is always given: the gateway draws one where the
    client did not.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    top_n_sigma: float = 0.0
    min_k: float = 0.0
    guard_window: int = 0
    seed: int = 0
    choice: int = 0
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        assert self.max_tokens >= 1, f"max_tokens is {self.max_tokens}, must be at least 1"
        assert self.temperature >= 0, f"temperature is {self.temperature}, must not be negative"
        assert 0 < self.top_p <= 1, f"top_p is {self.top_p}, must be in (0, 1]"
        assert self.top_k >= 0, f"top_k is {self.top_k}, must not be negative"
        assert 0 <= self.min_p <= 1, f"min_p is {self.min_p}, must be in [0, 1]"
        assert self.top_n_sigma >= 0, f"top_n_sigma is {self.top_n_sigma}, must not be negative"
        assert self.min_k >= 0, f"min_k is {self.min_k}, must not be negative"
        assert self.guard_window in (0, *GUARD_WINDOWS), (
            f"guard_window is {self.guard_window}, must be 0 or in {GUARD_WINDOWS}"
        )
        assert 0 <= self.seed < 2**63, f"seed is {self.seed}, must be in [0, 2^63)"


@dataclass(frozen=True, slots=True)
class SLO:
    """Targets of one request, in seconds; None where there is no target."""

    ttft_s: float | None = None
    tpot_s: float | None = None

    def first_due_s(self, arrived_s: float) -> float:
        """Return when the first token of a request that arrived then is due; may be never."""
        return inf if self.ttft_s is None else arrived_s + self.ttft_s

    def is_met(self, ttft_s: float, tpot_s: float | None) -> bool:
        """Tell whether these times are within the targets; without a TPOT, any of it is kept."""
        in_time = self.ttft_s is None or ttft_s <= self.ttft_s
        return in_time and (self.tpot_s is None or tpot_s is None or tpot_s <= self.tpot_s)


def time_per_token_s(times_s: Sequence[float], num_tokens: int) -> float | None:
    """Return the mean time per output token after the first (TPOT); None for fewer than two.

    Args:
        times_s: of what came, in order; the first and the last count.
        num_tokens: that came by then.
    """
    return (times_s[-1] - times_s[0]) / (num_tokens - 1) if num_tokens > 1 else None


@dataclass(frozen=True, slots=True)
class Request:
    """One choice of one client request; immutable.

    `key` is minted by the gateway and unique in its life; `attempt` counts the assignments
    of this request to attention workers (invariant I4 of docs/protocol.md). With GUARD,
    `emitted_entropies` has the entropy of each emitted token. Requests share computed blocks
    only if they have the same `salt`. Where they compete, those with the lowest `priority` go
    first, and among these the `tenant` with the fewest running ones.
    """

    key: int
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    attempt: int = 1
    emitted_ids: tuple[int, ...] = ()
    emitted_entropies: tuple[float, ...] = ()
    slo: SLO = field(default_factory=SLO)
    salt: str = ""
    tenant: str = ""
    priority: int = 0

    def __post_init__(self) -> None:
        assert self.prompt_ids, "a request needs at least one prompt token"
        assert len(self.emitted_ids) < self.sampling.max_tokens, "nothing is left to generate"
        num_entropies = len(self.emitted_ids) if self.sampling.guard_window else 0
        assert len(self.emitted_entropies) == num_entropies, (
            f"{len(self.emitted_entropies)} entropies for {num_entropies} tokens"
        )
