"""The gateway's one state object, and its ear on the wire."""

import asyncio
import hashlib
import logging
import secrets
import time
from collections.abc import Mapping

from afd_server.core.clock import Clock, MonotonicClock
from afd_server.core.errors import ProtocolError, WorkerFailed
from afd_server.core.model_spec import read_model_spec
from afd_server.core.request import SLO
from afd_server.core.topology import Member, Role
from afd_server.gateway.asker import Asker, api_key, targets_of, tenant_salt
from afd_server.gateway.byte_codec import byte_codec
from afd_server.gateway.config import GatewaySpec
from afd_server.gateway.expert_view import ExpertView
from afd_server.gateway.generation import Generations
from afd_server.gateway.pool_view import PoolView
from afd_server.gateway.stage_view import StageView
from afd_server.gateway.text import TextCodec
from afd_server.policy.admission import AdmissionConfig, check_reachable
from afd_server.telemetry.metrics import GatewayMetrics
from afd_server.transport.endpoint import Endpoint, Identity, Received
from afd_server.transport.messages import (
    ExpertLoad,
    Heartbeat,
    LoadReport,
    ProcessState,
    TokenChunk,
    TopologyUpdate,
)
from afd_server.transport.zeromq import ZeroMQLink

log = logging.getLogger(__name__)

HEARTBEAT_S = 0.25


