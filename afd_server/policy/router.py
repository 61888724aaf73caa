"""Chooses an attention worker for a request."""

from collections.abc import Mapping, Sequence

from afd_server.core.topology import Member


def choose_worker(workers: Sequence[Member], live_tokens: Mapping[str, int]) -> Member | None:
    """Return the worker with the least work, the lowest slot among equals; None if there is none.

    Args:
        workers: the attention pool.
        live_tokens: by incarnation, the prompt and output tokens its live requests may take.
    """
    return min(workers, key=lambda w: (live_tokens.get(w.incarnation, 0), w.slot), default=None)
