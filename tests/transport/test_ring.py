"""Records through shared memory: all of them, as they were cut, and never a byte from elsewhere."""

import os
import random
import struct
import subprocess
import sys
from collections import deque

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from afd_server.core.errors import ConfigError, TransportError
from afd_server.transport import ring as ring_module
from afd_server.transport.ring import (
    CAPACITY,
    MAX_FRAMES,
    MAX_RECORD_BYTES,
    MAX_RECORDS,
    MEMORY_BYTES,
    Put,
    Ring,
    RingBroken,
    RingGone,
    RingLibrary,
    Watch,
    create_memory,
    open_memory,
    why_unavailable,
)

LIBRARY = RingLibrary()
TOKEN = bytes(range(16))

# Places in the page of counters, as native/ring.cpp has them; of what side 0 writes.
WRITTEN, READ, FIRST_SLOT = 0, 64, 192
FIRST_RECORD = 4096


class Pair:
    """Two ends in one process."""

    def __init__(self):
        self.memory, descriptor = create_memory(TOKEN)
        self.a = Ring(LIBRARY, self.memory, 0)
        self.b = Ring(LIBRARY, open_memory(os.getpid(), descriptor, TOKEN), 1)
        os.close(descriptor)

    def poke(self, place, *words):
        """Write into the shared page as a peer gone mad would."""
        struct.pack_into(f"<{len(words)}Q", self.memory, place, *words)

    def close(self):
        self.a.close()
        self.b.close()


@pytest.fixture
def pair():
    made = Pair()
    yield made
    made.close()


def taken(ring):
    frames = ring.take()
    return frames if frames is None else [bytes(frame) for frame in frames]


def test_an_empty_ring_gives_nothing(pair):
    assert pair.a.take() is None
    assert pair.b.take() is None


@pytest.mark.parametrize(
    "frames",
    [[b"one"], [b""], [b"", b""], [b"1", bytearray(b"2"), memoryview(b"3")], [b"x"] * MAX_FRAMES,
     [memoryview(bytearray(range(8))).cast("i"), b"tail"], []],
)  # fmt: skip
def test_a_record_comes_as_it_was_cut_in_both_directions(pair, frames):
    for writer, reader in ((pair.a, pair.b), (pair.b, pair.a)):
        assert writer.put(frames) is Put.TAKEN
        assert taken(reader) == [bytes(frame) for frame in frames]
        assert reader.take() is None


def test_what_was_taken_belongs_to_the_reader(pair):
    pair.a.put([b"header", b"first"])
    (_, first) = pair.b.take()
    pair.a.put([b"header", b"other"])
    assert bytes(first) == b"first"


def test_the_largest_record_passes_and_a_larger_one_is_for_somebody_else(pair):
    largest = random.Random(1).randbytes(MAX_RECORD_BYTES - 8)
    assert pair.a.put([largest]) is Put.TAKEN
    assert taken(pair.b) == [largest]
    assert pair.a.put([largest + b"x"]) is Put.TOO_LARGE
    assert pair.a.put([b"x"] * (MAX_FRAMES + 1)) is Put.TOO_LARGE
    assert pair.b.take() is None


def test_who_does_not_read_is_written_no_more_than_the_credits(pair):
    puts = [pair.a.put([b"%d" % number]) for number in range(MAX_RECORDS + 1)]
    assert puts == [Put.TAKEN] * MAX_RECORDS + [Put.FULL]
    assert taken(pair.b) == [b"0"]
    assert pair.a.put([b"more"]) is Put.TAKEN
    assert pair.a.put([b"too much"]) is Put.FULL


def test_large_records_fill_a_ring_before_the_credits_do(pair):
    count = 0
    while pair.a.put([bytes(MAX_RECORD_BYTES - 8)]) is Put.TAKEN:
        count += 1
    assert count == CAPACITY // MAX_RECORD_BYTES
    assert len(pair.b.take()[0]) == MAX_RECORD_BYTES - 8


sizes = st.integers(0, 3000) | st.integers(0, MAX_RECORD_BYTES - 8)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(sizes, max_size=24) | st.integers(0, 30), max_size=12))
def test_any_mixture_of_puts_and_takes_keeps_every_record_and_their_order(turns):
    pair, expected, source = Pair(), deque(), random.Random(0).randbytes(MAX_RECORD_BYTES)
    for turn in turns:
        if isinstance(turn, int):
            for _ in range(turn):
                assert taken(pair.b) == (expected.popleft() if expected else None)
            continue
        for size in turn:
            record = [source[:size]]
            if pair.a.put(record) is Put.TAKEN:
                expected.append(record)
            else:
                assert len(expected) == MAX_RECORDS or (
                    sum(len(held[0]) for held in expected) > CAPACITY - 2 * MAX_RECORD_BYTES
                )
    while expected:
        assert taken(pair.b) == expected.popleft()
    assert pair.a.put([source[: MAX_RECORD_BYTES - 8]]) is Put.TAKEN  # all room has come back
    pair.close()


