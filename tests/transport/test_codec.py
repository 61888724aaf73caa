"""The first half of the checks on receipt: what `encode` makes comes back, nothing else does."""

import math
import random
import struct
import tracemalloc
import zlib
from dataclasses import replace

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afd_server.core.errors import ProtocolError
from afd_server.core.topology import FFNParallel, Member, Role, Topology
from afd_server.transport import codec
from afd_server.transport.codec import (
    MAX_HEADER_BYTES,
    MAX_MEMBERS,
    MAX_STRING_CHARS,
    PROTOCOL_MAJOR,
    PROTOCOL_MINOR,
    Envelope,
    HeaderReader,
    decode,
    decode_header,
    encode,
)
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

ENVELOPE = Envelope("a1b2c3d4e5f60718", 3, 41, "digest", "fingerprint", 250)
BIGGEST = 2**63 - 1
CANCEL = Cancel(key=5, attempt=1)
BEAT = Heartbeat(Role.FFN, 1, ProcessState.FAILED, 12, "ipc:///x", "no such file")
DISPATCH = Dispatch(
    step=7,
    lane=1,
    layer=2,
    part=0,
    live_us=9,
    activations=Payload(DType.FLOAT32, (2, 3), bytes(range(24))),
)
COMBINE = Combine(7, 1, 2, 0, 3, 0, 0, "", Payload(DType.FLOAT32, (2, 3), bytes(range(24))))
SUBMIT = Submit(
    key=1, attempt=1, num_prompt=2, num_emitted=0, max_tokens=8, top_k=0, guard_window=7, seed=9,
    choice=0, temperature=0.7, top_p=1.0, min_p=0.0, top_n_sigma=1.0, min_k=3.0, ttft_s=0.5,
    tpot_s=0.05, rank=1000, salt="salt", tenant="tenant",
    tokens=Payload(DType.INT32, (2,), bytes(8)),
)  # fmt: skip
TOPOLOGY = Topology(
    4,
    (
        Member(Role.ATTENTION, 0, "aa", "ipc:///run/aa.ipc", "fp"),
        Member(Role.FFN, 1, "bb", "tcp://10.0.0.2:5555", "fp"),
    ),
    FFNParallel.REPLICATE,
)

# Positions in a header's list.
MAJOR, MINOR, TAG, SOURCE, DIGEST, FINGERPRINT, EPOCH, SEQUENCE, BUDGET, OWN = range(10)
DTYPE, RANK, DIM_0, DIM_1, DIM_2, NBYTES, CRC = range(-7, 0)

numbers = st.integers(0, BIGGEST) | st.sampled_from([0, 1, 2**31, 2**32, BIGGEST])
reals = st.floats(allow_nan=False, allow_infinity=False)
words = st.text(st.characters(codec="utf-8"), max_size=24)
envelopes = st.builds(Envelope, words, numbers, numbers, words, words, numbers)
members = st.builds(Member, st.sampled_from(Role), numbers, words, words, words)


@st.composite
def payloads(draw):
    dtype = draw(st.sampled_from([d for d in DType if d is not DType.NONE]))
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
    size = math.prod(shape) * dtype.itemsize
    buffer = draw(st.sampled_from([bytes, bytearray, memoryview]))
    return Payload(dtype, shape, buffer(draw(st.binary(min_size=size, max_size=size))))


any_payload = payloads() | st.just(EMPTY)
messages = st.one_of(
    st.builds(Submit, *[numbers] * 9, *[reals] * 7, numbers, words, words, any_payload),
    st.builds(Cancel, numbers, numbers),
    st.builds(TokenChunk, any_payload),
    st.builds(LoadReport, *[numbers] * 18, any_payload),
    st.builds(ExpertLoad, any_payload),
    st.builds(Dispatch, *[numbers] * 5, any_payload),
    st.builds(Combine, *[numbers] * 7, words, any_payload),
    st.builds(
        Heartbeat, st.sampled_from(Role), numbers, st.sampled_from(ProcessState), numbers, words,
        words,
    ),
    st.builds(
        TopologyUpdate,
        st.builds(
            Topology, numbers, st.lists(members, max_size=6).map(tuple),
            st.sampled_from(FFNParallel),
        ),
    ),
)  # fmt: skip


