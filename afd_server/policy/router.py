"""Chooses an attention worker for a request."""

from collections.abc import Container, Mapping, Sequence

from afd_server.core.topology import Member
from afd_server.policy.prefix import extend_chain

BLOCK_TOKENS = 64  # of a prompt, that are remembered or not
MOST_BLOCKS = 65_536  # remembered: some 10 MB


class PrefixMap:
    """Which workers were given which beginnings of prompts: a guess at what they have computed.

    They evict blocks without a word, so the oldest are forgotten here too.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[bytes, str], None] = {}  # by block and worker, oldest first

    def note(self, blocks: Sequence[bytes], worker: str) -> None:
        """Remember that a worker computes these blocks."""
        for block in blocks:
            self._held.pop((block, worker), None)
            self._held[block, worker] = None
        while len(self._held) > MOST_BLOCKS:
            del self._held[next(iter(self._held))]

    def num_tokens(self, blocks: Sequence[bytes], worker: str) -> int:
        """Return how many tokens from the first on a worker need not compute."""
        held = next((i for i, b in enumerate(blocks) if (b, worker) not in self._held), len(blocks))
        return held * BLOCK_TOKENS


def prefix_blocks(prompt_ids: Sequence[int], salt: str) -> list[bytes]:
    """Return the names of a prompt's full blocks; its last token is always computed."""
    chain: list[bytes] = []
    extend_chain(chain, prompt_ids, BLOCK_TOKENS, (len(prompt_ids) - 1) // BLOCK_TOKENS, salt)
    return chain


def choose_worker(
    workers: Sequence[Member], work: Mapping[str, int], late: Container[str] = ()
) -> Member | None:
    """Return the worker with the least work, the lowest slot among equals; None if there is none.

    Args:
        workers: the attention pool.
        work: by incarnation, the tokens that its live requests are expected to take and that the
            new one would have to compute there.
        late: incarnations whose steps take longer than the new request's target; the last choice.
    """
    return min(
        workers,
        key=lambda w: (w.incarnation in late, work.get(w.incarnation, 0), w.slot),
        default=None,
    )
