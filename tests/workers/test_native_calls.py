"""Workers whose calls native code sends and answers: the tokens and the care of Python's path."""

import pytest
import torch

from afd_server.core.errors import ProtocolError
from afd_server.core.request import Request, SamplingParams
from afd_server.core.stage import AHEAD
from afd_server.core.topology import FFNParallel, Role
from afd_server.models.base import Reached
from afd_server.telemetry.timeline import EventKind, read_events
from afd_server.transport.codec import Envelope
from afd_server.transport.endpoint import Received
from afd_server.transport.messages import Combine, Dispatch, DType, Payload
from afd_server.workers import runtime
from afd_server.workers.config import Numerics
from support.checkpoints import tiny_llama
from support.experts import tiny_routed
from support.pools import Pools, ipc_links, shm_links, tcp_links

INT8 = Numerics("native", "int8", "bfloat16")


def requests(count=6, first=1):
    generator = torch.Generator().manual_seed(5)
    lengths = (90, 7, 1, 130, 60, 33)
    return [
        Request(
            key,
            tuple(torch.randint(3, 259, (lengths[key % 6],), generator=generator).tolist()),
            SamplingParams(max_tokens=10, temperature=0.7 if key % 2 else 0.0, seed=key),
        )
        for key in range(first, first + count)
    ]


@pytest.fixture(params=[shm_links, ipc_links])
def open_pools(request, tmp_path):
    opened = []

    def open_one(model, native=True, **settings):
        link = request.param(tmp_path) if native else None
        settings = {"numerics": INT8, "max_batch_tokens": 128, "num_ffn": 2} | settings
        parallel = {"parallel": FFNParallel.REPLICATE, "num_replicas": settings["num_ffn"]}
        opened.append(Pools(model, link=link, with_crc=not native, **(parallel | settings)))
        return opened[-1]

    yield open_one
    for pools in opened:
        pools.close()


def answered(pools):
    return [w._server.num_calls for name, w in pools.workers.items() if name.startswith("ffn")]


def expected_tokens(open_pools, model, wanted):
    return open_pools(model, native=False).run(wanted)


def count_further(client):
    """Return a list that takes the layers which native code came to by itself."""
    take, reached = client.take, []

    def taken(lane):
        answer = take(lane)
        reached.extend([answer.layer] if isinstance(answer, Reached) else [])
        return answer

    client.take = taken
    return reached


def run_until_between_layers(pools):
    """Return the client of the attention worker once native code has sent a call of its own."""
    client = pools.workers[pools.attention()]._ffn
    for _ in range(1000):
        pools.turn()
        calls = client._calls.items()
        if any(client._native.layer(place) > call.first_layer for place, call in calls):
            return client
    raise AssertionError("no call went on")


@pytest.mark.parametrize("num_attention", [1, 2])
@pytest.mark.parametrize("shares_dense", [False, True])
def test_native_calls_give_the_tokens_of_python_calls(open_pools, num_attention, shares_dense):
    model, wanted = tiny_llama()[0], requests()
    expected = expected_tokens(open_pools, model, wanted)
    pools = open_pools(model, num_attention=num_attention, shares_dense=shares_dense)
    slots = [request.key % num_attention for request in wanted]
    assert pools.run(requests(2, 101), [0, num_attention - 1])  # the memory is agreed on
    clients = [w._ffn for name, w in pools.workers.items() if name.startswith("attention")]
    resends = [client.num_resends for client in clients]
    went_on = [count_further(client) for client in clients]
    assert pools.run(wanted, slots) == expected
    assert all(count > 20 for count in answered(pools))
    assert all(len(reached) > 10 for reached in went_on)
    assert [client.num_resends for client in clients] == resends
    assert not any(client._calls for client in clients)


def halves_computed(pools):
    """Return how many halves of FFNs the attention worker has computed since the last time."""
    events = read_events(bytes(pools.workers[pools.attention()].load(0).events.data))
    num_layers = pools._model_spec.num_layers
    return sum(e.kind == EventKind.FFN and e.layer < num_layers for e in events)


