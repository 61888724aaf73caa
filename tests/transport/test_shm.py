"""What the shared-memory link promises beyond the contract of every link (test_links.py)."""

import contextlib
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest

from afd_server.core.errors import TransportError
from afd_server.transport import shm
from afd_server.transport.ring import (
    MAX_FRAMES,
    MAX_RECORD_BYTES,
    MAX_RECORDS,
    create_memory,
)
from afd_server.transport.shm import SharedMemoryLink
from afd_server.transport.zeromq import CREDITS, ZeroMQLink
from support.links import (
    PATIENCE,
    SharedMemoryNet,
    await_frames,
    await_memory,
    notice_absence,
    opened,
    pair,
    send_once_connected,
    send_until_heard,
)

CONTROL = struct.Struct("<8sB16sii")
MARK = b"\xc1afd-sh\x01"
OFFER, ACCEPT, REFUSE, BELL = 1, 2, 3, 4


@pytest.fixture
def net(tmp_path):
    yield from opened(SharedMemoryNet, tmp_path)


@pytest.fixture
def stranger(net):
    """A bare ZeroMQ link, on which anything can be said."""
    link = ZeroMQLink("stranger", f"ipc://{net.directory}/stranger.ipc")
    net.opened.append(link)
    return link


def descriptors():
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def turns(*links):
    for _ in range(PATIENCE):
        for link in links:
            yield link.receive(0.001)


def count_over_zeromq(link, monkeypatch):
    """Write down what a link sends over ZeroMQ from now on."""
    sent = []
    monkeypatch.setattr(link._link, "send", lambda peer, frames: sent.append(frames))
    return sent


# -- what travels where


def test_small_messages_do_not_touch_zeromq_in_either_direction(net, monkeypatch):
    a, b = pair(net)
    over_zeromq = [count_over_zeromq(link, monkeypatch) for link in (a, b)]
    a.send("b", [b"question", bytes(36_000)])
    assert await_frames(b, 1) == [("a", [b"question", bytes(36_000)])]
    b.send("a", [b"answer", b""])
    assert await_frames(a, 1) == [("b", [b"answer", b""])]
    assert over_zeromq == [[], []]


@pytest.mark.parametrize("frames", [[bytes(MAX_RECORD_BYTES)], [b"x"] * (MAX_FRAMES + 1)])
def test_what_does_not_fit_goes_over_zeromq(net, frames):
    a, b = pair(net)
    a.send("b", frames)
    assert await_frames(b, 1) == [("a", frames)]
    assert "b" in a.peers_in_memory


def test_before_the_memory_is_accepted_messages_go_over_zeromq(net):
    a, b = net.link("a"), net.link("b")
    a.connect("b", b.address)
    send_once_connected(a, "b", [b"early", b""])
    assert not a.peers_in_memory
    assert await_frames(b, 1) == [("a", [b"early", b""])]
    assert b.peers_in_memory == {"a"}  # it may answer through the memory at once
    b.send("a", [b"answer", b""])
    assert await_frames(a, 1) == [("b", [b"answer", b""])]


def test_peers_beyond_this_host_and_peers_known_before_get_no_memory(net, stranger):
    link = ZeroMQLink("early", None)
    link.connect("stranger", stranger.address)
    early = SharedMemoryLink(link)
    far = ZeroMQLink("far", "tcp://127.0.0.1:*")
    net.opened += [early, far]
    early.connect("far", far.address)
    for peer, name in ((stranger, "stranger"), (far, "far")):
        send_once_connected(early, name, [b"plain", b""])
        assert await_frames(peer, 1) == [("early", [b"plain", b""])]


# -- sleeping and watching


def delayed(seconds, action):
    timer = threading.Timer(seconds, action)
    timer.start()
    return timer


@pytest.mark.parametrize("watches", [False, True])
def test_a_waiting_reader_is_reached_at_once_whether_it_sleeps_or_watches(
    net, watches, monkeypatch
):
    a, b = pair(net)
    b._usual_wait_ns = 0 if watches else 10**9
    monkeypatch.setattr(shm, "LONGEST_WATCH_NS", 10**10 if watches else 1)
    timer = delayed(0.1, lambda: a.send("b", [b"now", b""]))
    began = time.monotonic()
    assert b.receive(10.0) == [("a", [b"now", b""])]
    assert 0.05 < time.monotonic() - began < 5
    timer.join()


