"""What native code answers in the middle of a wait, and what it leaves to Python."""

import contextlib
import ctypes
import itertools
import signal
import struct
import threading
import time
import zlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from afd_server.core.clock import MonotonicClock
from afd_server.core.errors import ConfigError, TransportError
from afd_server.core.stage import StageId
from afd_server.core.topology import Member, Role, Topology
from afd_server.telemetry.timeline import EventKind, read_events
from afd_server.transport import shm, sockets
from afd_server.transport.calls import (
    MOST_CALLS,
    CallClient,
    CallServer,
    NativeLayer,
    NativeWay,
    Rows,
)
from afd_server.transport.codec import HeaderReader, decode, encode
from afd_server.transport.endpoint import Endpoint, Identity
from afd_server.transport.messages import Combine, Dispatch, DType, Heartbeat, Payload, ProcessState
from afd_server.transport.ring import MAX_RECORDS, RingLibrary
from support.links import (
    PATIENCE,
    IPCNet,
    SharedMemoryNet,
    await_frames,
    opened,
    pair,
    send_once_connected,
)

ROW_BYTES, WIDTH, SLOT, MOST_ROWS, EPOCH = 12, 3, 1, 8, 7
FUNCTION = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint8), ctypes.c_int64,
    ctypes.POINTER(ctypes.c_float),
)  # fmt: skip


STAGE = StageId(11, 65_537, 2)
ONLY_RINGS = pytest.mark.parametrize("net", [SharedMemoryNet], indirect=True)
ONLY_SOCKETS = pytest.mark.parametrize("net", [IPCNet], indirect=True)


@pytest.fixture(params=[SharedMemoryNet, IPCNet])
def net(request, tmp_path):
    yield from opened(request.param, tmp_path)


def computed(layer, row):
    return [float(sum(row)), float(row[0]), float(layer)]


class Worker:
    """Two links and a server behind the second, for layers 0 and 2 of three."""

    def __init__(self, net):
        self.a, self.b = pair(net)
        self.batches = []
        self.during = lambda: None
        self.functions = [FUNCTION(self.compute(layer)) for layer in range(3)]
        layers = [
            NativeLayer(ctypes.cast(f, ctypes.c_void_p).value, 0, ROW_BYTES, WIDTH)
            if layer != 1
            else NativeLayer(0, 0, 0, 0)
            for layer, f in enumerate(self.functions)
        ]
        clock = MonotonicClock()
        members = (
            Member(Role.ATTENTION, 3, "a", "ipc://a", "numerics"),
            Member(Role.FFN, SLOT, "b", "ipc://b", "numerics"),
        )
        self.caller = Endpoint(self.a, Identity("a", "model", "numerics"), clock, (), False)
        self.answerer = Endpoint(self.b, Identity("b", "model", "numerics"), clock, (), False)
        self.caller.topology = self.answerer.topology = Topology(EPOCH, members)
        sequence = self.answerer.sequence
        self.server = CallServer(RingLibrary(), layers, 3, SLOT, MOST_ROWS, sequence)
        self.b.assist(self.server)
        self.server.follow(EPOCH, self.answerer.pool(Role.ATTENTION))

    def compute(self, layer):
        def function(_context, rows, count, out):
            batch = [bytes(rows[i * ROW_BYTES : (i + 1) * ROW_BYTES]) for i in range(count)]
            self.batches.append((layer, count))
            self.during()
            for place, value in enumerate(
                itertools.chain.from_iterable(computed(layer, row) for row in batch)
            ):
                out[place] = value

        return function

    def serve(self, count=1):
        """Let the server answer so many calls; return what it leaves to Python."""
        left, goal = [], self.server.num_calls + count
        for _ in range(PATIENCE):
            left += self.b.receive(0.01)
            if self.server.num_calls >= goal:
                return left
        raise AssertionError(f"{goal - self.server.num_calls} of {count} calls were not answered")

    def answers(self, count):
        """Let the server work; return the answers, each fully checked."""
        left = self.serve(count)
        got = []
        while len(got) < count:
            got += [received.message for received in self.caller.receive(1.0)]
        return got, left


@pytest.fixture
def worker(net):
    return Worker(net)


def rows_of(count, first=0):
    return bytes((first + i * i) % 251 for i in range(count * ROW_BYTES))


