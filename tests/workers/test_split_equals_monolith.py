"""The oracle: attention and FFN workers over a wire give what the monolith gives.

Every topology, lane count and link; also over a network that loses, repeats, delays and damages
frames.
"""

import random
from dataclasses import replace

import pytest
import torch

from afd_server.core.model_spec import read_model_spec
from afd_server.core.request import FinishReason, Request, SamplingParams
from afd_server.core.stage import AHEAD
from afd_server.core.topology import FFNParallel, Role
from afd_server.kernels.reference import PagedRun, plan_paged_rows
from afd_server.models.base import FFNShare, MicroBatch
from afd_server.models.catalogue import ARCHITECTURES
from afd_server.models.head import Held
from afd_server.models.monolith import run_monolith
from afd_server.telemetry.timeline import EventKind, read_events
from afd_server.transport.inproc import Faults
from afd_server.transport.messages import DType, Payload, submit_of
from afd_server.weights.checkpoint import Checkpoint
from afd_server.weights.packed import PackedWeights
from afd_server.workers.attention.kv_store import KVStore
from afd_server.workers.attention.sampler import Sampler
from afd_server.workers.config import Numerics
from afd_server.workers.runtime import select_kernels
from afd_server.workers.tensors import TORCH_DTYPES, row_dtype
from support.checkpoints import tiny_llama
from support.families import ROUTED, WRITERS, family
from support.logits import record_logits
from support.pools import EXACT, Pools, ipc_links, shm_links, tcp_links

TOPOLOGIES = [(1, 1), (2, 1), (1, 2), (2, 2)]
NUM_OUTPUT = 8


def make_requests(count=6, temperature=0.0, seed=3, num_output=NUM_OUTPUT):
    rng = random.Random(seed)
    return [
        Request(
            key,
            tuple(rng.randrange(3, 259) for _ in range(rng.randint(1, 70))),
            SamplingParams(
                max_tokens=num_output,
                temperature=temperature,
                seed=key * 7919,
                top_p=0.95 if key % 2 else 1.0,
            ),
        )
        for key in range(1, count + 1)
    ]


class Monolith:
    """The same model in one process: one request, one token at a time."""

    def __init__(self, numerics=EXACT, directory=None, **shape):
        directory = directory or tiny_llama(**shape)[0]
        self.kv_dtype = TORCH_DTYPES[numerics.kv]
        self.spec = read_model_spec(directory)
        kernels = select_kernels(numerics)
        reader = PackedWeights(Checkpoint(directory, row_dtype(numerics)), kernels, None)
        self.sampler = Sampler(kernels)
        architecture = ARCHITECTURES[self.spec.model_type]
        self.attention = architecture.attention(self.spec, reader, kernels, 256)
        self.held = Held(architecture, self.spec, reader, kernels, FFNShare())

    def generate(self, request: Request) -> tuple[list[int], list[torch.Tensor]]:
        kv = KVStore(self.spec, 16, 16, self.kv_dtype).layers
        ids, computed, logits = list(request.prompt_ids), 0, []
        for _ in range(request.sampling.max_tokens):
            positions = list(range(computed, len(ids)))
            batch = MicroBatch(
                torch.tensor(ids[computed:]),
                torch.tensor(positions),
                torch.tensor(positions),
                plan_paged_rows([PagedRun(computed, len(positions), range(16))]),
                torch.tensor([len(positions) - 1]),
                kv,
            )
            logits.append(run_monolith(self.attention, [self.held], batch)[0])
            computed = len(ids)
            ids.append(self.sampler.sample(logits[-1], request.sampling, len(ids)))
        return ids[len(request.prompt_ids) :], logits


@pytest.fixture(scope="module")
def monolith():
    return Monolith()


@pytest.fixture
def logits_of(monkeypatch):
    return record_logits(monkeypatch)


def links(kind, tmp_path):
    made = {"ipc": ipc_links(tmp_path), "tcp": tcp_links(), "shm": shm_links(tmp_path)}
    return made.get(kind)


