"""Keeps the pools at their size and tells everybody who is alive.

One synchronous loop. It writes the topology, everybody else reads it (invariant I6).
"""

import logging
import secrets
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from afd_server.cluster.launcher import Launcher
from afd_server.core.clock import Clock
from afd_server.core.errors import WorkerFailed
from afd_server.core.topology import FFNParallel, Member, Role, Topology
from afd_server.transport.endpoint import Endpoint, Received
from afd_server.transport.messages import Heartbeat, ProcessState, TopologyUpdate
from afd_server.workers.config import WorkerSpec

log = logging.getLogger(__name__)

MAX_RESTARTS, RESTART_WINDOW_S = 5, 60.0
POLL_S = 0.5  # between two looks at the processes


def new_incarnation() -> str:
    """Draw a name for a process: 8 random bytes in hex."""
    return secrets.token_hex(8)


@dataclass(slots=True)
class _Slot:
    """A worker's place in its pool, through all its incarnations."""

    spec: WorkerSpec
    member: Member | None = None  # set while its worker can be reached
    is_ready: bool = False  # its worker serves requests at once
    failure: str | None = None  # what its worker said before it ended
    restarts_s: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_RESTARTS))
    given_up: bool = False


class Supervisor:
    """Starts workers, publishes topologies, replaces the dead.

    Args:
        specs: one for each worker of both pools.
        gateway: the gateway's incarnation; its process is not ours to start.
        ffn_parallel: goes into the topology.
        launcher: starts and ends worker processes.
        endpoint: bound where the specs say the supervisor listens.
        clock: limits restarts.
    """

    def __init__(
        self,
        specs: list[WorkerSpec],
        gateway: str,
        ffn_parallel: FFNParallel,
        launcher: Launcher,
        endpoint: Endpoint,
        clock: Clock,
    ) -> None:
        self.topology = Topology(0, (), ffn_parallel)
        self._slots = [_Slot(spec) for spec in specs]
        self._gateway: Member | None = None
        self._launcher = launcher
        self._endpoint = endpoint
        self._clock = clock
        self._next_poll_s = 0.0
        self._epochs: dict[str, int] = {}  # what each process says it follows
        endpoint.introduce(Member(Role.GATEWAY, 0, gateway, "", ""))

    @property
    def is_serving(self) -> bool:
        """Tell whether every worker is ready and the gateway follows the present topology."""
        complete = all(slot.member is not None and slot.is_ready for slot in self._slots)
        followed = self._gateway is not None and (
            self._epochs.get(self._gateway.incarnation) == self.topology.epoch
        )
        return complete and followed and self.topology.epoch > 0

    def start(self, timeout_s: float, check: Callable[[], None]) -> None:
        """Start every worker and wait until the whole server serves.

        Args:
            timeout_s: how long that may take.
            check: called often; raises to break off.

        Raises:
            WorkerFailed: a worker ended before it was ready, or time ran out.
        """
        for slot in self._slots:
            self._launch(slot)
        give_up_s = self._clock.now() + timeout_s
        while not self.is_serving:
            check()
            self.turn(restart=False)
            if self._clock.now() > give_up_s:
                late = [slot.spec.name for slot in self._slots if not slot.is_ready]
                raise WorkerFailed(
                    f"not ready after {timeout_s:.0f} s: {', '.join(late) or 'gateway'}"
                )

    def turn(self, restart: bool = True) -> None:
        """Take in heartbeats, look after the processes, tell those who are behind.

        Args:
            restart: whether a dead worker is replaced; otherwise its end is an error.

        Raises:
            WorkerFailed: a worker ended and `restart` is false.
        """
        for received in self._endpoint.receive(0.1):
            if isinstance(received.message, Heartbeat):
                self._hear(received, received.message)
        if self._clock.now() >= self._next_poll_s:
            self._next_poll_s = self._clock.now() + POLL_S
            for slot in self._slots:
                self._look_after(slot, restart)

    def _hear(self, received: Received, beat: Heartbeat) -> None:
        source = received.envelope.source
        self._epochs[source] = received.envelope.epoch
        if received.sender.role is Role.GATEWAY:
            if self._gateway is None:
                self._gateway = Member(Role.GATEWAY, 0, source, "", "")
                self._publish()
        else:
            slot = next((s for s in self._slots if s.spec.incarnation == source), None)
            if slot is None:
                return  # an earlier incarnation's last words
            if beat.state is ProcessState.FAILED:
                slot.failure = beat.detail
            elif slot.member is None and not slot.given_up:
                self._welcome(slot, beat.address, received.envelope.fingerprint)
            slot.is_ready = beat.state is ProcessState.READY
        if received.envelope.epoch < self.topology.epoch:
            self._endpoint.try_send(source, TopologyUpdate(self.topology))

    def _welcome(self, slot: _Slot, address: str, fingerprint: str) -> None:
        spec = slot.spec
        member = Member(spec.role, spec.slot, spec.incarnation, address, fingerprint)
        try:
            self._check_fingerprint(member)
        except WorkerFailed as error:
            if self.topology.epoch == 0:
                raise  # the server never served: better not to begin
            self._lose(slot)
            self._give_up(slot, str(error))
            return
        slot.member = member
        log.info("%s is ready at %s", member.name, address)
        self._publish()

    def _give_up(self, slot: _Slot, reason: str) -> None:
        log.error("%s stays down: %s", slot.spec.name, reason)
        slot.given_up = True

    def _check_fingerprint(self, member: Member) -> None:
        for slot in self._slots:
            other = slot.member
            if other and other.role is member.role and other.fingerprint != member.fingerprint:
                raise WorkerFailed(
                    f"{member.name} computes other bits than {other.name} (fingerprints "
                    f"{member.fingerprint} and {other.fingerprint}); a pool needs equal machines "
                    "and equal software"
                )

    def _look_after(self, slot: _Slot, restart: bool) -> None:
        if slot.given_up:
            return
        ending = self._launcher.ending(slot.spec.incarnation)
        if ending is None:
            return
        reason = f"{slot.spec.name} ended ({ending})"
        if slot.failure is not None:
            reason = f"{slot.spec.name}: {slot.failure}"
        if not restart:
            raise WorkerFailed(reason)
        log.error("%s", reason)
        self._lose(slot)
        self._replace(slot)

    def _lose(self, slot: _Slot) -> None:
        self._launcher.stop(slot.spec.incarnation)
        self._endpoint.dismiss(slot.spec.incarnation)
        self._epochs.pop(slot.spec.incarnation, None)
        if slot.member is not None:
            slot.member = None
            self._publish()

    def _replace(self, slot: _Slot) -> None:
        """Start a new incarnation, at most `MAX_RESTARTS` times in `RESTART_WINDOW_S`."""
        now = self._clock.now()
        restarts = slot.restarts_s
        if len(restarts) == MAX_RESTARTS and now - restarts[0] < RESTART_WINDOW_S:
            self._give_up(slot, f"it ended {MAX_RESTARTS + 1} times in {RESTART_WINDOW_S:.0f} s")
            return
        restarts.append(now)
        bind = slot.spec.bind
        incarnation = new_incarnation()
        bind = bind.replace(slot.spec.incarnation, incarnation)
        slot.spec = replace(slot.spec, incarnation=incarnation, bind=bind)
        slot.failure, slot.is_ready = None, False
        try:
            self._launch(slot)
        except WorkerFailed as error:
            self._give_up(slot, str(error))

    def _launch(self, slot: _Slot) -> None:
        spec = slot.spec
        self._endpoint.introduce(Member(spec.role, spec.slot, spec.incarnation, "", ""))
        self._launcher.launch(spec)

    def _publish(self) -> None:
        """Number and send a new topology, once there is a gateway and something to tell it."""
        ready = [slot.member for slot in self._slots if slot.member is not None]
        started = self.topology.epoch > 0 or len(ready) == len(self._slots)
        if self._gateway is None or not started:
            return
        members = (self._gateway, *ready)
        self.topology = replace(self.topology, epoch=self.topology.epoch + 1, members=members)
        self._endpoint.topology = self.topology
        for member in members:
            self._endpoint.try_send(member.incarnation, TopologyUpdate(self.topology))
