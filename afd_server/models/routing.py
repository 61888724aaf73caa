"""Which experts a token goes to, and how that travels: behind each row of an FFN call.

Knows nothing of workers: who holds an expert is `core.topology.Placement`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

ELSEWHERE = -1  # stands in a part of a call for an expert that another worker was asked for
CHOICE_BYTES = 8  # an expert (int32) and its weight (float32)


class RoutedRows(NamedTuple):
    """Rows with the experts they go to.

    Attributes:
        rows: prepared rows, [tokens, …].
        experts: [tokens, chosen] int32, ascending in each row.
        weights: [tokens, chosen] float32.
    """

    rows: Tensor
    experts: Tensor
    weights: Tensor


def choose_experts(logits: Tensor, num_chosen: int, renormalises: bool) -> tuple[Tensor, Tensor]:
    """Choose the most probable experts of each row; of equals the one with the lower id.

    Args:
        logits: [tokens, experts].
        num_chosen: experts of a token.
        renormalises: whether weights are divided by their sum.

    Returns:
        experts [tokens, chosen] int32, ascending, and their weights [tokens, chosen] float32.
    """
    probabilities = torch.softmax(logits.float(), -1)
    best = torch.sort(probabilities, dim=-1, descending=True, stable=True).indices
    experts = best[:, :num_chosen].sort(-1).values
    weights = probabilities.gather(-1, experts)
    if renormalises:
        total = weights[:, 0]
        for choice in range(1, num_chosen):  # in order, so that a row's sum is its own affair
            total = total + weights[:, choice]
        weights = weights / total[:, None]
    return experts.to(torch.int32), weights


def join(routed: RoutedRows) -> Tensor:
    """Return routed rows as bytes, [tokens, row + chosen · 8] uint8: row, experts, weights."""
    return torch.cat([part.contiguous().view(torch.uint8) for part in routed], 1)


def split(joined: Tensor, num_chosen: int, dtype: torch.dtype) -> RoutedRows:
    """Undo `join` for prepared rows of a dtype."""
    experts, weights = joined[:, -8 * num_chosen : -4 * num_chosen], joined[:, -4 * num_chosen :]
    return RoutedRows(
        joined[:, : -8 * num_chosen].contiguous().view(dtype),
        experts.contiguous().view(torch.int32),
        weights.contiguous().view(torch.float32),
    )


def experts_of(joined: Tensor, num_chosen: int) -> Tensor:
    """Return the experts of joined rows, [tokens, chosen] int32."""
    return joined[:, -8 * num_chosen : -4 * num_chosen].contiguous().view(torch.int32)


def answers_of(experts: Tensor) -> Tensor:
    """Mark which choices are answered by a row of their own, [tokens, chosen] bool.

    A row that finds all of its experts at one worker is answered by their sum, marked at its
    first choice; any other by one row for each expert that is there.
    """
    here = experts != ELSEWHERE
    complete = here.all(1, keepdim=True)
    first = torch.arange(experts.shape[1]) == 0
    return torch.where(complete, first, here)


def compute_routed(
    routed: RoutedRows, expert: Callable[[int, Tensor], Tensor], hidden_size: int
) -> Tensor:
    """Compute the answers to routed rows, as `answers_of` marks them, in its order.

    A token's contribution from an expert is weight · output in float32, rounded to the output's
    dtype; contributions are added in ascending order of experts (`add_in_expert_order`).

    Args:
        routed: rows, of which at least one expert each is here.
        expert: gives the output of an expert, [rows, hidden], for some rows.
        hidden_size: of the output.

    Returns:
        [answers, hidden].
    """
    rows, experts, weights = routed
    num_chosen = experts.shape[1]
    flat = experts.flatten()
    outputs: Tensor | None = None
    for index in torch.unique(flat).tolist():
        if index == ELSEWHERE:
            continue
        places = (flat == index).nonzero().flatten()
        output = expert(index, rows[places // num_chosen])
        weighted = weights.flatten()[places, None] * output.float()
        if outputs is None:
            outputs = output.new_zeros(flat.shape[0], hidden_size)
        outputs[places] = weighted.to(output.dtype)
    assert outputs is not None, "a call without an expert of this worker"
    contributions = outputs.view(-1, num_chosen, hidden_size)
    complete = (experts != ELSEWHERE).all(1)
    contributions[complete, 0] = add_in_expert_order(contributions[complete])
    return contributions[answers_of(experts)]


def add_in_expert_order(contributions: Tensor) -> Tensor:
    """Add [tokens, chosen, hidden] over the choices, one by one in float32; keep the dtype.

    The order is that of the experts, so the sum does not depend on who computed what.
    """
    total = contributions[:, 0].float()
    for choice in range(1, contributions.shape[1]):
        total = total + contributions[:, choice].float()
    return total.to(contributions.dtype)