def read(frames, with_crc=True):
    return decode(decode_header(frames[0]), frames[1], with_crc)


def changed(message, changes):
    """Return a message's frames with some items of the header replaced."""
    header, data = encode(ENVELOPE, message, True)
    items = msgpack.unpackb(header)
    for position, value in changes.items():
        items[position] = value
    return [msgpack.packb(items), data]


def refused(frames, reason, with_crc=True):
    with pytest.raises(ProtocolError) as caught:
        read(frames, with_crc)
    assert caught.value.reason == reason, caught.value
    return str(caught.value)


@given(envelopes, messages, st.booleans())
def test_every_message_comes_back_as_it_went(envelope, message, with_crc):
    frames = encode(envelope, message, with_crc)
    header = decode_header(frames[0])
    assert header.envelope == envelope
    assert decode(header, frames[1], with_crc) == message


@given(messages)
def test_every_header_is_short_and_flat(message):
    header, _ = encode(ENVELOPE, message, True)
    assert len(header) <= MAX_HEADER_BYTES
    assert all(type(item) in (int, str, bytes) for item in msgpack.unpackb(header))


@pytest.mark.parametrize("dtype", [d for d in DType if d is not DType.NONE])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0), (2, 3), (2, 1, 2)])
def test_every_dtype_travels_in_every_rank(dtype, shape):
    size = math.prod(shape) * dtype.itemsize
    message = TokenChunk(Payload(dtype, shape, bytes(range(size))))
    assert read(encode(ENVELOPE, message, True)) == message


def test_the_payload_is_not_copied():
    data = bytearray(24)
    message = replace(DISPATCH, activations=Payload(DType.FLOAT32, (2, 3), memoryview(data)))
    frames = encode(ENVELOPE, message, True)
    data[:4] = b"\x01\x02\x03\x04"
    assert bytes(frames[1][:4]) == b"\x01\x02\x03\x04"
    received = decode(decode_header(frames[0]), frames[1], False)
    assert received.activations.data is frames[1]


def test_extreme_floats_come_back_bit_for_bit():
    extremes = [5e-324, 1.7976931348623157e308, -0.0, 0.1]
    for value in extremes:
        message = replace(SUBMIT, temperature=value)
        back = read(encode(ENVELOPE, message, True))
        assert struct.pack("<d", back.temperature) == struct.pack("<d", value)


def test_the_largest_topology_we_start_comes_back():
    members = tuple(Member(Role.FFN, i, f"{i:016x}", "", "f" * 64) for i in range(MAX_MEMBERS))
    update = TopologyUpdate(Topology(1, members))
    assert read(encode(ENVELOPE, update, True)) == update


def test_a_larger_topology_is_not_sent():
    crowd = (Member(Role.FFN, 0, "x", "", ""),) * (MAX_MEMBERS + 1)
    with pytest.raises(AssertionError, match="1025 members"):
        encode(ENVELOPE, TopologyUpdate(Topology(1, crowd)), True)


def test_a_header_too_long_to_be_received_is_not_sent():
    words = "x" * MAX_STRING_CHARS
    crowded = ENVELOPE._replace(source=words, model_digest=words, fingerprint=words)
    beat = Heartbeat(Role.FFN, 0, ProcessState.FAILED, 0, words, words)
    with pytest.raises(AssertionError, match="header of"):
        encode(crowded, beat, True)


# -- size


def test_a_header_beyond_2_kib_is_refused_unread():
    header = b"\xc1" * (MAX_HEADER_BYTES + 1)  # would be no MessagePack at all
    assert "2049 bytes" in refused([header, b""], "size")


def test_a_header_of_exactly_2_kib_is_read():
    assert "no MessagePack list" in refused([b"\x01" * MAX_HEADER_BYTES, b""], "type")


@pytest.mark.parametrize("size", [0, 1, 23, 25, 48])
def test_a_payload_of_another_length_is_refused(size):
    header, _ = encode(ENVELOPE, DISPATCH, True)
    assert f"the frame has {size}" in refused([header, bytes(size)], "size")


