"""A token depends on its request alone: the same ids and logit bits alone and in any company.

A few rounds run with the other tests; `make determinism` makes 10,000 comparisons.
"""

import hashlib
import random
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from afd_server.core.model_spec import read_model_spec
from afd_server.core.request import Request, SamplingParams
from afd_server.core.topology import FFNParallel, Role
from afd_server.workers.config import Numerics
from support.checkpoints import tiny_llama
from support.experts import tiny_routed
from support.families import family
from support.logits import record_logits
from support.pools import Pools, shm_links

MODELS = {  # dense; with experts; with a shared one, clamps and sliding windows beside
    "llama": lambda: tiny_llama()[0],
    "mixtral": lambda: tiny_routed("mixtral")[0],
    "step3p5": lambda: family("step3p5").directory,
}
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
    shares_memory: bool = False  # so that native code takes calls from layer to layer

    @property
    def num_parts(self) -> int:
        shared = {FFNParallel.TENSOR: self.num_ffn, FFNParallel.HYBRID: 2}
        return shared.get(self.parallel, 1)

    @property
    def bits(self) -> tuple[str, int, str]:
        """Return all that the bits of a request may depend on."""
        return self.model, self.num_parts, self.kv

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
            kv_cache_bytes=self.num_blocks * block_bytes,
            max_num_seqs=self.max_num_seqs,
            prefix_caching=self.prefix_caching,
            lm_head=self.head[0],
            shares_head=self.head[1],
            link=shm_links(directory_of_links) if self.shares_memory else None,
            with_crc=not self.shares_memory,
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
        num_blocks=rng.choice([16, 18, 300]),  # 16 hold one sequence of the longest kind
        max_num_seqs=max_num_seqs,
        prefix_caching=rng.random() < 0.7,
        kv=rng.choice(["bfloat16", "int8"]),
        head=rng.choice([(Role.ATTENTION, False), (Role.FFN, False), (Role.FFN, True)]),
        shares_memory=rng.random() < 0.5,
    )


def population(rng: random.Random, size: int = 60) -> list[Request]:
    """Greedy and seeded requests; many begin alike, so that prefixes are hit."""
    stems = [[rng.randrange(3, 259) for _ in range(rng.choice([16, 40, 64]))] for _ in range(4)]
    requests = []
    for key in range(1, size + 1):
        stem = rng.choice(stems)[: rng.choice([0, 16, 64])]
        prompt = [*stem, *(rng.randrange(3, 259) for _ in range(rng.randint(1, 80)))]
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
    """Runs requests in pools and writes down what each gave."""

    def __init__(self, monkeypatch, directory):
        self._logits = record_logits(monkeypatch)
        self._directory = directory
        self.num_preemptions = self.num_hit_tokens = self.num_native = 0

    def outcomes(self, company: Company, requests: list[Request]) -> list[Outcome]:
        self._logits.clear()
        pools = company.pools(self._directory)
        try:
            tokens = pools.run(requests, [r.key % company.num_attention for r in requests])
        finally:
            pools.close()
        for name, worker in pools.workers.items():
            if name.startswith("attention"):
                load = worker.load(0)
                self.num_preemptions += load.preemptions
                self.num_hit_tokens += load.hit_tokens
            elif (server := worker._server) is not None:
                self.num_native += server.num_calls
        return [
            (ids, [self._digest(request, step) for step in range(len(ids))])
            for request, ids in zip(requests, tokens, strict=True)
        ]

    def _digest(self, request: Request, step: int) -> str:
        logits = self._logits[request.sampling.seed, len(request.prompt_ids) + step]
        return hashlib.blake2b(logits.numpy().tobytes(), digest_size=8).hexdigest()


@pytest.fixture
def num_comparisons(pytestconfig):
    return pytestconfig.getoption("comparisons")


def test_company_changes_no_bit(num_comparisons, pytestconfig, monkeypatch, tmp_path):
    rng, runs = random.Random(20250727), Runs(monkeypatch, tmp_path)
    requests = population(rng)
    alone: dict[tuple[int, str, int, str], Outcome] = {}
    num_compared = 0
    while num_compared < num_comparisons:
        company = any_company(rng)
        chosen = rng.sample(requests, rng.randint(1, 32))
        for request in chosen:
            if (request.key, *company.bits) not in alone:
                model, num_parts, kv = company.bits
                single = replace(ALONE, model=model, num_ffn=num_parts, kv=kv)
                (alone[request.key, *company.bits],) = runs.outcomes(single, [request])
        for request, outcome in zip(chosen, runs.outcomes(company, chosen), strict=True):
            assert outcome == alone[request.key, *company.bits], f"{request} in {company}"
        num_compared += len(chosen)
    assert runs.num_preemptions > 0, "no round was tight enough to preempt"
    assert runs.num_hit_tokens > 0, "no round found a prefix computed"
    assert runs.num_native > 0, "no round had calls without Python"
    reporter = pytestconfig.pluginmanager.get_plugin("terminalreporter")
    reporter.write_line(
        f"{num_compared} comparisons, 0 differences; on the way {runs.num_preemptions} "
        f"preemptions, {runs.num_hit_tokens} tokens found computed and {runs.num_native} calls "
        "without Python"
    )
