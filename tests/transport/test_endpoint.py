"""The second half of the checks on receipt: who is believed, and what becomes of who is not."""

from dataclasses import replace

import pytest

from afd_server.core.clock import ManualClock
from afd_server.core.errors import TransportError
from afd_server.core.topology import Member, Role, Topology
from afd_server.transport.codec import Envelope, decode, decode_header, encode
from afd_server.transport.endpoint import (
    BAD_FRAME_WINDOW_S,
    MAX_BAD_FRAMES,
    QUARANTINE_S,
    Endpoint,
    Identity,
)
from afd_server.transport.inproc import InProcessNetwork
from afd_server.transport.messages import (
    EMPTY,
    Cancel,
    Combine,
    Dispatch,
    DType,
    ExpertLoad,
    Heartbeat,
    LoadReport,
    Payload,
    ProcessState,
    Submit,
    TokenChunk,
    TopologyUpdate,
)

MODEL, NUMERICS = "digest", "numerics"
SUPERVISOR = Member(Role.SUPERVISOR, 0, "supervisor", "", "")
GATEWAY = Member(Role.GATEWAY, 0, "gateway", "", "")
ATTENTION = Member(Role.ATTENTION, 0, "attention0", "", NUMERICS)
OTHER = Member(Role.ATTENTION, 1, "attention1", "", NUMERICS)
FFN = Member(Role.FFN, 0, "ffn0", "", NUMERICS)
TOPOLOGY = Topology(3, (GATEWAY, ATTENTION, OTHER, FFN))

ROWS = Payload(DType.FLOAT32, (1, 4), bytes(range(16)))
MESSAGES = (
    Submit(*range(1, 10), *[0.5] * 7, 1000, "", "", Payload(DType.INT32, (1,), bytes(4))),
    Cancel(1, 1),
    TokenChunk(Payload(DType.INT64, (1, 8), bytes(64))),
    LoadReport(*range(18), Payload(DType.UINT8, (1, 40), bytes(40))),
    Dispatch(7, 1, 2, 0, 9, ROWS),
    Combine(7, 1, 2, 0, 3, 0, 0, "", ROWS),
    Heartbeat(Role.FFN, 0, ProcessState.READY, 1, "", ""),
    TopologyUpdate(TOPOLOGY),
    ExpertLoad(Payload(DType.INT64, (1, 2), bytes(16))),
)
SUBMIT, CANCEL, CHUNK, LOAD, DISPATCH, COMBINE, BEAT, UPDATE, EXPERTS = MESSAGES

MAY_SEND = {
    Role.SUPERVISOR: {TopologyUpdate},
    Role.GATEWAY: {Submit, Cancel, Heartbeat},
    Role.ATTENTION: {TokenChunk, LoadReport, ExpertLoad, Dispatch, Heartbeat},
    Role.FFN: {LoadReport, Combine, Heartbeat},
}


class Wire:
    """One endpoint under test and bare links, on which its peers may say anything."""

    def __init__(self, introduced=(SUPERVISOR,), with_crc=True):
        self.network = InProcessNetwork()
        self.clock = ManualClock()
        link = self.network.link("me")
        self.me = Endpoint(link, Identity("me", MODEL, NUMERICS), self.clock, introduced, with_crc)
        self.me.topology = TOPOLOGY
        self.with_crc = with_crc
        self.links = {}

    def link(self, name):
        if name not in self.links:
            self.links[name] = self.network.link(name)
        return self.links[name]

    def say(self, member, message, **changes):
        """Send as a member; `changes` are those of the envelope."""
        envelope = Envelope(member.incarnation, 3, 1, MODEL, member.fingerprint)
        self.say_frames(member, encode(envelope._replace(**changes), message, self.with_crc))

    def say_frames(self, member, frames):
        self.link(member.incarnation).send("me", frames)

    def hear(self):
        return [received.message for received in self.me.receive(0)]

    def heard_by(self, member):
        """Return what a peer got from the endpoint under test: envelopes and messages."""
        heard = []
        for _, (frame, data) in self.link(member.incarnation).receive(0):
            header = decode_header(frame)
            heard.append((header.envelope, decode(header, data, self.with_crc)))
        return heard


