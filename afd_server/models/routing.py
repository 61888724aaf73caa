"""Which experts a token goes to, and how that travels: behind each row of an FFN call.

Knows nothing of workers: who holds an expert is `core.topology.Placement`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from afd_server.models.forward import add_in_part_order

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
    dtype; contributions are added one by one in float32, in ascending order of experts. So the sum
    does not depend on who computed what.

    Args:
        routed: rows, of which at least one expert each is here.
        expert: gives the output of an expert, [rows, hidden], for some rows.
        hidden_size: of the output.

    Returns:
        [answers, hidden].
    """
    rows, experts, weights = routed
    num_tokens, num_chosen = experts.shape
    flat, flat_weights = experts.flatten(), weights.flatten()
    table: Tensor | None = None  # a row for each choice; those of others are never looked at
    for index in torch.unique(flat).tolist():
        if index == ELSEWHERE:
            continue
        places = (flat == index).nonzero().flatten()
        output = expert(index, rows[places // num_chosen])
        if table is None:
            table = output.new_empty(flat.shape[0], hidden_size)
        table[places] = (flat_weights[places, None] * output.float()).to(output.dtype)
    assert table is not None, "a call without an expert of this worker"
    contributions = table.view(num_tokens, num_chosen, hidden_size)
    complete = (experts != ELSEWHERE).all(1)
    if bool(complete.all()):
        return add_in_part_order(contributions.unbind(1))
    contributions[complete, 0] = add_in_part_order(contributions[complete].unbind(1))
    return contributions[answers_of(experts)]