def test_who_watches_the_rings_hears_zeromq_as_well(net, stranger, monkeypatch):
    _, b = pair(net)
    stranger.connect("b", b.address)
    send_once_connected(stranger, "b", [b"hello", b""])
    assert await_frames(b, 1) == [("stranger", [b"hello", b""])]
    b._usual_wait_ns = 0
    monkeypatch.setattr(shm, "LONGEST_WATCH_NS", 10**10)
    timer = delayed(0.1, lambda: stranger.send("b", [b"topology", b""]))
    began = time.monotonic()
    assert b.receive(10.0) == [("stranger", [b"topology", b""])]
    assert time.monotonic() - began < 5
    timer.join()


def test_busy_rings_do_not_keep_zeromq_from_being_heard(net, stranger):
    a, b = pair(net)
    stranger.connect("b", b.address)
    send_once_connected(stranger, "b", [b"topology", b""])
    for _ in range(PATIENCE):
        a.send("b", [b"busy", b""])
        if ("stranger", [b"topology", b""]) in b.receive(0.01):
            return
    raise AssertionError("the control message was never heard")


def test_an_idle_pair_uses_no_cpu(net):
    a, b = pair(net)
    for _ in range(50):  # busy at first, so that they begin by watching
        a.send("b", [b"x", b""])
        await_frames(b, 1)
    began = time.process_time()
    for _ in range(4):
        assert b.receive(0.25) == []
    assert time.process_time() - began < 0.3  # of a second; who watched would use all of it


def test_a_wait_ends_in_time(net):
    _, b = pair(net)
    for usual_ns in (0, shm.LONGEST_COUNTED_NS):
        b._usual_wait_ns = usual_ns
        for wait_s in (0.0, 0.0005, 0.02):
            began = time.monotonic()
            assert b.receive(wait_s) == []
            assert time.monotonic() - began < wait_s + 5


def test_short_waits_bring_the_watch_back(net, monkeypatch):
    _, b = pair(net)
    clock = types.SimpleNamespace(now_ns=0)
    clock.monotonic_ns = lambda: clock.now_ns
    monkeypatch.setattr(shm, "time", clock)

    def wait(now_ns, until_ns):
        clock.now_ns += 100_000
        return []

    monkeypatch.setattr(b, "_wait", wait)
    b._usual_wait_ns = shm.LONGEST_COUNTED_NS
    for _ in range(50):
        assert b.receive(1.0) == []
    assert b._usual_wait_ns < shm.LONGEST_WATCH_NS


# -- ends


def test_leaving_a_peer_takes_the_memory_from_both_and_meeting_it_gives_new(net):
    a, b = pair(net)
    a.disconnect("b")
    assert not a.peers_in_memory
    for _ in turns(b):
        if not b.peers_in_memory:
            break
    assert not b.peers_in_memory
    a.connect("b", b.address)
    send_until_heard(a, b, [b"again", b""])
    for _ in turns(a, b):
        if a.peers_in_memory and b.peers_in_memory:
            return
    raise AssertionError("no new memory")


def test_a_peer_that_comes_back_under_its_name_gets_new_memory(net):
    a, b = pair(net)
    b.close()
    again = net.link("b")
    send_until_heard(a, again, [b"again", b""])
    for _ in turns(a, again):
        with contextlib.suppress(TransportError):
            a.send("b", [b"and again", b""])
        if a.peers_in_memory:
            return
    raise AssertionError("no new memory")


def test_nothing_is_left_open(net):
    before = descriptors()
    for number in range(20):
        a, b = net.link(f"a{number}"), net.link("b")
        a.connect("b", b.address)
        send_once_connected(a, "b", [b"hello", b""])
        await_frames(b, 1)
        await_memory(a, "b")
        a.connect("nobody", f"ipc://{net.directory}/nobody.ipc")  # an offer nobody answers
        a.close()
        b.close()
    assert descriptors() <= before + 2