def spoilt(member, message):
    """Return a message's frames with one bit of the payload flipped."""
    envelope = Envelope(member.incarnation, 3, 1, MODEL, member.fingerprint)
    header, data = encode(envelope, message, True)
    return [header, bytes([data[0] ^ 1]) + bytes(data[1:])]


# -- membership


def test_a_member_is_heard_with_its_envelope_and_its_place():
    wire = Wire()
    wire.say(ATTENTION, DISPATCH, sequence=12, budget_ms=80)
    (received,) = wire.me.receive(0)
    assert received.message == DISPATCH
    assert received.sender == ATTENTION
    assert received.envelope == Envelope("attention0", 3, 12, MODEL, NUMERICS, 80)
    assert wire.me.num_bad_frames == 0


def test_a_stranger_is_not_heard():
    wire = Wire()
    wire.say(replace(ATTENTION, incarnation="stranger"), LOAD)
    assert wire.hear() == []
    assert wire.me.counters == {"bad_unknown_source": 1}


def test_an_introduced_process_is_heard_before_any_topology_holds_it():
    wire = Wire()
    starting = Member(Role.FFN, 1, "ffn1", "", "")
    wire.me.introduce(starting)
    wire.say(starting, BEAT)
    assert wire.hear() == [BEAT]


def test_an_introduced_process_may_have_found_its_fingerprint_since():
    wire = Wire(introduced=(SUPERVISOR, Member(Role.FFN, 1, "ffn1", "", "")))
    wire.say(Member(Role.FFN, 1, "ffn1", "", "whatever"), BEAT)
    assert wire.hear() == [BEAT]


def test_a_dismissed_process_is_a_stranger_again():
    wire = Wire()
    wire.me.dismiss(SUPERVISOR.incarnation)
    wire.me.dismiss("nobody")  # was never introduced
    wire.say(SUPERVISOR, UPDATE)
    assert wire.hear() == []
    assert wire.me.counters["bad_unknown_source"] == 1


def test_a_member_gone_from_the_topology_is_a_stranger():
    wire = Wire()
    wire.me.topology = Topology(4, (GATEWAY, OTHER, FFN))
    wire.say(ATTENTION, LOAD)
    wire.say(OTHER, LOAD)
    assert wire.hear() == [LOAD]
    assert wire.me.counters["bad_unknown_source"] == 1


def test_a_restarted_worker_is_heard_under_its_new_incarnation_only():
    wire = Wire()
    restarted = replace(FFN, incarnation="ffn0-again")
    wire.me.topology = Topology(4, (ATTENTION, restarted))
    wire.say(FFN, COMBINE)
    wire.say(restarted, replace(COMBINE, step=8))
    assert wire.hear() == [replace(COMBINE, step=8)]


def test_a_new_topology_counts_for_what_arrived_together_with_it():
    wire = Wire()
    newcomer = replace(FFN, incarnation="newcomer")
    wire.say(SUPERVISOR, TopologyUpdate(Topology(4, (*TOPOLOGY.members, newcomer))))
    wire.say(newcomer, COMBINE)
    heard = []
    for received in wire.me.receive(0):
        heard.append(received.message)
        if isinstance(received.message, TopologyUpdate):
            wire.me.topology = received.message.topology
    assert heard[1:] == [COMBINE]


# -- who may say what


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("sender", [SUPERVISOR, GATEWAY, ATTENTION, FFN], ids=lambda m: m.name)
def test_a_role_is_heard_only_with_its_own_messages(sender, message):
    wire = Wire()
    wire.say(sender, message)
    if type(message) in MAY_SEND[sender.role]:
        assert wire.hear() == [message]
        assert not wire.me.counters
    else:
        assert wire.hear() == []
        assert wire.me.counters["bad_role"] == 1


# -- identity


