"""The choices of one HTTP request: token events in, text and endings out."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from afd_server.api.body import Metrics
from afd_server.api.openai import FinishName, StopReason
from afd_server.core.request import FinishReason, SamplingParams
from afd_server.gateway.asker import Asker
from afd_server.gateway.generation import (
    Event,
    EventQueue,
    FailureEvent,
    Generations,
    Timing,
    TokenEvent,
)
from afd_server.gateway.text import TextCodec, TextStream

_NAMES: dict[FinishReason, FinishName] = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
}


@dataclass(frozen=True, slots=True)
class ChoicePlan:
    """What to generate for one choice of one of the request's prompts."""

    prompt_index: int
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    stop: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """What one token added to a choice."""

    choice: int
    text: str
    token_id: int
    finish: FinishName | None
    stop_reason: StopReason


@dataclass(slots=True)
class ChoiceState:
    """A choice so far."""

    plan: ChoicePlan
    stream: TextStream
    key: int | None = None  # set while it is being generated
    num_cached: int = 0  # prompt tokens that the attempt with the first token found computed
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish: FinishName | None = None
    stop_reason: StopReason = None
    timing: Timing | None = None  # of its tokens so far

    @property
    def metrics(self) -> Metrics:
        """Return how it was served, for its client; it must have ended."""
        timing = self.timing
        assert timing is not None, "an unfinished choice has no metrics"
        return {
            "ttft_ms": timing.ttft_s * 1e3,
            "tpot_ms": None if timing.tpot_s is None else timing.tpot_s * 1e3,
            "queue_ms": timing.queue_s * 1e3,
            "slo_met": timing.slo_met,
        }


class Choices:
    """Runs the choices of one HTTP request side by side.

    Use it as a context manager: generation starts on entry, and what still runs at the exit is
    cancelled, so that its KV blocks are freed. It is counted as the one that failed or was
    refused, if any was, and else as left by its client.

    Args:
        generations: runs the requests.
        codec: for their text.
        plans: one for each choice.
        asker: on whose behalf all of them run.
        silent_stops: stop tokens that are no `stop_reason`: the model's end of sequence.
    """

    def __init__(
        self,
        generations: Generations,
        codec: TextCodec,
        plans: list[ChoicePlan],
        asker: Asker,
        silent_stops: tuple[int, ...],
    ) -> None:
        self._generations = generations
        self._asker = asker
        self._silent_stops = silent_stops
        self._events: EventQueue = EventQueue()
        self._first: TokenEvent | None = None  # taken from the queue, and still to be told
        self._ended_by = "abort"
        self.states = [ChoiceState(plan, TextStream(codec, plan.stop)) for plan in plans]

    def __enter__(self) -> "Choices":
        for index, state in enumerate(self.states):
            plan = state.plan
            state.key = self._generations.start(
                index, plan.prompt_ids, plan.sampling, self._asker, self._events
            )
        return self

    def __exit__(self, *_exc: object) -> None:
        for state in self.states:
            if state.key is not None:
                self._generations.abandon(state.key, self._ended_by)

    async def begin(self) -> None:
        """Wait until the first of them has its first token.

        Raises:
            AFDError: it failed, or was refused, before that.
        """
        self._first = self._unfailed(await self._events.get())

    async def pieces(self, quiet_s: float | None = None) -> AsyncIterator[Piece | None]:
        """Yield what each token adds, at once, until every choice has ended.

        None is yielded whenever nothing has come for `quiet_s`.

        Raises:
            AFDError: one of them failed.
        """
        num_open = len(self.states)
        while num_open:
            event, self._first = self._first, None
            try:
                async with asyncio.timeout(quiet_s):
                    event = event or self._unfailed(await self._events.get())
            except TimeoutError:
                yield None
                continue
            state = self.states[event.choice]
            if state.finish is not None:
                continue  # tokens that were under way when a stop string ended the choice
            piece = self._take(state, event)
            num_open -= piece.finish is not None
            yield piece

    def _unfailed(self, event: Event) -> TokenEvent:
        if isinstance(event, FailureEvent):
            self._ended_by = event.reason
            raise event.error
        return event

    def _take(self, state: ChoiceState, event: TokenEvent) -> Piece:
        token_id, finish = event.token_id, event.finish
        if not state.token_ids:
            state.num_cached = event.num_cached
        state.timing = event.timing
        text = state.stream.push(token_id)
        if finish is not None and state.stream.stopped_by is None:
            text += state.stream.finish()
        state.text += text
        state.token_ids.append(token_id)
        if state.stream.stopped_by is not None:
            state.finish, state.stop_reason = "stop", state.stream.stopped_by
            assert state.key is not None
            self._generations.abandon(state.key, "stop")
        elif finish is not None:
            state.finish = _NAMES[finish]
            if finish is FinishReason.STOP and token_id not in self._silent_stops:
                state.stop_reason = token_id
        return Piece(event.choice, text, token_id, state.finish, state.stop_reason)


async def run_to_end(choices: Choices) -> list[ChoiceState]:
    """Wait for every choice to end; raises what `pieces` raises."""
    async for _piece in choices.pieces():
        pass
    return choices.states