@pytest.mark.parametrize(
    "changes",
    [
        {NBYTES: 23},
        {NBYTES: 0},
        {NBYTES: BIGGEST},
        {DIM_0: 3},
        {DIM_0: 0},
        {DIM_1: BIGGEST, DIM_0: BIGGEST},  # would be 4 bytes in 64-bit arithmetic
        {DTYPE: DType.BFLOAT16},
        {DTYPE: DType.INT64},
        {RANK: 1, DIM_1: 0},
        {RANK: 3},  # the third dimension is then 0
        {DTYPE: DType.NONE, RANK: 0, DIM_0: 0, DIM_1: 0},
    ],
)
def test_shape_dtype_and_nbytes_must_agree_with_the_frame(changes):
    refused(changed(DISPATCH, changes), "size")


@pytest.mark.parametrize("message", [CANCEL, BEAT])
def test_a_payload_on_a_message_without_one_is_refused(message):
    changes = {DTYPE: DType.UINT8, RANK: 1, DIM_0: 4, NBYTES: 4, CRC: zlib.crc32(b"more")}
    header, _ = changed(message, changes)
    assert "has no payload" in refused([header, b"more"], "size")


def test_even_an_empty_payload_on_a_message_without_one_is_refused():
    refused(changed(CANCEL, {DTYPE: DType.UINT8, RANK: 1}), "size")


def test_an_unannounced_payload_is_refused():
    header, _ = encode(ENVELOPE, CANCEL, True)
    refused([header, b"more"], "size")


# -- type


@pytest.mark.parametrize(
    "content", [{}, {1: 2}, 7, None, "text", b"bytes", 1.5, True], ids=lambda c: type(c).__name__
)
def test_what_is_no_list_is_refused(content):
    refused([msgpack.packb(content), b""], "type")


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\xc1",  # never used by MessagePack
        b"\x93\x02\x00",  # a list that ends early
        b"\x91\xa2\xff\xff",  # no UTF-8
        b"\x91" * MAX_HEADER_BYTES,  # deeper than any stack
        msgpack.packb([2, 0, 2]) + b"\x00",  # something follows
    ],
    ids=["empty", "c1", "short", "utf8", "deep", "tail"],
)
def test_what_is_no_messagepack_is_refused(header):
    assert "no MessagePack list" in refused([header, b""], "type")


@pytest.mark.parametrize(
    "item",
    [
        {},
        {"key": 1},
        [],
        [[1]],
        msgpack.ExtType(5, b""),
        msgpack.ExtType(5, b"data"),
        msgpack.Timestamp(1, 2),
        None,
        True,
        1.0,
        b"bytes",
        "text",
    ],
    ids=repr,
)
@pytest.mark.parametrize("position", [MAJOR, MINOR, TAG, EPOCH, SEQUENCE, BUDGET, OWN, DTYPE, CRC])
def test_only_an_integer_is_an_integer(position, item):
    refused(changed(CANCEL, {position: item}), "type")


@pytest.mark.parametrize("item", [None, 1, b"bytes", {}, ["x"]], ids=repr)
@pytest.mark.parametrize("position", [SOURCE, DIGEST, FINGERPRINT])
def test_only_a_string_is_a_string(position, item):
    refused(changed(CANCEL, {position: item}), "type")


@pytest.mark.parametrize("item", [0.7, 1, "8 bytes.", b"", bytes(7), bytes(9), None], ids=repr)
def test_only_eight_bytes_are_a_float(item):
    refused(changed(SUBMIT, {OWN + 9: item}), "type")


@pytest.mark.parametrize("message", [CANCEL, SUBMIT, DISPATCH])
@pytest.mark.parametrize("more", [-1, 1])
def test_a_list_of_another_length_is_refused(message, more):
    header, data = encode(ENVELOPE, message, True)
    items = [*msgpack.unpackb(header), 0]
    refused([msgpack.packb(items[: len(items) - 1 + more]), data], "type")


@pytest.mark.parametrize("items", [[], [1], [1, 0]])
def test_a_list_too_short_for_version_and_tag_is_refused(items):
    assert "without version and tag" in refused([msgpack.packb(items), b""], "type")


@pytest.mark.parametrize("tag", [0, 10, -1, BIGGEST])
def test_a_tenth_message_is_refused(tag):
    assert f"unknown message tag {tag}" in refused(changed(CANCEL, {TAG: tag}), "type")


