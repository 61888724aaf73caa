"""The supervisor over an in-process network: starts, watches, replaces, publishes."""

import pytest

from afd_server.cluster.supervisor import MAX_RESTARTS, POLL_S, Supervisor
from afd_server.core.clock import ManualClock
from afd_server.core.errors import WorkerFailed
from afd_server.core.topology import FFNParallel, Member, Role
from afd_server.transport.endpoint import Endpoint, Identity
from afd_server.transport.inproc import InProcessNetwork
from afd_server.transport.messages import Heartbeat, ProcessState, TopologyUpdate
from afd_server.workers.config import AttentionConfig, FFNConfig, Numerics, WorkerSpec

SUPERVISOR = Member(Role.SUPERVISOR, 0, "sup", "", "")


def spec(role, slot):
    return WorkerSpec(
        role=role, slot=slot, incarnation=f"{role.name}{slot}", supervisor="sup",
        supervisor_address="", bind=f"ipc:///x/{role.name}{slot}.ipc", model_path="/m",
        model_digest="d", numerics=Numerics("reference", "float32", "float32"),
        compute_threads=1, transport="zmq", with_crc=True,
        attention=AttentionConfig(1, 64, 4, 8, 16, 1000, True),
        ffn=FFNConfig(FFNParallel.TENSOR, 1),
    )  # fmt: skip


class FakeProcess:
    """A worker or gateway reduced to its reports."""

    def __init__(self, cluster, role, slot, incarnation):
        self.role, self.slot, self.incarnation = role, slot, incarnation
        self.state = ProcessState.READY
        self.endpoint = Endpoint(
            cluster.network.link(incarnation),
            Identity(incarnation, "d"),
            cluster.clock,
            (SUPERVISOR,),
        )

    def report(self, state=None, detail="", fingerprint=""):
        self.endpoint.identify(fingerprint)
        state = state or self.state
        beat = Heartbeat(self.role, self.slot, state, 0, f"ipc:///x/{self.incarnation}", detail)
        self.endpoint.send("sup", beat)

    def listen(self):
        for received in self.endpoint.receive(0):
            if isinstance(received.message, TopologyUpdate):
                self.endpoint.topology = received.message.topology
        return self.endpoint.topology


class FakeLauncher:
    """Starts nothing; remembers what it was asked for."""

    def __init__(self):
        self.launched, self.stopped, self.endings = [], [], {}

    def launch(self, worker_spec):
        self.launched.append(worker_spec)

    def ending(self, incarnation):
        return self.endings.get(incarnation)

    def stop(self, incarnation):
        self.stopped.append(incarnation)

    def close(self):
        self.launched.clear()


class Cluster:
    """A supervisor of 1A1F and the fake processes around it."""

    def __init__(self):
        self.network, self.clock, self.launcher = InProcessNetwork(), ManualClock(), FakeLauncher()
        endpoint = Endpoint(self.network.link("sup"), Identity("sup", "d"), self.clock)
        specs = [spec(Role.ATTENTION, 0), spec(Role.FFN, 0)]
        self.supervisor = Supervisor(
            specs, "gate", FFNParallel.TENSOR, self.launcher, endpoint, self.clock
        )
        self.gateway = FakeProcess(self, Role.GATEWAY, 0, "gate")
        self.workers = {}

    def check(self):
        """What the supervisor calls while it waits: everybody reports."""
        for launched in self.launcher.launched:
            if (
                launched.incarnation not in self.workers
                and launched.incarnation not in self.launcher.endings
            ):
                self.workers[launched.incarnation] = FakeProcess(
                    self, launched.role, launched.slot, launched.incarnation
                )
        for process in (self.gateway, *self.workers.values()):
            process.listen()
            process.report()
        self.clock.advance(0.1)

    def turn(self, times=1, **options):
        for _ in range(times):
            self.check()
            self.supervisor.turn(**options)

    def start(self):
        self.supervisor.start(10.0, self.check)


def test_a_server_serves_when_all_are_ready_and_the_gateway_knows():
    cluster = Cluster()
    cluster.start()
    assert cluster.supervisor.topology.notation == "1A1F"
    assert cluster.gateway.listen() == cluster.supervisor.topology
    cluster.turn(2)
    for worker in cluster.workers.values():
        assert worker.listen().epoch == cluster.supervisor.topology.epoch


