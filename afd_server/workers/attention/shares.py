"""Cuts an FFN call up among the groups that hold its experts, and puts the answers together.

One of them may be the attention worker itself.

Knows nothing of messages: which group computes what, and which row of an answer means what.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from afd_server.models.base import FFNCall
from afd_server.models.forward import add_in_part_order, join_parts
from afd_server.models.routing import (
    CHOICE_BYTES,
    ELSEWHERE,
    answers_of,
    experts_of,
)


class Share(NamedTuple):
    """What every worker of a group has to compute of a call.

    Attributes:
        group: of the placement.
        rows: what travels, unless the group is `Placement.attention_side`.
        places: [answers] int64: token · chosen + choice of each row that is answered, see
            `answers_of`; None if the group got the call as it is, and answers each row with one.
        num_answers: rows of an answer.
    """

    group: int
    rows: Tensor
    places: Tensor | None
    num_answers: int


def cut(call: FFNCall, group_of: Sequence[int | None]) -> list[Share] | None:
    """Cut a call up by experts.

    Args:
        call: of a routed layer or a dense one.
        group_of: the group to ask for each expert of the layer, None if nobody has it.

    Returns:
        The shares of those groups that have something to do; None if an expert is missing.
    """
    if not call.num_chosen:
        (group,) = group_of
        return None if group is None else [Share(group, call.rows, None, call.rows.shape[0])]
    experts = experts_of(call.rows, call.num_chosen)
    wanted = [group_of[expert] for expert in torch.unique(experts).tolist()]
    asked = sorted({group for group in wanted if group is not None})
    if None in wanted:
        return None
    if len(asked) == 1:
        return [Share(asked[0], call.rows, None, call.rows.shape[0])]
    groups = torch.tensor([ELSEWHERE if group is None else group for group in group_of])[experts]
    return [_share(call, experts, groups, group) for group in asked]


def _share(call: FFNCall, experts: Tensor, groups: Tensor, group: int) -> Share:
    """Take the rows with an expert of this group; others' experts are marked `ELSEWHERE`."""
    mine = groups == group  # [tokens, chosen]
    tokens = mine.any(1).nonzero().flatten()
    here = torch.where(mine[tokens], experts[tokens], ELSEWHERE)
    rows = call.rows[tokens]
    end = rows.shape[1] - CHOICE_BYTES * call.num_chosen
    rows[:, end : end + 4 * call.num_chosen] = here.view(torch.uint8)
    places = tokens[:, None] * call.num_chosen + torch.arange(call.num_chosen)
    places = places[answers_of(here)]
    return Share(group, rows, places, places.shape[0])


def put_together(
    call: FFNCall, shares: Sequence[Share], answers: Sequence[Sequence[Tensor]]
) -> Tensor:
    """Join the answers: in each column shard by expert, then shard by shard.

    Args:
        call: as it was cut.
        shares: from `cut`.
        answers: for each share those of the group's workers, by column shard. What is not cut, at
            the attention side, is added with the first shard.

    Returns:
        [tokens, hidden], or logits of the head's call, in the dtype of the answers.
    """
    if shares[0].places is None:
        return join_parts(call, answers[0])
    shards = []
    for shard in range(max(map(len, answers))):
        there = [(s, a[shard]) for s, a in zip(shares, answers, strict=True) if shard < len(a)]
        shards.append(_add_by_expert(call, there))
    return add_in_part_order(shards)


def _add_by_expert(call: FFNCall, answers: Sequence[tuple[Share, Tensor]]) -> Tensor:
    """Add the answers of one column shard to shares of a routed call, [tokens, hidden]."""
    places = torch.cat([share.places for share, _ in answers if share.places is not None])
    # the last row of what is added is zero: the answer to a choice that was summed with another
    index = torch.full((call.rows.shape[0] * call.num_chosen,), places.shape[0])
    index[places] = torch.arange(places.shape[0])
    first = answers[0][1]
    rows = torch.cat([*(answer for _, answer in answers), first.new_zeros(1, first.shape[1])])
    return add_in_part_order([rows[i] for i in index.view(-1, call.num_chosen).unbind(1)])
