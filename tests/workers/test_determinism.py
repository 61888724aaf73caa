"""A token depends on its request alone: the same ids and logit bits alone and in any company.

A few rounds run with the other tests; `make determinism ARGS='--record FILE'` makes 10,000
comparisons and writes what it did.
"""

import hashlib
import json
import random
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from afd_server.core.model_spec import read_model_spec
from afd_server.core.request import Request, SamplingParams
from afd_server.core.topology import FFNParallel, Role
from afd_server.workers.attention.lanes import Lane
from afd_server.workers.config import Numerics
from support.checkpoints import tiny_llama
from support.experts import tiny_routed
from support.families import family
from support.logits import record_logits
from support.pools import Pools, ipc_links, shm_links

MODELS = {  # dense; with experts; with a shared one, clamps and sliding windows beside
    "llama": lambda: tiny_llama()[0],
    "mixtral": lambda: tiny_routed("mixtral")[0],
    "step3p5": lambda: family("step3p5").directory,
}
LINKS = {"shm": shm_links, "ipc": ipc_links}
FRESH_AFTER = 1000  # comparisons, with other requests
Outcome = tuple[list[int], list[str]]  # token ids, a digest of each step's logits


@dataclass(frozen=True)
class Company:
    """How a round is run: which model, which pools, how full, how cut."""

    model: str
    num_attention: int
    num_ffn: int
    parallel: FFNParallel
    num_replicas: int
    num_lanes: int | None  # None: found by a calibration
    max_batch_tokens: int
    max_gather_rows: int
    num_blocks: int
    max_num_seqs: int
    prefix_caching: bool
    kv: str = "bfloat16"
    head: tuple[Role, bool] = (Role.ATTENTION, False)
    native_over: str | None = None  # what native code takes calls over, from layer to layer
    shares_dense: bool = False  # and each side computes a half of an FFN

    @property
    def num_parts(self) -> int:
        shared = {FFNParallel.TENSOR: self.num_ffn, FFNParallel.HYBRID: 2}
        return shared.get(self.parallel, 1)

    @property
    def bits(self) -> tuple[str, int, str]:
        """Return all that the bits of a request may depend on."""
        return self.model, self.num_parts, self.kv

    @property
    def max_model_len(self) -> int:
        return min(640, 16 * self.num_blocks)

    def pools(self, directory_of_links: Path) -> Pools:
        directory = MODELS[self.model]()
        spec = read_model_spec(directory)
        block_bytes = 16 * spec.kv_slot_bytes(self.kv) * len(spec.kv_groups)  # in every group
        return Pools(
            directory,
            num_attention=self.num_attention,
            num_ffn=self.num_ffn,
            parallel=self.parallel,
            num_replicas=self.num_replicas,
            num_lanes=self.num_lanes,
            numerics=Numerics("native", "int8", self.kv),
            max_batch_tokens=self.max_batch_tokens,
            max_gather_rows=self.max_gather_rows,
            max_model_len=self.max_model_len,
            kv_cache_bytes=self.num_blocks * block_bytes,
            max_num_seqs=self.max_num_seqs,
            prefix_caching=self.prefix_caching,
            lm_head=self.head[0],
            shares_head=self.head[1],
            shares_dense=self.shares_dense,
            link=LINKS[self.native_over](directory_of_links) if self.native_over else None,
            with_crc=self.native_over is None,
        )


ALONE = Company("llama", 1, 1, FFNParallel.TENSOR, 1, 1, 600, 1024, 300, 4, False)


def any_company(rng: random.Random) -> Company:
    parallel = rng.choice(list(FFNParallel))
    max_num_seqs = rng.choice([4, 12, 15])
    num_ffn, num_replicas = rng.randint(1, 3), 1
    if parallel in (FFNParallel.EXPERT, FFNParallel.HYBRID):
        num_replicas = rng.randint(1, num_ffn)
    num_ffn *= {FFNParallel.COLOCATED: 0, FFNParallel.HYBRID: 2}.get(parallel, 1)
    return Company(
        model=rng.choice(list(MODELS)),
        num_attention=rng.randint(1, 3),
        num_ffn=num_ffn,
        parallel=parallel,
        num_replicas=num_replicas,
        num_lanes=rng.choice([1, 2, 3, 4, None] if num_ffn else [1, 2, 3, 4]),
        max_batch_tokens=rng.choice([16, 24, 64, 200, 512]),
        max_gather_rows=rng.choice([1, 20, 1024]),
        num_blocks=rng.choice([16, 18, 44, 300]),  # 40 hold one sequence of the longest kind
        max_num_seqs=max_num_seqs,
        prefix_caching=rng.random() < 0.7,
        kv=rng.choice(["bfloat16", "int8"]),
        head=rng.choice([(Role.ATTENTION, False), (Role.FFN, False), (Role.FFN, True)]),
        native_over=rng.choice([None, "shm", "ipc"]),
        shares_dense=rng.random() < 0.5,
    )


