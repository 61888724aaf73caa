"""The attention worker: takes requests, keeps its lanes going, reports tokens.

One synchronous object driven by `workers.runtime`: messages in, one piece of work at a time.
"""

from collections import deque
from collections.abc import Sequence

import torch

from afd_server.core.batch import Emitted, StepResult
from afd_server.core.clock import Clock
from afd_server.core.request import SLO, Request, SamplingParams
from afd_server.core.stage import StageId
from afd_server.core.topology import Role
from afd_server.models.base import AttentionHalf, FFNCall
from afd_server.policy.scheduler import Scheduler
from afd_server.transport.endpoint import Endpoint, Received
from afd_server.transport.messages import (
    Cancel,
    Combine,
    DType,
    LoadReport,
    Payload,
    Submit,
    TokenChunk,
)
from afd_server.workers.attention.ffn_client import FFNClient
from afd_server.workers.attention.kv_store import KVStore
from afd_server.workers.attention.lanes import Lane


class AttentionWorker:
    """Attention half, KV blocks and scheduler behind one endpoint.

    Args:
        model: the attention half.
        kv: as many blocks as the scheduler hands out.
        scheduler: decides; this class does.
        num_lanes: micro-batches in flight.
        ffn: reaches the FFN pool.
        endpoint: towards the gateway.
        clock: dates nothing but resends.
    """

    def __init__(
        self,
        model: AttentionHalf,
        kv: KVStore,
        scheduler: Scheduler,
        num_lanes: int,
        ffn: FFNClient,
        endpoint: Endpoint,
        clock: Clock,
    ) -> None:
        self._model = model
        self._kv = kv
        self._scheduler = scheduler
        self._ffn = ffn
        self._endpoint = endpoint
        self._clock = clock
        self._lanes = [Lane(index) for index in range(num_lanes)]
        self._idle: list[Lane] = list(self._lanes)
        self._runnable: deque[Lane] = deque()  # idle with a chance of work, or with their sum in
        self._owners: dict[tuple[int, int], str] = {}  # (key, attempt) → gateway
        self._num_rows = 0

    def handle(self, received: Received) -> None:
        """Take in a message meant for an attention worker; nothing is computed here."""
        message = received.message
        if isinstance(message, Submit):
            self._submit(received.envelope.source, message)
        elif isinstance(message, Cancel):
            self._cancel(message.key, message.attempt)
        elif isinstance(message, Combine):
            lane = self._ffn.accept(received, message)
            if lane is not None:
                self._runnable.append(self._lanes[lane])

    def advance(self) -> bool:
        """Run one lane to its next boundary.

        Returns:
            Whether another lane could run at once.
        """
        self._ffn.resend_due()
        if not self._runnable:
            return False
        lane = self._runnable.popleft()
        if lane.is_idle:
            plan = self._scheduler.plan(lane.index)
            if plan is None:
                self._idle.append(lane)
                return bool(self._runnable)
            self._num_rows += plan.num_tokens
            self._dispatch(*lane.start(plan, self._model, self._kv.layers, self._kv.block_size))
        else:
            outcome = lane.resume(self._ffn.take(lane.index))
            if isinstance(outcome, StepResult):
                self._report(self._scheduler.commit(outcome))
                self._runnable.append(lane)
                self._wake_idle()
            else:
                self._dispatch(*outcome)
        return bool(self._runnable)

    def wait_s(self) -> float | None:
        """Return how long the worker may sleep without missing a resend; None: for ever."""
        return self._ffn.next_resend_s()

    def follow_topology(self) -> None:
        """React to a new topology of the endpoint: lost FFN workers, lost gateways."""
        topology = self._endpoint.topology
        for member in topology.pool(Role.FFN):
            self._endpoint.link.connect(member.incarnation, member.address)
        self._ffn.reassign()
        for (key, attempt), gateway in list(self._owners.items()):
            if topology.find(gateway) is None:
                self._cancel(key, attempt)

    def load(self, num_bad_frames: int) -> LoadReport:
        """Return the present load."""
        scheduler = self._scheduler
        return LoadReport(
            steps=scheduler.num_steps,
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            free_blocks=scheduler.blocks.num_free,
            num_blocks=scheduler.blocks.num_blocks,
            preemptions=scheduler.num_preemptions,
            rows=self._num_rows,
            bad_frames=num_bad_frames,
            resends=self._ffn.counters["resends"],
        )

    def _submit(self, gateway: str, submit: Submit) -> None:
        request = _request_of(submit)
        self._scheduler.submit(request)
        self._owners[request.key, request.attempt] = gateway
        self._send_rows(gateway, [(request.key, request.attempt, 0, 0, 0, 0)])
        self._wake_idle()

    def _cancel(self, key: int, attempt: int) -> None:
        self._scheduler.cancel(key, attempt)
        self._owners.pop((key, attempt), None)
        self._wake_idle()  # its blocks may let another one in

    def _wake_idle(self) -> None:
        self._runnable.extend(self._idle)
        self._idle.clear()

    def _dispatch(self, stage: StageId, call: FFNCall) -> None:
        self._ffn.dispatch(stage, call)

    def _report(self, emitted: Sequence[Emitted]) -> None:
        by_gateway: dict[str, list[tuple[int, ...]]] = {}
        for token in emitted:
            owner = self._owners.get((token.key, token.attempt))
            if owner is None:
                continue  # cancelled while in flight
            row = (token.key, token.attempt, token.index, 1, token.token_id, token.finish or 0)
            by_gateway.setdefault(owner, []).append(row)
            if token.finish is not None:
                del self._owners[token.key, token.attempt]
        for gateway, rows in by_gateway.items():
            self._send_rows(gateway, rows)

    def _send_rows(self, gateway: str, rows: Sequence[tuple[int, ...]]) -> None:
        # what is lost here the gateway misses by its index, and asks again
        data = torch.tensor(rows, dtype=torch.int64).numpy().tobytes()
        chunk = TokenChunk(Payload(DType.INT64, (len(rows), 6), data))
        self._endpoint.try_send(gateway, chunk)


def _request_of(submit: Submit) -> Request:
    tokens = memoryview(submit.tokens.data).cast("B").cast("i")
    emitted_from, stops_from = submit.num_prompt, submit.num_prompt + submit.num_emitted
    sampling = SamplingParams(
        max_tokens=submit.max_tokens,
        temperature=submit.temperature,
        top_p=submit.top_p,
        top_k=submit.top_k,
        min_p=submit.min_p,
        seed=submit.seed,
        choice=submit.choice,
        stop_token_ids=tuple(tokens[stops_from:]),
    )
    return Request(
        key=submit.key,
        attempt=submit.attempt,
        prompt_ids=tuple(tokens[:emitted_from]),
        emitted_ids=tuple(tokens[emitted_from:stops_from]),
        sampling=sampling,
        slo=SLO(submit.ttft_s or None, submit.tpot_s or None),
    )
