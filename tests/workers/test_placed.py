"""What runs on which side is the placement's affair: the bits are the same on either."""

import itertools

import pytest
import torch

from afd_server.core.clock import ManualClock
from afd_server.core.model_spec import read_model_spec
from afd_server.core.request import Request, SamplingParams
from afd_server.core.stage import StageId
from afd_server.core.topology import FFNParallel, Member, Placement, Role, Topology
from afd_server.models.base import FFNCall
from afd_server.models.routing import RoutedRows, join
from afd_server.telemetry.timeline import Timeline
from afd_server.transport.codec import Envelope
from afd_server.transport.endpoint import Endpoint, Identity, Received
from afd_server.transport.inproc import Faults, InProcessNetwork
from afd_server.transport.messages import Combine, Dispatch
from afd_server.workers import runtime
from afd_server.workers.attention.ffn_client import FFNClient
from afd_server.workers.config import Numerics
from afd_server.workers.tensors import to_payload
from support.checkpoints import tiny_llama
from support.experts import tiny_routed
from support.logits import record_logits
from support.pools import EXACT, Pools

NUMERICS = [
    EXACT,
    Numerics("reference", "bfloat16", "bfloat16"),
    Numerics("native", "int8", "bfloat16"),
    Numerics("native", "float32", "float32"),
]
DENSE = (0, 2)  # of the three layers


def requests():
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, 259, (n,), generator=generator).tolist() for n in (40, 7, 1)]
    return [
        Request(key, tuple(ids), SamplingParams(max_tokens=8, temperature=0.7, seed=key))
        for key, ids in enumerate(prompts, 1)
    ]


@pytest.fixture
def logits_of(monkeypatch):
    return record_logits(monkeypatch)


def run(pools, logits_of):
    logits_of.clear()
    tokens = pools.run(requests())
    pools.close()
    return tokens, dict(logits_of)


def assert_same_bits(got, expected):
    assert got[0] == expected[0]
    assert got[1].keys() == expected[1].keys()
    assert all(torch.equal(got[1][place], row) for place, row in expected[1].items())


def dispatches(pools):
    """Return a list that fills with every dispatch that FFN workers get."""
    taken = []
    for name, worker in pools.workers.items():
        if name.startswith("ffn"):

            def handle(received, inner=worker.handle):
                if isinstance(received.message, Dispatch):
                    taken.append(received.message)
                inner(received)

            worker.handle = handle
    return taken


def routed_with_dense_layers():
    return tiny_routed("qwen3_moe", dense_layers=DENSE)[0]


@pytest.mark.parametrize("numerics", NUMERICS, ids=lambda n: f"{n.kernels}-{n.weights}")
@pytest.mark.parametrize(
    ("parallel", "num_ffn"),
    [(FFNParallel.TENSOR, 1), (FFNParallel.REPLICATE, 2), (FFNParallel.EXPERT, 3)],
)
def test_dense_layers_give_the_same_bits_on_either_side(parallel, num_ffn, numerics, logits_of):
    shape = {"num_ffn": num_ffn, "parallel": parallel, "numerics": numerics, "num_lanes": 3}
    expected = run(Pools(routed_with_dense_layers(), **shape), logits_of)
    pools = Pools(routed_with_dense_layers(), **shape, dense_layers=Role.ATTENTION)
    taken = dispatches(pools)
    assert_same_bits(run(pools, logits_of), expected)
    assert {message.layer for message in taken} == {1}


def test_dense_layers_of_the_attention_side_are_whole_where_experts_are_cut(logits_of):
    directory, reference = tiny_routed("qwen3_moe", dense_layers=DENSE)
    pools = Pools(directory, num_ffn=2, dense_layers=Role.ATTENTION)
    taken = dispatches(pools)
    tokens, logits = run(pools, logits_of)
    assert {message.layer for message in taken} == {1}
    for request, got in zip(requests(), tokens, strict=True):
        first = len(request.prompt_ids)
        ids = torch.tensor([[*request.prompt_ids, *got[:-1]]])
        ours = torch.stack([logits[request.sampling.seed, first + i] for i in range(len(got))])
        assert (ours - reference(ids).logits[0, first - 1 :]).abs().max() <= 1e-4


@pytest.mark.parametrize("setting", ["dense_layers", "lm_head"])
@pytest.mark.parametrize(("num_ffn", "differs"), [(1, False), (2, True)])
def test_the_fingerprint_knows_who_holds_what_only_where_it_is_cut(num_ffn, differs, setting):
    prints = {
        Pools(tiny_llama()[0], num_ffn=num_ffn, **{setting: side}).topology.members[1].fingerprint
        for side in (Role.ATTENTION, Role.FFN)
    }
    assert len(prints) == 1 + differs


