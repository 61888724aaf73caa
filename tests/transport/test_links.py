"""One contract for every link: in-process, ipc with and without native code, tcp, shared memory.

Then what only some promise.
"""

import itertools
import random
import signal
import subprocess
import sys
from collections import Counter

import pytest
import zmq

from afd_server.core.errors import AddressInUse, ConfigError, TransportError
from afd_server.transport import shm, zeromq
from afd_server.transport.codec import MAX_PAYLOAD_BYTES
from afd_server.transport.inproc import Faults, InProcessNetwork
from afd_server.transport.zeromq import CREDITS, ZeroMQLink
from support.links import (
    InProcessNet,
    IPCNet,
    NativeIPCNet,
    SharedMemoryNet,
    TCPNet,
    await_frames,
    notice_absence,
    opened,
    pair,
    send_once_connected,
    send_until_heard,
    send_until_refused,
)


@pytest.fixture(params=[InProcessNet, IPCNet, TCPNet, NativeIPCNet, SharedMemoryNet])
def net(request, tmp_path):
    yield from opened(request.param, tmp_path)


@pytest.fixture(params=[IPCNet, TCPNet, NativeIPCNet, SharedMemoryNet])
def processes(request, tmp_path):
    yield from opened(request.param, tmp_path)


@pytest.fixture(params=[IPCNet, TCPNet, NativeIPCNet])
def sockets(request, tmp_path):
    yield from opened(request.param, tmp_path)


# -- every link


def test_a_question_is_answered_on_the_way_it_came(net):
    a, b = pair(net)
    a.send("b", [b"question", b"1"])
    assert await_frames(b, 1) == [("a", [b"question", b"1"])]
    b.send("a", [b"answer", b"1"])  # `b` never connected to `a`
    assert await_frames(a, 1) == [("b", [b"answer", b"1"])]


def test_frames_arrive_as_they_were_cut(net):
    a, b = pair(net)
    for frames in ([b"one"], [b"", b""], [b"1", b"2", b"3"], [bytearray(b"x"), memoryview(b"y")]):
        a.send("b", frames)
        assert await_frames(b, 1) == [("a", [bytes(frame) for frame in frames])]


def test_eight_megabytes_pass_in_both_directions(net):
    a, b = pair(net)
    big = random.Random(1).randbytes(8 * 2**20)
    a.send("b", [b"header", big])
    assert await_frames(b, 1) == [("a", [b"header", big])]
    b.send("a", [b"header", memoryview(big)])
    assert await_frames(a, 1) == [("b", [b"header", big])]


def test_a_peer_without_faults_is_heard_in_order(net):
    a, b = pair(net)
    received = []
    for start in range(0, 1000, 25):  # fewer than the credits
        for number in range(start, start + 25):
            a.send("b", [b"n", b"%d" % number])
        received += await_frames(b, 25)
    assert [int(frames[1]) for _, frames in received] == list(range(1000))


def test_several_peers_are_told_apart(net):
    hub = net.link("hub")
    links = {name: net.link(name) for name in ("x", "y", "z")}
    for name, link in links.items():
        link.connect("hub", hub.address)
        send_once_connected(link, "hub", [b"from", name.encode()])
    received = await_frames(hub, 3)
    assert sorted(received) == [(name, [b"from", name.encode()]) for name in links]
    for name, link in links.items():
        hub.send(name, [b"for", name.encode()])
        assert await_frames(link, 1) == [("hub", [b"for", name.encode()])]


def test_nobody_can_be_sent_to_who_was_never_met(net):
    with pytest.raises(TransportError, match="nobody"):
        net.link("a").send("nobody", [b"x", b""])


def test_nothing_comes_when_nothing_was_sent(net):
    assert net.link("a").receive(0) == []
    assert net.link("b").receive(0.001) == []


def test_a_second_connect_changes_nothing(net):
    a, b = pair(net)
    a.connect("b", b.address)
    a.send("b", [b"once", b""])
    assert await_frames(b, 1) == [("a", [b"once", b""])]
    assert b.receive(0.01) == []


def test_a_peer_can_be_left_and_met_again(net):
    a, b = pair(net)
    a.disconnect("b")
    a.disconnect("b")
    a.disconnect("never met")
    a.connect("b", b.address)
    send_until_heard(a, b, [b"again", b""])


def test_a_closed_peer_is_noticed(net):
    a, b = pair(net)
    b.close()
    notice_absence(a, "b")


