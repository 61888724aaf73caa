"""Cuts a step in two, so that its own halves keep both pools busy."""

from dataclasses import replace

from afd_server.core.batch import StepPlan

MIN_ROWS = 8  # of a part: for fewer, reading all weights twice costs more than waiting saves


def go_ahead(plan: StepPlan) -> tuple[StepPlan, StepPlan] | None:
    """Let half of a step's rows go through each layer ahead of the rest.

    These are the first tokens of its prompts, then the last ones of sequences that have only one
    left. What follows in a sequence comes later in every layer, so the results are those of the
    plan.

    Returns:
        What goes ahead and the rest, of as many rows or one more; None if the step is too small
        for that, or is to stay whole.
    """
    room = plan.num_tokens // 2
    if not plan.may_be_cut or room < MIN_ROWS:
        return None
    counts = []
    for planned in plan.sequences:
        counts.append(min(room, len(planned.token_ids) - planned.samples))
        room -= counts[-1]
    ahead, rest = [], []
    for planned, count in zip(plan.sequences, counts, strict=True):
        last = len(planned.token_ids) - 1
        if room and count == last:
            room -= 1
            ahead.append(planned)
            continue
        first, others = planned.token_ids[:count], planned.token_ids[count:]
        if first:
            ahead.append(replace(planned, token_ids=first, samples=False))
        if others:
            rest.append(replace(planned, token_ids=others, start=planned.start + count))
    return replace(plan, sequences=tuple(ahead)), replace(plan, sequences=tuple(rest))
