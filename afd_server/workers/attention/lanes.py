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

# Of a stage: the next call, or none where nothing depends on it. Behind the last one: the step's
# result, or none while its other part is under way.
Outcome = tuple[StageId, FFNCall | None] | StepResult | None


class Part:
    """One micro-batch of a lane's step on its way through the layers, with at most one call out.

    Attributes:
        lane: whose step it is.
        index: what stands for the lane in its stages.
        step: the number of that step.
        num_rows: of the micro-batch.
        num_samples: new tokens that it gives.
        is_held: it could go on, but for the part that goes ahead.
    """

    def __init__(self, lane: "Lane", index: int) -> None:
        self.lane = lane
        self.index = index
        self.step = 0
        self.num_rows = 0
        self.num_samples = 0
        self.is_held = False
        self._plan: StepPlan | None = None
        self._attended = ctypes.c_int64()  # native code counts on
        self._num_layers = 0
        self._last_layer: int | None = None  # where a part ends that nothing is sampled from
        self._forward: Forward | None = None

    @property
    def num_stages(self) -> int:
        """Return the stages behind it; 0 if it has not begun."""
        return self._attended.value

    @property
    def needs_keys(self) -> bool:
        """Tell whether it goes on with a layer: behind the last one, keys do not matter."""
        return self.num_stages < self._num_layers

    @property
    def is_over(self) -> bool:
        """Tell whether it has no micro-batch, or not any more."""
        return self._forward is None

    def start(
        self, plan: StepPlan, model: AttentionHalf, kv: KVStore, ahead: "Part | None" = None
    ) -> None:
        """Take a micro-batch, which may follow that of another part in each layer."""
        assert self._forward is None, f"part {self.index} is busy"
        self._plan, self.step, self.num_rows = plan, plan.step, plan.num_tokens
        self.num_samples = sum(planned.samples for planned in plan.sequences)
        self._attended.value, self._num_layers = 0, model.num_layers
        ends_early = self.index >= AHEAD and self.num_samples == 0
        self._last_layer = model.num_layers - 1 if ends_early else None
        batch = micro_batch(plan, kv.layers, kv.group_of, kv.block_size)
        progress = Progress(
            attended=ctypes.addressof(self._attended),
            ahead=0 if ahead is None else ctypes.addressof(ahead._attended),
            end=model.num_layers if self._last_layer is None else self._last_layer,
        )
        self._forward = forward(model, batch, progress)

    def resume(self, answer: Tensor | Reached | None) -> Outcome:
        """Go on with the answer to its latest call, or begin without one."""
        assert self._forward is not None and self._plan is not None, f"part {self.index} is over"
        try:
            call = next(self._forward) if answer is None else self._forward.send(answer)
        except StopIteration as stop:
            self._forward = None
            return self.lane.take(self._plan, stop.value)
        self._attended.value = call.layer + 1
        stage = StageId(self.step, self.index, call.layer)
        if call.layer == self._last_layer:
            self._forward = None
            return stage, None
        return stage, call


class Lane:
    """Carries one step through all layers; never waits for another lane.

    A step of many rows goes in two parts, and one is computed while the other is away.

    Args:
        index: of the lane.
        sampler: turns logits into tokens.
    """

    def __init__(self, index: int, sampler: Sampler) -> None:
        self.index = index
        self.begun_s = 0.0  # when its latest step began
        self.rest = Part(self, index)  # the whole step, if nothing goes ahead
        self._ahead = Part(self, AHEAD + index)
        self._sampler = sampler
        self._plan: StepPlan | None = None
        self._sampled: list[tuple[PlannedSequence, Sampled]] = []  # as the parts gave them

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
        if part is not self.rest or ahead.is_over or not part.needs_keys:
            return False
        return ahead.num_stages <= part.num_stages

    def start(
        self, plan: StepPlan, model: AttentionHalf, kv: KVStore, begin_s: float
    ) -> list[Part]:
        """Take a step; return its parts in the order in which they are to begin."""
        assert self._plan is None, f"lane {self.index} is busy"
        self._plan = plan
        self.begun_s = begin_s
        plans = go_ahead(plan)
        if plans is None:
            self.rest.start(plan, model, kv)
            return [self.rest]
        self._ahead.start(plans[0], model, kv)
        self.rest.start(plans[1], model, kv, self._ahead)
        return [self._ahead, self.rest]

    def take(self, part: StepPlan, logits: Tensor | None) -> StepResult | None:
        """Take the logits of the rows of a part that asked for them, [rows, vocab].

        Returns:
            The result of the step; None while its other part is under way.
        """
        assert self._plan is not None, f"lane {self.index} has no step"
        sampling = [planned for planned in part.sequences if planned.samples]
        if logits is not None:
            self._sampled += zip(sampling, map(self._sample, logits, sampling), strict=True)
        if not (self.rest.is_over and self._ahead.is_over):
            return None
        place = {planned.key: at for at, planned in enumerate(self._plan.sequences)}
        self._sampled.sort(key=lambda sampled: place[sampled[0].key])
        result = StepResult(self._plan, tuple(token for _, token in self._sampled))
        self._plan, self._sampled = None, []
        return result

    def _sample(self, logits: Tensor, planned: PlannedSequence) -> Sampled:
        params, position = planned.sampling, planned.start + len(planned.token_ids)
        if planned.history is None:
            return Sampled(self._sampler.sample(logits, params, position))
        return self._sampler.sample_guarded(logits, params, position, planned.history)
