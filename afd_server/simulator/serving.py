"""One attention worker behind a gateway: what becomes of requests under a load."""

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import count

from afd_server.core.batch import Sampled, StepPlan, StepResult
from afd_server.core.errors import Overloaded
from afd_server.core.request import SLO, Request, SamplingParams, time_per_token_s
from afd_server.policy.admission import AdmissionConfig, FirstTokenQueue, check_capacity
from afd_server.policy.scheduler import Scheduler, SchedulerConfig
from afd_server.policy.step_time import StepLoad, load_of

StepTime = Callable[[StepLoad, float], float]  # of a step that begins at a moment, in seconds


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request to come: when, its sizes in tokens, and what it asks for.

    With `num_emitted` it is moved: a worker had sent so many of its tokens, and died.
    """

    at_s: float
    num_prompt: int
    num_output: int
    slo: SLO = field(default_factory=SLO)
    priority: int = 0
    tenant: str = ""
    num_emitted: int = 0


@dataclass(slots=True)
class Outcome:
    """What became of a request: the times of its tokens here, or why and when it was refused."""

    arrival: Arrival
    token_times_s: list[float] = field(default_factory=list)
    refusal: str | None = None
    refused_s: float | None = None

    @property
    def tpot_s(self) -> float | None:
        """Return the mean time per output token after the first; None for fewer than two."""
        return time_per_token_s(self.token_times_s, len(self.token_times_s))

    @property
    def ttft_s(self) -> float | None:
        """Return the time to the first token; None without one."""
        return self.token_times_s[0] - self.arrival.at_s if self.token_times_s else None


class ServingSimulation:
    """Runs arrivals through admission, scheduler and lanes.

    Args:
        scheduler: of the attention worker.
        admission: of the gateway.
        step_s: the machine.
    """

    def __init__(
        self, scheduler: SchedulerConfig, admission: AdmissionConfig, step_s: StepTime
    ) -> None:
        self.scheduler = Scheduler(scheduler)
        self.queue = FirstTokenQueue()
        self._admission = admission
        self._step_s = step_s
        self._idle = set(range(scheduler.num_lanes))
        self._loads: dict[int, StepLoad] = {}
        self._events: list[tuple[float, int, Arrival | StepPlan]] = []
        self._order = count()
        self._live: dict[int, Outcome] = {}

    def run(self, arrivals: Iterable[Arrival]) -> list[Outcome]:
        """Return what became of each arrival, in their order."""
        outcomes = [Outcome(arrival) for arrival in arrivals]
        for outcome in outcomes:
            self._push(outcome.arrival.at_s, outcome.arrival)
        arriving = iter(sorted(outcomes, key=lambda o: o.arrival.at_s))
        while self._events:
            now_s, _, event = heapq.heappop(self._events)
            if isinstance(event, Arrival):
                self._take(next(arriving), now_s)
            else:
                self._end_step(event, now_s)
            self._start_steps(now_s)
        assert not self._live, f"{len(self._live)} requests never ended"
        return outcomes

    def _push(self, at_s: float, event: Arrival | StepPlan) -> None:
        heapq.heappush(self._events, (at_s, next(self._order), event))

    def _take(self, outcome: Outcome, now_s: float) -> None:
        arrival, key = outcome.arrival, next(self._order)
        if arrival.num_emitted:  # the gateway admitted it long ago
            self._live[key] = outcome
            self.scheduler.submit(_request(key, arrival), now_s)
            return
        try:
            check_capacity(self._admission, len(self._live), 1, self.queue.retry_after_s(now_s))
            if self._admission.slo_mode == "enforce":
                ttft_s = arrival.slo.ttft_s
                self.queue.check(
                    self._admission, ttft_s, arrival.priority, arrival.tenant, 1, now_s
                )
        except Overloaded as error:
            outcome.refusal, outcome.refused_s = error.reason, now_s
            return
        self._live[key] = outcome
        due_s = arrival.slo.first_due_s(now_s)
        self.queue.enter(key, arrival.priority, arrival.tenant, due_s, now_s)
        self.scheduler.submit(_request(key, arrival), now_s)

    def _start_steps(self, now_s: float) -> None:
        for request in self.scheduler.expire(now_s):
            outcome = self._live.pop(request.key)
            outcome.refusal, outcome.refused_s = "queue_timeout", now_s
            self.queue.leave(request.key)
        for lane in sorted(self._idle):
            plan = self.scheduler.plan(lane, now_s)
            if plan is not None:
                load = load_of(plan, self._loads.values())
                self._idle.remove(lane)
                self._loads[lane] = load
                self._push(now_s + self._step_s(load, now_s), plan)

    def _end_step(self, plan: StepPlan, now_s: float) -> None:
        tokens = tuple(Sampled(0) for planned in plan.sequences if planned.samples)
        self._idle.add(plan.lane)
        del self._loads[plan.lane]
        for token in self.scheduler.commit(StepResult(plan, tokens), now_s):
            self._live[token.key].token_times_s.append(now_s)
            self.queue.serve(token.key, now_s)
            if token.finish is not None:
                del self._live[token.key]


def _request(key: int, arrival: Arrival) -> Request:
    """Return a request of so many tokens; prompts differ, so none is found computed."""
    return Request(
        key,
        (key % 2**31, *range(arrival.num_prompt - 1)),
        SamplingParams(max_tokens=arrival.num_output),
        attempt=2 if arrival.num_emitted else 1,
        emitted_ids=(0,) * arrival.num_emitted,
        slo=arrival.slo,
        tenant=arrival.tenant,
        priority=arrival.priority,
    )
