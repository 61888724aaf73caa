"""Routed models over whole pools: transformers' logits, and the same bits for any placement."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from afd_server.core.request import Request, SamplingParams
from afd_server.core.stage import AHEAD
from afd_server.core.topology import FFNParallel, Role
from afd_server.models.routing import RoutedRows, join
from afd_server.telemetry.timeline import EventKind, read_events
from afd_server.transport.codec import Envelope
from afd_server.transport.endpoint import Received
from afd_server.transport.inproc import Faults
from afd_server.transport.messages import Dispatch
from afd_server.workers.attention.sampler import Sampler
from afd_server.workers.config import Numerics
from afd_server.workers.tensors import to_payload
from support.checkpoints import tiny_llama
from support.experts import EXPERT_WRITERS, tiny_routed, write_qwen3_moe
from support.families import family
from support.pools import EXACT, Pools

NUM_OUTPUT = 32
LAYOUTS = [
    (FFNParallel.TENSOR, 2, 1),
    (FFNParallel.REPLICATE, 2, 1),
    (FFNParallel.EXPERT, 2, 1),
    (FFNParallel.EXPERT, 3, 2),
    (FFNParallel.HYBRID, 4, 1),
]


def make_requests(count=4, num_output=NUM_OUTPUT):
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, 259, (n,), generator=generator) for n in (60, 7, 33, 1)[:count]]
    sampling = SamplingParams(max_tokens=num_output, temperature=0)
    return [
        Request(key, tuple(ids.tolist()), replace(sampling, seed=key))
        for key, ids in enumerate(prompts, 1)
    ]


@pytest.fixture
def logits_of(monkeypatch):
    """Every row of logits that a worker samples from, by (seed of the request, position)."""
    recorded = {}

    def record(sampler, logits, params, position):
        recorded[params.seed, position] = logits.clone()
        return original(sampler, logits, params, position)

    original = Sampler.sample
    monkeypatch.setattr(Sampler, "sample", record)
    return recorded


def run(pools, requests, logits_of, slots=None):
    """Return the tokens and all logits of some requests."""
    logits_of.clear()
    tokens = pools.run(requests, slots or [0] * len(requests))
    pools.close()
    return tokens, dict(logits_of)


@pytest.mark.parametrize(("parallel", "num_ffn", "num_replicas"), LAYOUTS)
@pytest.mark.parametrize("kind", EXPERT_WRITERS)
def test_the_split_model_gives_transformers_logits_and_greedy_tokens(
    kind, parallel, num_ffn, num_replicas, logits_of
):
    directory, reference = tiny_routed(kind)
    pools = Pools(
        directory, num_attention=2, num_ffn=num_ffn, parallel=parallel, num_replicas=num_replicas
    )
    requests = make_requests()
    tokens, logits = run(pools, requests, logits_of, [0, 1, 0, 1])
    for request, got in zip(requests, tokens, strict=True):
        ids = [*request.prompt_ids, *got]
        expected = reference(torch.tensor([ids[:-1]])).logits[0, len(request.prompt_ids) - 1 :]
        assert got == expected.argmax(-1).tolist()
        seed, first = request.sampling.seed, len(request.prompt_ids)
        ours = torch.stack([logits[seed, first + step] for step in range(len(got))])
        assert (ours - expected).abs().max() <= 1e-4


@pytest.mark.parametrize(
    "numerics",
    [EXACT, Numerics("reference", "bfloat16", "bfloat16"), Numerics("native", "int8", "bfloat16"),
     Numerics("native", "float32", "float32")],
    ids=lambda n: f"{n.kernels}-{n.weights}",
)  # fmt: skip
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])  # the latter's have a shared one
def test_no_placement_of_whole_experts_changes_a_bit(name, numerics, logits_of):
    directory, requests = family(name).directory, make_requests(3, 8)
    layouts = [(FFNParallel.TENSOR, 1, 1), (FFNParallel.REPLICATE, 2, 1)]
    layouts += [(FFNParallel.EXPERT, n, k) for n, k in ((1, 1), (3, 1), (5, 2), (3, 3))]
    expected = None
    for parallel, num_ffn, num_replicas in layouts:
        pools = Pools(
            directory,
            num_ffn=num_ffn,
            parallel=parallel,
            num_replicas=num_replicas,
            numerics=numerics,
            num_lanes=3,
        )
        tokens, logits = run(pools, requests, logits_of)
        expected = expected or (tokens, logits)
        assert tokens == expected[0]
        assert all(torch.equal(logits[place], row) for place, row in expected[1].items())


@pytest.mark.parametrize("shape", [{"chosen": 8}, {"chosen": 1}, {"experts": 48, "chosen": 3}])
def test_all_one_or_few_of_the_experts_over_five_workers_give_the_tokens_of_one(shape, logits_of):
    directory, requests = tiny_routed("qwen3_moe", **shape)[0], make_requests(3, 8)
    one = run(Pools(directory), requests, logits_of)
    five = run(Pools(directory, num_ffn=5, parallel=FFNParallel.EXPERT), requests, logits_of)
    assert five[0] == one[0]
    assert all(torch.equal(five[1][place], row) for place, row in one[1].items())


def test_all_tokens_may_go_to_one_expert(tmp_path, logits_of):
    write_qwen3_moe(tmp_path, chosen=1)
    tensors = load_file(tmp_path / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("mlp.gate.weight"):
            tensor.zero_()  # of equal scores the first expert's is taken
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    requests = make_requests(3, 8)
    one = run(Pools(tmp_path), requests, logits_of)
    five = Pools(tmp_path, num_ffn=5, parallel=FFNParallel.EXPERT)
    assert run(five, requests, logits_of)[0] == one[0]
    calls = [w.num_steps for name, w in five.workers.items() if name.startswith("ffn")]
    assert [count > 0 for count in calls] == [True] * 3 + [False] * 2, "three layers, one each"


def test_dense_layers_between_routed_ones_lie_with_one_worker_each(logits_of):
    directory, requests = tiny_routed("qwen3_moe", dense_layers=(0, 2))[0], make_requests(3, 8)
    one = run(Pools(directory), requests, logits_of)
    three = run(Pools(directory, num_ffn=3, parallel=FFNParallel.EXPERT), requests, logits_of)
    assert three[0] == one[0]


def test_a_worker_without_tokens_for_a_layer_gets_no_message():
    pools = Pools(tiny_routed("mixtral")[0], num_ffn=8, num_lanes=1, parallel=FFNParallel.EXPERT)
    asked = []
    for name, worker in pools.workers.items():
        if name.startswith("ffn"):

            def handle(received, name=name, inner=worker.handle):
                if isinstance(received.message, Dispatch):
                    asked.append((received.message.step, received.message.layer, name))
                inner(received)

            worker.handle = handle
    pools.run([Request(1, (9,), SamplingParams(max_tokens=6, temperature=0))])
    # one token, two experts, a worker for each expert
    assert len(asked) == len(set(asked)) == 6 * 3 * 2


def test_calls_of_a_lost_worker_go_on_at_once_with_the_other_holders(logits_of):
    directory, requests = tiny_routed("mixtral")[0], make_requests(3, 20)
    expected, _ = run(Pools(directory), requests, logits_of)
    pools = Pools(directory, num_ffn=3, parallel=FFNParallel.EXPERT, num_replicas=2)
    for request in requests:
        pools.submit(request)
    for _ in range(25):
        pools.turn()
    pools.kill(next(n for n, m in pools.members.items() if m.role is Role.FFN and m.slot == 1))
    pools.publish()
    assert pools.run(requests) == expected


def test_without_replicas_calls_wait_for_the_new_holder(logits_of):
    directory, requests = tiny_routed("mixtral")[0], make_requests(3, 20)
    expected, _ = run(Pools(directory), requests, logits_of)
    pools = Pools(directory, num_ffn=3, parallel=FFNParallel.EXPERT)
    for request in requests:
        pools.submit(request)
    for _ in range(25):
        pools.turn()
    pools.kill(next(n for n, m in pools.members.items() if m.role is Role.FFN and m.slot == 1))
    pools.publish()
    for _ in range(100):
        pools.turn()
    assert not pools.finish
    pools.start(Role.FFN, 1)
    pools.publish()
    assert pools.run(requests) == expected


@pytest.mark.parametrize("seed", range(3))
def test_a_network_that_loses_repeats_delays_and_reorders_changes_no_token(seed, logits_of):
    directory, requests = tiny_routed("mixtral")[0], make_requests(3, 8)
    expected, _ = run(Pools(directory), requests, logits_of)
    faults = Faults(seed, drop=0.05, duplicate=0.1, max_delay=5)
    pools = Pools(
        directory,
        num_ffn=3,
        parallel=FFNParallel.EXPERT,
        num_replicas=2,
        faults=faults,
        resend_s=0.3,
    )
    assert pools.run(requests) == expected


def rows_for(experts):
    """Return the payload of one row, as tiny models have it, with these experts."""
    experts = torch.tensor([experts], dtype=torch.int32)
    return to_payload(join(RoutedRows(torch.ones(1, 96), experts, torch.ones(1, 2))))


@pytest.mark.parametrize(
    ("layer", "payload", "reason"),
    [
        (1, rows_for([0, 3]), "part"),  # of layer 1, slot 0 of 3 holds experts 2 and 5
        (1, rows_for([2, 8]), "part"),
        (1, rows_for([2, -2]), "part"),
        (1, rows_for([-1, -1]), "range"),
        (4, rows_for([2, 5]), "range"),
        (3, to_payload(torch.ones(1, 96)), "part"),  # the head, held by the attention side
        (1, to_payload(torch.ones(1, 96)), "shape"),
        (1, to_payload(torch.ones(1, 96 * 4 + 16)), "dtype"),
        (1, to_payload(torch.ones(1, 96 * 4 + 24, dtype=torch.uint8)), "shape"),
        (0, to_payload(torch.ones(1, 96)), None),  # dense, and held by slot 0
        (2, to_payload(torch.ones(1, 96)), "part"),  # dense, held by slot 2
        (1, rows_for([2, 5]), None),
        (1, rows_for([-1, 5]), None),
    ],
)
def test_a_call_for_what_a_worker_does_not_hold_or_cannot_read_is_refused(layer, payload, reason):
    directory, _ = tiny_routed("qwen3_moe", dense_layers=(0, 2))
    pools = Pools(directory, num_ffn=3, parallel=FFNParallel.EXPERT)
    (name,) = (n for n, m in pools.members.items() if m.role is Role.FFN and m.slot == 0)
    sender = pools.members[pools.attention()]
    envelope = Envelope(sender.incarnation, 1, 1, "digest", sender.fingerprint)
    dispatch = Dispatch(1, 0, layer, 0, 0, payload)
    pools.workers[name].handle(Received(envelope, sender, dispatch))
    refused = {k: n for k, n in pools.endpoints[name].counters.items() if k.startswith("refused")}
    assert refused == ({f"refused_{reason}": 1} if reason else {})
    assert pools.workers[name].load(0).running == (reason is None)


@pytest.mark.parametrize(
    ("name", "num_experts", "choices"),
    [("qwen3_moe", 8, [3, 0, 3]), ("deepseek_v3", 12, [0, 3, 3])],
)
def test_gates_count_every_choice_once_whatever_is_sent_again(name, num_experts, choices):
    faults = Faults(7, drop=0.05, duplicate=0.1, max_delay=5)
    pools = Pools(
        family(name).directory,
        num_ffn=3,
        parallel=FFNParallel.EXPERT,
        faults=faults,
        resend_s=0.3,
    )
    requests = make_requests(2, 6)
    pools.run(requests)
    worker = pools.workers[pools.attention()]
    counts = memoryview(worker.expert_load().tokens.data).cast("q", (3, num_experts)).tolist()
    report = worker.load(0)
    events = list(read_events(report.events.data))
    sampled = {(e.step, e.lane) for e in events if e.kind == EventKind.SAMPLE}
    unasked = sum(  # what goes ahead of a prompt's rest ends with the last layer's attention
        e.rows
        for e in events
        if e.kind == EventKind.ATTENTION and e.layer == 2 and e.lane >= AHEAD
        if (e.step, e.lane) not in sampled
    )
    rows = [report.rows, report.rows, report.rows - unasked]
    expected = [count * num_rows for count, num_rows in zip(choices, rows, strict=True)]
    assert [sum(row) for row in counts] == expected


def test_a_model_without_experts_reports_none():
    pools = Pools(tiny_llama()[0])
    assert all(worker.expert_load() is None for worker in pools.workers.values())
