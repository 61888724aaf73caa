"""Decides whether a request may enter, before any work is done for it."""

from dataclasses import dataclass

from afd_server.core.errors import InvalidRequest, Overloaded

RETRY_AFTER_S = 1.0


@dataclass(frozen=True, slots=True)
class AdmissionConfig:
    """Limits of one gateway: most live requests, and the context in tokens."""

    max_live_requests: int
    max_model_len: int


def check_capacity(config: AdmissionConfig, num_live: int, num_new: int) -> None:
    """Refuse when the gateway is full; needs no knowledge of the prompt.

    Raises:
        Overloaded: `num_new` more requests would exceed the limit.
    """
    if num_live + num_new > config.max_live_requests:
        raise Overloaded(
            f"{num_live} requests are live and the limit is {config.max_live_requests}; "
            "try again later",
            RETRY_AFTER_S,
        )


def fit_max_tokens(
    config: AdmissionConfig, num_prompt: int, wanted: int | None, prompt_param: str = "prompt"
) -> int:
    """Return how many tokens may be generated: `wanted`, or all that the context leaves.

    Raises:
        InvalidRequest: prompt and wanted tokens together exceed the context.
    """
    room = config.max_model_len - num_prompt
    if room < 1:
        raise InvalidRequest(
            f"the prompt has {num_prompt} tokens, the context holds {config.max_model_len} "
            "including at least one of output; shorten the prompt",
            prompt_param,
        )
    if wanted is not None and wanted > room:
        raise InvalidRequest(
            f"max_tokens is {wanted}, but a prompt of {num_prompt} tokens leaves room for {room} "
            f"in a context of {config.max_model_len}",
            "max_tokens",
        )
    return wanted if wanted is not None else room