@pytest.mark.parametrize("kind", ["inproc", "ipc", "tcp", "shm"])
@pytest.mark.parametrize(("num_attention", "num_ffn"), TOPOLOGIES)
def test_logits_of_the_split_model_are_the_monoliths(
    kind, num_attention, num_ffn, monolith, logits_of, tmp_path
):
    pools = Pools(
        tiny_llama()[0], num_attention=num_attention, num_ffn=num_ffn, link=links(kind, tmp_path)
    )
    try:
        for number, request in enumerate(make_requests(3)):
            expected_tokens, expected_logits = monolith.generate(request)
            logits_of.clear()
            tokens = pools.run([request], [number % num_attention])[0]
            assert tokens == expected_tokens
            got = torch.stack(list(logits_of.values()))
            gap = (got - torch.stack(expected_logits)).abs().max()
            assert gap <= 1e-5
            if num_ffn == 1:
                assert gap == 0  # the same parts in the same order: the same bits
    finally:
        pools.close()


def assert_company_changes_nothing(pools, num_attention, requests, monolith, logits_of):
    expected = {request.key: monolith.generate(request) for request in requests}
    tokens = pools.run(requests, [r.key % num_attention for r in requests])
    assert tokens == [expected[request.key][0] for request in requests]
    for request in requests:
        for step, logits in enumerate(expected[request.key][1]):
            position = len(request.prompt_ids) + step
            got = logits_of[request.sampling.seed, position]
            assert (got - logits).abs().max() <= 1e-5


@pytest.mark.parametrize("num_lanes", [1, 2, 3, 4])
@pytest.mark.parametrize(("num_attention", "num_ffn"), TOPOLOGIES)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_requests_in_company_get_the_monoliths_logits_and_tokens(
    num_lanes, num_attention, num_ffn, temperature, monolith, logits_of
):
    pools = Pools(
        tiny_llama()[0], num_attention=num_attention, num_ffn=num_ffn, num_lanes=num_lanes
    )
    requests = make_requests(6, temperature)
    assert_company_changes_nothing(pools, num_attention, requests, monolith, logits_of)


@pytest.mark.parametrize("kind", ["ipc", "tcp", "shm"])
@pytest.mark.parametrize("num_lanes", [1, 2, 3, 4])
@pytest.mark.parametrize(("num_attention", "num_ffn"), TOPOLOGIES)
def test_requests_in_company_over_sockets_get_the_monoliths_logits_and_tokens(
    kind, num_lanes, num_attention, num_ffn, monolith, logits_of, tmp_path
):
    pools = Pools(
        tiny_llama()[0],
        num_attention=num_attention,
        num_ffn=num_ffn,
        num_lanes=num_lanes,
        link=links(kind, tmp_path),
    )
    try:
        requests = make_requests(4)
        assert_company_changes_nothing(pools, num_attention, requests, monolith, logits_of)
    finally:
        pools.close()


def test_tied_embeddings_are_split_as_well(logits_of):
    shape = {"heads": 6, "kv_heads": 6, "tied": True}
    pools = Pools(tiny_llama(**shape)[0], num_ffn=2)
    assert_company_changes_nothing(pools, 1, make_requests(4), Monolith(**shape), logits_of)


@pytest.mark.parametrize(
    ("name", "parallel"),
    [
        *((name, FFNParallel.TENSOR) for name in WRITERS),
        *((name, FFNParallel.EXPERT) for name in ROUTED),
    ],
)
def test_an_architecture_split_over_pools_is_its_independent_model(name, parallel, logits_of):
    directory, reference = family(name)
    requests = make_requests(4, num_output=33)
    pools = Pools(  # prefills in chunks
        directory, num_attention=2, num_ffn=2, num_lanes=2, parallel=parallel
    )
    outputs = pools.run(requests, [request.key % 2 for request in requests])
    for request, output in zip(requests, outputs, strict=True):
        start, ids = len(request.prompt_ids), [*request.prompt_ids, *output]
        expected = reference(ids)[start - 1 : -1]
        got = torch.stack([logits_of[request.sampling.seed, start + i] for i in range(33)])
        assert expected.std() > 0.1  # the comparison means something
        assert (got - expected).abs().max() <= 1e-4
        assert output == expected.argmax(-1).tolist()


@pytest.mark.parametrize(
    "numerics",
    [
        Numerics("reference", "bfloat16", "bfloat16"),
        Numerics("native", "int8", "bfloat16"),
        Numerics("native", "float32", "float32"),
        Numerics("native", "bfloat16", "bfloat16"),
    ],
    ids=lambda numerics: f"{numerics.kernels}-{numerics.weights}",
)
@pytest.mark.parametrize("name", WRITERS)
def test_workers_of_any_numerics_give_the_bits_of_such_a_monolith(name, numerics, logits_of):
    directory = family(name).directory
    pools, requests = Pools(directory, num_attention=2, numerics=numerics), make_requests(4)
    monolith = Monolith(numerics, directory)
    assert_company_changes_nothing(pools, 2, requests, monolith, logits_of)
    for request in requests:
        for step, logits in enumerate(monolith.generate(request)[1]):
            position = len(request.prompt_ids) + step
            assert torch.equal(logits_of[request.sampling.seed, position], logits)