SOME_AT_ATTENTION = [
    {(1, 0)},
    {(1, 7), (0, 0)},
    {(1, expert) for expert in range(8)},
    set(itertools.product((1,), (1, 2, 5))),
]


def at_attention(monkeypatch, named):
    """Let the attention side hold these (layer, expert), whatever the settings say."""

    def placement_of(config, model):
        given = original(config, model)
        holders = tuple(
            tuple(
                (given.attention_side,) if (layer, expert) in named else groups
                for expert, groups in enumerate(experts)
            )
            for layer, experts in enumerate(given.holders)
        )
        return Placement(holders, given.num_groups, given.num_shards)

    original = runtime.placement_of
    monkeypatch.setattr(runtime, "placement_of", placement_of)


@pytest.mark.parametrize("numerics", NUMERICS, ids=lambda n: f"{n.kernels}-{n.weights}")
@pytest.mark.parametrize("named", SOME_AT_ATTENTION, ids=len)
def test_the_attention_side_may_hold_any_expert_of_any_layer(
    named, numerics, logits_of, monkeypatch
):
    shape = {"num_ffn": 3, "parallel": FFNParallel.EXPERT, "numerics": numerics}
    expected = run(Pools(routed_with_dense_layers(), **shape), logits_of)
    at_attention(monkeypatch, named)
    assert_same_bits(run(Pools(routed_with_dense_layers(), **shape), logits_of), expected)


def test_a_worker_lost_in_the_middle_of_calls_that_are_partly_computed_here_changes_no_token(
    logits_of, monkeypatch
):
    expected = run(Pools(routed_with_dense_layers()), logits_of)[0]
    at_attention(monkeypatch, SOME_AT_ATTENTION[-1])
    pools = Pools(routed_with_dense_layers(), num_ffn=2, parallel=FFNParallel.EXPERT)
    for request in requests():
        pools.submit(request)
    for _ in range(15):
        pools.turn()
    pools.kill(next(n for n, m in pools.members.items() if m.role is Role.FFN and m.slot == 1))
    pools.publish()
    for _ in range(50):
        pools.turn()
    assert not pools.finish
    pools.start(Role.FFN, 1)
    pools.publish()
    assert pools.run(requests()) == expected


HEAD_LAYOUTS = [
    (FFNParallel.TENSOR, 1),
    (FFNParallel.TENSOR, 2),
    (FFNParallel.TENSOR, 4),
    (FFNParallel.REPLICATE, 2),
]


@pytest.mark.parametrize("numerics", NUMERICS, ids=lambda n: f"{n.kernels}-{n.weights}")
@pytest.mark.parametrize(("parallel", "num_ffn"), HEAD_LAYOUTS)
@pytest.mark.parametrize("tied", [False, True])
def test_the_head_gives_the_same_bits_on_either_side_whole_or_in_parts(
    tied, parallel, num_ffn, numerics, logits_of
):
    shape = {"num_ffn": num_ffn, "parallel": parallel, "numerics": numerics, "num_attention": 2}
    expected = run(Pools(tiny_llama(tied=tied)[0], **shape), logits_of)
    for shares_head in (False, True):
        model = tiny_llama(tied=tied)[0]
        pools = Pools(model, **shape, lm_head=Role.FFN, shares_head=shares_head)
        assert_same_bits(run(pools, logits_of), expected)


def test_each_side_computes_its_part_of_the_vocabulary():
    pools = Pools(tiny_llama()[0], num_ffn=2, lm_head=Role.FFN, shares_head=True)
    attention = pools.workers[pools.attention()]
    ffn = [worker for name, worker in pools.workers.items() if name.startswith("ffn")]
    held = [attention._ffn._own, *(worker._held for worker in ffn)]
    rows = torch.ones(1, 96)
    widths = [half.answer(3, rows).shape[1] for half in held]
    assert sum(widths) == pools._model_spec.vocab_size and max(widths) <= 2 * min(widths)


def test_a_model_with_experts_has_its_head_where_a_dense_layer_would_be(logits_of):
    expected = run(Pools(routed_with_dense_layers()), logits_of)
    shape = {"num_ffn": 3, "parallel": FFNParallel.EXPERT, "num_replicas": 2}
    pools = Pools(
        routed_with_dense_layers(), **shape, lm_head=Role.FFN, dense_layers=Role.ATTENTION
    )
    taken = dispatches(pools)
    assert_same_bits(run(pools, logits_of), expected)
    assert {message.layer for message in taken} == {1, 3}