def test_a_worker_that_ends_while_starting_breaks_the_start_with_its_own_words():
    cluster = Cluster()
    worker = FakeProcess(cluster, Role.FFN, 0, "FFN0")

    def check():
        worker.report(ProcessState.FAILED, "no tensor x")
        cluster.launcher.endings["FFN0"] = "exit status 1"
        cluster.clock.advance(POLL_S)

    with pytest.raises(WorkerFailed, match="ffn/0: no tensor x"):
        cluster.supervisor.start(10.0, check)


def test_a_worker_that_calibrates_is_in_the_topology_and_keeps_the_start_waiting():
    cluster = Cluster()
    worker = FakeProcess(cluster, Role.ATTENTION, 0, "ATTENTION0")
    cluster.workers["ATTENTION0"] = worker
    worker.state = ProcessState.STARTING
    with pytest.raises(WorkerFailed, match="not ready after 10 s: attention/0$"):
        cluster.start()
    assert cluster.supervisor.topology.notation == worker.listen().notation == "1A1F"
    worker.state = ProcessState.READY
    cluster.turn(2)
    assert cluster.supervisor.is_serving


def test_a_worker_that_never_reports_is_named_when_time_is_up():
    cluster = Cluster()
    with pytest.raises(WorkerFailed, match="not ready after 10 s: attention/0, ffn/0"):
        cluster.supervisor.start(10.0, lambda: cluster.clock.advance(1.0))


def test_a_dead_worker_leaves_the_topology_at_once_and_a_new_one_joins():
    cluster = Cluster()
    cluster.start()
    epoch = cluster.supervisor.topology.epoch
    cluster.launcher.endings["FFN0"] = "killed by SIGKILL"
    del cluster.workers["FFN0"]
    cluster.clock.advance(POLL_S)
    cluster.supervisor.turn()
    assert cluster.supervisor.topology.notation == "1A0F"
    assert cluster.supervisor.topology.epoch == epoch + 1
    replacement = cluster.launcher.launched[-1]
    assert (replacement.role, replacement.slot) == (Role.FFN, 0)
    assert replacement.incarnation != "FFN0"
    assert replacement.bind == f"ipc:///x/{replacement.incarnation}.ipc"
    cluster.turn(3)
    assert cluster.supervisor.topology.notation == "1A1F"
    assert cluster.supervisor.is_serving


def test_a_worker_that_dies_again_and_again_stays_down():
    cluster = Cluster()
    cluster.start()
    for _ in range(MAX_RESTARTS + 3):
        newest = [s for s in cluster.launcher.launched if s.role is Role.FFN][-1].incarnation
        cluster.launcher.endings[newest] = "exit status 1"
        cluster.workers.pop(newest, None)
        cluster.clock.advance(POLL_S)
        cluster.supervisor.turn()
    ffn = [s for s in cluster.launcher.launched if s.role is Role.FFN]
    assert len(ffn) == 1 + MAX_RESTARTS


def test_rare_deaths_are_always_replaced():
    cluster = Cluster()
    cluster.start()
    for _ in range(MAX_RESTARTS + 3):
        newest = [s for s in cluster.launcher.launched if s.role is Role.FFN][-1].incarnation
        cluster.launcher.endings[newest] = "exit status 1"
        cluster.workers.pop(newest, None)
        cluster.clock.advance(30.0)
        cluster.supervisor.turn()
    ffn = [s for s in cluster.launcher.launched if s.role is Role.FFN]
    assert len(ffn) == 1 + MAX_RESTARTS + 3


def test_a_process_that_fell_behind_is_told_again():
    cluster = Cluster()
    cluster.start()
    cluster.turn(3)
    cluster.gateway.endpoint.topology = type(cluster.supervisor.topology)(0, ())
    cluster.gateway.report()
    cluster.supervisor.turn()
    assert cluster.gateway.listen().epoch == cluster.supervisor.topology.epoch


def test_workers_of_one_pool_must_compute_the_same_bits():
    network, clock = InProcessNetwork(), ManualClock()
    endpoint = Endpoint(network.link("sup"), Identity("sup", "d"), clock)
    specs = [spec(Role.FFN, 0), spec(Role.FFN, 1)]
    supervisor = Supervisor(specs, "gate", FFNParallel.TENSOR, FakeLauncher(), endpoint, clock)
    cluster = type("Bare", (), {"network": network, "clock": clock})

    def check():
        clock.advance(0.1)
        for slot in (0, 1):
            if f"FFN{slot}" not in seen:
                seen[f"FFN{slot}"] = FakeProcess(cluster, Role.FFN, slot, f"FFN{slot}")
            seen[f"FFN{slot}"].report(fingerprint=f"print{slot}")

    seen = {}
    with pytest.raises(WorkerFailed, match="other bits"):
        supervisor.start(5.0, check)