@pytest.mark.parametrize("num_lanes", [1, 3])
def test_colocated_workers_give_the_monoliths_logits_and_tokens(num_lanes, monolith, logits_of):
    pools = Pools(
        tiny_llama()[0],
        num_attention=2,
        num_ffn=0,
        num_lanes=num_lanes,
        parallel=FFNParallel.COLOCATED,
    )
    assert_company_changes_nothing(pools, 2, make_requests(6), monolith, logits_of)


def test_replicas_of_the_whole_ffn_give_the_monoliths_tokens(monolith):
    requests = make_requests()
    pools = Pools(tiny_llama()[0], num_ffn=3, num_lanes=3, parallel=FFNParallel.REPLICATE)
    assert pools.run(requests) == [monolith.generate(request)[0] for request in requests]
    steps = [w.load(0).steps for n, w in pools.workers.items() if n.startswith("ffn")]
    assert all(steps), "a replica had nothing to do"


def test_preemption_changes_no_token(monolith):
    requests = make_requests(6, num_output=40)
    pools = Pools(tiny_llama()[0], kv_cache_bytes=10 * 16 * 768, max_model_len=128)
    assert pools.run(requests) == [monolith.generate(request)[0] for request in requests]
    assert pools.workers[pools.attention()].load(0).preemptions > 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("lm_head", [Role.ATTENTION, Role.FFN])
def test_both_parts_of_a_step_give_tokens_whichever_ends_first(lm_head, seed):
    """Twenty decode in one lane, ten of them ahead; answers overtake each other on the wire."""
    requests = make_requests(20, temperature=0.8, num_output=24)
    pools = Pools(
        tiny_llama()[0],
        num_lanes=1,
        lm_head=lm_head,
        max_num_seqs=24,
        max_batch_tokens=64,
        faults=Faults(seed, max_delay=8),
    )
    results = pools.run(requests)
    events = read_events(pools.workers[pools.attention()].load(0).events.data)
    sampled = sum(e.rows for e in events if e.kind == EventKind.SAMPLE and e.lane >= AHEAD)
    assert sampled > 100, "those ahead have their tokens from their own part"
    assert results == Pools(tiny_llama()[0]).run(requests)


@pytest.mark.parametrize("seed", range(4))
def test_a_network_that_loses_repeats_delays_and_reorders_changes_no_token(seed, monolith):
    requests = make_requests(5, temperature=0.8 * (seed % 2))
    faults = Faults(seed, drop=0.05, duplicate=0.1, max_delay=5)
    pools = Pools(tiny_llama()[0], num_ffn=2, faults=faults, resend_s=0.3)
    assert pools.run(requests) == [monolith.generate(request)[0] for request in requests]
    assert pools.workers[pools.attention()].load(0).resends > 0


def test_damaged_frames_are_dropped_and_change_no_token(monolith):
    requests = make_requests(3)
    # rare enough that no peer damages three frames in ten (virtual) seconds
    pools = Pools(tiny_llama()[0], faults=Faults(1, corrupt=0.004), resend_s=0.3)
    assert pools.run(requests) == [monolith.generate(request)[0] for request in requests]
    assert sum(e.num_bad_frames for e in (*pools.endpoints.values(), pools.gateway)) > 0


def test_an_ffn_worker_replaced_in_the_middle_changes_no_token(monolith):
    requests = make_requests(4, num_output=20)
    expected = [monolith.generate(request)[0] for request in requests]
    pools = Pools(tiny_llama()[0], num_ffn=2)
    for request in requests:
        pools.submit(request)
    for _ in range(25):
        pools.turn()
    victim = next(n for n, m in pools.members.items() if m.role is Role.FFN and m.slot == 1)
    pools.kill(victim)
    pools.publish()  # without it: calls wait
    for _ in range(10):
        pools.turn()
    assert not pools.finish
    pools.start(Role.FFN, 1)
    pools.publish()
    assert pools.run(requests) == expected


