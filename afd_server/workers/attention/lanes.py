"""The slots of an attention worker, each with one step in flight."""

import ctypes

from torch import Tensor

from afd_server.core.batch import PlannedSequence, Sampled, StepPlan, StepResult
from afd_server.core.stage import AHEAD, StageId
from afd_server.models.base import AttentionHalf, FFNCall, Progress, Reached
from afd_server.models.forward import Forward, forward
from afd_server.policy.ahead import go_ahead
from afd_server.workers.attention.kv_store import KVStore
from afd_server.workers.attention.sampler import Sampler
from afd_server.workers.tensors import micro_batch

# Of a stage: the next call, or none where nothing depends on it; or the step's end.
Outcome = tuple[StageId, FFNCall | None] | StepResult


class Part:
    """One micro-batch of a lane's step on its way through the layers, with at most one call out.

    Attributes:
        lane: whose step it is.
        index: what stands for the lane in its stages.
        num_rows: of the micro-batch.
        is_held: it could go on, but for the part that goes ahead.
    """

    def __init__(self, lane: "Lane", index: int) -> None:
        self.lane = lane
        self.index = index
        self.num_rows = 0
        self.is_held = False
        self._step = 0
        self._attended = ctypes.c_int64()  # native code counts on
        self._last_layer: int | None = None  # where a part ends that nothing is sampled from
        self._forward: Forward | None = None

    @property
    def num_stages(self) -> int:
        """Return the stages behind it; 0 if it has not begun."""
        return self._attended.value

    @property
    def is_over(self) -> bool:
        """Tell whether it has no micro-batch, or not any more."""
        return self._forward is None

    def start(
        self, plan: StepPlan, model: AttentionHalf, kv: KVStore, ahead: "Part | None" = None
    ) -> None:
        """Take a micro-batch, which may follow that of another part in each layer."""
        assert self._forward is None, f"part {self.index} is busy"
        self._step, self.num_rows, self._attended.value = plan.step, plan.num_tokens, 0
        self._last_layer = model.num_layers - 1 if self.index >= AHEAD else None
        batch = micro_batch(plan, kv.layers, kv.group_of, kv.block_size)
        progress = Progress(
            attended=ctypes.addressof(self._attended),
            ahead=0 if ahead is None else ctypes.addressof(ahead._attended),
            end=model.num_layers if self._last_layer is None else self._last_layer,
        )
        self._forward = forward(model, batch, progress)

    def resume(self, answer: Tensor | Reached | None) -> Outcome:
        """Go on with the answer to its latest call, or begin without one."""
        assert self._forward is not None, f"part {self.index} has no micro-batch"
        try:
            call = next(self._forward) if answer is None else self._forward.send(answer)
        except StopIteration as stop:
            self._forward = None
            return self.lane.finish(stop.value)
        self._attended.value = call.layer + 1
        stage = StageId(self._step, self.index, call.layer)
        if call.layer == self._last_layer:
            self._forward = None
            return stage, None
        return stage, call


class Lane:
    """Carries one step through all layers; never waits for another lane.

    A step with much prefill goes in two parts, and one is computed while the other is away.

    Args:
        index: of the lane.
        sampler: turns logits into tokens.
        cuts_steps: whether steps may go in two parts.
    """

    def __init__(self, index: int, sampler: Sampler, cuts_steps: bool) -> None:
        self.index = index
        self.begun_s = 0.0  # when its latest step began
        self.rest = Part(self, index)  # the whole step, if nothing goes ahead
        self._ahead = Part(self, AHEAD + index)
        self._sampler = sampler
        self._cuts_steps = cuts_steps
        self._plan: StepPlan | None = None

    @property
    def is_idle(self) -> bool:
        """Tell whether the lane may take a plan."""
        return self._plan is None

    def part(self, index: int) -> Part:
        """Return the part that is called so in stages."""
        return self._ahead if index >= AHEAD else self.rest

    def must_wait(self, part: Part) -> bool:
        """Tell whether a part's next layer needs keys that are not written yet."""
        ahead = self._ahead
        return part is self.rest and not ahead.is_over and ahead.num_stages <= part.num_stages

    def start(
        self, plan: StepPlan, model: AttentionHalf, kv: KVStore, begin_s: float
    ) -> list[Part]:
        """Take a step; return its parts in the order in which they are to begin."""
        assert self._plan is None, f"lane {self.index} is busy"
        self._plan = plan
        self.begun_s = begin_s
        plans = go_ahead(plan) if self._cuts_steps else None
        if plans is None:
            self.rest.start(plan, model, kv)
            return [self.rest]
        self._ahead.start(plans[0], model, kv)
        self.rest.start(plans[1], model, kv, self._ahead)
        return [self._ahead, self.rest]

    def finish(self, logits: Tensor | None) -> StepResult:
        """End the step with the logits of the rows that asked for them, [rows, vocab]."""
        assert self._plan is not None and self._ahead.is_over, f"lane {self.index} is not done"
        plan, self._plan = self._plan, None
        return StepResult(plan, self._sample_all(plan, logits))

    def _sample_all(self, plan: StepPlan, logits: Tensor | None) -> tuple[Sampled, ...]:
        """Sample each row of [rows, vocab] for the sequence that asked for it, in plan order."""
        if logits is None:
            return ()
        sampling = [planned for planned in plan.sequences if planned.samples]
        return tuple(map(self._sample, logits, sampling))

    def _sample(self, logits: Tensor, planned: PlannedSequence) -> Sampled:
        params, position = planned.sampling, planned.start + len(planned.token_ids)
        if planned.history is None:
            return Sampled(self._sampler.sample(logits, params, position))
        return self._sampler.sample_guarded(logits, params, position, planned.history)