# -- version


@pytest.mark.parametrize("major", [0, PROTOCOL_MAJOR + 1, -1])
def test_another_major_version_is_refused(major):
    assert f"protocol {major}" in refused(changed(CANCEL, {MAJOR: major}), "version")


def test_a_newer_minor_version_is_understood():
    assert read(changed(CANCEL, {MINOR: PROTOCOL_MINOR + 1})) == CANCEL


def test_another_major_version_is_named_before_its_unknown_layout():
    refused([msgpack.packb([PROTOCOL_MAJOR + 1, 0, 99, {}][:3]), b""], "version")


# -- range


@pytest.mark.parametrize("value", [-1, -(2**63), 2**63, 2**64 - 1])
@pytest.mark.parametrize("position", [EPOCH, SEQUENCE, BUDGET, OWN, RANK, DIM_0, NBYTES, CRC])
def test_an_integer_outside_63_bits_is_refused(position, value):
    refused(changed(CANCEL, {position: value}), "range")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", range(5))
def test_a_float_that_is_no_number_is_refused(field, value):
    assert "finite" in refused(
        changed(SUBMIT, {OWN + 9 + field: struct.pack("<d", value)}), "range"
    )


@pytest.mark.parametrize("position", [SOURCE, DIGEST, FINGERPRINT])
def test_a_long_string_is_refused(position):
    assert read(changed(CANCEL, {position: "é" * MAX_STRING_CHARS})) == CANCEL
    refused(changed(CANCEL, {position: "x" * (MAX_STRING_CHARS + 1)}), "range")


@pytest.mark.parametrize(
    "changes",
    [
        {DTYPE: 6},
        {DTYPE: -1},
        {RANK: 4},
        {RANK: BIGGEST},
        {RANK: 1},  # two dimensions follow
        {DIM_2: 1},
        {DTYPE: DType.NONE, NBYTES: 0},  # nothing has no shape
    ],
)
def test_a_shape_of_another_rank_or_an_unknown_dtype_is_refused(changes):
    refused(changed(DISPATCH, changes), "range")


@pytest.mark.parametrize(("position", "value"), [(OWN, 4), (OWN + 2, 0), (OWN + 2, 9)])
def test_an_unknown_role_or_state_is_refused(position, value):
    beat = Heartbeat(Role.FFN, 0, ProcessState.READY, 1, "", "")
    refused(changed(beat, {position: value}), "range")


# -- headers of a fixed layout

calls = st.one_of(
    st.builds(Dispatch, *[numbers] * 5, any_payload),
    st.builds(Combine, *[numbers] * 7, st.just("") | words, any_payload),
)
cuts = st.floats(0, 1)
damages = st.one_of(
    st.tuples(st.just("replace"), cuts, st.binary(max_size=12)),
    st.tuples(st.just("insert"), cuts, st.binary(max_size=12)),
    st.tuples(st.just("delete"), cuts, st.integers(1, 12)),
)


def damaged(frame, damage):
    kind, cut, what = damage
    place = int(cut * len(frame))
    if kind == "delete":
        return frame[:place] + frame[place + what :]
    return frame[:place] + what + frame[place + len(what) * (kind == "replace") :]


def verdict(read, frame):
    try:
        return read(frame)
    except ProtocolError as error:
        return error.reason, str(error)


@settings(max_examples=400)
@given(envelopes, calls, calls, st.lists(damages, max_size=3))
def test_a_reader_that_knows_the_sender_says_what_a_stranger_would(envelope, met, call, damage):
    reader = HeaderReader()
    for message in (met, call):
        reader.read(encode(envelope, message, True)[0])
    frame = encode(envelope._replace(sequence=7), call, True)[0]
    for step in damage:
        frame = damaged(frame, step)
    for _ in range(2):
        assert verdict(reader.read, frame) == verdict(decode_header, frame)