def test_a_cancelled_request_gives_its_blocks_back():
    pools = Pools(tiny_llama()[0])
    worker = pools.workers[pools.attention()]
    free = worker.load(0).free_blocks
    requests = make_requests(4, num_output=100)
    for request in requests:
        pools.submit(request)
    for _ in range(40):
        pools.turn()
    assert worker.load(0).free_blocks < free
    for request in requests:
        pools.cancel(request.key)
    for _ in range(40):
        pools.turn()
    assert worker.load(0).free_blocks == free
    assert worker.load(0).running == worker.load(0).waiting == 0


def test_a_lost_gateways_requests_are_cancelled():
    pools = Pools(tiny_llama()[0])
    worker = pools.workers[pools.attention()]
    free = worker.load(0).free_blocks
    pools.submit(make_requests(1, num_output=100)[0])
    for _ in range(20):
        pools.turn()
    gateway = pools.members.pop("gateway")
    pools.publish()
    for _ in range(20):
        pools.turn()
    pools.members["gateway"] = gateway
    assert worker.load(0).free_blocks == free


def test_a_repeated_submit_is_answered_but_not_started_twice():
    pools = Pools(tiny_llama()[0])
    request = make_requests(1)[0]
    for _ in range(3):
        pools.submit(request)
    pools.turn()
    pools.turn()
    load = pools.workers[pools.attention()].load(0)
    assert load.running + load.waiting == 1
    assert pools.alive_rows == 3


def test_a_stop_token_ends_a_request_before_max_tokens(monolith):
    request = make_requests(1)[0]
    tokens = monolith.generate(request)[0]
    stop = tokens[3]
    params = SamplingParams(max_tokens=8, temperature=0, stop_token_ids=(stop,))
    pools = Pools(tiny_llama()[0])
    got = pools.run([Request(1, request.prompt_ids, params)])[0]
    assert got == tokens[: tokens.index(stop) + 1]
    assert pools.finish[1] == FinishReason.STOP


def test_guard_gives_the_same_tokens_in_any_batch_after_preemption_and_in_a_new_attempt():
    params = SamplingParams(max_tokens=24, seed=5, guard_window=4)
    guarded = Request(1, (7, 8, 9, 7), params)
    alone = Pools(tiny_llama()[0])
    (tokens,), entropies = alone.run([guarded]), alone.entropies[1]
    assert len(set(entropies)) == 24
    crowd = [Request(2 + i, (3 + i,) * 40, SamplingParams(max_tokens=30)) for i in range(4)]
    crowded = Pools(tiny_llama()[0], kv_cache_bytes=150_000, max_model_len=192)
    assert crowded.run([*crowd, guarded])[-1] == tokens
    assert crowded.workers[crowded.attention()].load(0).preemptions > 0
    for num_emitted in (1, 2, 11, 23):
        emitted = (tuple(tokens[:num_emitted]), tuple(entropies[:num_emitted]))
        other = Pools(tiny_llama()[0])
        other.submit(Request(1, guarded.prompt_ids, params, 2, *emitted))
        while 1 not in other.finish:
            other.turn()
        assert other.tokens[1] == tokens


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_prompt": 0},
        {"num_prompt": 99},
        {"num_emitted": 99},
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"min_p": 1.5},
        {"top_n_sigma": -1.0},
        {"min_k": -1.0},
        {"guard_window": 1, "temperature": 1.0},
        {"guard_window": 7, "temperature": 0.0},
        {"guard_window": 7, "temperature": 1.0, "num_emitted": 1},
        {"max_tokens": 0},
        {"tokens": Payload(DType.INT32, (1,), (10**6).to_bytes(4, "little"))},
        {"tokens": Payload(DType.INT64, (1,), bytes(8))},
    ],
)
def test_a_submit_that_makes_no_sense_fails_alone(wrong, monolith):
    pools = Pools(tiny_llama()[0])
    good = make_requests(1)[0]
    submit = submit_of(Request(77, (5,), SamplingParams(max_tokens=3, temperature=0)))
    pools.gateway.send(pools.attention(), replace(submit, **wrong))
    assert pools.run([good]) == [monolith.generate(good)[0]]
    assert pools.refused == [77]


def test_a_lost_frame_and_a_new_epoch_do_not_stop_a_lane(monolith):
    request = make_requests(1)[0]
    pools = Pools(tiny_llama()[0], resend_s=0.05)
    pools.submit(request)
    for _ in range(30):
        pools.turn()
        pools.network.lose_everything_for("ffn0-1")
        pools.publish()  # the same members under a new number
    assert pools.run([request]) == [monolith.generate(request)[0]]