@pytest.mark.parametrize("num_lanes", [1, 3])
def test_both_sides_compute_the_ffns_of_a_lane_that_is_alone(open_pools, num_lanes):
    model, wanted = tiny_llama()[0], [r for r in requests(12) if len(r.prompt_ids) < 48]
    expected = expected_tokens(open_pools, model, wanted)
    pools = open_pools(model, num_ffn=1, num_lanes=num_lanes, shares_dense=True)
    assert pools.run(requests(2, 101))
    halves_computed(pools)
    before = answered(pools)[0]
    assert pools.run(wanted) == expected
    num_halves, num_calls = halves_computed(pools), answered(pools)[0] - before
    if num_lanes == 1:
        assert num_calls >= num_halves > num_calls / 2  # steps in two parts are no lane alone
    else:
        assert num_halves < num_calls / 2


@pytest.mark.parametrize("shares_head", [False, True])
def test_the_head_is_answered_without_python(open_pools, shares_head):
    model, wanted = tiny_llama()[0], requests()
    expected = expected_tokens(open_pools, model, wanted)
    pools = open_pools(model, num_ffn=1, lm_head=Role.FFN, shares_head=shares_head)
    assert pools.run(requests(2, 101))
    (worker,) = (w for name, w in pools.workers.items() if name.startswith("ffn"))
    answer, in_python = worker._held.answer, []
    worker._held.answer = lambda layer, rows: in_python.append(layer) or answer(layer, rows)
    before = worker._server.num_calls
    assert pools.run(wanted) == expected
    assert worker._server.num_calls > before + 30
    assert pools._model_spec.num_layers not in in_python


def test_logits_that_native_code_does_not_expect_are_taken_by_python(open_pools):
    model, wanted = tiny_llama()[0], requests()
    expected = expected_tokens(open_pools, model, wanted)
    head = {"lm_head": Role.FFN, "shares_head": True}
    pools = open_pools(model, num_ffn=1, **head)
    assert pools.run(requests(2, 101))
    client, head_layer = pools.workers[pools.attention()]._ffn, pools._model_spec.num_layers
    call, changed = client._native.call, []

    def change_some(place, peer, stage, *rest):
        sent = call(place, peer, stage, *rest)
        if sent and stage.layer == head_layer and stage.step % 5 == 0:
            client._native._outs[place].step += 1  # so that its answer is nobody's there
            changed.append(stage)
        return sent

    client._native.call = change_some
    assert pools.run(wanted) == expected
    assert len(changed) > 2


def test_python_answers_calls_for_halves_as_well(open_pools):
    model, wanted = tiny_llama()[0], requests()
    expected = expected_tokens(open_pools, model, wanted)
    pools = open_pools(model, num_ffn=1, num_lanes=1, shares_dense=True)
    assert pools.run(requests(2, 101))
    halves_computed(pools)
    (server,) = (w._server for name, w in pools.workers.items() if name.startswith("ffn"))
    server.follow(pools.epoch, {})  # nobody whom native code knows
    before = answered(pools)
    assert pools.run(wanted) == expected
    assert answered(pools) == before and halves_computed(pools) > 10


@pytest.mark.parametrize("layer", [3 + 1 + 3, 3 + 1 + 1])
def test_a_half_that_there_is_not_is_refused(open_pools, layer):
    model = tiny_routed("qwen3_moe", dense_layers=(0, 2))[0]
    pools = open_pools(model, num_ffn=1)
    assert pools._model_spec.num_layers == 3
    (worker,) = (w for name, w in pools.workers.items() if name.startswith("ffn"))
    width = worker._row_format.size(pools._model_spec.hidden_size)
    rows = Payload(DType.UINT8, (1, width), bytes(width))
    assert worker._checked(Dispatch(1, 0, 3 + 1 + 2, 0, 0, rows)).shape == (1, width)
    with pytest.raises(ProtocolError, match=f"layer {layer} of 3"):
        worker._checked(Dispatch(1, 0, layer, 0, 0, rows))


@pytest.mark.parametrize(("layer", "is_taken"), [(4, True), (8, False)])
def test_an_answer_to_what_was_never_asked_for_is_stale(open_pools, layer, is_taken):
    pools = open_pools(tiny_llama()[0], num_ffn=1, num_lanes=1, shares_dense=True)
    assert pools.run(requests(1, 101)) and pools._model_spec.num_layers == 3
    pools.submit(requests(1)[0])
    client = run_until_between_layers(pools)
    (pending,) = client._calls.values()
    client._give_up(pending)
    step, lane, at = pending.stage
    shape = pending.call.rows.shape[0], pools._model_spec.hidden_size
    partial = Payload(DType.FLOAT32, shape, bytes(4 * shape[0] * shape[1]))
    combine = Combine(step, lane, layer + at, 0, pools.epoch, 0, 0, "", partial)
    (ffn,) = (member for member in pools.members.values() if member.role is Role.FFN)
    stale = client.counters["stale"]
    received = Received(Envelope(ffn.incarnation, pools.epoch, 1, "", "", 0), ffn, combine)
    assert (client.accept(received, combine) == lane) == is_taken
    assert client.counters["stale"] == stale + (not is_taken)


