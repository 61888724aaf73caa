"""The progress of one request on an attention worker."""

from enum import Enum

from afd_server.core.request import FinishReason, Request


class SequenceState(Enum):
    """Where a sequence is between arrival and its last token."""

    WAITING = "waiting"  # owns no blocks
    RUNNING = "running"  # owns blocks, may be planned
    IN_FLIGHT = "in_flight"  # part of a lane's micro-batch
    FINISHED = "finished"


class Sequence:
    """Tokens known, tokens computed, blocks owned.

    Owned by one `Scheduler`. `num_computed` counts the tokens whose keys and values are in
    the blocks; the last known token is never computed before it is used to predict the next.
    """

    __slots__ = ("arrival", "block_ids", "cancelled", "finish", "num_computed", "request", "state",
                 "token_ids")  # fmt: skip

    def __init__(self, request: Request, arrival: int) -> None:
        self.request = request
        self.arrival = arrival  # rank in order of arrival: smaller is older
        self.token_ids = [*request.prompt_ids, *request.emitted_ids]
        self.num_computed = 0
        self.block_ids: list[int] = []
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

    def append(self, token_id: int) -> None:
        """Take a sampled token; the sequence is then decoding."""
        assert self.num_pending == 0, "a token was sampled before all others were computed"
        self.token_ids.append(token_id)

    def forget_computed(self) -> list[int]:
        """Give up all blocks (preemption): the sequence waits and will prefill again.

        Returns:
            The blocks it owned; the caller frees them.
        """
        released, self.block_ids = self.block_ids, []
        self.num_computed = 0
        self.state = SequenceState.WAITING
        return released
