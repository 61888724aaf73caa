"""Cuts a step with much prefill in two, so that its own halves keep both pools busy."""

from dataclasses import replace

from afd_server.core.batch import StepPlan

# Weights are read once for each part; from about this many rows on, products take longer than that.
MIN_ROWS = 24


def least_prefill(rows: float) -> float:
    """Return from how many tokens of a prompt on a step with so many decoding rows goes in two."""
    return max(2 * MIN_ROWS - rows, MIN_ROWS + 1)


def go_ahead(plan: StepPlan) -> tuple[StepPlan, StepPlan] | None:
    """Let the first tokens of a step's prompts go through each layer ahead of the rest.

    Nothing is sampled in the part that goes ahead, and what follows it in a sequence comes later
    in every layer, so the results are those of the plan.

    Returns:
        What goes ahead, about half of the rows or as many as may, and the rest; None if either
        would be too small to be worth it.
    """
    room = plan.num_tokens // 2
    ahead, rest = [], []
    for planned in plan.sequences:
        count = min(room, len(planned.token_ids) - planned.samples)
        room -= count
        first, others = planned.token_ids[:count], planned.token_ids[count:]
        if first:
            ahead.append(replace(planned, token_ids=first, samples=False))
        if others:
            rest.append(replace(planned, token_ids=others, start=planned.start + count))
    if sum(len(planned.token_ids) for planned in ahead) < MIN_ROWS:
        return None
    return replace(plan, sequences=tuple(ahead)), replace(plan, sequences=tuple(rest))