# -- the end


def test_what_was_written_before_the_end_is_still_read(pair):
    pair.a.put([b"last words"])
    pair.a.close()
    assert taken(pair.b) == [b"last words"]
    with pytest.raises(RingGone, match="closed"):
        pair.b.take()
    with pytest.raises(RingGone, match="closed"):
        pair.b.put([b"x"])


def test_closing_twice_does_no_harm(pair):
    pair.a.close()
    pair.a.close()


# -- sleep and watch


def test_a_sleeper_is_not_written_to_until_it_is_awake(pair):
    watch = Watch(LIBRARY, [pair.b])
    assert not watch.announce_sleep()
    assert [pair.a.put([b"x"]) for _ in range(2)] == [Put.ASLEEP, Put.ASLEEP]
    watch.end_sleep()
    assert pair.b.take() is None
    assert pair.a.put([b"x"]) is Put.TAKEN


def test_who_falls_asleep_while_a_record_is_written_is_woken_once(pair):
    place = LIBRARY.reserve(pair.a.handle, 8)
    assert not Watch(LIBRARY, [pair.b]).announce_sleep()
    pair.memory[place : place + 8] = struct.pack("<II", 1, 0)
    assert LIBRARY.commit(pair.a.handle, 8) == 1
    assert pair.a.put([b"x"]) is Put.TAKEN
    assert taken(pair.b) == [b""]


def test_nobody_sleeps_over_a_record(pair):
    other = Pair()
    watch = Watch(LIBRARY, [other.b, pair.b])
    pair.a.put([b"x"])
    assert watch.announce_sleep()
    assert other.a.put([b"y"]) is Put.TAKEN  # the announcement was taken back everywhere
    other.close()


def test_a_watch_sees_a_record_of_any_ring_the_end_of_one_and_its_own_end():
    one, two = Pair(), Pair()
    watch = Watch(LIBRARY, [one.b, two.b])
    assert not watch.look(1000)
    two.a.put([b"x"])
    await_record(watch)
    two.b.take()
    assert not watch.look(0)
    one.a.close()
    await_record(watch)
    one.close()
    two.close()


def await_record(watch):
    assert watch.look(10**11), "nothing came"


ECHO = """
import os, sys
from afd_server.transport.ring import Ring, RingGone, RingLibrary, Watch, open_memory
library = RingLibrary()
memory = open_memory(int(sys.argv[1]), int(sys.argv[2]), bytes(range(16)))
ring = Ring(library, memory, 1)
watch = Watch(library, [ring])
print("mapped", flush=True)
try:
    while os.getppid() == int(sys.argv[1]):
        watch.look(10**8)
        while (frames := ring.take()) is not None:
            ring.put(frames)
except RingGone:
    print("gone")
"""


def test_another_process_hears_every_byte_and_answers():
    memory, descriptor = create_memory(TOKEN)
    command = [sys.executable, "-c", ECHO, str(os.getpid()), str(descriptor)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        ring = Ring(LIBRARY, memory, 0)
        try:
            assert process.stdout.readline() == "mapped\n"
            echo_records(ring)
        finally:  # the other process ends by this
            ring.close()
            os.close(descriptor)
        assert process.communicate(timeout=20)[0] == "gone\n"


def echo_records(ring):
    watch, rng, waiting = Watch(LIBRARY, [ring]), random.Random(5), deque()
    for _ in range(3000):
        record = [rng.randbytes(rng.choice([0, 100, 2304, 40_000])) for _ in range(2)]
        if len(waiting) < MAX_RECORDS // 2 and ring.put(record) is Put.TAKEN:
            waiting.append(record)
            continue
        await_record(watch)
        assert taken(ring) == waiting.popleft()
    while waiting:
        await_record(watch)
        assert taken(ring) == waiting.popleft()


# -- a peer gone mad

places = st.integers(0, 175).map(lambda index: 8 * index)
words = st.integers(0, 2**64 - 1) | st.sampled_from(
    [0, 1, 63, 64, 65, CAPACITY, CAPACITY << 32 | 64, (CAPACITY - 64) << 32 | 65, 2**63, 2**64 - 1]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(places, words), max_size=6), st.integers(0, 5))
@example([(WRITTEN, 1), (FIRST_SLOT, 2**64 - 1)], 0)
@example([(WRITTEN, 1), (FIRST_SLOT, (CAPACITY - 64) << 32 | 64)], 0)
def test_whatever_the_shared_page_says_nothing_beyond_the_memory_is_touched(pokes, num_puts):
    pair = Pair()
    for number in range(num_puts):
        pair.a.put([b"x" * 100 * number])
        pair.b.put([b"x" * 100])
        pair.b.take()
    for place, value in pokes:
        pair.poke(place, value)
    for ring in (pair.a, pair.b):
        for _ in range(4):
            try:
                assert ring.put([b"y" * 5000]) in (Put.TAKEN, Put.WAKE, Put.FULL, Put.ASLEEP)
                ring.take()
            except RingGone:
                break
    pair.close()


