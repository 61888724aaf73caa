"""Keeps decoding sequences on time: token k of a request is due k − 1 targets after its first.

A sequence that is ahead of its schedule has earned slack, which may be spent on the prompts of
others; one that is behind has a debt, which is repaid before any prompt goes on. All predictions
come from what steps have taken so far, those of a calibration first (`policy.step_time`).
"""

from collections.abc import Callable, Iterable, Mapping
from math import ceil, inf

from afd_server.core.sequence import Sequence
from afd_server.policy.step_time import StepLoad, StepTimeModel, with_prefill, with_row

HEADROOM = 0.94  # of a target: tokens are due that much earlier than was promised
DECODE_SHARE = 0.82  # of a target that decoding alone may come to take; the rest is for prompts
LONGEST_GAP = 1.7  # targets: slack or not, hardly any step with more prefill takes longer
EXPECTED_GROWTH = 64  # tokens by which a sequence is taken to grow when it is judged
PATIENCE_S = 0.5  # without any prefill, after which some is done at anybody's cost
MIN_PREFILL = 16  # tokens of a prompt that go on whatever they cost, where some have to
WORTH_A_STEP = 24  # tokens: until there is slack for so many, it is saved
SWITCH_GAIN = 1.06  # that another number of lanes must promise: to change it costs half a step
TRIAL_EVERY = 128  # steps, of which so many are in another number of lanes than is thought best
TRIAL_STEPS = 8
TRIAL_COST = 1.25  # unless these are thought to take so many times as long
STEP_QUANTILE = 0.75  # of a step's time, for what must be done by a moment
GAP_QUANTILE = 0.98  # the same for the longest gap: how far a step may stray depends on the machine
STALLED_QUANTILE = 0.9  # where it would be exceeded without any prompt too: short ones do not help
MEAN_QUANTILE = 0.6  # of many steps' time, whose mean lies above the median