def population(rng: random.Random, first_key: int, size: int = 60) -> list[Request]:
    """Greedy and seeded requests; many begin alike, so that prefixes are hit, and some are long."""
    stems = [[rng.randrange(3, 259) for _ in range(rng.choice([16, 40, 64]))] for _ in range(4)]
    requests = []
    for key in range(first_key, first_key + size):
        stem = rng.choice(stems)[: rng.choice([0, 16, 64])]
        num_own = rng.randint(200, 536) if rng.random() < 0.15 else rng.randint(1, 80)
        prompt = [*stem, *(rng.randrange(3, 259) for _ in range(num_own))]
        sampling = SamplingParams(
            max_tokens=rng.randint(1, 10),
            temperature=rng.choice([0.0, 0.7, 1.2]),
            top_p=rng.choice([1.0, 0.9]),
            top_k=rng.choice([0, 0, 30]),
            seed=key,
        )
        requests.append(Request(key, tuple(prompt), sampling))
    return requests


class Runs:
    """Runs requests in pools and writes down what each gave, and what happened in company."""

    def __init__(self, monkeypatch, directory):
        self._logits = record_logits(monkeypatch)
        self._directory = directory
        self._single: dict[Company, Pools] = {}
        self._chunks: list[int] = []
        self.done = Counter()
        original = Lane.start

        def start(lane, plan, *rest):
            self._chunks += [len(planned.token_ids) for planned in plan.sequences]
            return original(lane, plan, *rest)

        monkeypatch.setattr(Lane, "start", start)

    def alone(self, company: Company, request: Request) -> Outcome:
        """Run a request in pools that have nothing else to do."""
        model, num_parts, kv = company.bits
        single = replace(ALONE, model=model, num_ffn=num_parts, kv=kv)
        if single not in self._single:
            self._single[single] = single.pools(self._directory)
        return self._outcomes(self._single[single], [request], [0])[0]

    def together(self, company: Company, requests: list[Request]) -> list[Outcome]:
        """Run requests in pools of their own."""
        pools = company.pools(self._directory)
        self._chunks.clear()
        try:
            slots = [request.key % company.num_attention for request in requests]
            outcomes = self._outcomes(pools, requests, slots)
        finally:
            pools.close()
        self.done["comparisons"] += len(requests)
        self.done["largest_chunk"] = max(self.done["largest_chunk"], *self._chunks)
        for name, worker in pools.workers.items():
            if name.startswith("attention"):
                load = worker.load(0)
                self.done["preemptions"] += load.preemptions
                self.done["prefix_hit_tokens"] += load.hit_tokens
            elif (server := worker._server) is not None:
                self.done["calls_without_python"] += server.num_calls
        return outcomes

    def close(self) -> None:
        for pools in self._single.values():
            pools.close()

    def _outcomes(self, pools: Pools, requests: list[Request], slots: list[int]) -> list[Outcome]:
        self._logits.clear()
        tokens = pools.run(requests, slots)
        return [
            (ids, [self._digest(request, step) for step in range(len(ids))])
            for request, ids in zip(requests, tokens, strict=True)
        ]

    def _digest(self, request: Request, step: int) -> str:
        logits = self._logits[request.sampling.seed, len(request.prompt_ids) + step]
        return hashlib.blake2b(logits.numpy().tobytes(), digest_size=8).hexdigest()


@pytest.fixture
def runs(monkeypatch, tmp_path):
    made = Runs(monkeypatch, tmp_path)
    yield made
    made.close()


def test_company_changes_no_bit(pytestconfig, runs):
    num_comparisons = pytestconfig.getoption("comparisons")
    rng, done = random.Random(20250727), runs.done
    requests: list[Request] = []
    alone: dict[tuple[int, str, int, str], Outcome] = {}
    while done["comparisons"] < num_comparisons:
        if done["comparisons"] >= FRESH_AFTER * done["populations"]:
            requests = population(rng, first_key=1 + done["populations"] * len(requests))
            done["populations"] += 1
            alone.clear()
        company = any_company(rng)
        fitting = [
            request
            for request in requests
            if len(request.prompt_ids) + request.sampling.max_tokens <= company.max_model_len
        ]
        chosen = rng.sample(fitting, rng.randint(1, 32))
        for request in chosen:
            if (request.key, *company.bits) not in alone:
                alone[request.key, *company.bits] = runs.alone(company, request)
        for request, outcome in zip(chosen, runs.together(company, chosen), strict=True):
            assert outcome == alone[request.key, *company.bits], f"{request} in {company}"
    if num_comparisons >= FRESH_AFTER:  # a few are few, and over shared memory timing decides
        assert done["preemptions"] > 0, "no round was tight enough to preempt"
    assert done["prefix_hit_tokens"] > 0, "no round found a prefix computed"
    assert done["calls_without_python"] > 0, "no round had calls without Python"
    assert done["largest_chunk"] > 200, "no round computed much of a prompt at once"
    record = json.dumps({"differences": 0, **done}, indent=2)
    pytestconfig.pluginmanager.get_plugin("terminalreporter").write_line(record)
    if (path := pytestconfig.getoption("record")) is not None:
        path.write_text(f"{record}\n", "utf-8")