def test_closing_twice_does_no_harm(net):
    link = net.link("a")
    link.close()
    link.close()


def test_a_name_can_be_used_again_after_close(net):
    a, b = pair(net)
    b.close()
    again = net.link("b")
    a.connect("b", again.address)
    send_until_heard(a, again, [b"again", b""])


# -- between processes


def test_who_only_connects_has_no_address_and_hears_answers(sockets):
    hub = sockets.link("hub")
    client = ZeroMQLink("client", None)
    sockets.opened.append(client)
    assert client.address == ""
    assert client.filenos() == []
    with pytest.raises(TransportError, match="hub was never connected"):
        client.send("hub", [b"x", b""])
    client.connect("hub", hub.address)
    assert len(client.filenos()) == 1
    send_once_connected(client, "hub", [b"question", b""])
    await_frames(hub, 1)
    hub.send("client", [b"answer", b""])
    assert await_frames(client, 1) == [("hub", [b"answer", b""])]


def test_every_socket_gives_a_descriptor_to_wait_on(sockets):
    a, b = pair(sockets)
    assert len(a.filenos()) == 2
    assert len(b.filenos()) == 1
    assert len(set(a.filenos())) == 2


def test_a_peer_that_moved_is_followed_to_its_new_address(processes):
    a, _ = pair(processes)
    moved = processes.link("moved")
    a.connect("b", moved.address)
    send_once_connected(a, "b", [b"here", b""])
    assert await_frames(moved, 1) == [("a", [b"here", b""])]


@pytest.mark.parametrize("address", ["", "nonsense", "tcp://", "foo://127.0.0.1:1"])
def test_an_address_of_nowhere_is_our_own_error_and_leaves_nothing_behind(sockets, address):
    a = sockets.link("a")
    with pytest.raises(TransportError, match="b cannot be reached at"):
        a.connect("b", address)
    assert len(a.filenos()) == 1
    a.connect("b", sockets.link("b").address)
    send_once_connected(a, "b", [b"x", b""])


def test_after_close_sending_is_an_error_of_ours(processes):
    a, _ = pair(processes)
    a.close()
    with pytest.raises(TransportError, match="b cannot be reached"):
        a.send("b", [b"x", b""])


def test_a_routing_id_that_is_no_text_is_read_all_the_same(processes):
    hub = processes.link("hub")
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.linger = 0
        stranger.setsockopt(zmq.IDENTITY, b"\xff\xfe")
        stranger.connect(hub.address)
        stranger.send_multipart([b"x", b""])
        assert await_frames(hub, 1) == [("��", [b"x", b""])]


def test_who_does_not_read_is_sent_no_more_than_the_credits(processes):
    a, b = pair(processes)
    frames = [b"header", bytes(256 * 1024)]  # beyond what the kernel's buffers hold
    most = 2 * CREDITS + 16  # at both ends, in the kernel's buffers and the I/O threads
    assert CREDITS / 2 <= send_until_refused(a, "b", frames, 1000) <= most
    assert CREDITS / 2 <= send_until_refused(b, "a", frames, 1000) <= most


def test_who_reads_again_is_sent_to_again(processes):
    a, b = pair(processes)
    send_until_refused(a, "b", [b"header", bytes(256 * 1024)], 1000)
    send_until_heard(a, b, [b"again", b""])


def test_before_a_peer_listens_nothing_is_queued_for_it(processes):
    a = processes.link("a")
    a.connect("b", f"ipc://{processes.directory}/nobody.ipc")
    with pytest.raises(TransportError, match="b is not connected or does not keep up"):
        a.send("b", [b"x", b""])