@pytest.mark.parametrize("value", [0, 1, 3, 4, 6, 7, 2**32, BIGGEST, 2**63, 2**64 - 1])
@pytest.mark.parametrize("message", [DISPATCH, COMBINE])
def test_every_number_is_judged_as_by_a_stranger(message, value):
    reader = HeaderReader()
    frame = encode(ENVELOPE, message, True)[0]
    reader.read(frame)
    for place in range(len(frame) - 8):
        changed_frame = frame[:place] + value.to_bytes(8, "big") + frame[place + 8 :]
        assert verdict(reader.read, changed_frame) == verdict(decode_header, changed_frame)


@pytest.mark.parametrize("message", [DISPATCH, COMBINE])
def test_a_known_sender_is_not_read_item_by_item_again(message, monkeypatch):
    reader = HeaderReader()
    reader.read(encode(ENVELOPE, message, True)[0])
    expected = decode_header(encode(ENVELOPE._replace(sequence=42), message, True)[0])
    monkeypatch.setattr(codec, "decode_header", None)
    for buffer in (bytes, bytearray, memoryview):
        frame = buffer(encode(ENVELOPE._replace(sequence=42), message, True)[0])
        assert reader.read(frame) == expected


@pytest.mark.parametrize(
    "message", [CANCEL, SUBMIT, replace(COMBINE, refusal="part", partial=EMPTY)]
)
def test_what_has_no_fixed_layout_is_read_all_the_same(message):
    reader = HeaderReader()
    for _ in range(2):
        frames = encode(ENVELOPE, message, True)
        assert decode(reader.read(frames[0]), frames[1], True) == message


def test_a_foreign_packer_of_the_same_list_is_understood():
    reader = HeaderReader()
    items = msgpack.unpackb(encode(ENVELOPE, DISPATCH, True)[0])
    for _ in range(2):
        assert reader.read(msgpack.packb(items)) == decode_header(
            encode(ENVELOPE, DISPATCH, True)[0]
        )


def test_whoever_invents_names_does_not_fill_a_readers_memory():
    reader = HeaderReader()
    for number in range(MAX_MEMBERS + 10):
        reader.read(encode(ENVELOPE._replace(source=f"{number}"), DISPATCH, True)[0])
    assert len(reader._known) <= MAX_MEMBERS


# -- CRC


def test_any_flipped_bit_of_a_payload_is_seen():
    header, data = encode(ENVELOPE, DISPATCH, True)
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        refused([header, flipped], "crc")


def test_a_link_without_checksums_neither_sends_nor_checks_them():
    header, data = encode(ENVELOPE, DISPATCH, False)
    assert decode_header(header).crc == 0
    assert read([header, data], with_crc=False) == DISPATCH
    refused([header, data], "crc", with_crc=True)


# -- the topology inside a payload


def topology_frames(rows, data=None):
    packed = msgpack.packb(rows) if data is None else data
    header, _ = encode(ENVELOPE, TopologyUpdate(TOPOLOGY), True)
    items = msgpack.unpackb(header)
    items[DIM_0], items[NBYTES], items[CRC] = len(packed), len(packed), zlib.crc32(packed)
    return [msgpack.packb(items), packed]


ROWS = [4, 2, Role.FFN, 1, "bb", "tcp://10.0.0.2:5555", "fp"]


def test_a_topology_of_whole_rows_is_read():
    update = read(topology_frames(ROWS))
    assert update.topology == Topology(4, TOPOLOGY.members[1:], FFNParallel.REPLICATE)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([], "type"),
        ([4], "type"),
        (ROWS[:-1], "type"),
        ([*ROWS, 0], "type"),
        ([4, 2] + ROWS[2:] * (MAX_MEMBERS + 1), "type"),
        ([True, *ROWS[1:]], "type"),
        ([-1, *ROWS[1:]], "range"),
        ([4, 6, *ROWS[2:]], "range"),
        ([4, 2, 9, *ROWS[3:]], "range"),
        ([4, 2, Role.FFN, "1", *ROWS[4:]], "type"),
        ([*ROWS[:4], "x" * (MAX_STRING_CHARS + 1), *ROWS[5:]], "range"),
        ([*ROWS[:6], ["fp"]], "type"),
    ],
)
def test_a_malformed_topology_is_refused(rows, reason):
    refused(topology_frames(rows), reason)