def test_the_answer_to_a_half_is_good_when_native_code_has_given_it_up(open_pools):
    model, wanted = tiny_llama()[0], requests()
    expected = expected_tokens(open_pools, model, wanted)
    pools = open_pools(model, num_ffn=1, num_lanes=1, shares_dense=True, resend_s=3600.0)
    assert pools.run(requests(2, 101))
    for request in wanted:
        pools.submit(request)
    for _ in range(5):
        client = run_until_between_layers(pools)
        for pending in list(client._calls.values()):
            client._give_up(pending)
    before = client.counters["stale"], client.num_resends
    assert pools.run(wanted) == expected
    assert (client.counters["stale"], client.num_resends) == before


@pytest.mark.parametrize("given_up", ["ahead", "rest", "both", "none"])
def test_a_prompt_s_parts_go_on_in_native_code_and_in_python(open_pools, given_up):
    model, wanted = tiny_llama()[0], requests()
    expected = expected_tokens(open_pools, model, wanted)
    pools = open_pools(model, num_ffn=1, num_lanes=1, resend_s=3600.0)
    assert pools.run(requests(2, 101))
    worker = pools.workers[pools.attention()]
    client = worker._ffn
    reached = count_further(client)
    for request in wanted:
        pools.submit(request)
    num_together = 0
    for _ in range(60):
        pools.turn()
        for lane in worker._lanes:
            ahead = lane.part(AHEAD)
            assert ahead.is_over or lane.rest.num_stages <= ahead.num_stages, "its keys are needed"
        parts = {pending.stage.lane >= AHEAD: pending for pending in client._calls.values()}
        if len(parts) < 2:
            continue
        num_together += 1
        for is_ahead, pending in parts.items():
            if given_up in ("both", "ahead" if is_ahead else "rest"):
                client._give_up(pending)
    assert num_together > 2
    assert pools.run(wanted) == expected
    assert reached


@pytest.mark.parametrize("shares_dense", [False, True])
def test_a_lost_worker_costs_no_token(open_pools, shares_dense):
    model, wanted = tiny_llama()[0], requests()
    expected = expected_tokens(open_pools, model, wanted)
    pools = open_pools(model, shares_dense=shares_dense)
    assert pools.run(requests(2, 101))
    for request in wanted:
        pools.submit(request)
    before = sum(answered(pools))
    while sum(answered(pools)) < before + 20:
        pools.turn()
    lost = next(name for name in pools.workers if name.startswith("ffn"))
    slot = pools.members[lost].slot
    pools.kill(lost)
    for _ in range(20):
        pools.turn()
    pools.start(Role.FFN, slot)
    pools.publish()
    assert pools.run(wanted) == expected


@pytest.mark.parametrize("shares_dense", [False, True])
def test_a_new_topology_in_the_middle_costs_no_token(open_pools, shares_dense):
    model, wanted = tiny_llama()[0], requests()
    expected = expected_tokens(open_pools, model, wanted)
    pools = open_pools(model, num_attention=1, shares_dense=shares_dense)
    assert pools.run(requests(2, 101))
    for request in wanted:
        pools.submit(request)
    for _ in range(40):
        pools.turn()
        pools.turn()
        pools.publish()
    assert pools.run(wanted) == expected


@pytest.mark.parametrize("numerics", [INT8, Numerics("native", "int8", "int8")])
@pytest.mark.parametrize("shares_dense", [False, True])
def test_a_call_that_went_on_is_sent_again_from_its_layer(open_pools, numerics, shares_dense):
    model, wanted = tiny_llama()[0], requests()
    expected = open_pools(model, native=False, numerics=numerics).run(wanted)
    pools = open_pools(model, num_ffn=1, numerics=numerics, shares_dense=shares_dense)
    assert pools.run(requests(2, 101))
    for request in wanted:
        pools.submit(request)
    for _ in range(5):
        client = run_until_between_layers(pools)
        kept, client._resend_s = client._resend_s, -1.0
        for pending in client._pending.values():
            pending.resend_at = 0.0
        before = client.num_resends
        client.resend_due()
        client._resend_s = kept
        assert client.num_resends > before and not client._calls
        assert any(
            pending.stage.layer > pending.first_layer for pending in client._pending.values()
        )
    assert pools.run(wanted) == expected