def test_who_speaks_as_another_is_not_heard():
    wire = Wire()
    wire.say(OTHER, LOAD, source=ATTENTION.incarnation)
    assert wire.hear() == []
    assert wire.me.counters == {"bad_source": 1}


@pytest.mark.parametrize("sender", [SUPERVISOR, ATTENTION], ids=lambda m: m.name)
def test_who_serves_another_model_is_not_heard(sender):
    wire = Wire()
    message = UPDATE if sender is SUPERVISOR else LOAD
    wire.say(sender, message, model_digest="another")
    assert wire.hear() == []
    assert wire.me.counters == {"bad_model": 1}


def test_a_member_that_computes_otherwise_than_the_topology_says_is_not_heard():
    wire = Wire()
    wire.say(FFN, COMBINE, fingerprint="other numerics")
    assert wire.hear() == []
    assert wire.me.counters == {"bad_fingerprint": 1}


# -- frames


@pytest.mark.parametrize("num_frames", [0, 1, 3])
def test_a_message_is_two_frames(num_frames):
    wire = Wire()
    envelope = Envelope(ATTENTION.incarnation, 3, 1, MODEL, NUMERICS)
    header, data = encode(envelope, LOAD, True)
    wire.say_frames(ATTENTION, [header, data, b"more"][:num_frames])
    assert wire.hear() == []
    assert wire.me.counters == {"bad_size": 1}


def test_a_header_that_cannot_be_read_is_dropped_without_an_answer():
    wire = Wire()
    wire.say_frames(ATTENTION, [b"\xc1", b""])
    assert wire.hear() == []
    assert wire.me.counters == {"bad_type": 1}
    assert wire.heard_by(ATTENTION) == []


def test_a_flipped_bit_is_seen_where_checksums_are_on():
    wire = Wire()
    wire.say_frames(FFN, spoilt(FFN, COMBINE))
    assert wire.hear() == []
    assert wire.me.counters == {"bad_crc": 1}


def test_a_flipped_bit_goes_unseen_where_checksums_are_off():
    wire = Wire(with_crc=False)
    wire.say_frames(FFN, spoilt(FFN, COMBINE))
    (message,) = wire.hear()
    assert message.partial.data != ROWS.data


def test_a_bad_frame_does_not_keep_its_neighbours_from_being_heard():
    wire = Wire()
    wire.say(ATTENTION, LOAD)
    wire.say_frames(ATTENTION, [b"\xc1", b""])
    wire.say(ATTENTION, DISPATCH)
    assert wire.hear() == [LOAD, DISPATCH]


# -- refusals


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"fingerprint": "other numerics"}, "fingerprint"),
        ({"model_digest": "another"}, "model"),
        ({"source": OTHER.incarnation}, "source"),
    ],
)
def test_a_refused_dispatch_is_answered_with_its_key_and_the_reason(changes, reason):
    wire = Wire()
    wire.say(ATTENTION, DISPATCH, epoch=2, **changes)
    assert wire.hear() == []
    ((_, answer),) = wire.heard_by(ATTENTION)
    assert answer == Combine(7, 1, 2, 0, 2, 0, 0, reason, EMPTY)


def test_a_dispatch_damaged_on_its_way_is_answered():
    wire = Wire()
    wire.say_frames(ATTENTION, spoilt(ATTENTION, DISPATCH))
    wire.hear()
    ((_, answer),) = wire.heard_by(ATTENTION)
    assert answer == Combine(7, 1, 2, 0, 3, 0, 0, "crc", EMPTY)


def test_a_worker_that_the_topology_has_not_brought_yet_learns_why_it_waits():
    wire = Wire()
    newcomer = replace(ATTENTION, incarnation="newcomer")
    wire.say(newcomer, DISPATCH)
    assert wire.hear() == []
    ((_, answer),) = wire.heard_by(newcomer)
    assert answer == Combine(7, 1, 2, 0, 3, 0, 0, "unknown_source", EMPTY)