@pytest.mark.parametrize("data", [b"", b"\x80", b"\xc1", b"\xdd\xff\xff\xff\xff", b"\xc7\x00\x05"])
def test_a_topology_that_is_no_list_is_refused(data):
    refused(topology_frames(None, data), "type")


# -- hostile frames


@pytest.mark.parametrize(
    "header",
    [
        b"\xdd\xff\xff\xff\xff",  # a list of 2^32 items
        b"\xdf\xff\xff\xff\xff",  # as many pairs
        b"\xdb\xff\xff\xff\xff",  # a string of 4 GiB
        b"\xc6\xff\xff\xff\xff",  # bytes
        b"\xc9\xff\xff\xff\xff\x05",  # an extension type
        b"\xdc\x08\x00" * 682,  # lists of 2048 items within each other
        b"\x91" + b"\xdd\x7f\xff\xff\xff" * 400,
    ],
    ids=["list", "map", "string", "bytes", "extension", "lists", "nested"],
)
def test_what_a_header_merely_declares_costs_nothing(header):
    tracemalloc.start()
    try:
        refused([header, b""], "type")
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 2**20


def test_a_shape_that_merely_declares_costs_nothing():
    header, data = changed(DISPATCH, {DIM_0: BIGGEST, DIM_1: BIGGEST, NBYTES: BIGGEST})
    tracemalloc.start()
    try:
        refused([header, data], "size")
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 2**20


@settings(max_examples=300)
@given(st.binary(max_size=80), st.binary(max_size=16), st.booleans())
def test_random_bytes_are_refused(header, data, with_crc):
    with pytest.raises(ProtocolError):
        read([header, data], with_crc)


EXAMPLES = [
    SUBMIT,
    CANCEL,
    TokenChunk(Payload(DType.INT64, (1, 8), bytes(64))),
    LoadReport(*range(18), Payload(DType.UINT8, (1, 40), bytes(40))),
    ExpertLoad(Payload(DType.INT64, (2, 3), bytes(48))),
    DISPATCH,
    Combine(7, 1, 2, 0, 3, 0, 0, "", Payload(DType.FLOAT32, (2, 3), bytes(24))),
    Combine(7, 1, 2, 0, 3, 0, 0, "crc", EMPTY),
    BEAT,
    TopologyUpdate(TOPOLOGY),
]


def mutated(frame, rng):
    """Return a frame with one to four bytes changed, cut out or put in."""
    frame = bytearray(frame)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(frame) + 1)
        kind = rng.randrange(3)
        if kind == 0 and at < len(frame):
            frame[at] = rng.randrange(256)
        elif kind == 1:
            del frame[at : at + rng.randint(1, 3)]
        else:
            frame[at:at] = rng.randbytes(rng.randint(1, 3))
    return bytes(frame)


def payload_of(message):
    return next(
        (v for n in message.__slots__ if isinstance(v := getattr(message, n), Payload)), None
    )


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("with_crc", [True, False])
def test_a_mutated_frame_is_refused_or_is_a_whole_message(example, with_crc):
    rng = random.Random(zlib.crc32(repr(example).encode()))
    header, data = encode(ENVELOPE, example, with_crc)
    for _ in range(700):
        frames = [mutated(header, rng), mutated(data, rng) if rng.random() < 0.3 else data]
        try:
            message = read(frames, with_crc)
        except ProtocolError:
            continue
        payload = payload_of(message)
        if payload is not None:
            assert payload.nbytes == len(payload.data) == len(frames[1])
        assert read(encode(ENVELOPE, message, with_crc), with_crc) == message


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda m: type(m).__name__)
def test_no_item_of_a_header_can_be_exchanged_for_nonsense(example):
    nonsense = [
        None,
        True,
        -1,
        2**64 - 1,
        1.5,
        {},
        [],
        [0] * 40,
        "x" * 600,
        msgpack.ExtType(1, b""),
    ]
    header, data = encode(ENVELOPE, example, True)
    for position in range(len(msgpack.unpackb(header))):
        for item in nonsense:
            if (position, item) == (MINOR, -1) or (position, item) == (MINOR, 2**64 - 1):
                continue  # a minor version is not looked at
            items = msgpack.unpackb(header)
            items[position] = item
            with pytest.raises(ProtocolError):
                read([msgpack.packb(items), data])