def dispatch(rows, layer=2, **changes):
    fields = {"step": 11, "lane": 65_537, "layer": layer, "part": SLOT, "live_us": 5_000}
    payload = Payload(DType.UINT8, (len(rows) // ROW_BYTES, ROW_BYTES), rows)
    return Dispatch(**{**fields, "activations": payload, **changes})


def values_of(combine):
    return list(struct.unpack(f"<{len(combine.partial.data) // 4}f", combine.partial.data))


def expected_values(layer, rows):
    pieces = [rows[i : i + ROW_BYTES] for i in range(0, len(rows), ROW_BYTES)]
    return [value for row in pieces for value in computed(layer, row)]


@pytest.mark.parametrize("count", [1, 5, MOST_ROWS])
def test_a_call_is_answered_without_python(worker, count):
    rows = rows_of(count)
    worker.caller.send("b", dispatch(rows))
    (answer,), left = worker.answers(1)
    assert left == []
    assert isinstance(answer, Combine) and answer.refusal == ""
    key = (answer.step, answer.lane, answer.layer, answer.part, answer.call_epoch)
    assert key == (11, 65_537, 2, SLOT, EPOCH)
    assert answer.partial.shape == (count, WIDTH)
    assert values_of(answer) == expected_values(2, rows)
    assert answer.taken_us > 0 and 0 <= answer.held_us < 10_000_000
    assert (worker.server.num_calls, worker.server.num_rows) == (1, count)
    assert worker.answerer.sequence.value == 1


@ONLY_RINGS  # a socket gives no hold of how many have come
def test_calls_of_a_layer_are_computed_together_up_to_the_limit_and_others_in_their_turn(worker):
    calls = [(2, 3), (0, 2), (2, 4), (2, 3), (0, 1)]
    for step, (layer, count) in enumerate(calls):
        worker.caller.send("b", dispatch(rows_of(count, step), layer, step=step))
    answers, _ = worker.answers(len(calls))
    assert worker.batches == [(2, 7), (0, 3), (2, 3)]
    for answer in answers:
        layer, count = calls[answer.step]
        assert values_of(answer) == expected_values(layer, rows_of(count, answer.step))
    events = list(read_events(worker.server.take_events()))
    kinds = [event.kind for event in events if event.kind != EventKind.WAIT]
    assert kinds == [
        EventKind.FFN, EventKind.GATHERED, EventKind.FFN, EventKind.GATHERED, EventKind.FFN,
    ]  # fmt: skip
    assert [event.rows for event in events if event.kind != EventKind.WAIT] == [7, 4, 3, 1, 3]
    assert {event.peer for event in events if event.kind != EventKind.WAIT} == {3}
    assert worker.server.take_events() == b""


def other_payload(dtype, shape, size):
    return {"activations": Payload(dtype, shape, bytes(size))}


LEFT_TO_PYTHON = [
    dispatch(rows_of(2), layer=1),
    dispatch(rows_of(2), layer=3),
    dispatch(rows_of(2), part=SLOT + 1),
    dispatch(rows_of(MOST_ROWS + 1)),
    dispatch(b"", **other_payload(DType.UINT8, (0, ROW_BYTES), 0)),
    dispatch(b"", **other_payload(DType.UINT8, (2, ROW_BYTES + 1), 2 * ROW_BYTES + 2)),
    dispatch(b"", **other_payload(DType.FLOAT32, (1, 3), ROW_BYTES)),
    dispatch(b"", **other_payload(DType.UINT8, (2, ROW_BYTES, 1), 2 * ROW_BYTES)),
    Heartbeat(Role.ATTENTION, 3, ProcessState.READY, 1, "ipc://a", ""),
]


@pytest.mark.parametrize("message", LEFT_TO_PYTHON, ids=range(len(LEFT_TO_PYTHON)))
def test_whatever_is_not_exactly_a_call_for_it_is_left_to_python(worker, message):
    worker.caller.send("b", message)
    (received,) = worker.answerer.receive(1.0)
    assert received.message == message
    assert worker.batches == []


def test_calls_with_a_checksum_are_left_to_python(worker):
    with_crc = Endpoint(worker.a, worker.caller.identity, MonotonicClock())
    with_crc.topology = worker.caller.topology
    with_crc.send("b", dispatch(rows_of(1)))
    ((_, frames),) = worker.b.receive(1.0)
    assert zlib.crc32(frames[1]) and worker.batches == []


@pytest.mark.parametrize(
    "identity",
    [
        Identity("c", "model", "numerics"),
        Identity("a", "another", "numerics"),
        Identity("a", "model", "others"),
    ],
)
def test_who_is_not_in_the_topology_as_it_says_is_left_to_python(worker, identity):
    stranger = Endpoint(worker.a, identity, MonotonicClock(), (), False)
    stranger.send("b", dispatch(rows_of(1)))
    assert list(worker.answerer.receive(1.0)) == []
    assert worker.answerer.num_bad_frames == 1
    assert worker.batches == []


def test_who_is_in_quarantine_is_left_to_python(worker):
    for _ in range(3):
        worker.a.send("b", [b"\x00", b""])
    for _ in range(10):
        list(worker.answerer.receive(0.01))
    assert worker.answerer.quarantined == {"a"}
    worker.server.follow(EPOCH, worker.answerer.pool(Role.ATTENTION))
    worker.caller.send("b", dispatch(rows_of(1)))
    assert list(worker.answerer.receive(1.0)) == []
    assert worker.answerer.counters["bad_quarantined"] >= 1
    assert worker.batches == []


def test_a_caller_that_sleeps_is_woken_by_its_answer(worker):
    results = []
    rows = rows_of(2)
    worker.caller.send("b", dispatch(rows))
    sleeper = threading.Thread(
        target=lambda: results.extend(await_frames(worker.a, 1)), daemon=True
    )
    worker.a._usual_wait_ns = 10**9  # it does not watch: it sleeps at once
    sleeper.start()
    for _ in range(200):
        if results:
            break
        worker.b.receive(0.01)
    sleeper.join(10)
    ((_, (header, data)),) = results
    answer = decode(HeaderReader().read(header), data, False)
    assert values_of(answer) == expected_values(2, rows)


def test_an_endless_stream_of_calls_does_not_keep_python_from_its_turn(worker):
    until = threading.Event()

    def call_on():
        while not until.is_set():
            with contextlib.suppress(TransportError):  # there is no room; the next one may fit
                worker.caller.send("b", dispatch(rows_of(1)))
            worker.a.receive(0)

    thread = threading.Thread(target=call_on, daemon=True)
    thread.start()
    for _ in range(PATIENCE):
        worker.server.watch(1_000_000)
        if worker.server.num_calls > 100:
            break
    until.set()
    thread.join(10)
    assert worker.server.num_calls > 0


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_mutated_call_is_answered_only_if_python_reads_the_same_call(worker, data):
    sent = encode(worker.caller.envelope(), dispatch(rows_of(2)), False)
    header, payload = bytearray(sent[0]), bytes(sent[1])
    for _ in range(data.draw(st.integers(1, 3))):
        header[data.draw(st.integers(0, len(header) - 1))] = data.draw(st.integers(0, 255))
    worker.batches.clear()
    worker.a.send("b", [bytes(header), payload])
    left = []
    while not (left or worker.batches):
        left = worker.b.receive(0.01)
    if not worker.batches:
        ((_, frames),) = left
        assert [bytes(frame) for frame in frames] == [bytes(header), payload]
        return
    assert left == []
    called = decode(HeaderReader().read(bytes(header)), payload, False)
    ((_, (answer_header, answer_data)),) = await_frames(worker.a, 1)
    answer = decode(HeaderReader().read(answer_header), answer_data, False)
    for name in ("step", "lane", "layer", "part"):
        assert getattr(answer, name) == getattr(called, name)
    assert called.part == SLOT and called.layer in (0, 2)
    assert called.activations.shape == (2, ROW_BYTES)
    assert values_of(answer) == expected_values(called.layer, payload)


# -- the calling side


class Pair(Worker):
    """Both ends in native code."""

    def __init__(self, net):
        super().__init__(net)
        self.client = CallClient(RingLibrary(), self.caller.sequence)
        self.a.assist(self.client)
        self.client.follow(EPOCH, self.caller.pool(Role.FFN))
        self.kept = []

    def call(self, place, count, stage=STAGE, first=0, way=None):
        """Send a call; return the memory of its answer."""
        rows = ctypes.create_string_buffer(rows_of(count, first), count * ROW_BYTES)
        answer = (ctypes.c_float * (count * WIDTH))()
        self.kept.append((rows, answer))
        sent = self.client.call(
            place,
            "b",
            stage,
            5_000,
            Rows(ctypes.addressof(rows), count, ROW_BYTES),
            Rows(ctypes.addressof(answer), count, WIDTH),
            None if way is None else way(rows),
        )
        return answer if sent else None

    def await_ready(self, count):
        ready = []
        for _ in range(PATIENCE):
            self.b.receive(0)
            assert self.a.receive(0.001) == []
            ready += self.client.take_ready()
            if len(ready) >= count:
                return ready
        raise AssertionError(f"{len(ready)} of {count} answers came")


@pytest.fixture
def both(net):
    return Pair(net)


def change_ways(link):
    """Have native code think that the ways to peers have changed."""
    (link._see_rings if isinstance(link, shm.SharedMemoryLink) else link._see_sockets)()


def test_answers_come_to_the_memory_that_waits_for_them(both):
    calls = {place: (2 * (place % 2), place + 1) for place in (0, 1, 2, 5, MOST_CALLS - 1)}
    calls = {place: (layer, min(count, MOST_ROWS)) for place, (layer, count) in calls.items()}
    answers = {
        place: both.call(place, count, StageId(40 + place, place, layer), place)
        for place, (layer, count) in calls.items()
    }
    assert sorted(both.await_ready(len(calls))) == sorted(calls)
    for place, (layer, count) in calls.items():
        assert list(answers[place]) == expected_values(layer, rows_of(count, place))
    events = list(read_events(both.client.take_events()))
    for kind in (EventKind.A_TO_F, EventKind.F_TO_A):
        assert {(e.step, e.lane, e.layer, e.rows, e.peer) for e in events if e.kind == kind} == {
            (40 + place, place, layer, count, SLOT) for place, (layer, count) in calls.items()
        }
    for there, back in zip(events[::2], events[1::2], strict=True):
        assert (there.kind, back.kind) == (EventKind.A_TO_F, EventKind.F_TO_A)
        assert there.begin_s <= there.end_s <= back.begin_s + 1e-5 <= back.end_s + 2e-5
    assert both.client.take_events() == b"" and both.client.take_ready() == []


def test_what_native_code_sends_python_reads(both):
    both.server.follow(EPOCH, {})
    assert both.call(3, 2) is not None
    (received,) = both.answerer.receive(1.0)
    assert received.message == dispatch(rows_of(2))
    assert received.envelope == both.caller.envelope()._replace(sequence=1)


def answer_by_hand(both, **changes):
    """Answer a call of two rows, with other values than it should have."""
    values = struct.pack(f"<{2 * WIDTH}f", *range(2 * WIDTH))
    fields = {
        "step": 11, "lane": 65_537, "layer": 2, "part": SLOT, "call_epoch": EPOCH,
        "taken_us": 1, "held_us": 1, "refusal": "",
        "partial": Payload(DType.FLOAT32, (2, WIDTH), values),
    }  # fmt: skip
    both.answerer.send("a", Combine(**{**fields, **changes}))


def answered(both, **changes):
    """Answer a call by hand, and return what of that is left to Python."""
    answer_by_hand(both, **changes)
    return [received.message for received in both.caller.receive(0.2)]


@pytest.mark.parametrize(
    "changes",
    [
        {"step": 12},
        {"lane": 0},
        {"layer": 1},
        {"part": 0},
        {"call_epoch": EPOCH - 1},
        {"refusal": "range", "partial": Payload(DType.NONE, (), b"")},
        {"partial": Payload(DType.FLOAT32, (1, WIDTH), bytes(4 * WIDTH))},
        {"partial": Payload(DType.FLOAT32, (2, WIDTH, 1), bytes(8 * WIDTH))},
        {"partial": Payload(DType.INT32, (2, WIDTH), bytes(8 * WIDTH))},
    ],
)
def test_whatever_is_not_exactly_the_answer_is_left_to_python(both, changes):
    both.server.follow(EPOCH, {})
    answer = both.call(3, 2)
    (left,) = answered(both, **changes)
    assert all(getattr(left, name) == value for name, value in changes.items())
    assert both.client.take_ready() == []
    assert answered(both) == [] and both.client.take_ready() == [3]  # it is still waited for
    assert list(answer) == list(range(2 * WIDTH))


@ONLY_RINGS
def test_an_answer_that_comes_just_behind_native_code_s_look_waits_for_the_next(both, monkeypatch):
    """Taken by Python it would be the end of the call's way, and so would the next ones."""
    both.server.follow(EPOCH, {})
    answer, watch, sent = both.call(3, 2), both.client.watch, []

    def watch_and_then_answer(longest_ns):
        is_due = watch(longest_ns)
        if not sent:
            sent.append(answer_by_hand(both))
        return is_due

    monkeypatch.setattr(both.client, "watch", watch_and_then_answer)
    assert both.a.receive(0) == [] and sent
    assert both.a.receive(0) == [] and both.client.take_ready() == [3]
    assert list(answer) == list(range(2 * WIDTH))


@ONLY_RINGS
def test_python_takes_everything_around_an_answer(both):
    both.server.follow(EPOCH, {})
    both.call(3, 2)
    steps = [21, 22, 11, 23, 24]
    for step in steps:
        answer_by_hand(both, step=step)
    left = [received.message.step for received in both.caller.receive(1.0)]
    assert left == [21, 22, 23, 24] and both.client.take_ready() == [3]


@pytest.mark.parametrize("change", ["give up", "follow", "ways"])
def test_an_answer_to_a_call_given_up_is_left_to_python(both, change):
    both.server.follow(EPOCH, {})
    answer = both.call(3, 2)
    if change == "give up":
        both.client.give_up(3)
    elif change == "follow":
        both.client.follow(EPOCH, both.caller.pool(Role.FFN))
    else:
        change_ways(both.a)
    (left,) = answered(both)
    assert isinstance(left, Combine) and both.client.take_ready() == []
    assert list(answer) == [0.0] * 2 * WIDTH
    assert answered(both, step=99) != []


def fill(both):
    """Call until there is no room for more; over sockets that takes what their threads hold."""
    is_memory = isinstance(both.a, shm.SharedMemoryLink)
    frames, most = [b"x", b""] if is_memory else [b"x", bytes(256 * 1024)], 1000
    refused = taken = 0
    while refused < (1 if is_memory else 20):
        try:
            both.a.send("b", frames)
            taken, refused = taken + 1, 0
        except TransportError:
            refused += 1
            time.sleep(0.001)  # the I/O threads may make room
        assert taken <= (MAX_RECORDS if is_memory else most)


def test_who_cannot_be_called_natively_is_not(both):
    assert both.call(MOST_CALLS, 1) is None
    both.client.follow(EPOCH, {})
    assert both.call(0, 1) is None
    both.client.follow(EPOCH, both.caller.pool(Role.FFN))
    fill(both)
    assert both.call(0, 1) is None
    for _ in range(PATIENCE):
        both.b.receive(0.01)
        both.a.receive(0)
        if both.call(0, 1) is not None:
            return
    raise AssertionError("there was never room again")


@ONLY_RINGS
def test_with_more_rings_than_native_code_knows_python_does_everything(both, monkeypatch):
    monkeypatch.setattr(shm, "MOST_RINGS", 0)
    both.a._see_rings()
    both.b._see_rings()
    assert both.call(0, 1) is None
    both.caller.send("b", dispatch(rows_of(1)))
    (received,) = both.answerer.receive(1.0)
    assert received.message == dispatch(rows_of(1)) and both.batches == []


def test_a_server_that_sleeps_is_woken_by_a_call(both):
    both.b._usual_wait_ns = 10**9  # it does not watch: it sleeps at once
    until, left = threading.Event(), []

    def serve():
        while not until.is_set():
            left.extend(both.b.receive(0.5))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    num_answered = 0
    try:
        for step in range(20):
            num_left = len(left)
            time.sleep(0.01)  # it sleeps now; what comes just when Python looks is left to it
            answer = both.call(0, 1, StageId(step, 0, 2))
            for _ in range(PATIENCE):
                left.extend(both.a.receive(0.001))
                if both.client.take_ready():
                    assert list(answer) == expected_values(2, rows_of(1))
                    num_answered += 1
                    break
                if len(left) > num_left:
                    break
    finally:
        until.set()
        thread.join(10)
    assert num_answered > 0 and num_answered + len(left) == 20


# -- from an answer to the next call

ATTENTION = ctypes.CFUNCTYPE(
    ctypes.c_int32, ctypes.c_void_p, ctypes.POINTER(ctypes.c_float),
    ctypes.POINTER(ctypes.c_float), ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_float), ctypes.POINTER(ctypes.c_uint8),
)  # fmt: skip


class Walk:
    """Makes ways through layers that add answers up, and ask for rows made of the sums."""

    def __init__(self, both, peers=("b", "b", "b"), fails_at=None):
        self.peers = both.client.places_of(peers)
        self.hidden = (ctypes.c_float * (MOST_ROWS * WIDTH))()
        self.begun = []
        self.halves = 0, 0, 0, 0
        self.attended = ctypes.c_int64(1)
        self.leader = None  # another one, which goes ahead
        self.behind = []  # by which layer begun, those that the leader had attended

        def attend(context, hidden, delta, count, blocks, seen, total, data):
            layer = context or 0
            assert (blocks, seen) == (layer + 10, layer + 20)
            self.begun.append(layer)
            self.behind += [self.leader.attended.value] if self.leader else []
            if layer == fails_at:
                return 0
            for i in range(count * WIDTH):
                total[i] = hidden[i] + delta[i]
            for i in range(count * ROW_BYTES):
                data[i] = int(total[i // ROW_BYTES * WIDTH] + i + layer) % 251
            return 1

        self.function = ATTENTION(attend)
        self.tables = [
            (ctypes.c_void_p * 3)(*(first + layer for layer in range(3))) for first in (0, 10, 20)
        ]

    def __call__(self, rows):
        self.way = NativeWay(
            ctypes.cast(self.function, ctypes.c_void_p),
            *map(ctypes.addressof, self.tables),
            ctypes.addressof(self.peers),
            len(self.peers),
            ROW_BYTES,
            ctypes.addressof(self.hidden),
            ctypes.addressof(rows),
            time.monotonic(),
            *self.halves,
            ctypes.addressof(self.attended),
            ctypes.addressof(self.leader.attended) if self.leader else 0,
        )
        self.rows = rows
        return self.way

    def compute_first_halves(self, layers):
        """Have the first halves of these layers computed here: a thousand and the layer each."""
        self.own = (ctypes.c_float * (MOST_ROWS * WIDTH))()
        self.firsts = []

        def first_half(context, rows, count, out):
            assert ctypes.addressof(rows.contents) == ctypes.addressof(self.rows)
            self.firsts.append(context - 1)
            for i in range(count * WIDTH):
                out[i] = 1000.0 + context - 1

        self.first_half = FUNCTION(first_half)
        self.contexts = (ctypes.c_void_p * 3)(*(n + 1 if n in layers else 0 for n in range(3)))
        function = ctypes.cast(self.first_half, ctypes.c_void_p).value
        self.halves = function, ctypes.addressof(self.contexts), ctypes.addressof(self.own), 3

    def expected(self, count):
        """Return what the answers add up to behind layer 0, and the answer to layer 1."""
        first = expected_values(0, rows_of(count))
        rows = bytes(
            int(first[i // ROW_BYTES * WIDTH] + i + 1) % 251 for i in range(count * ROW_BYTES)
        )
        return first, rows


@pytest.fixture
def all_layers(net):
    """Both ends, and a server that computes all three layers, and the second halves of these."""
    both = Pair(net)
    both.functions += [FUNCTION(both.compute(layer)) for layer in range(3, 6)]
    layers = [
        NativeLayer(ctypes.cast(f, ctypes.c_void_p).value, 0, ROW_BYTES, WIDTH)
        for f in both.functions
    ]
    sequence = both.answerer.sequence
    both.server = CallServer(RingLibrary(), layers, 3, SLOT, MOST_ROWS, sequence)
    both.b.assist(both.server)
    both.server.follow(EPOCH, both.answerer.pool(Role.ATTENTION))
    return both


def test_an_answer_goes_on_to_the_last_layer(all_layers):
    both, walk = all_layers, Walk(all_layers)
    answer = both.call(4, 2, StageId(11, 0, 0), way=walk)
    assert both.await_ready(1) == [4]
    assert walk.begun == [1, 2] and [layer for layer, _ in both.batches] == [0, 1, 2]
    assert both.client.layer(4) == 2 and both.client.is_sent(4)
    assert list(answer) == expected_values(2, bytes(walk.rows))
    first, rows = walk.expected(2)
    second = expected_values(1, rows)
    sums = [a + b for a, b in zip(first, second, strict=True)]
    assert list(walk.hidden[: len(sums)]) == sums
    events = list(read_events(both.client.take_events()))
    attended = [e for e in events if e.kind == EventKind.ATTENTION]
    assert [(e.step, e.lane, e.layer, e.rows) for e in attended] == [(11, 0, 1, 2), (11, 0, 2, 2)]
    (wait,) = (e for e in events if e.kind == EventKind.WAIT)  # Python notes the first and the last
    assert attended[0].end_s <= wait.begin_s <= wait.end_s == attended[1].begin_s
    assert both.client.idle_since_s >= attended[1].end_s
    for kind in (EventKind.A_TO_F, EventKind.F_TO_A):
        assert [e.layer for e in events if e.kind == kind] == [0, 1, 2]


@pytest.mark.parametrize(
    ("settings", "begun", "reached"),
    [
        ({"peers": ("b", "b", None)}, [1], 1),
        ({"peers": ("b", None, "b")}, [], 0),
        ({"peers": ("b", "z", "b")}, [], 0),
        ({"fails_at": 2}, [1, 2], 1),
    ],
)
def test_python_goes_on_where_the_way_ends(all_layers, settings, begun, reached):
    both, walk = all_layers, Walk(all_layers, **settings)
    answer = both.call(0, 1, StageId(11, 0, 0), way=walk)
    assert both.await_ready(1) == [0]
    assert walk.begun == begun and both.client.layer(0) == reached and both.client.is_sent(0)
    assert list(answer) == expected_values(reached, bytes(walk.rows))


def test_the_first_half_of_a_layer_is_computed_while_the_second_is_out(all_layers):
    both, walk = all_layers, Walk(all_layers)
    walk.compute_first_halves({0, 2})
    answer = both.call(4, 2, StageId(11, 0, 0), way=walk)
    assert both.await_ready(1) == [4]
    assert [layer for layer, _ in both.batches] == [3, 1, 5] and walk.firsts == [0, 2]
    assert both.client.layer(4) == 2
    second = expected_values(5, bytes(walk.rows))
    assert list(answer) == [1002.0 + value for value in second]
    for taken in (both.client.take_events(), both.server.take_events()):
        events = [e for e in read_events(taken) if e.kind in (EventKind.FFN, EventKind.F_TO_A)]
        assert {e.layer for e in events} <= {0, 1, 2}
        assert sum(e.kind == EventKind.FFN for e in events) in (2, 3)


def test_who_has_another_call_out_asks_for_all_of_a_layer(all_layers):
    both, walks = all_layers, [Walk(all_layers) for _ in range(2)]
    for walk in walks:
        walk.compute_first_halves({0, 1, 2})
    for lane, walk in enumerate(walks):
        both.call(lane, 1, StageId(11, lane, 0), first=lane, way=walk)
    both.serve(2)
    assert [layer for layer, _ in both.batches] == [3, 0]
    assert sorted(both.await_ready(2)) == [0, 1]
    assert walks[0].firsts[:1] == [0] and 0 not in walks[1].firsts


def test_a_half_may_be_answered_before_the_other_is_computed(all_layers):
    both, walk = all_layers, Walk(all_layers, peers=("b", None, None))
    walk.compute_first_halves({0})
    answer = both.call(4, 1, StageId(11, 0, 0), way=walk)
    both.serve()  # the answer is on its way
    assert walk.firsts == []
    assert both.await_ready(1) == [4]
    assert walk.firsts == [0]
    assert list(answer) == [1000.0 + value for value in expected_values(3, rows_of(1))]


def test_a_half_that_was_answered_is_not_under_way_when_it_is_given_up(all_layers):
    both, walk = all_layers, Walk(all_layers, peers=("b", None, None))
    walk.compute_first_halves({0})
    both.call(4, 1, StageId(11, 0, 0), way=walk)
    both.serve()
    both.client._peers._table.bell = 1  # somebody is to be woken before anything is computed here
    while not both.client._outs[4].is_answered:
        assert both.client.watch(0)
    assert walk.firsts == [] and not both.client.give_up(4)
    both.call(5, 1)
    assert both.client.give_up(5)


def test_lanes_go_on_beside_each_other(all_layers):
    walks = [Walk(all_layers) for _ in range(3)]
    answers = [
        all_layers.call(lane, 1, StageId(11, lane, 0), first=lane, way=walk)
        for lane, walk in enumerate(walks)
    ]
    assert sorted(all_layers.await_ready(3)) == [0, 1, 2]
    for answer, walk in zip(answers, walks, strict=True):
        assert list(answer) == expected_values(2, bytes(walk.rows))


def test_who_follows_attends_each_layer_behind_who_goes_ahead(all_layers):
    leader, follower = Walk(all_layers), Walk(all_layers)
    follower.leader = leader
    answers = [all_layers.call(0, 2, StageId(11, 0, 0), first=0, way=follower)]
    all_layers.serve()
    while not (all_layers.client._outs[0].is_answered or follower.begun):
        assert all_layers.a.receive(0.001) == []
    assert follower.begun == []
    answers.append(all_layers.call(1, 2, StageId(11, 1, 0), first=1, way=leader))
    assert sorted(all_layers.await_ready(2)) == [0, 1]
    assert leader.begun == follower.begun == [1, 2]
    assert all(map(int.__gt__, follower.behind, follower.begun))
    assert leader.attended.value == follower.attended.value == 3
    for answer, walk in zip(answers, (follower, leader), strict=True):
        assert list(answer) == expected_values(2, bytes(walk.rows))


def test_who_follows_waits_until_python_has_attended_where_the_other_way_ends(all_layers):
    both, leader, follower = all_layers, Walk(all_layers, peers=("b", "b")), Walk(all_layers)
    follower.leader = leader
    both.call(0, 1, StageId(11, 0, 0), first=0, way=follower)
    both.call(1, 1, StageId(11, 1, 0), first=1, way=leader)
    assert both.await_ready(1) == [1]
    for _ in range(20):
        assert both.a.receive(0.001) == []
    both.serve(0)
    assert follower.begun == [1] and both.client.layer(0) == 1 and both.client.take_ready() == []
    leader.attended.value = 3
    assert both.await_ready(1) == [0]
    assert follower.begun == [1, 2] and both.client.layer(0) == 2


def test_who_waits_for_another_one_can_be_given_up(all_layers):
    both, leader, follower = all_layers, Walk(all_layers), Walk(all_layers)
    follower.leader = leader
    both.call(0, 1, StageId(11, 0, 0), way=follower)
    both.serve()
    while not both.client._outs[0].is_answered:
        assert both.a.receive(0.001) == []
    assert follower.begun == [] and not both.client.give_up(0)
    leader.attended.value = 3
    assert both.a.receive(0.001) == [] and follower.begun == []


@pytest.mark.parametrize("change", ["give up", "follow", "ways"])
def test_a_call_given_up_goes_no_further_and_its_layer_is_known(all_layers, change):
    both, walk = all_layers, Walk(all_layers)
    both.call(4, 2, StageId(11, 0, 0), way=walk)
    both.serve()
    while both.client.layer(4) == 0:
        assert both.a.receive(0.001) == []
    generation = both.client.generation
    if change == "give up":
        both.client.give_up(4)
    elif change == "follow":
        both.client.follow(EPOCH, both.caller.pool(Role.FFN))
    else:
        change_ways(both.a)
    assert (both.client.generation > generation) == (change != "give up")
    both.serve()
    ((_, frames),) = both.a.receive(1.0)
    left = decode(HeaderReader().read(bytes(frames[0])), frames[1], False)
    assert (left.layer, values_of(left)) == (1, expected_values(1, walk.expected(2)[1]))
    assert both.client.layer(4) == 1 and both.client.take_ready() == [] and walk.begun == [1]


def test_a_call_that_finds_no_room_is_left_to_python(all_layers):
    both, walk = all_layers, Walk(all_layers)
    both.call(4, 1, StageId(11, 0, 0), way=walk)
    both.serve()
    fill(both)
    ready = []
    while not ready:
        assert both.a.receive(0.001) == []
        ready = both.client.take_ready()
    assert ready == [4]
    assert both.client.layer(4) == 1 and not both.client.is_sent(4)
    assert bytes(walk.rows) == walk.expected(1)[1]


# -- what only sockets need


def further_callers(worker, net, names):
    """Connect callers to the server's socket; all but the last are in the topology."""
    members = [Member(Role.ATTENTION, 5, name, "", "numerics") for name in names[:-1]]
    worker.answerer.topology = Topology(EPOCH, (*worker.answerer.topology.members, *members))
    worker.server.follow(EPOCH, worker.answerer.pool(Role.ATTENTION))
    for name in names:
        link = net.link(name)
        link.connect("b", worker.b.address)
        send_once_connected(link, "b", [b"hello", b""])
        assert await_frames(worker.b, 1) == [(name, [b"hello", b""])]
        caller = Endpoint(link, Identity(name, "model", "numerics"), MonotonicClock(), (), False)
        caller.topology = worker.answerer.topology
        yield caller


@ONLY_SOCKETS
def test_callers_of_one_socket_are_told_apart(worker, net):
    callers = [worker.caller, *further_callers(worker, net, ("c", "d", "stranger"))]
    for step, caller in enumerate(callers[:3]):
        caller.send("b", dispatch(rows_of(1, step), step=step))
    assert worker.serve(3) == []
    callers[3].send("b", dispatch(rows_of(1)))
    assert [name for name, _ in await_frames(worker.b, 1)] == ["stranger"]
    for step, caller in enumerate(callers[:3]):
        (received,) = caller.receive(1.0)
        assert received.message.step == step
        assert values_of(received.message) == expected_values(2, rows_of(1, step))


@ONLY_SOCKETS
def test_a_caller_that_has_gone_costs_its_answer_and_nothing_else(worker, net):
    other, _ = further_callers(worker, net, ("c", "stranger"))
    worker.during = worker.a.close
    worker.caller.send("b", dispatch(rows_of(1)))
    worker.serve()
    worker.during = lambda: None
    other.send("b", dispatch(rows_of(2)))
    worker.serve()
    (received,) = other.receive(1.0)
    assert values_of(received.message) == expected_values(2, rows_of(2))


@ONLY_SOCKETS
def test_what_is_held_is_whole_and_in_order_and_calls_behind_it_are_not_lost(worker):
    calls = [
        encode(worker.caller.envelope(), dispatch(rows_of(1), step=i), False) for i in range(4)
    ]
    sent = [calls[0], [b"1"], calls[1], [b"1", b"2", b"3"], calls[2], [b""], calls[3]]
    sent = [[bytes(frame) for frame in frames] for frames in sent]
    for frames in sent:
        worker.a.send("b", frames)
    left = []
    while worker.server.num_calls + len(left) < len(sent):
        left += [frames for _, frames in worker.b.receive(1.0)]
    assert [frames for frames in sent if frames in left] == left
    assert [frames for frames in left if len(frames) != 2] == sent[1:6:2]


@ONLY_SOCKETS
def test_no_more_is_read_before_python_has_taken_what_is_held(worker):
    worker.a.send("b", [b"first", b""])
    while not worker.server.watch(10_000_000):
        pass
    worker.caller.send("b", dispatch(rows_of(1)))
    for _ in range(10):
        assert worker.server.watch(10_000_000)
    assert worker.batches == []
    assert worker.b.receive(0) == [("a", [b"first", b""])]
    worker.serve()


@ONLY_SOCKETS
def test_a_peer_that_was_disconnected_is_not_called_until_it_is_connected_again(both):
    assert both.call(0, 1) is not None
    both.a.disconnect("b")
    assert both.call(0, 1) is None
    both.a.connect("b", both.b.address)
    for _ in range(PATIENCE):  # a first reconnect may be lost
        answer = both.call(0, 1)
        both.b.receive(0.001)
        both.a.receive(0.01)
        if both.client.take_ready():
            break
    assert list(answer) == expected_values(2, rows_of(1))


@ONLY_SOCKETS
def test_after_close_nobody_is_called(both):
    both.a.close()
    assert both.call(0, 1) is None
    both.a.close()


@ONLY_SOCKETS
def test_a_wait_ends_for_a_signal(worker):
    came = []
    before = signal.signal(signal.SIGUSR1, lambda *_: came.append(True))
    waker = threading.Timer(0.1, signal.pthread_kill, (threading.get_ident(), signal.SIGUSR1))
    begin_s = time.monotonic()
    waker.start()
    try:
        assert worker.b.receive(20.0) == []
    finally:
        waker.join()
        signal.signal(signal.SIGUSR1, before)
    assert came and time.monotonic() - begin_s < 10.0


@ONLY_SOCKETS
def test_a_wait_is_as_long_as_was_asked_for(worker):
    begin_s = time.monotonic()
    assert worker.b.receive(0.05) == []
    assert 0.05 <= time.monotonic() - begin_s < 4.0


@pytest.mark.parametrize("lacks", ["library", "function"])
def test_without_its_parts_native_code_does_not_read_sockets(monkeypatch, tmp_path, lacks):
    if lacks == "library":
        monkeypatch.setattr(sockets, "LIBRARY", tmp_path / "none.so")
    else:
        monkeypatch.setattr(sockets, "_NAMES", ("zmq_msg_init", "zmq_no_such_function"))
    reason = sockets.why_not_native()
    assert "was not built" in reason if lacks == "library" else "zmq_no_such_function" in reason
    for net in opened(IPCNet, tmp_path):
        with pytest.raises(ConfigError, match="libafd_ring.so was not built|libzmq"):
            net.link("a").assist(CallClient(RingLibrary(), ctypes.c_int64(0)))
