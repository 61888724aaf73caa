"""Starts workers as Ray actors. The only file that knows Ray.

Ray places the workers and watches their processes. No token and no activation passes through
it: each actor runs the worker's own loop, and Ray calls only start, stop and ask.
"""

import logging
import os
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any  # Any: handles of an untyped library

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from afd_server.cluster.launcher import STOP_S
from afd_server.core.errors import ConfigError, WorkerFailed
from afd_server.core.topology import Role
from afd_server.telemetry.log import configure_logging
from afd_server.workers.config import WorkerSpec, parse_worker_spec

log = logging.getLogger(__name__)

NODE_ADDRESS = "{node}"  # in a worker's bind address: stands for its node's own
OBJECT_STORE_BYTES = 80 * 2**20  # Ray's minimum: nothing of ours goes through it
PLACEMENT_S = 60
CONNECT_S = 5.0


@dataclass(frozen=True, slots=True)
class RayConfig:
    """How to reach Ray and what a worker takes of it.

    Attributes:
        address: of a running cluster, or None to start Ray on this machine for this server.
        temp_dir: for the files of a Ray that we start.
        resources: what one worker of a role takes, such as `{"CPU": 1}`.
        counts: workers of each role.
    """

    address: str | None
    temp_dir: Path
    resources: dict[Role, dict[str, float]]
    counts: dict[Role, int]
    log_level: str


class RayLauncher:
    """Workers as actors, each pool in a placement group of its own.

    Args:
        config: of Ray and the pools.
        check: called while waiting for a place; raises to break off.

    Raises:
        ConfigError: no cluster answers at the address.
        WorkerFailed: the cluster has no room for the pools.
    """

    def __init__(self, config: RayConfig, check: Callable[[], None]) -> None:
        self._config = config
        self._check = check
        self._actors: dict[str, Any] = {}
        self._runs: dict[str, Any] = {}
        self._groups: dict[Role, PlacementGroup] = {}
        try:
            self._connect()
            self._place()
        except BaseException:
            self.close()
            raise

    def launch(self, spec: WorkerSpec) -> None:
        resources = dict(self._config.resources[spec.role])
        actor = _WorkerActor.options(  # type: ignore[attr-defined]  # made by ray.remote
            name=f"{spec.name}-{spec.incarnation}",
            num_cpus=resources.pop("CPU", 0),
            num_gpus=resources.pop("GPU", 0),
            resources=resources,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                self._groups[spec.role], placement_group_bundle_index=spec.slot
            ),
        ).remote()
        self._actors[spec.incarnation] = actor
        self._runs[spec.incarnation] = actor.run.remote(spec.to_json(), self._config.log_level)

    def ending(self, incarnation: str) -> str | None:
        run = self._runs[incarnation]
        done, _ = ray.wait([run], timeout=0)
        if not done:
            return None
        try:
            ray.get(run)
        except ray.exceptions.RayError as error:
            return str(error).splitlines()[0]
        return "it was stopped"

    def stop(self, incarnation: str) -> None:
        actor, run = self._actors.pop(incarnation), self._runs.pop(incarnation)
        actor.stop.remote()
        ray.wait([run], timeout=STOP_S)
        ray.kill(actor)

    def close(self) -> None:
        for actor in self._actors.values():
            actor.stop.remote()
        if self._runs:
            ray.wait(list(self._runs.values()), num_returns=len(self._runs), timeout=STOP_S)
        for actor in self._actors.values():
            ray.kill(actor)
        self._actors.clear()
        self._runs.clear()
        for group in self._groups.values():
            remove_placement_group(group)
        self._groups.clear()
        ray.shutdown()

    def _connect(self) -> None:
        config = self._config
        common = {
            "log_to_driver": True,
            "logging_level": logging.WARNING,
            "namespace": "afd_server",
        }
        if config.address is not None:
            _check_reachable(config.address)
            try:
                ray.init(address=config.address, **common)
            except ConnectionError as error:
                raise ConfigError(f"no Ray cluster answers at {config.address}: {error}") from error
            return
        needed: dict[str, float] = {"CPU": os.cpu_count() or 1}
        total: dict[str, float] = {}
        for role, count in config.counts.items():
            for name, amount in config.resources[role].items():
                total[name] = total.get(name, 0) + amount * count
        needed |= {name: max(amount, needed.get(name, 0)) for name, amount in total.items()}
        # our own Ray: as much of everything as the pools ask for, so that it always fits
        ray.init(
            address="local",
            num_cpus=needed.pop("CPU"),
            num_gpus=needed.pop("GPU", 0),
            resources=needed,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            _temp_dir=str(config.temp_dir),
            _node_ip_address="127.0.0.1",
            **common,
        )

    def _place(self) -> None:
        for role, count in self._config.counts.items():
            if count == 0:
                continue  # colocated: there are no FFN workers, and Ray refuses an empty group
            bundles = [dict(self._config.resources[role]) for _ in range(count)]
            group = placement_group(bundles, strategy="PACK", name=f"afd-{role.name.lower()}")
            self._groups[role] = group
            if not self._wait_for(group):
                raise WorkerFailed(
                    f"Ray has no room for {count} {role.name.lower()} workers with "
                    f"{self._config.resources[role]} each; it has {ray.available_resources()}"
                )

    def _wait_for(self, group: PlacementGroup) -> bool:
        """Wait until a group has its place, or tell that it got none."""
        for _ in range(PLACEMENT_S):
            self._check()
            if group.wait(1):
                return True
        return False


def _check_reachable(address: str) -> None:
    """Refuse a dead `host:port` within seconds; Ray itself would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return  # `auto` and the like: Ray knows
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        raise ConfigError(f"no Ray cluster answers at {address}: {error}") from error


@ray.remote(max_restarts=0, max_concurrency=3)
class _WorkerActor:
    """A process that runs one worker's loop; other calls come in beside it."""

    def __init__(self) -> None:
        self._stop = threading.Event()

    def run(self, spec_json: str, log_level: str) -> None:
        """Be the worker until told to stop; an error ends the process (invariant I12)."""
        from afd_server.workers.runtime import run_worker

        spec = parse_worker_spec(spec_json)
        configure_logging(spec.name, log_level)
        bind = spec.bind.replace(NODE_ADDRESS, ray.util.get_node_ip_address())
        try:
            run_worker(replace(spec, bind=bind), self._stop.is_set)
        except BaseException:  # noqa: BLE001  the process ends right here
            os._exit(1)

    def stop(self) -> None:
        """Ask the loop to end."""
        self._stop.set()
