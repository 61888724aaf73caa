"""What the gateway knows of the pools: who is there, how loaded, whether they advance."""

from dataclasses import dataclass

from afd_server.core.clock import Clock
from afd_server.core.topology import Member, Role, Topology
from afd_server.transport.messages import LoadReport

SILENT_AFTER_S = 3.0  # six missed reports
STUCK_AFTER_S = 15.0  # longer than the longest step of a supported model on a slow core


@dataclass(slots=True)
class _Seen:
    report: LoadReport | None  # None until the first
    at_s: float  # of that report, or of joining
    advanced_at_s: float


class PoolView:
    """The latest topology and the latest report of each worker."""

    def __init__(self, clock: Clock) -> None:
        self.topology = Topology(0, ())
        self._clock = clock
        self._seen: dict[str, _Seen] = {}

    def follow(self, topology: Topology) -> None:
        """Take a newer topology: forget workers that left, expect a report of those that joined."""
        self.topology = topology
        now = self._clock.now()
        self._seen = {
            member.incarnation: self._seen.get(member.incarnation, _Seen(None, now, now))
            for member in self.workers()
        }

    def take_report(self, incarnation: str, report: LoadReport) -> None:
        """Remember a worker's load and whether it got on since the last one."""
        now, seen = self._clock.now(), self._seen[incarnation]
        idle = report.running + report.waiting == 0
        if seen.report is None or idle or report.steps > seen.report.steps:
            seen.advanced_at_s = now
        seen.report, seen.at_s = report, now

    def report(self, incarnation: str) -> LoadReport | None:
        """Return the last report of a worker, or None if there was none yet."""
        seen = self._seen.get(incarnation)
        return seen.report if seen else None

    def workers(self) -> tuple[Member, ...]:
        """Return all workers, attention first, by slot."""
        return self.topology.pool(Role.ATTENTION) + self.topology.pool(Role.FFN)

    def trouble(self) -> list[str]:
        """Return a sentence for each worker that is silent or does not advance."""
        now, found = self._clock.now(), []
        for member in self.workers():
            seen = self._seen[member.incarnation]
            if now - seen.at_s > SILENT_AFTER_S:
                found.append(f"{member.name} has been silent for {now - seen.at_s:.1f} s")
            elif now - seen.advanced_at_s > STUCK_AFTER_S:
                found.append(f"{member.name} is stuck since {now - seen.advanced_at_s:.1f} s")
        return found

    def missing(self, num_attention: int, num_ffn: int) -> list[str]:
        """Return a sentence for each pool that has fewer workers than asked for."""
        wanted = {Role.ATTENTION: num_attention, Role.FFN: num_ffn}
        return [
            f"{len(self.topology.pool(role))} of {count} {role.name.lower()} workers are there"
            for role, count in wanted.items()
            if len(self.topology.pool(role)) < count
        ]