class Pace:
    """The schedule of one attention worker's sequences.

    Args:
        num_lanes: that share the sequences; `open_lanes` may say so later.
    """

    def __init__(self, num_lanes: int) -> None:
        self.model = StepTimeModel()
        self._lane_choices = range(num_lanes, num_lanes + 1)
        self._num_chosen = 0
        self._preferred = num_lanes  # lanes, but for trials of others
        self.num_lanes = num_lanes  # in which sequences decode, as last chosen
        self._last_prefill_s = -inf

    def open_lanes(self, most: int, fewest: int) -> None:
        """Share the sequences among so many lanes from now on, as many as pay."""
        self._lane_choices = range(fewest, most + 1)

    @property
    def most_lanes(self) -> int:
        """Return how many lanes are open."""
        return self._lane_choices[-1]

    def lanes_for(self, sequences: list[Sequence]) -> int:
        """Return the number of lanes that bring all of these a token soonest.

        Few sequences are sooner through in few lanes: a step takes hardly longer for some rows
        more, and longer beside another step. How much longer is seen only while several run, so
        the second best number has a trial now and then.
        """
        self.num_lanes = self._choose_lanes(sequences)
        return self.num_lanes

    def _choose_lanes(self, sequences: list[Sequence]) -> int:
        choices = self._lane_choices
        if len(choices) == 1:
            return choices[-1]
        rows, keys = _expected_rows(sequences)
        expected_s = {lanes: self._decode_step_s(rows, keys, lanes) for lanes in choices}

        def weighed_s(lanes: int) -> float:
            return expected_s[lanes] / (SWITCH_GAIN if lanes == self._preferred else 1.0)

        best, second, *_ = sorted(choices, key=weighed_s)
        self._preferred = best
        self._num_chosen += 1
        is_trial = self._num_chosen % TRIAL_EVERY < TRIAL_STEPS
        return second if is_trial and expected_s[second] < TRIAL_COST * expected_s[best] else best

    def due_s(self, sequence: Sequence) -> float:
        """Return when the next token of a sequence is due; without a target, never."""
        slo, first_s = sequence.request.slo, sequence.first_token_s
        if first_s is None:
            return slo.first_due_s(sequence.arrived_s)
        if slo.tpot_s is None:
            return inf
        return first_s + sequence.num_since_first * slo.tpot_s * HEADROOM

    def can_wait(
        self, sequence: Sequence, load: StepLoad, first: Sequence, some_read: bool, now_s: float
    ) -> bool:
        """Tell whether a sequence with a loose target may miss the step of one with a tighter one.

        It may if the next one will still do, and the step would else be late for the tighter one
        or take slack that prompts are waiting for; but not while its first tokens are held.

        Args:
            sequence: that may miss it.
            load: the step so far.
            first: the sequence in it that is due first.
            some_read: whether prompts are being read.
            now_s: the present.
        """
        loose, tight = sequence.request.slo.tpot_s, first.request.slo.tpot_s
        if loose is None or tight is None or loose <= tight or sequence.num_held:
            return False
        step_s = self.model.predict(with_row(load, sequence), STEP_QUANTILE)
        is_late = now_s + step_s > self.due_s(first)
        return (is_late or some_read) and self.due_s(sequence) > now_s + 2 * step_s

    def prefill_budget(
        self,
        load: StepLoad,
        start: int,
        running: Iterable[Sequence],
        most: int,
        now_s: float,
        ends_s: Mapping[int, float],
    ) -> int:
        """Return how many tokens of prompts a step can take so that nobody's token is late.

        Who is about to have a first token in another lane will want the next one as soon as those
        who decode; and while several are reading, no step is so long that one of them would wait
        for it with a short answer. Somebody alone reads as much as there is room for.

        Slack is saved until there is enough for some more tokens, as each costs less among many;
        unless no gap may be so long.

        Args:
            load: the rest of the step.
            start: position of the first of these tokens.
            running: all who own blocks, in this lane or another.
            most: what the step has room for, and what there is.
            now_s: the present.
            ends_s: when the steps of other lanes will end, by the arrival of their sequences.
        """
        awaiting = [s for s in running if _is_awaited(s) or _is_about_to(s, ends_s)]
        reading = [s for s in running if s.first_token_s is None and s.num_left > 1]
        targets = _targets(awaiting if len(reading) == 1 else [*awaiting, *reading])
        if not targets:
            return most
        latest_s = min((self._latest_s(s, now_s, ends_s) for s in awaiting), default=inf)
        longest_s = LONGEST_GAP * min(targets)

        def is_on_time(step: StepLoad) -> bool:
            return now_s + self.model.predict(step, STEP_QUANTILE) <= latest_s

        quantile = GAP_QUANTILE
        if self.model.longest(load, quantile) > longest_s:
            quantile = STALLED_QUANTILE

        def is_short(step: StepLoad) -> bool:
            return self.model.longest(step, quantile) <= longest_s

        in_a_gap = max(min(MIN_PREFILL, most), _most_prefill(load, start, most, is_short))
        fitting = _most_prefill(load, start, in_a_gap, is_on_time)
        if fitting >= min(in_a_gap, WORTH_A_STEP):
            return fitting
        is_starved = now_s - self._last_prefill_s > PATIENCE_S
        return max(fitting, min(MIN_PREFILL, most)) if is_starved else 0

    def _latest_s(self, sequence: Sequence, now_s: float, ends_s: Mapping[int, float]) -> float:
        """Return when a step that begins now must have ended, for a sequence to be on time.

        One in a step of another lane has its token when that ends; it is the next one for which
        it may have to wait.
        """
        tpot_s, end_s = sequence.request.slo.tpot_s, ends_s.get(sequence.arrival)
        if tpot_s is None:
            return inf
        if end_s is None:
            return self.due_s(sequence)
        if sequence.first_token_s is None:
            return max(now_s, end_s) + tpot_s * HEADROOM
        return self.due_s(sequence) + tpot_s * HEADROOM - max(0.0, end_s - now_s)

    def note_prefill(self, now_s: float) -> None:
        """Remember that a prompt went on."""
        self._last_prefill_s = now_s

    def fits(self, newcomer: Sequence, running: list[Sequence], now_s: float) -> bool:
        """Tell whether all who run and a newcomer will be on time when it decodes as well.

        Whose target nobody could keep even alone, on a machine that has become slow, has no say
        in that for others.
        """
        everybody, alone_s = [*running, newcomer], self.alone_s
        targets = _targets(everybody)
        if not running or not targets:
            return True
        if max(targets) > alone_s:
            targets = [target for target in targets if target > alone_s]
        in_reach = [s for s in running if (s.request.slo.tpot_s or 0.0) >= min(targets)]
        if any(self.due_s(s) + min(targets) < now_s for s in in_reach if _is_awaited(s)):
            return False  # debts first
        return self.decode_step_s(everybody) <= min(targets) * DECODE_SHARE

    def decode_step_s(self, sequences: list[Sequence]) -> float:
        """Return the expected time of a step when these decode, spread over the lanes that pay."""
        rows, keys = _expected_rows(sequences)
        return min(self._decode_step_s(rows, keys, lanes) for lanes in self._lane_choices)

    def _decode_step_s(self, rows: float, keys: float, num_lanes: int) -> float:
        lanes = min(num_lanes, max(1, ceil(rows)))
        others, rows = lanes - 1, rows / lanes
        load = StepLoad(rows, keys / lanes, others=others, other_rows=others * rows)
        return self.model.predict(load, MEAN_QUANTILE)

    @property
    def alone_s(self) -> float:
        """Return what a step takes for a single sequence: no target below it can be met."""
        return self.model.predict(StepLoad(rows=1, keys=256), MEAN_QUANTILE)


