"""Whole pools in one thread: the real workers over any link, driven turn by turn."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from afd_server.core.clock import Clock, ManualClock, MonotonicClock
from afd_server.core.model_spec import read_model_spec
from afd_server.core.request import Request
from afd_server.core.topology import FFNParallel, Member, Role, Topology
from afd_server.transport.base import Link
from afd_server.transport.endpoint import Endpoint, Identity
from afd_server.transport.inproc import Faults, InProcessNetwork
from afd_server.transport.messages import (
    TOKEN_COLUMNS,
    Cancel,
    TokenChunk,
    TopologyUpdate,
    bits_float,
    submit_of,
)
from afd_server.transport.shm import SharedMemoryLink
from afd_server.transport.zeromq import ZeroMQLink
from afd_server.workers.config import AttentionConfig, Numerics, WorkerSpec, ffn_config
from afd_server.workers.runtime import (
    WorkerLoop,
    build_attention_worker,
    build_ffn_worker,
    numerics_fingerprint,
    select_kernels,
)

SUPERVISOR = "supervisor"
GATEWAY = "gateway"
EXACT = Numerics("reference", "float32", "float32")


class Pools:
    """A gateway's and a supervisor's end, and N + M workers, all in this thread."""

    def __init__(
        self,
        model: Path,
        *,
        num_attention: int = 1,
        num_ffn: int = 1,
        num_lanes: int | None = 2,
        calibrates: bool = False,
        parallel: FFNParallel = FFNParallel.TENSOR,
        num_replicas: int = 1,
        dense_layers: Role = Role.FFN,
        shares_dense: bool = False,
        lm_head: Role = Role.ATTENTION,
        shares_head: bool = False,
        numerics: Numerics = EXACT,
        link: Callable[[str], Link] | None = None,
        faults: Faults | None = None,
        max_batch_tokens: int = 24,
        kv_cache_bytes: int = 2_000_000,
        resend_s: float = 2.0,
        max_model_len: int = 256,
        max_num_seqs: int = 16,
        prefix_caching: bool = True,
        max_gather_rows: int = 1024,
        with_crc: bool = True,
    ) -> None:
        self.network = InProcessNetwork(faults)
        self._open = link or self.network.link
        self.clock: Clock = MonotonicClock() if link else ManualClock()
        self._incarnations = itertools.count()
        self._template = {
            "supervisor": SUPERVISOR,
            "supervisor_address": "",
            "bind": "",
            "model_path": str(model),
            "model_digest": "digest",
            "numerics": numerics,
            "compute_threads": 1,
            "transport": "zmq",
            "with_crc": with_crc,
            "attention": AttentionConfig(
                num_lanes,
                max_model_len,
                max_num_seqs,
                max_batch_tokens,
                16,
                kv_cache_bytes,
                prefix_caching,
                resend_s,
                calibrates=calibrates,
            ),  # fmt: skip
            "ffn": replace(
                ffn_config(parallel, num_ffn, num_replicas),
                max_gather_rows=max_gather_rows,
                dense_layers=dense_layers,
                shares_dense=shares_dense,
                lm_head=lm_head,
                shares_head=shares_head,
            ),
        }
        self._model_spec = read_model_spec(model)
        self._parallel = parallel
        self.members: dict[str, Member] = {}
        self.loops: dict[str, WorkerLoop] = {}
        self.workers: dict[str, object] = {}
        self.endpoints: dict[str, Endpoint] = {}
        self.epoch = 0
        self.tokens: dict[int, list[int]] = {}
        self.entropies: dict[int, list[float]] = {}  # with GUARD
        self.finish: dict[int, int] = {}
        self.cached: dict[int, int] = {}
        self.alive_rows = 0
        self.lost_rows = 0
        self.refused: list[int] = []
        self._introduced = (Member(Role.SUPERVISOR, 0, SUPERVISOR, "", ""),)
        self.supervisor = self._endpoint(SUPERVISOR, ())
        self.gateway = self._endpoint(GATEWAY, self._introduced)
        self.members[GATEWAY] = Member(Role.GATEWAY, 0, GATEWAY, self.gateway.link.address, "")
        for slot in range(num_attention):
            self.start(Role.ATTENTION, slot)
        for slot in range(num_ffn):
            self.start(Role.FFN, slot)
        self.publish()

    def start(self, role: Role, slot: int) -> str:
        incarnation = f"{role.name.lower()}{slot}-{next(self._incarnations)}"
        spec = WorkerSpec(role=role, slot=slot, incarnation=incarnation, **self._template)
        endpoint = self._endpoint(incarnation, self._introduced)
        build = build_attention_worker if role is Role.ATTENTION else build_ffn_worker
        kernels = select_kernels(spec.numerics)
        worker = build(spec, self._model_spec, kernels, endpoint, self.clock)
        fingerprint = numerics_fingerprint(spec, kernels)
        endpoint.identify(fingerprint)
        member = Member(role, slot, incarnation, endpoint.link.address, fingerprint)
        self.members[incarnation] = member
        self.endpoints[incarnation] = endpoint
        self.workers[incarnation] = worker
        self.loops[incarnation] = WorkerLoop(spec, worker, endpoint, self.clock)
        self.supervisor.introduce(member)
        return incarnation

    def _endpoint(self, name: str, introduced: tuple[Member, ...]) -> Endpoint:
        with_crc = self._template["with_crc"]
        return Endpoint(
            self._open(name), Identity(name, "digest"), self.clock, introduced, with_crc
        )

    def kill(self, incarnation: str) -> None:
        self.endpoints.pop(incarnation).link.close()
        del self.loops[incarnation], self.members[incarnation], self.workers[incarnation]

    def publish(self) -> None:
        """Tell everybody who is alive; a lossy network is tried again and again."""
        self.epoch += 1
        topology = Topology(self.epoch, tuple(self.members.values()), self._parallel)
        self.topology = self.gateway.topology = self.supervisor.topology = topology
        for member in self.members.values():
            if member.role is not Role.GATEWAY:
                self.supervisor.link.connect(member.incarnation, member.address)
                self.gateway.link.connect(member.incarnation, member.address)
        self.announce()

    def announce(self) -> None:
        for member in self.members.values():
            if member.role is not Role.GATEWAY:
                endpoint = self.endpoints[member.incarnation]
                if endpoint.topology.epoch < self.epoch:
                    self.supervisor.try_send(member.incarnation, TopologyUpdate(self.topology))

    def attention(self, slot: int = 0) -> str:
        return next(
            m.incarnation
            for m in self.members.values()
            if m.role is Role.ATTENTION and m.slot == slot
        )

    def submit(self, request: Request, slot: int = 0) -> None:
        self.tokens.setdefault(request.key, list(request.emitted_ids))
        self.gateway.try_send(self.attention(slot), submit_of(request))

    def cancel(self, key: int, slot: int = 0, attempt: int = 1) -> None:
        self.gateway.try_send(self.attention(slot), Cancel(key, attempt))

    def turn(self) -> None:
        """Let everybody take one turn."""
        wait = 0.0 if isinstance(self.clock, ManualClock) else 0.001
        self.announce()
        for loop in self.loops.values():
            loop.turn(wait)
        list(self.supervisor.receive(0))
        for received in self.gateway.receive(0):
            if isinstance(received.message, TokenChunk):
                self._take(received.message)
        if isinstance(self.clock, ManualClock):
            self.clock.advance(0.01)

    def run(self, requests: list[Request], slots: list[int] | None = None, turns: int = 200_000):
        """Submit everything, repeat what the network lost, and return each request's tokens."""
        slots = slots or [0] * len(requests)
        for number in range(turns):
            if number % 200 == 0:
                for request, slot in zip(requests, slots, strict=True):
                    if request.key not in self.finish:
                        self._submit_again(request, slot)
            self.turn()
            if all(request.key in self.finish for request in requests):
                return [self.tokens[request.key] for request in requests]
        raise AssertionError(f"unfinished after {turns} turns: {self.tokens}")

    def _submit_again(self, request: Request, slot: int) -> None:
        known = self.tokens.setdefault(request.key, [])
        entropies = self.entropies.get(request.key, []) if request.sampling.guard_window else []
        again = replace(request, emitted_ids=tuple(known), emitted_entropies=tuple(entropies))
        self.submit(again, slot)

    def _take(self, chunk: TokenChunk) -> None:
        values = memoryview(bytes(chunk.rows.data)).cast("q")
        for start in range(0, len(values), TOKEN_COLUMNS):
            row = values[start : start + TOKEN_COLUMNS]
            key, _, index, count, token, finish, cached, bits, _ = row
            if count == 0:
                self.alive_rows += finish == 0
                if finish:
                    self.refused.append(key)
                continue
            self.cached.setdefault(key, cached)
            known = self.tokens[key]
            if index != len(known):
                self.lost_rows += 1
                if index > len(known):  # a gap: end this attempt, `run` asks again
                    self.cancel(key)
                continue
            known.append(token)
            self.entropies.setdefault(key, []).append(bits_float(bits))
            if finish:
                self.finish[key] = finish

    def close(self) -> None:
        for endpoint in (*self.endpoints.values(), self.supervisor, self.gateway):
            endpoint.link.close()


def ipc_links(directory: Path) -> Callable[[str], Link]:
    return lambda name: ZeroMQLink(name, f"ipc://{directory}/{name}.ipc")


def shm_links(directory: Path) -> Callable[[str], Link]:
    return lambda name: SharedMemoryLink(ZeroMQLink(name, f"ipc://{directory}/{name}.ipc"))


def tcp_links() -> Callable[[str], Link]:
    return lambda name: ZeroMQLink(name, "tcp://127.0.0.1:*")
