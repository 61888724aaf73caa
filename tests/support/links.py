"""Links of every kind, and patience with them."""

import contextlib
import ctypes

from afd_server.core.errors import TransportError
from afd_server.transport.calls import CallServer
from afd_server.transport.inproc import InProcessNetwork
from afd_server.transport.ring import RingLibrary
from afd_server.transport.shm import SharedMemoryLink
from afd_server.transport.zeromq import ZeroMQLink

PATIENCE = 1000  # receives of 10 ms before a test gives up


class Net:
    """Opens links of one kind and closes them all."""

    @staticmethod
    def settle(a, b):
        """Wait until everything that two connected links agree on is agreed on."""

    def __init__(self, directory):
        self.directory = directory
        self.opened = []

    def link(self, name):
        self.opened.append(self.make(name))
        return self.opened[-1]

    def close(self):
        for link in self.opened:
            link.close()


class InProcessNet(Net):
    def __init__(self, directory):
        super().__init__(directory)
        self.make = InProcessNetwork().link


class IPCNet(Net):
    def make(self, name):
        return ZeroMQLink(name, f"ipc://{self.directory}/{name}.ipc")


class TCPNet(Net):
    def make(self, name):
        return ZeroMQLink(name, "tcp://127.0.0.1:*")


class NativeIPCNet(IPCNet):
    """Sockets that native code reads, though there is nothing for it to answer."""

    def make(self, name):
        link = super().make(name)
        link.assist(CallServer(RingLibrary(), [], 1, 0, 1, ctypes.c_int64(0)))
        return link


class SharedMemoryNet(IPCNet):
    def make(self, name):
        return SharedMemoryLink(super().make(name))

    @staticmethod
    def settle(a, b):
        await_memory(a, "b")


def opened(kind, directory):
    net = kind(directory)
    yield net
    net.close()


def await_frames(link, num_messages):
    """Receive until so many messages came; fail instead of waiting for ever."""
    received = []
    for _ in range(PATIENCE):
        received += link.receive(0.01)
        if len(received) >= num_messages:
            return [(peer, [bytes(frame) for frame in frames]) for peer, frames in received]
    raise AssertionError(f"{len(received)} of {num_messages} messages came")


def send_once_connected(link, peer, frames):
    """Send as soon as the way is open; fail instead of trying for ever."""
    for _ in range(PATIENCE):
        try:
            return link.send(peer, frames)
        except TransportError:
            link.receive(0.01)
    raise AssertionError(f"{peer} was never reached")


def send_until_heard(sender, receiver, frames):
    """Send until it arrives: on a way that was cut, frames and a first reconnect may be lost."""
    for _ in range(PATIENCE):
        with contextlib.suppress(TransportError):
            sender.send("b", frames)
        if ("a", frames) in receiver.receive(0.01):
            return
        sender.receive(0)
    raise AssertionError(f"{frames} never arrived")


def send_until_refused(link, peer, frames, limit):
    """Send without waiting; return how many were taken before the link refused."""
    for count in range(limit):
        try:
            link.send(peer, frames)
        except TransportError:
            return count
    raise AssertionError(f"{limit} messages were taken by nobody")


def notice_absence(link, peer):
    """Send until the link refuses: the peer has gone."""
    for _ in range(PATIENCE):
        try:
            link.send(peer, [b"anybody?", b""])
        except TransportError:
            return
        link.receive(0.01)
    raise AssertionError(f"frames to {peer} were taken though it is gone")


def await_memory(link, peer):
    """Receive until a peer is reached through shared memory; nothing else may arrive."""
    for _ in range(PATIENCE):
        assert link.receive(0.01) == []
        if peer in link.peers_in_memory:
            return
    raise AssertionError(f"{peer} has not accepted the memory")


def pair(net):
    """Return two links, the first connected to the second and known to be so."""
    a, b = net.link("a"), net.link("b")
    a.connect("b", b.address)
    send_once_connected(a, "b", [b"hello", b""])
    assert await_frames(b, 1) == [("a", [b"hello", b""])]
    net.settle(a, b)
    return a, b