def is_decoding(sequence: Sequence) -> bool:
    """Tell whether a sequence has had tokens here and waits for its next one only."""
    return sequence.first_token_s is not None and sequence.num_pending == 1


def _is_awaited(sequence: Sequence) -> bool:
    """Tell whether a client has had tokens and waits for the next one."""
    return is_decoding(sequence) and not sequence.num_held


def _is_about_to(sequence: Sequence, ends_s: Mapping[int, float]) -> bool:
    """Tell whether another lane is about to bring a sequence its first token, and not its last."""
    is_read = sequence.num_reached == len(sequence.token_ids) and sequence.arrival in ends_s
    return sequence.first_token_s is None and is_read and sequence.num_left > 1


def _most_prefill(
    load: StepLoad, start: int, most: int, is_fine: Callable[[StepLoad], bool]
) -> int:
    """Return with how many tokens of a prompt, at most, a load is still fine."""
    fitting, too_many = 0, most + 1
    while too_many - fitting > 1:
        middle = (fitting + too_many) // 2
        if is_fine(with_prefill(load, start, middle)):
            fitting = middle
        else:
            too_many = middle
    return fitting


def _expected_rows(sequences: list[Sequence]) -> tuple[float, float]:
    """Return how many rows sequences have in a step on average, and the keys these attend to.

    One with a looser target than the tightest needs a row only in some of the steps.
    """
    targets = [s.request.slo.tpot_s or inf for s in sequences]
    tightest = min(targets, default=inf)
    weights = [1.0 if tightest == inf else tightest / target for target in targets]
    keys = sum(
        weight * (len(s.token_ids) + min(s.num_left, EXPECTED_GROWTH))
        for weight, s in zip(weights, sequences, strict=True)
    )
    return sum(weights), keys


def _targets(sequences: Iterable[Sequence]) -> list[float]:
    targets = (sequence.request.slo.tpot_s for sequence in sequences)
    return [target for target in targets if target is not None]
