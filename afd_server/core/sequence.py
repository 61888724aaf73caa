"""The progress of one request on an attention worker."""

from collections import Counter
from dataclasses import dataclass, field
from enum import Enum

from afd_server.core.request import FinishReason, Request


class SequenceState(Enum):
    """Where a sequence is between arrival and its last token."""

    WAITING = "waiting"  # owns no blocks
    RUNNING = "running"  # owns blocks, may be planned
    IN_FLIGHT = "in_flight"  # part of a lane's micro-batch
    FINISHED = "finished"


class History:
    """What GUARD looks back on: how often each token occurred, and the generated ones' entropies.

    Grows with its sequence; whoever samples the next token only reads it.
    """

    __slots__ = ("counts", "entropies")

    def __init__(self, request: Request) -> None:
        self.counts = Counter((*request.prompt_ids, *request.emitted_ids))
        self.entropies = list(request.emitted_entropies)


@dataclass(slots=True)
class BlockTable:
    """Where the keys and values of a sequence are, in the layers of one KV group.

    Attributes:
        block_ids: block i holds positions i · block_size onwards.
        num_left: so many at the beginning left the window and were given back; what stands
            there in `block_ids` means nothing.
    """

    block_ids: list[int] = field(default_factory=list)
    num_left: int = 0

    @property
    def owned(self) -> list[int]:
        """Return the blocks that the sequence owns."""
        return self.block_ids[self.num_left :]


class Sequence:
    """Tokens known, tokens computed, blocks owned (`tables`, one for each KV group).

    Owned by one `Scheduler`. `num_computed` counts the tokens whose keys and values are in
    the blocks; the last known token is never computed before it is used to predict the next.
    `history` is kept for GUARD alone.
    `num_reached` is the most that `num_computed` has been or will be after the step in flight,
    and `num_cached` how many of these others had computed. `chain` names the full blocks.
    `arrived_s`, `begun_s` (first planned) and `first_token_s` are of this attempt. Of the first
    tokens, `num_held` have not been sent yet: the client gets them together.
    """

    __slots__ = ("arrival", "arrived_s", "begun_s", "cancelled", "chain", "finish",
                 "first_token_s", "history", "num_cached", "num_computed", "num_held",
                 "num_reached", "num_since_first", "request", "state", "tables",
                 "token_ids")  # fmt: skip

    def __init__(
        self, request: Request, arrival: int, arrived_s: float, num_tables: int = 1
    ) -> None:
        self.request = request
        self.arrival = arrival  # rank in order of arrival: smaller is older
        self.arrived_s = arrived_s
        self.begun_s: float | None = None
        self.first_token_s: float | None = None
        self.num_since_first = 0  # tokens, the first included
        self.num_held = 0
        self.token_ids = [*request.prompt_ids, *request.emitted_ids]
        self.history = History(request) if request.sampling.guard_window else None
        self.num_computed = 0
        self.num_reached = 0
        self.num_cached = 0
        self.tables = [BlockTable() for _ in range(num_tables)]
        self.chain: list[bytes] = []
        self.state = SequenceState.WAITING
        self.cancelled = False
        self.finish: FinishReason | None = None

    @property
    def num_pending(self) -> int:
        """Return how many known tokens must still be computed: 1 while decoding."""
        return len(self.token_ids) - self.num_computed

    @property
    def num_emitted(self) -> int:
        """Return how many tokens were generated so far, over all attempts."""
        return len(self.token_ids) - len(self.request.prompt_ids)

    @property
    def num_left(self) -> int:
        """Return how many tokens may still be generated."""
        return self.request.sampling.max_tokens - self.num_emitted

    @property
    def is_promised(self) -> bool:
        """Tell whether somebody has had a token of it already, or its first is under way."""
        return bool(self.request.emitted_ids) or self.begun_s is not None

    def append(self, token_id: int, now_s: float, entropy: float | None = None) -> None:
        """Take a sampled token; the sequence is then decoding. Its entropy is there with GUARD."""
        assert self.num_pending == 0, "a token was sampled before all others were computed"
        self.token_ids.append(token_id)
        if self.first_token_s is None:
            self.first_token_s = now_s
        self.num_since_first += 1
        if self.history is not None:
            assert entropy is not None, "GUARD needs every entropy"
            self.history.counts[token_id] += 1
            self.history.entropies.append(entropy)

    def begin_anew(self) -> None:
        """Let the schedule begin with the next token."""
        self.first_token_s = None
        self.num_since_first = 0

    def release(self) -> list[int]:
        """Give up all blocks.

        Returns:
            The blocks it owned; the caller frees them.
        """
        released = [block for table in self.tables for block in table.owned]
        self.tables = [BlockTable() for _ in self.tables]
        return released

    def forget_computed(self) -> list[int]:
        """Give up all blocks (preemption): the sequence waits and will prefill again.

        Returns:
            The blocks it owned; the caller frees them.
        """
        self.num_computed = 0
        self.state = SequenceState.WAITING
        return self.release()