def test_only_a_dispatch_is_answered():
    wire = Wire()
    for message in MESSAGES:
        if message is not DISPATCH:
            wire.say(ATTENTION, message, model_digest="another")
            wire.clock.advance(BAD_FRAME_WINDOW_S)
    assert wire.hear() == []
    assert wire.heard_by(ATTENTION) == []


def test_a_refusal_that_cannot_be_sent_is_counted_and_forgotten():
    wire = Wire()
    wire.say(ATTENTION, DISPATCH, model_digest="another")
    wire.link(ATTENTION.incarnation).close()
    assert wire.hear() == []
    assert wire.me.counters == {"bad_model": 1, "unsent": 1}


# -- quarantine


def offend(wire, member, times, apart_s=0.0):
    for _ in range(times):
        wire.say_frames(member, [b"\xc1", b""])
        wire.hear()
        wire.clock.advance(apart_s)


def test_three_bad_frames_within_ten_seconds_end_the_hearing_for_a_while():
    wire = Wire()
    offend(wire, ATTENTION, MAX_BAD_FRAMES - 1)
    wire.say(ATTENTION, LOAD)
    assert wire.hear() == [LOAD]
    offend(wire, ATTENTION, 1)
    wire.clock.advance(QUARANTINE_S - 0.01)
    wire.say(ATTENTION, LOAD)
    assert wire.hear() == []
    assert wire.me.counters == {"bad_type": 3, "bad_quarantined": 1}
    assert wire.me.num_bad_frames == 4
    wire.clock.advance(0.01)
    wire.say(ATTENTION, LOAD)
    assert wire.hear() == [LOAD]


def test_after_a_quarantine_the_count_begins_anew():
    wire = Wire()
    offend(wire, ATTENTION, MAX_BAD_FRAMES)
    wire.clock.advance(QUARANTINE_S)
    offend(wire, ATTENTION, MAX_BAD_FRAMES - 1)
    wire.say(ATTENTION, LOAD)
    assert wire.hear() == [LOAD]
    offend(wire, ATTENTION, 1)
    wire.say(ATTENTION, LOAD)
    assert wire.hear() == []


def test_who_is_not_heard_can_still_be_spoken_to():
    wire = Wire()
    offend(wire, ATTENTION, MAX_BAD_FRAMES)
    wire.me.send(ATTENTION.incarnation, COMBINE)
    assert [message for _, message in wire.heard_by(ATTENTION)] == [COMBINE]


def test_bad_frames_of_one_receive_are_enough():
    wire = Wire()
    for _ in range(MAX_BAD_FRAMES + 2):
        wire.say_frames(ATTENTION, [b"\xc1", b""])
    wire.hear()
    assert wire.me.counters == {"bad_type": 3, "bad_quarantined": 2}


def test_exactly_ten_seconds_are_within_ten_seconds():
    wire = Wire()
    offend(wire, ATTENTION, MAX_BAD_FRAMES, apart_s=BAD_FRAME_WINDOW_S / 2)
    wire.say(ATTENTION, LOAD)
    assert wire.hear() == []


def test_bad_frames_far_apart_are_forgiven():
    wire = Wire()
    offend(wire, ATTENTION, 20, apart_s=BAD_FRAME_WINDOW_S / 2 + 0.01)
    wire.say(ATTENTION, LOAD)
    assert wire.hear() == [LOAD]
    assert wire.me.counters == {"bad_type": 20}


def test_bad_frames_of_several_peers_are_not_added_up():
    wire = Wire()
    for member in (ATTENTION, OTHER, FFN, GATEWAY):
        offend(wire, member, MAX_BAD_FRAMES - 1)
    for member in (ATTENTION, OTHER, FFN):
        wire.say(member, LOAD)
    assert wire.hear() == [LOAD] * 3


def test_the_others_do_not_suffer_from_a_quarantine():
    wire = Wire()
    offend(wire, ATTENTION, MAX_BAD_FRAMES)
    wire.say(ATTENTION, LOAD)
    wire.say(OTHER, DISPATCH)
    assert wire.hear() == [DISPATCH]