class Service:
    """What the routes work with: text, requests, pools, limits.

    Args:
        spec: of this process.
        clock: for health and latencies.

    Raises:
        ModelError: config.json or the tokenizer cannot be used.
    """

    def __init__(self, spec: GatewaySpec, clock: Clock | None = None) -> None:
        self._spec = spec
        self.clock = clock = clock or MonotonicClock()
        model = read_model_spec(spec.model_directory)
        self.codec = _codec(spec, model.vocab_size)
        self.model_name = spec.served_model_name
        self.eos_token_ids = model.eos_token_ids
        self.vocab_size = model.vocab_size
        self.created = int(time.time())
        self.admission = AdmissionConfig(
            spec.max_live_requests,
            spec.max_model_len,
            spec.max_queued_requests,
            SLO(spec.ttft_slo_s, spec.tpot_slo_s),
            spec.slo_mode,
        )
        self.metrics = GatewayMetrics(spec.served_model_name)
        self.pools = PoolView(clock)
        self.stages = StageView(clock, self.metrics)
        self.experts = ExpertView(self.metrics)
        self.is_draining = False
        self._link = ZeroMQLink(spec.incarnation, bind=None)
        supervisor = Member(Role.SUPERVISOR, 0, spec.supervisor, spec.supervisor_address, "")
        identity = Identity(spec.incarnation, spec.model_digest)
        self._endpoint = Endpoint(self._link, identity, clock, (supervisor,), spec.with_crc)
        self.generations = Generations(self._endpoint, clock, self.metrics)
        self._salt_secret = secrets.token_bytes(16)
        self._watched: set[int] = set()

    @property
    def is_ready(self) -> bool:
        """Tell whether requests can be served: an attention worker and every FFN part."""
        return not self.pools.missing(1, self._spec.num_ffn_parts)

    @property
    def spec(self) -> GatewaySpec:
        """Return what this gateway was told at its start."""
        return self._spec

    @property
    def system_fingerprint(self) -> str:
        """Return a name for the numerics of the whole: equal ones give equal tokens."""
        prints = sorted({member.fingerprint for member in self.pools.workers()})
        return "fp_" + hashlib.sha256(" ".join(prints).encode()).hexdigest()[:12]

    def asker_of(self, headers: Mapping[str, str], cache_salt: str | None, priority: int) -> Asker:
        """Return on whose behalf a request with these headers runs, which came now.

        Raises:
            InvalidRequest: a target in the headers is nonsense.
        """
        key = api_key(headers)
        salt = tenant_salt(self._salt_secret, key, cache_salt)
        tenant = tenant_salt(self._salt_secret, key, None)
        slo = targets_of(headers, self.admission.slo)
        if self.admission.slo_mode == "off":
            slo = SLO()
        return Asker(salt, tenant, priority, slo, self.clock.now())

    def check_reachable(self, slo: SLO) -> None:
        """Refuse targets of the client's own that no attention worker would meet.

        Raises:
            InvalidRequest: so it is.
        """
        alone_us = [
            report.alone_us
            for member in self.pools.topology.pool(Role.ATTENTION)
            if (report := self.pools.report(member.incarnation)) is not None
        ]
        if alone_us:
            check_reachable(slo, self.admission.slo, min(alone_us) / 1e6)

    async def run(self) -> None:
        """Listen and report until cancelled; then let go of the wire."""
        self._link.connect(self._spec.supervisor, self._spec.supervisor_address)
        try:
            while True:
                self._watch()
                self._beat()
                self.generations.ask_again()
                self._drain()
                await asyncio.sleep(HEARTBEAT_S)
        finally:
            self._unwatch()
            self._link.close()

    def stop_taking(self) -> None:
        """Refuse new requests from now on; running ones go on."""
        self.is_draining = True

    def end_all(self) -> None:
        """End what still runs, with an error that says why."""
        self.generations.fail_all(WorkerFailed("the server was stopped"))

    def _watch(self) -> None:
        """Wake up for every socket of the link; its descriptors change with the topology."""
        loop = asyncio.get_running_loop()
        current = set(self._link.filenos())
        for fileno in current - self._watched:
            loop.add_reader(fileno, self._drain)
        self._watched = current

    def _unwatch(self) -> None:
        loop = asyncio.get_running_loop()
        for fileno in self._watched:
            loop.remove_reader(fileno)
        self._watched = set()

    def _beat(self) -> None:
        beat = Heartbeat(Role.GATEWAY, 0, ProcessState.READY, 0, self._spec.url, "")
        self._endpoint.try_send(self._spec.supervisor, beat)
        for member in self.pools.workers():
            self._endpoint.try_send(member.incarnation, beat)
        queue = self.generations.queue
        self.metrics.queue(queue.num_waiting, queue.drain_s(self.clock.now()))
        self.metrics.topology(
            self.pools.topology.epoch,
            len(self.pools.topology.pool(Role.ATTENTION)),
            len(self.pools.topology.pool(Role.FFN)),
        )

    def _drain(self) -> None:
        """Take in all that has arrived.

        ZeroMQ's descriptors signal edges, also consumed by sends, so one reads until nothing is
        left; an edge that is missed all the same costs at most one heartbeat.
        """
        is_empty = False
        while not is_empty:
            is_empty = True
            for received in self._endpoint.receive(0):
                is_empty = False
                try:
                    self._take(received)
                except ProtocolError as error:
                    log.warning("dropped a message of %s: %s", received.sender.name, error)

    def _take(self, received: Received) -> None:
        message, source = received.message, received.envelope.source
        if isinstance(message, TokenChunk):
            self.generations.take(source, message)
        elif isinstance(message, LoadReport):
            last = self.pools.report(source)
            self.pools.take_report(source, message)
            self._show_load(received.sender, message, last)
            self.stages.take(received.sender, message, self._endpoint.received_s)
        elif isinstance(message, ExpertLoad):
            self.experts.take(source, message)
        elif isinstance(message, TopologyUpdate):
            self._follow(message)

    def _follow(self, update: TopologyUpdate) -> None:
        topology = update.topology
        if topology.epoch <= self._endpoint.topology.epoch:
            return
        log.info("epoch %d: %s", topology.epoch, topology.notation)
        self._unwatch()  # before descriptors are closed, and perhaps used again
        for gone in self.pools.workers():
            if topology.find(gone.incarnation) is None:
                self._link.disconnect(gone.incarnation)
        self._endpoint.topology = topology
        self.pools.follow(topology)
        self.stages.follow(topology)
        self.experts.follow(topology)
        for member in self.pools.workers():
            self._link.connect(member.incarnation, member.address)
        self._watch()
        self.generations.follow(topology)

    def _show_load(self, sender: Member, report: LoadReport, last: LoadReport | None) -> None:
        self.metrics.worker(
            sender.name, report.rows, report.resends, report.bad_frames, report.dropped_events
        )
        if sender.role is Role.ATTENTION:
            self.generations.expect_step(sender.incarnation, report.step_us / 1e6)
            self.metrics.controller(
                sender.name,
                report.step_us / 1e6,
                report.alone_us / 1e6,
                report.decode_lanes,
                report.slowness_permille / 1e3,
            )
            self.metrics.prefix_cache(
                sender.name,
                report.queried_tokens - (last.queried_tokens if last else 0),
                report.hit_tokens - (last.hit_tokens if last else 0),
            )
        reports = [
            found
            for member in self.pools.topology.pool(Role.ATTENTION)
            if (found := self.pools.report(member.incarnation)) is not None
        ]
        blocks = sum(r.num_blocks for r in reports)
        free = sum(r.free_blocks for r in reports)
        self.metrics.load(
            running=sum(r.running for r in reports),
            waiting=sum(r.waiting for r in reports),
            kv_usage=1 - free / blocks if blocks else 0.0,
            preemptions=sum(r.preemptions for r in reports),
        )


def _codec(spec: GatewaySpec, vocab_size: int) -> TextCodec:
    if spec.load_format == "dummy" and not (spec.model_directory / "tokenizer.json").is_file():
        return byte_codec(vocab_size)
    return TextCodec.load(spec.model_directory)