PEER = """
import sys
from afd_server.transport.shm import SharedMemoryLink
from afd_server.transport.zeromq import CREDITS, ZeroMQLink
link = SharedMemoryLink(ZeroMQLink("b", sys.argv[1]))
print("bound", flush=True)
while True:
    for peer, frames in link.receive(1.0):
        link.send(peer, frames)
"""


@contextlib.contextmanager
def echo(net):
    address = f"ipc://{net.directory}/b.ipc"
    command = [sys.executable, "-c", PEER, address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "bound\n"
            a = net.link("a")
            a.connect("b", address)
            send_once_connected(a, "b", [b"hello", b""])
            assert await_frames(a, 1) == [("b", [b"hello", b""])]
            assert a.peers_in_memory == {"b"}
            yield a, process
        finally:
            process.kill()


def test_two_processes_speak_through_memory(net):
    with echo(net) as (a, _):
        for number in range(2000):
            a.send("b", [b"%d" % number, bytes(number)])
            assert await_frames(a, 1) == [("b", [b"%d" % number, bytes(number)])]


def test_a_killed_peer_is_noticed_and_its_memory_given_back(net):
    with echo(net) as (a, process):
        process.send_signal(signal.SIGKILL)
        process.wait()
        notice_absence(a, "b")
        for _ in turns(a):
            if not a.peers_in_memory:
                return
        raise AssertionError("the dead keep their memory")


def test_a_stopped_peer_is_written_no_more_than_the_credits_and_answers_when_it_goes_on(net):
    with echo(net) as (a, process):
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        payload = bytes(16384)  # so that few fit into the kernel's buffer of the socket
        for count in range(1000):
            try:
                a.send("b", [b"%d" % count, payload])
            except TransportError:
                break
        assert count <= MAX_RECORDS + 2 * CREDITS + 32  # it may be stopped awake or asleep
        process.send_signal(signal.SIGCONT)
        assert await_frames(a, 1)[0] == ("b", [b"0", payload])


# -- forged and foreign


def greet(stranger, link):
    stranger.connect("b", link.address)
    send_once_connected(stranger, "b", [b"hello", b""])
    assert await_frames(link, 1) == [("stranger", [b"hello", b""])]


def offer(pid, descriptor, token=bytes(16)):
    return CONTROL.pack(MARK, OFFER, token, pid, descriptor)


@pytest.mark.parametrize("pid", [-1, 0, 2**31 - 1, "own"])
def test_an_offer_of_what_is_no_memory_is_refused(net, stranger, pid):
    b = net.link("b")
    greet(stranger, b)
    stranger.send("b", [offer(os.getpid() if pid == "own" else pid, 0)])
    assert [b.receive(0.05) for _ in range(4)] == [[]] * 4
    ((_, (answer,)),) = await_frames(stranger, 1)
    assert CONTROL.unpack(answer)[:3] == (MARK, REFUSE, bytes(16))
    assert not b.peers_in_memory


def test_an_offer_with_another_token_is_refused(net, stranger):
    b = net.link("b")
    greet(stranger, b)
    memory, descriptor = create_memory(b"t" * 16)
    stranger.send("b", [offer(os.getpid(), descriptor)])
    assert b.receive(0.05) == []
    assert CONTROL.unpack(await_frames(stranger, 1)[0][1][0])[1] == REFUSE
    os.close(descriptor)
    memory.close()


def test_a_repeated_offer_gets_the_same_answer_and_a_new_one_new_memory(net, stranger):
    b = net.link("b")
    greet(stranger, b)
    for token in (b"1" * 16, b"1" * 16, b"2" * 16):
        memory, descriptor = create_memory(token)
        stranger.send("b", [offer(os.getpid(), descriptor, token)])
        for _ in turns(b):
            if b.peers_in_memory:
                break
        assert CONTROL.unpack(await_frames_with(b, stranger)[1][0])[1:3] == (ACCEPT, token)
        os.close(descriptor)
        memory.close()
    assert b.peers_in_memory == {"stranger"}


def await_frames_with(other, link):
    for _ in range(PATIENCE):
        other.receive(0)
        if received := link.receive(0.01):
            return received[0]
    raise AssertionError("no answer")


def test_who_cannot_map_the_memory_is_reached_over_zeromq(net, monkeypatch):
    def refuse(*_arguments):
        raise PermissionError("another user's")

    monkeypatch.setattr(shm, "open_memory", refuse)
    a, b = net.link("a"), net.link("b")
    a.connect("b", b.address)
    for number in range(5):
        send_once_connected(a, "b", [b"%d" % number, b""])
        assert await_frames(b, 1) == [("a", [b"%d" % number, b""])]
        assert a.receive(0.05) == []
    assert not a._offers


def test_an_acceptance_of_what_was_not_offered_changes_nothing(net, stranger):
    a, b = pair(net)
    greet(stranger, b)
    for kind in (ACCEPT, REFUSE, BELL):
        stranger.send("b", [CONTROL.pack(MARK, kind, bytes(16), os.getpid(), -1)])
    assert [b.receive(0.02) for _ in range(4)] == [[]] * 4
    assert b.peers_in_memory == {"a"}
    assert a.peers_in_memory == {"b"}


def test_who_accepts_and_dies_is_lost_again(net, stranger):
    a = net.link("a")
    a.connect("stranger", stranger.address)
    send_once_connected(a, "stranger", [b"hello", b""])
    ((_, (frame,)), _) = await_frames(stranger, 2)
    _, kind, token, pid, _ = CONTROL.unpack(frame)
    assert (kind, pid) == (OFFER, os.getpid())
    stranger.send("a", [CONTROL.pack(MARK, ACCEPT, token, 2**31 - 1, -1)])
    assert a.receive(0.1) == []
    assert not a.peers_in_memory


def test_the_peer_that_we_connected_to_offers_nothing(net, stranger):
    a = net.link("a")
    a.connect("stranger", stranger.address)
    send_once_connected(a, "stranger", [b"hello", b""])
    await_frames(stranger, 2)
    memory, descriptor = create_memory(bytes(16))
    stranger.send("a", [offer(os.getpid(), descriptor)])
    assert a.receive(0.1) == []
    assert CONTROL.unpack(await_frames(stranger, 1)[0][1][0])[1] == REFUSE
    assert not a.peers_in_memory
    os.close(descriptor)
    memory.close()


def test_no_more_memory_is_mapped_than_there_can_be_members(net, stranger, monkeypatch):
    monkeypatch.setattr(shm, "MAX_RINGS", 1)
    _, b = pair(net)
    greet(stranger, b)
    memory, descriptor = create_memory(bytes(16))
    stranger.send("b", [offer(os.getpid(), descriptor)])
    assert b.receive(0.1) == []
    assert CONTROL.unpack(await_frames(stranger, 1)[0][1][0])[1] == REFUSE
    assert b.peers_in_memory == {"a"}
    os.close(descriptor)
    memory.close()


@pytest.mark.parametrize(
    "frames",
    [
        [CONTROL.pack(MARK, 9, bytes(16), 1, 1)],
        [CONTROL.pack(b"\xc1afd-sh\x02", OFFER, bytes(16), 1, 1)],
        [CONTROL.pack(MARK, OFFER, bytes(16), 1, 1)[:-1]],
        [MARK],
        [CONTROL.pack(MARK, OFFER, bytes(16), 1, 1), b""],
    ],
    ids=["kind", "version", "short", "mark", "two frames"],
)
def test_what_is_no_frame_of_a_link_is_left_to_those_who_count_bad_ones(net, stranger, frames):
    b = net.link("b")
    greet(stranger, b)
    stranger.send("b", frames)
    assert await_frames(b, 1) == [("stranger", frames)]


def test_a_peer_that_spoils_its_counters_is_spoken_to_over_zeromq(net):
    a, b = pair(net)
    struct.pack_into("<Q", a._ways["b"].ring._memory, 0, 2**63)
    for _ in turns(b):
        if not b.peers_in_memory:
            break
    assert not b.peers_in_memory
    with pytest.raises(TransportError, match="b has gone"):
        a.send("b", [b"x", b""])
    send_until_heard(a, b, [b"again", b""])
