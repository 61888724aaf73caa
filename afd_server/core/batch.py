"""What one step of one lane must do, and what came of it."""

from dataclasses import dataclass
from typing import NamedTuple

from afd_server.core.request import FinishReason, SamplingParams
from afd_server.core.sequence import History


@dataclass(frozen=True, slots=True)
class PlannedSequence:
    """A run of tokens of one sequence within a step.

    The tokens sit at positions `start … start + len(token_ids) − 1` and their keys and
    values go to the blocks of `block_tables`: one whole table for each KV group, its block i
    holding positions i · block_size onwards. Ids before all that a window sees mean nothing.
    `samples` says that the last token's logits give a new token; `history` is set if GUARD is
    to choose it.
    """

    key: int
    attempt: int
    token_ids: tuple[int, ...]
    start: int
    block_tables: tuple[tuple[int, ...], ...]
    samples: bool
    sampling: SamplingParams
    history: History | None = None


@dataclass(frozen=True, slots=True)
class StepPlan:
    """All that a lane must do in one step. `step` numbers the plans of one worker.

    `may_be_cut` allows for two micro-batches, one of which is computed while the other is away.
    """

    step: int
    lane: int
    sequences: tuple[PlannedSequence, ...]
    may_be_cut: bool = True

    @property
    def num_tokens(self) -> int:
        """Return the rows of all of it."""
        return sum(len(planned.token_ids) for planned in self.sequences)


class Sampled(NamedTuple):
    """A new token; with GUARD, the entropy of the distribution it was drawn from."""

    token_id: int
    entropy: float | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """The sampled tokens of a step: one for each planned sequence with `samples`, in order."""

    plan: StepPlan
    tokens: tuple[Sampled, ...]


@dataclass(frozen=True, slots=True)
class Emitted:
    """A token to be sent to the gateway; `index` counts the request's tokens from 0.

    `num_cached` is how many tokens of the prompt this attempt found computed, `queued_s` how long
    it waited to be begun, `entropy` that of the token's distribution, with GUARD.
    """

    key: int
    attempt: int
    index: int
    token_id: int
    finish: FinishReason | None
    num_cached: int
    queued_s: float
    entropy: float | None = None
