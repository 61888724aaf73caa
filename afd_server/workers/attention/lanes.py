"""The slots of an attention worker, each with one micro-batch in flight."""

from torch import Tensor

from afd_server.core.batch import PlannedSequence, Sampled, StepPlan, StepResult
from afd_server.core.stage import StageId
from afd_server.models.base import AttentionHalf, FFNCall
from afd_server.models.forward import Forward, forward
from afd_server.workers.attention.kv_store import KVStore
from afd_server.workers.attention.sampler import Sampler
from afd_server.workers.tensors import micro_batch

Outcome = tuple[StageId, FFNCall] | StepResult  # of a stage: the next call, or the step's end


class Lane:
    """Carries one micro-batch through all layers; never waits for another lane."""

    def __init__(self, index: int, sampler: Sampler) -> None:
        self.index = index
        self._sampler = sampler
        self.begun_s = 0.0  # when its latest step began
        self._plan: StepPlan | None = None
        self._forward: Forward | None = None

    @property
    def is_idle(self) -> bool:
        """Tell whether the lane may take a plan."""
        return self._plan is None

    def start(
        self, plan: StepPlan, model: AttentionHalf, kv: KVStore, begin_s: float
    ) -> tuple[StageId, FFNCall]:
        """Begin a step and run it to its first call."""
        assert self._plan is None, f"lane {self.index} is busy"
        self._plan = plan
        self.begun_s = begin_s
        batch = micro_batch(plan, kv.layers, kv.group_of, kv.block_size)
        self._forward = forward(model, batch)
        return self._staged(next(self._forward))

    def resume(self, answer: Tensor) -> Outcome:
        """Go on with the answer to the latest call, to the next one or the end."""
        assert self._plan is not None and self._forward is not None, f"lane {self.index} is idle"
        try:
            return self._staged(self._forward.send(answer))
        except StopIteration as stop:
            plan, self._plan, self._forward = self._plan, None, None
            return StepResult(plan, self._sample_all(plan, stop.value))

    def _staged(self, call: FFNCall) -> tuple[StageId, FFNCall]:
        assert self._plan is not None
        return StageId(self._plan.step, self.index, call.layer), call

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
