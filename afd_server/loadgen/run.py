"""One run: offers sent when they are due, whatever the answers do."""

import asyncio
import resource
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from afd_server.loadgen.client import Client, Prepared
from afd_server.workload.offers import Offer
from afd_server.workload.report import RequestRecord, percentile

HEAD_START_S = 0.1  # to prepare the first requests
SPARE_S = 0.02  # before a request is due, kept free of preparing others
AHEAD = 32  # requests at most that are ready before they are due: a burst goes out together
BUSY_SHARE = 0.8  # of its one core; above, chunks wait for the client before they are timed
LATE_S = 0.02  # a loaded client's p99; shorter delays are the system's timers and scheduler


@dataclass(frozen=True, slots=True)
class ClientLoad:
    """How hard the client itself had to work.

    Preparing a request counts as lateness: so long no chunk of any answer can be timed.
    """

    cpu_share: float
    p99_lateness_s: float

    @property
    def is_bottleneck(self) -> bool:
        """Say whether figures may be the client's rather than the server's."""
        return self.cpu_share > BUSY_SHARE or self.p99_lateness_s > LATE_S

    def as_json(self) -> dict[str, float | bool]:
        """Return the block of a result file."""
        return {
            "cpu_share": self.cpu_share,
            "p99_lateness_ms": self.p99_lateness_s * 1000,
            "is_bottleneck": self.is_bottleneck,
        }


@dataclass(frozen=True, slots=True)
class Run:
    """What was measured. `interrupted`: by the user, before all had been sent and answered."""

    records: list[RequestRecord]
    load: ClientLoad
    interrupted: bool


class Limit(Protocol):
    """Says how many requests may be under way, and may learn from answers."""

    @property
    def width(self) -> int:
        """Return how many, now."""
        ...

    def note(self, record: RequestRecord, num_under_way: int) -> None:
        """Take a record of one that has just ended and is still counted."""
        ...


async def run_load(
    client: Client,
    offers: Iterable[Offer],
    *,
    limit: Limit | None = None,
    limit_s: float | None = None,
    note: Callable[[RequestRecord], None] = lambda _record: None,
) -> Run:
    """Send offers and wait for the answers.

    Args:
        client: of the server.
        offers: in order of time; those without one are sent as soon as there is room.
        limit: to requests under way at once; further ones wait in the client, and that wait is
            part of their time to first token.
        limit_s: after which everything under way is given up as unfinished.
        note: called with each record at once.

    Cancelling the task ends the run in the same way, with `interrupted` set.
    """
    sender = _Sender(client, limit, note)
    before, begin_s = _cpu_s(), time.monotonic()
    interrupted = False
    try:
        async with asyncio.timeout(limit_s), asyncio.TaskGroup() as requests:
            await sender.send_all(offers, requests)
    except TimeoutError:
        pass  # what was under way is unfinished
    except asyncio.CancelledError:
        interrupted = True
        task = asyncio.current_task()
        assert task is not None
        task.uncancel()
    wall_s = time.monotonic() - begin_s
    late_s = percentile(sender.late_s, 99) if sender.late_s else 0.0
    load = ClientLoad((_cpu_s() - before) / wall_s, late_s)
    return Run(sorted(sender.records, key=lambda record: record.intended_s), load, interrupted)


class _Ready(NamedTuple):
    """A request that waits for its time, and how long it took to prepare it."""

    prepared: Prepared
    due_s: float
    prepare_s: float


class _Sender:
    """Sends at the due times and collects the records."""

    def __init__(
        self, client: Client, limit: Limit | None, note: Callable[[RequestRecord], None]
    ) -> None:
        self.records: list[RequestRecord] = []
        self.late_s: list[float] = []
        self._client = client
        self._room = None if limit is None else _Room(limit)
        self._note = note

    async def send_all(self, offers: Iterable[Offer], requests: asyncio.TaskGroup) -> None:
        begin_s = free_s = time.monotonic() + HEAD_START_S
        left, ready = iter(offers), deque[_Ready]()
        while True:
            await self._fill(ready, left, begin_s)
            if not ready:
                return
            prepared, due_s, prepare_s = ready.popleft()
            await asyncio.sleep(due_s - time.monotonic())
            self.late_s.append(max(time.monotonic() - max(due_s, free_s), prepare_s))
            if self._room is not None:
                await self._room.enter()
            now_s, has_time = time.monotonic(), prepared.offer.at_s is not None
            if self._room is not None or not has_time:
                free_s = now_s
            requests.create_task(self._follow(prepared, due_s if has_time else now_s))

    async def _fill(self, ready: deque[_Ready], left: Iterator[Offer], begin_s: float) -> None:
        """Prepare offers while there is time, in any case the next one."""
        while len(ready) < AHEAD:
            now_s = time.monotonic()
            if ready and ready[0].due_s - now_s < SPARE_S:
                return
            offer = next(left, None)
            if offer is None:
                return
            prepared = self._client.prepare(offer)
            due_s = begin_s + (offer.at_s or 0.0)
            ready.append(_Ready(prepared, due_s, time.monotonic() - now_s))
            await asyncio.sleep(0)

    async def _follow(self, prepared: Prepared, intended_s: float) -> None:
        record = await self._client.send(prepared, intended_s)
        if self._room is not None:
            self._room.leave(record)
        self.records.append(record)
        self._note(record)


class _Room:
    """Lets one wait until fewer are under way than the limit is wide."""

    def __init__(self, limit: Limit) -> None:
        self._limit = limit
        self._num_under_way = 0
        self._left = asyncio.Event()

    async def enter(self) -> None:
        while self._num_under_way >= self._limit.width:
            self._left.clear()
            await self._left.wait()
        self._num_under_way += 1

    def leave(self, record: RequestRecord) -> None:
        self._limit.note(record, self._num_under_way)
        self._num_under_way -= 1
        self._left.set()


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