def test_a_busy_link_lets_its_owner_get_to_work(processes, monkeypatch):
    for module in (zeromq, shm):
        monkeypatch.setattr(module, "MAX_PER_RECEIVE", 10)
    a, b = pair(processes)
    for _ in range(CREDITS // 2):
        a.send("b", [b"x", b""])
    sizes = []
    while sum(sizes) < CREDITS // 2:
        sizes.append(len(b.receive(1.0)))
        assert 0 < sizes[-1] <= 10


def test_a_frame_beyond_the_budget_never_arrives(processes):
    a, b = pair(processes)
    a.send("b", [b"header", bytes(MAX_PAYLOAD_BYTES + 1)])
    assert b.receive(0.3) == []


SAFE = {
    zmq.MAXMSGSIZE: 64 * 2**20,
    zmq.SNDHWM: 64,
    zmq.RCVHWM: 64,
    zmq.LINGER: 0,
    zmq.HEARTBEAT_IVL: 0,
    zmq.TCP_KEEPALIVE: 1,
    zmq.TCP_KEEPALIVE_IDLE: 1,
    zmq.TCP_KEEPALIVE_INTVL: 1,
    zmq.TCP_KEEPALIVE_CNT: 3,
    zmq.TCP_MAXRT: 4000,
    zmq.HANDSHAKE_IVL: 2000,
    zmq.RECONNECT_IVL: 50,
    zmq.RECONNECT_IVL_MAX: 2000,
    zmq.IMMEDIATE: 1,
    zmq.BACKLOG: 100,
}


def test_no_socket_keeps_an_unsafe_default(sockets):
    a, _ = pair(sockets)
    a_sockets = a._sockets()
    assert [socket.type for socket in a_sockets] == [zmq.ROUTER, zmq.DEALER]
    for socket in a_sockets:
        assert {option: socket.getsockopt(option) for option in SAFE} == SAFE
    assert a_sockets[1].getsockopt(zmq.IDENTITY) == b"a"


# In a process of its own, which libzmq would abort.
LEFT_UNREAD = """
import sys, time
from afd_server.core.errors import TransportError
from afd_server.transport.zeromq import ZeroMQLink

reader, writer = ZeroMQLink("reader", sys.argv[1]), ZeroMQLink("writer", None)
writer.connect("reader", reader.address)
end_s = time.monotonic() + 0.7
while time.monotonic() < end_s:
    try:
        writer.send("reader", [b"header", bytes(256 * 1024)])
    except TransportError:
        time.sleep(0.001)
writer.close()
time.sleep(1.2)
assert reader.receive(1.0)
reader.close()
"""


@pytest.mark.parametrize("scheme", ["ipc", "tcp"])
def test_a_peer_that_leaves_a_full_queue_does_not_end_the_process(tmp_path, scheme):
    bind = f"ipc://{tmp_path}/reader" if scheme == "ipc" else "tcp://127.0.0.1:*"
    done = subprocess.run(
        [sys.executable, "-c", LEFT_UNREAD, bind], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_router_reports_who_is_not_there(processes):
    # libzmq does not tell whether ROUTER_MANDATORY is set; without it the frame just vanishes
    with pytest.raises(TransportError, match="Host unreachable|No route"):
        processes.link("a").send("gone", [b"x", b""])


# -- addresses


def test_a_taken_port_is_refused():
    first = ZeroMQLink("first", "tcp://127.0.0.1:*")
    address = first.address
    with pytest.raises(AddressInUse, match=address):
        ZeroMQLink("second", address)
    first.close()


def test_a_socket_path_that_is_listened_on_is_refused_and_stays_its_owners(tmp_path):
    net = IPCNet(tmp_path)
    a, b = pair(net)
    with pytest.raises(AddressInUse, match=r"b\.ipc is in use"):
        ZeroMQLink("second", b.address)
    a.send("b", [b"still here", b""])
    assert await_frames(b, 1) == [("a", [b"still here", b""])]
    net.close()


def test_a_socket_path_can_be_bound_again_after_close(tmp_path):
    address = f"ipc://{tmp_path}/x.ipc"
    ZeroMQLink("first", address).close()
    ZeroMQLink("second", address).close()


LISTENER = """
import sys, zmq
socket = zmq.Context().socket(zmq.ROUTER)
socket.bind(sys.argv[1])
print("bound", flush=True)
socket.recv()
"""


def test_a_socket_path_left_behind_by_a_killed_process_is_taken_over(tmp_path):
    address = f"ipc://{tmp_path}/x.ipc"
    command = [sys.executable, "-c", LISTENER, address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "bound\n"
        with pytest.raises(AddressInUse):
            ZeroMQLink("early", address)
        process.send_signal(signal.SIGKILL)
    assert (tmp_path / "x.ipc").exists()
    net = IPCNet(tmp_path)
    heir = net.link("x")
    a = net.link("a")
    a.connect("x", heir.address)
    send_once_connected(a, "x", [b"hello", b""])
    assert await_frames(heir, 1) == [("a", [b"hello", b""])]
    net.close()


@pytest.mark.parametrize(
    "bind",
    ["ipc:///no/such/directory/x.ipc", "ipc://" + "x" * 200, "foo://x", "nonsense", "tcp://x:y:z"],
)
def test_what_cannot_be_bound_is_a_wrong_setting(bind):
    with pytest.raises(ConfigError, match="cannot listen on"):
        ZeroMQLink("a", bind)


# -- the in-process twin


def run_of(faults, num_frames=4000, calls=80):
    """Send numbered frames and return what arrived, in order of arrival."""
    network = InProcessNetwork(faults)
    a, b = network.link("a"), network.link("b")
    for number in range(num_frames):
        a.send("b", [b"n", b"%08d" % number])
    return list(itertools.chain.from_iterable(b.receive(0) for _ in range(calls)))


def test_without_faults_nothing_happens_to_a_frame():
    arrived = run_of(None, 100, calls=1)
    assert arrived == [("a", [b"n", b"%08d" % number]) for number in range(100)]


def test_links_of_a_network_are_called_by_name():
    assert InProcessNetwork().link("a").address == "inproc://a"


def test_dropped_frames_are_missing_at_about_the_asked_rate():
    arrived = run_of(Faults(seed=1, drop=0.25))
    assert len(arrived) == pytest.approx(3000, abs=120)


def test_duplicated_frames_come_twice_at_about_the_asked_rate():
    copies = Counter(frames[1] for _, frames in run_of(Faults(seed=1, duplicate=0.25)))
    assert set(copies.values()) == {1, 2}
    assert sum(count == 2 for count in copies.values()) == pytest.approx(1000, abs=120)


def test_corrupt_frames_differ_in_one_bit_of_the_payload_at_about_the_asked_rate():
    arrived = run_of(Faults(seed=1, corrupt=0.25))
    flipped = [
        int.from_bytes(frames[1]) ^ int.from_bytes(b"%08d" % number)
        for number, (_, frames) in enumerate(arrived)
    ]
    assert all(difference.bit_count() <= 1 for difference in flipped)
    assert sum(map(bool, flipped)) == pytest.approx(1000, abs=120)
    assert all(frames[0] == b"n" for _, frames in arrived)


def test_an_empty_payload_cannot_be_corrupted():
    network = InProcessNetwork(Faults(corrupt=1.0))
    a, b = network.link("a"), network.link("b")
    a.send("b", [b"n", b""])
    assert b.receive(0) == [("a", [b"n", b""])]


def test_delayed_frames_come_within_the_asked_number_of_receives_and_out_of_order():
    network = InProcessNetwork(Faults(seed=1, max_delay=3))
    a, b = network.link("a"), network.link("b")
    for number in range(4000):
        a.send("b", [b"n", b"%08d" % number])
    turns = [b.receive(0) for _ in range(5)]
    assert [len(turn) for turn in turns] == pytest.approx([1000, 1000, 1000, 1000, 0], abs=120)
    order = [frames[1] for turn in turns for _, frames in turn]
    assert len(order) == 4000
    assert order != sorted(order)


def test_a_box_is_a_copy_that_its_sender_cannot_change():
    network = InProcessNetwork()
    a, b = network.link("a"), network.link("b")
    data = bytearray(b"before")
    a.send("b", [b"n", data])
    data[:] = b"after!"
    assert b.receive(0) == [("a", [b"n", b"before"])]


def test_the_same_seed_gives_the_same_run():
    faults = Faults(seed=7, drop=0.1, duplicate=0.1, corrupt=0.1, max_delay=5)
    assert run_of(faults) == run_of(faults)
    assert run_of(faults) != run_of(Faults(8, 0.1, 0.1, 0.1, 5))


def test_what_lay_in_the_box_of_a_closed_link_is_gone():
    network = InProcessNetwork()
    a, b = network.link("a"), network.link("b")
    a.send("b", [b"n", b""])
    b.close()
    assert network.link("b").receive(0) == []


def test_everything_under_way_to_one_peer_can_be_lost():
    network = InProcessNetwork(Faults(max_delay=3))
    a, b, c = network.link("a"), network.link("b"), network.link("c")
    for peer in ("b", "c"):
        a.send(peer, [b"n", b""])
    network.lose_everything_for("b")
    network.lose_everything_for("nobody")
    assert [b.receive(0) for _ in range(4)] == [[]] * 4
    assert sum(len(c.receive(0)) for _ in range(4)) == 1
    a.send("b", [b"later", b""])
    assert sum(len(b.receive(0)) for _ in range(4)) == 1
