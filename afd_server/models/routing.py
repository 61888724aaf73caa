"""Which experts a token goes to, and how that travels: behind each row of an FFN call.

Knows nothing of workers: who holds an expert is `core.topology.Placement`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from afd_server.core.expert_spec import ExpertSpec, GateSpec
from afd_server.kernels.reference import sigmoid
from afd_server.models.forward import add_in_part_order

ELSEWHERE = -1  # stands in a part of a call for an expert that another worker was asked for
CHOICE_BYTES = 8  # an expert (int32) and its weight (float32)
TINY = 1e-20  # beside the sum of weights: sigmoids far out may all be 0


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


def choose_experts(
    logits: Tensor, spec: ExpertSpec, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Choose the experts of each row with the best scores; of equals the one with the lower id.

    Args:
        logits: [tokens, experts] float32.
        spec: says how.
        bias: [experts] float32, added to scores for the choice but not for the weights; None if
            the gate has none.

    Returns:
        experts [tokens, chosen] int32, ascending, and their weights [tokens, chosen] float32.
        A shared expert is the last of each row, with weight 1.
    """
    gate, num_tokens = spec.gate, logits.shape[0]
    scores = torch.softmax(logits, -1) if gate.activation == "softmax" else sigmoid(logits)
    ranks = scores if bias is None else scores + bias
    if gate.num_kept_groups < gate.num_groups:
        ranks = _keep_best_groups(ranks, gate)
    experts = _best(ranks, spec.num_chosen).sort(-1).values
    weights = scores.gather(-1, experts)
    if gate.renormalises:
        weights = weights / (_sum_in_order(weights) + TINY)
    shared = experts.new_full((num_tokens, spec.num_shared), spec.num_experts)
    experts = torch.cat((experts, shared), 1)
    ones = weights.new_ones(num_tokens, spec.num_shared)
    return experts.to(torch.int32), torch.cat((weights * gate.scale, ones), 1)


def _keep_best_groups(ranks: Tensor, gate: GateSpec) -> Tensor:
    """Return ranks with those of all but the best groups at −∞."""
    by_group = ranks.view(ranks.shape[0], gate.num_groups, -1)
    two_best = by_group.sort(-1, descending=True).values[..., :2]
    kept = _best(_sum_in_order(two_best).squeeze(-1), gate.num_kept_groups)
    is_lost = torch.ones(by_group.shape[:2], dtype=torch.bool).scatter(1, kept, False)
    return by_group.masked_fill(is_lost.unsqueeze(-1), -math.inf).flatten(1)


def _best(ranks: Tensor, count: int) -> Tensor:
    """Return the indices of the highest of each row, best first; of equals the lower one."""
    return torch.sort(ranks, dim=-1, descending=True, stable=True).indices[:, :count]


def _sum_in_order(x: Tensor) -> Tensor:
    """Add up along the last dimension, kept as one, so that a row's sum is its own affair."""
    total = x[..., :1]
    for index in range(1, x.shape[-1]):
        total = total + x[..., index : index + 1]
    return total


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