def test_a_call_out_for_long_is_not_sent_again_while_it_goes_on(open_pools):
    pools = open_pools(tiny_llama()[0], num_ffn=1)
    assert pools.run(requests(2, 101))
    for request in requests():
        pools.submit(request)
    client = run_until_between_layers(pools)
    client._resend_s = 3600.0  # however slow the machine is
    for pending in client._calls.values():
        pending.resend_at = 0.0  # of the call that was asked for
    kept, resends = dict(client._calls), client.num_resends
    client.resend_due()
    assert client.num_resends == resends and client._calls == kept
    assert all(pending.resend_at > 0.0 for pending in kept.values())


def test_an_answer_that_has_come_survives_a_new_topology(open_pools):
    pools = open_pools(tiny_llama()[0], num_lanes=1)
    assert pools.run(requests(1, 101))
    name = pools.attention()
    client = pools.workers[name]._ffn
    pools.submit(requests(1)[0])
    for _ in range(1000):
        pools.turn()
        client._native.watch(20_000_000 if client._calls else 0)
        if client._calls and client._native._state.num_ready:
            break
    (lane,) = (call.stage.lane for call in client._calls.values())
    client.reassign()
    assert client.take_ready() == [lane]
    assert client._pending[lane].is_complete and not client._calls


@pytest.mark.parametrize("shares_dense", [False, True])
def test_the_timeline_is_that_of_python_calls(open_pools, shares_dense):
    model = tiny_llama()[0]
    pools = open_pools(model, num_ffn=1, num_lanes=1, shares_dense=shares_dense)
    assert pools.run(requests(1, 101))
    workers = dict(pools.workers)
    for worker in workers.values():
        worker.load(0)
    assert pools.run(requests(1, 201))
    events = {
        name: list(read_events(bytes(worker.load(0).events.data)))
        for name, worker in workers.items()
    }
    (attention,) = (seen for name, seen in events.items() if name.startswith("attention"))
    (ffn,) = (seen for name, seen in events.items() if name.startswith("ffn"))
    computed = [(e.step, e.lane, e.layer, e.rows) for e in ffn if e.kind == EventKind.FFN]
    for kind in (EventKind.A_TO_F, EventKind.F_TO_A):
        assert [(e.step, e.lane, e.layer, e.rows) for e in attention if e.kind == kind] == computed
    assert len(computed) >= 3 * 10
    assert sum(e.kind == EventKind.WAIT for e in ffn) > 0


@pytest.mark.parametrize("parallel", [FFNParallel.TENSOR, FFNParallel.EXPERT])
def test_what_native_code_cannot_do_python_does(open_pools, parallel):
    routed = parallel is FFNParallel.EXPERT
    model = tiny_routed("qwen3_moe")[0] if routed else tiny_llama()[0]
    wanted = requests(3)
    settings = {"parallel": parallel, "num_replicas": 1}
    expected = open_pools(model, native=False, **settings).run(wanted)
    pools = open_pools(model, **settings)
    assert pools.run(wanted) == expected
    clients = [w._ffn for name, w in pools.workers.items() if name.startswith("attention")]
    assert all(client._native is not None and not client._calls for client in clients)


@pytest.mark.parametrize("obstacle", ["checksums", "tcp", "libzmq"])
def test_python_sends_calls_where_native_code_cannot(tmp_path, monkeypatch, caplog, obstacle):
    if obstacle == "libzmq":
        monkeypatch.setattr(runtime, "why_not_native", lambda: "there is no libzmq")
    link = tcp_links() if obstacle == "tcp" else ipc_links(tmp_path)
    pools = Pools(tiny_llama()[0], numerics=INT8, link=link, with_crc=obstacle == "checksums")
    try:
        assert pools.run(requests(1))
        assert all(w._server is None for name, w in pools.workers.items() if name[0] == "f")
        assert pools.workers[pools.attention()]._ffn._native is None
    finally:
        pools.close()
    assert ("calls go through Python: there is no libzmq" in caplog.text) == (obstacle == "libzmq")