def test_only_rows_that_need_logits_travel_to_the_head():
    pools = Pools(tiny_llama()[0], num_lanes=1, lm_head=Role.FFN, max_batch_tokens=24)
    taken = dispatches(pools)
    pools.run([Request(1, tuple(range(3, 73)), SamplingParams(max_tokens=4, temperature=0))])
    rows = [message.activations.shape[0] for message in taken if message.layer == 3]
    assert rows == [1, 1, 1, 1]  # of a prompt in three chunks, and of four tokens


@pytest.mark.parametrize("shares_head", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_a_network_that_loses_and_reorders_logits_changes_no_token(seed, shares_head, logits_of):
    expected = run(Pools(tiny_llama()[0], num_ffn=2), logits_of)[0]
    faults = Faults(seed, drop=0.05, duplicate=0.1, max_delay=5)
    head = {"lm_head": Role.FFN, "shares_head": shares_head}
    pools = Pools(tiny_llama()[0], num_ffn=2, **head, faults=faults, resend_s=0.3)
    assert pools.run(requests()) == expected


@pytest.mark.parametrize(
    ("lm_head", "layer", "reason"),
    [(Role.FFN, 3, None), (Role.FFN, 4, "range"), (Role.ATTENTION, 3, "part")],
)
def test_a_worker_without_the_head_refuses_its_calls(lm_head, layer, reason):
    pools = Pools(tiny_llama()[0], lm_head=lm_head)
    (name,) = (n for n, m in pools.members.items() if m.role is Role.FFN)
    sender = pools.members[pools.attention()]
    envelope = Envelope(sender.incarnation, 1, 1, "digest", sender.fingerprint)
    dispatch = Dispatch(1, 0, layer, 0, 0, to_payload(torch.ones(2, 96)))
    pools.workers[name].handle(Received(envelope, sender, dispatch))
    refused = {k: n for k, n in pools.endpoints[name].counters.items() if k.startswith("refused")}
    assert refused == ({f"refused_{reason}": 1} if reason else {})


class CountsWhatIsOut:
    """What is held here, as far as it notes how many messages have left when it is asked."""

    def __init__(self, network):
        self._network = network
        self.num_out = []

    def answer(self, layer, rows):
        self.num_out.append(len(self._network.collect("ffn0")))
        return torch.zeros(2, 96)


def client_of(placement, own, network):
    clock = ManualClock()
    endpoint = Endpoint(network.link("attention0"), Identity("attention0", "digest"), clock)
    spec = read_model_spec(tiny_llama()[0])
    client = FFNClient(
        placement, 0, own, spec, torch.float32, endpoint, clock, Timeline(), resend_s=1.0
    )
    names = [network.link(f"ffn{slot}").address.rpartition("/")[2] for slot in (0, 1)]
    endpoint.topology = Topology(
        1, tuple(Member(Role.FFN, slot, name, "", "") for slot, name in enumerate(names))
    )
    client.reassign()
    return client


def test_the_own_part_of_a_call_is_computed_while_the_rest_is_out():
    network = InProcessNetwork()
    own = CountsWhatIsOut(network)
    client = client_of(Placement((((0,), (1,)),), num_groups=1), own, network)
    experts = torch.tensor([[0, 1], [0, 1]], dtype=torch.int32)
    rows = join(RoutedRows(torch.ones(2, 96), experts, torch.ones(2, 2)))
    assert not client.dispatch(StageId(1, 0, 0), FFNCall(0, rows, 2), 0.0)
    assert own.num_out == [1]


def test_a_call_that_is_computed_here_is_complete_at_once_and_nothing_is_sent_again():
    network = InProcessNetwork()
    own = CountsWhatIsOut(network)
    client = client_of(Placement((((1,),),), num_groups=1), own, network)
    assert client.dispatch(StageId(1, 0, 0), FFNCall(0, torch.ones(2, 96)), 0.0)
    assert client.next_resend_s() is None
    assert torch.equal(client.take(0), torch.zeros(2, 96))
    assert own.num_out == [0]


@pytest.mark.parametrize(
    ("width", "dtype", "is_taken"),
    [(128, torch.float32, True), (131, torch.float32, False), (128, torch.bfloat16, False)],
)
def test_only_logits_of_a_workers_own_part_of_the_vocabulary_are_taken(width, dtype, is_taken):
    network = InProcessNetwork()
    client = client_of(Placement((((0,),),), 1, num_shards=2), CountsWhatIsOut(network), network)
    client.dispatch(StageId(1, 0, 0), FFNCall(0, torch.ones(2, 96), is_head=True), 0.0)
    answer = Combine(1, 0, 0, 0, 1, 0, 0, "", to_payload(torch.ones(2, width, dtype=dtype)))
    ffn0 = Member(Role.FFN, 0, "ffn0", "", "")
    client.accept(Received(Envelope("ffn0", 1, 1, "digest", ""), ffn0, answer), answer)
    assert client.counters["bad_partial"] == (not is_taken)