@pytest.mark.parametrize(
    ("place", "value"),
    [(WRITTEN, MAX_RECORDS + 1), (WRITTEN, 2**64 - 1), (FIRST_SLOT, 0), (FIRST_SLOT, 2**64 - 1),
     (FIRST_SLOT, CAPACITY << 32 | 1), (FIRST_SLOT, CAPACITY + 1)],
)  # fmt: skip
def test_a_writer_whose_counters_or_lengths_are_wrong_is_not_read(pair, place, value):
    pair.a.put([b"x"])
    pair.poke(place, value)
    with pytest.raises(RingBroken, match="counters"):
        pair.b.take()


@pytest.mark.parametrize("value", [2, 2**63, 2**64 - 65])
def test_a_reader_who_has_read_more_than_was_written_is_not_written_to(pair, value):
    pair.a.put([b"x"])
    pair.poke(READ, value)
    with pytest.raises(RingBroken, match="counters"):
        pair.a.put([b"x"])


@pytest.mark.parametrize("head", [(9, 0), (2**32 - 1, 1), (1, 4), (1, 2**32 - 1), (2, 3), (0, 0)])
def test_a_record_cut_otherwise_than_it_says_is_refused(pair, head):
    pair.a.put([b"123"])
    struct.pack_into("<2I", pair.memory, FIRST_RECORD, *head)
    with pytest.raises(RingBroken, match="a record of 11 bytes"):
        pair.b.take()


@pytest.mark.parametrize("length", [1, 3, 7])
def test_a_record_too_short_for_its_own_head_is_refused(pair, length):
    pair.a.put([b"123"])
    pair.poke(FIRST_SLOT, length)
    with pytest.raises(RingBroken, match=f"a record of {length} bytes"):
        pair.b.take()


# -- memory


def test_memory_is_reached_by_process_descriptor_and_token_and_has_no_name():
    memory, descriptor = create_memory(TOKEN)
    assert os.fstat(descriptor).st_nlink == 0
    with pytest.raises(TransportError, match="other memory than was offered"):
        open_memory(os.getpid(), descriptor, bytes(16))
    open_memory(os.getpid(), descriptor, TOKEN).close()
    os.close(descriptor)
    with pytest.raises(OSError, match="No such file"):
        open_memory(os.getpid(), descriptor, TOKEN)
    memory.close()


def open_number(path):
    return os.open(path, os.O_RDWR)


def test_a_descriptor_of_something_else_is_not_opened(tmp_path):
    (tmp_path / "file").write_bytes(bytes(MEMORY_BYTES))
    for path in (tmp_path / "file", "/dev/null"):
        descriptor = open_number(path)
        with pytest.raises(TransportError, match="no memory of ours"):
            open_memory(os.getpid(), descriptor, bytes(16))
        os.close(descriptor)


@pytest.mark.parametrize(
    ("size", "complaint"), [(MEMORY_BYTES, "could shrink"), (4096, "4096 bytes"), (0, "0 bytes")]
)
def test_memory_that_is_not_sealed_or_of_another_size_is_refused(size, complaint):
    descriptor = os.memfd_create("afd-ring", os.MFD_ALLOW_SEALING)
    os.truncate(descriptor, size)
    with pytest.raises(TransportError, match=complaint):
        open_memory(os.getpid(), descriptor, bytes(16))
    os.close(descriptor)


@pytest.mark.parametrize("pid", [-1, 0, 2**31 - 1])
def test_memory_of_nobody_cannot_be_opened(pid):
    with pytest.raises(OSError, match="No such file"):
        open_memory(pid, 3, TOKEN)


def test_this_machine_shares_memory():
    assert why_unavailable() is None


def test_what_was_not_built_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(ring_module, "LIBRARY", tmp_path / "none.so")
    assert "no C++ compiler" in why_unavailable()
    with pytest.raises(ConfigError, match="no C\\+\\+ compiler"):
        RingLibrary()


def test_a_library_of_other_sources_is_refused(monkeypatch):
    monkeypatch.setattr(ring_module, "INTERFACE", 1)
    with pytest.raises(ConfigError, match="built from other sources"):
        RingLibrary()


def test_a_system_without_shared_memory_says_why(monkeypatch):
    def refuse(*_arguments):
        raise OSError("not here")

    monkeypatch.setattr(os, "memfd_create", refuse)
    assert "not here" in why_unavailable()
    monkeypatch.undo()
    monkeypatch.delattr(os, "pidfd_open")
    assert "pidfd_open" in why_unavailable()