def test_an_introduced_process_can_be_quarantined_too():
    wire = Wire()
    offend(wire, SUPERVISOR, MAX_BAD_FRAMES)
    wire.say(SUPERVISOR, UPDATE)
    assert wire.hear() == []


@pytest.mark.parametrize("changes", [{}, {"model_digest": "another"}, {"source": "attention0"}])
def test_a_stranger_is_never_quarantined_for_the_topology_may_still_bring_it(changes):
    wire = Wire()
    stranger = replace(OTHER, slot=2, incarnation="stranger")
    for _ in range(2 * MAX_BAD_FRAMES):
        wire.say(stranger, LOAD, **changes)
        wire.say_frames(stranger, [b"\xc1", b""])
        assert wire.hear() == []
    wire.me.topology = Topology(4, (*TOPOLOGY.members, stranger))
    wire.say(stranger, LOAD)
    assert wire.hear() == [LOAD]


def test_whoever_invents_names_does_not_fill_the_memory():
    wire = Wire()
    for number in range(100):
        wire.say_frames(replace(FFN, incarnation=f"invented{number}"), [b"\xc1", b""])
    wire.hear()
    assert set(wire.me.counters) == {"bad_type"}
    assert not wire.me._bad_at
    assert not wire.me._quarantined_until


# -- sending


def test_envelopes_carry_identity_epoch_and_a_running_number():
    wire = Wire()
    for peer in (ATTENTION, GATEWAY):
        wire.link(peer.incarnation)
    wire.me.send(ATTENTION.incarnation, COMBINE)
    wire.me.topology = Topology(8, TOPOLOGY.members)
    wire.me.send(GATEWAY.incarnation, LOAD)
    wire.me.send(ATTENTION.incarnation, COMBINE)
    to_attention = [envelope for envelope, _ in wire.heard_by(ATTENTION)]
    assert to_attention == [
        Envelope("me", 3, 1, MODEL, NUMERICS),
        Envelope("me", 8, 3, MODEL, NUMERICS),
    ]
    assert wire.heard_by(GATEWAY) == [(Envelope("me", 8, 2, MODEL, NUMERICS), LOAD)]


def test_an_endpoint_begins_at_epoch_0_without_a_fingerprint():
    network = InProcessNetwork()
    endpoint = Endpoint(network.link("me"), Identity("me", MODEL), ManualClock())
    peer = network.link("peer")
    endpoint.send("peer", BEAT)
    endpoint.identify(NUMERICS)
    endpoint.send("peer", BEAT)
    envelopes = [decode_header(frames[0]).envelope for _, frames in peer.receive(0)]
    assert envelopes == [Envelope("me", 0, 1, MODEL, ""), Envelope("me", 0, 2, MODEL, NUMERICS)]


def test_sending_to_nobody_raises_and_trying_to_is_counted():
    wire = Wire()
    with pytest.raises(TransportError):
        wire.me.send("nobody", LOAD)
    assert not wire.me.counters
    assert not wire.me.try_send("nobody", LOAD)
    assert wire.me.counters == {"unsent": 1}
    assert wire.me.num_bad_frames == 0
    wire.link(GATEWAY.incarnation)
    assert wire.me.try_send(GATEWAY.incarnation, LOAD)


def test_two_endpoints_understand_each_other():
    network, clock = InProcessNetwork(), ManualClock()
    ends = {
        member: Endpoint(
            network.link(member.incarnation),
            Identity(member.incarnation, MODEL, NUMERICS),
            clock,
        )
        for member in (ATTENTION, FFN)
    }
    for end in ends.values():
        end.topology = TOPOLOGY
    ends[ATTENTION].send(FFN.incarnation, DISPATCH)
    (question,) = ends[FFN].receive(0)
    assert (question.sender, question.message) == (ATTENTION, DISPATCH)
    ends[FFN].send(question.sender.incarnation, COMBINE)
    (answer,) = ends[ATTENTION].receive(0)
    assert (answer.sender, answer.message) == (FFN, COMBINE)
