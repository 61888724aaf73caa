"""Messages to frames and back; the first half of the checks on receipt.

A message is two frames: a MessagePack list of at most 2 KiB with fixed positions, and the raw
payload. The list holds what stays the same for a sender, the numbers of the envelope, the
message's own fields in order of declaration, and the payload's facts. No maps, no extension types,
no nesting (docs/protocol.md, section 2).

Dispatches and combines travel 60 times a token, so their headers have a fixed layout, which is
written and read with one call each. Whatever is not exactly of that layout is read item by item.
"""

import math
import struct
import zlib
from collections.abc import Sequence
from enum import IntEnum
from functools import lru_cache
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple, get_type_hints  # Any: what MessagePack gives, checked first

import msgpack

from afd_server.core.errors import ProtocolError
from afd_server.core.topology import FFNParallel, Member, Role, Topology
from afd_server.transport.messages import (
    EMPTY,
    Buffer,
    Cancel,
    Combine,
    Dispatch,
    DType,
    ExpertLoad,
    Heartbeat,
    LoadReport,
    Message,
    Payload,
    Submit,
    TokenChunk,
    TopologyUpdate,
)

PROTOCOL_MAJOR, PROTOCOL_MINOR = 6, 0
MAX_HEADER_BYTES = 2048
MAX_PAYLOAD_BYTES = 64 * 2**20
MAX_STRING_CHARS = 512
MAX_MEMBERS = 1024
MAX_DIMS = 3

_TAGS: dict[int, type[Any]] = {
    1: Submit,
    2: Cancel,
    3: TokenChunk,
    4: LoadReport,
    5: Dispatch,
    6: Combine,
    7: Heartbeat,
    8: TopologyUpdate,
    9: ExpertLoad,
}
_TAG_OF = {kind: tag for tag, kind in _TAGS.items()}
_NUM_CONSTANT = 6  # major, minor, tag, source, model digest, fingerprint
_NUM_ENVELOPE = _NUM_CONSTANT + 3  # epoch, sequence, budget
_NUM_PAYLOAD = 1 + 1 + MAX_DIMS + 1 + 1  # dtype, rank, dimensions, nbytes, crc
_NUM_MEMBER = 5


def _own_fields(kind: type[Any]) -> dict[str, type[Any]]:
    """Return the fields of a message that travel in its header."""
    hints = get_type_hints(kind)
    return {name: hint for name, hint in hints.items() if hint not in (Payload, Topology)}


_OWN = {kind: tuple(_own_fields(kind).items()) for kind in _TAG_OF}
_PAYLOAD_OF = {
    kind: attrgetter(name)
    for kind in _TAG_OF
    for name, hint in get_type_hints(kind).items()
    if hint is Payload
}
# A list may declare no more than its kind ever has: what is declared is allocated.
_MAX_HEADER_ITEMS = _NUM_ENVELOPE + max(map(len, _OWN.values())) + _NUM_PAYLOAD
_MAX_TOPOLOGY_ITEMS = 2 + _NUM_MEMBER * MAX_MEMBERS


class Envelope(NamedTuple):
    """Who sends, what it is built of, and where in its life it is.

    Attributes:
        source: the sender's incarnation.
        epoch: the topology it acted under.
        sequence: counts its messages.
        model_digest: of the checkpoint it serves.
        fingerprint: of its numerics; empty for processes that compute nothing.
        budget_ms: time left for an answer, relative; 0 if there is no limit.
    """

    source: str
    epoch: int
    sequence: int
    model_digest: str
    fingerprint: str
    budget_ms: int = 0


class Header(NamedTuple):
    """A header that passed the checks of size, type and range; the payload is still unchecked."""

    envelope: Envelope
    kind: type[Any]
    values: tuple[Any, ...]  # the message's fields without the payload
    dtype: DType
    shape: tuple[int, ...]
    nbytes: int
    crc: int


class _Layout:
    """The bytes of a header behind its constant items, if every number has eight bytes.

    Each number is a MessagePack uint64, a marker and 8 bytes, each string an empty one.
    """

    UINT64, EMPTY_STRING = 0xCF, 0xA0

    def __init__(self, kind: type[Any]) -> None:
        own = [hint for _, hint in _OWN[kind]]
        hints = [int] * (_NUM_ENVELOPE - _NUM_CONSTANT) + own + [int] * _NUM_PAYLOAD
        assert own[:-1] == [int] * (len(own) - 1), f"{kind.__name__} has no fixed layout"
        self.num_values = len(own) - (own[-1] is str)
        self.has_text = own[-1] is str
        self.values = attrgetter(*(name for name, _ in _OWN[kind]))
        self._struct = struct.Struct(">" + "".join("B" if h is str else "BQ" for h in hints))
        self._template: list[int] = []
        self._numbers: list[int] = []
        for hint in hints:
            self._template.append(self.EMPTY_STRING if hint is str else self.UINT64)
            if hint is not str:
                self._numbers.append(len(self._template))
                self._template.append(0)
        markers = sorted(set(range(len(self._template))) - set(self._numbers))
        self._pick_numbers = itemgetter(*self._numbers)
        self._pick_markers = itemgetter(*markers)
        self._markers = self._pick_markers(self._template)

    @property
    def size(self) -> int:
        """Return the bytes of the layout."""
        return self._struct.size

    def pack(self, numbers: Sequence[int]) -> bytes:
        """Return the bytes of these numbers."""
        items = self._template.copy()
        for place, number in zip(self._numbers, numbers, strict=True):
            items[place] = number
        return self._struct.pack(*items)

    def unpack(self, data: bytes) -> tuple[int, ...] | None:
        """Return the numbers, each in [0, 2^63); None if the bytes are not of this layout."""
        items = self._struct.unpack(data)
        if self._pick_markers(items) != self._markers:
            return None
        numbers: tuple[int, ...] = self._pick_numbers(items)
        return numbers if max(numbers) < 2**63 else None


_LAYOUTS: dict[type[Any], _Layout] = {kind: _Layout(kind) for kind in (Dispatch, Combine)}
_DTYPES = {int(dtype): dtype for dtype in DType}


@lru_cache(maxsize=64)
def _beginning(tag: int, source: str, model_digest: str, fingerprint: str) -> bytes:
    """Return the bytes up to the first item that changes between messages of a sender."""
    packer = msgpack.Packer()
    constant = (PROTOCOL_MAJOR, PROTOCOL_MINOR, tag, source, model_digest, fingerprint)
    num_items = _NUM_ENVELOPE + len(_OWN[_TAGS[tag]]) + _NUM_PAYLOAD
    return b"".join([packer.pack_array_header(num_items), *map(packer.pack, constant)])


def header_beginning(kind: type[Any], source: str, model_digest: str, fingerprint: str) -> bytes:
    """Return what the headers of one sender's messages of a kind begin with."""
    return _beginning(_TAG_OF[kind], source, model_digest, fingerprint)


def encode(envelope: Envelope, message: Message, with_crc: bool) -> list[Buffer]:
    """Return the two frames of a message."""
    kind, payload = type(message), _payload_of(message)
    rank = len(payload.shape)
    shape = (*payload.shape, *(0,) * (MAX_DIMS - rank))
    crc = zlib.crc32(payload.data) if with_crc else 0
    facts = (payload.dtype, rank, *shape, payload.nbytes, crc)
    changing = (envelope.epoch, envelope.sequence, envelope.budget_ms)
    beginning = _beginning(
        _TAG_OF[kind], envelope.source, envelope.model_digest, envelope.fingerprint
    )
    layout = _LAYOUTS.get(kind)
    values = _values_of(message) if layout is None else layout.values(message)
    if layout is not None and not (layout.has_text and values[-1]):
        header = beginning + layout.pack((*changing, *values[: layout.num_values], *facts))
    else:
        rest = map(msgpack.Packer().pack, (*changing, *values, *facts))
        header = b"".join([beginning, *rest])
    assert len(header) <= MAX_HEADER_BYTES, f"header of {len(header)} bytes"
    return [header, payload.data]


class HeaderReader:
    """Checks and reads headers; remembers the beginnings of those that were read item by item."""

    def __init__(self) -> None:
        self._known: dict[bytes, tuple[type[Any], str, str, str]] = {}

    def read(self, frame: Buffer) -> Header:
        """Check and read a header; the verdict is that of `decode_header`.

        Raises:
            ProtocolError: the frame is none that `encode` makes.
        """
        data = bytes(frame)
        for kind, layout in _LAYOUTS.items():
            known = self._known.get(data[: -layout.size])
            if known is not None and known[0] is kind:
                header = _read_layout(layout, known, data[-layout.size :])
                if header is not None:
                    return header
        header = decode_header(data)
        layout_of_kind = _LAYOUTS.get(header.kind)
        if layout_of_kind is not None:
            self._remember(header, data[: -layout_of_kind.size])
        return header

    def _remember(self, header: Header, beginning: bytes) -> None:
        envelope = header.envelope
        constant = (envelope.source, envelope.model_digest, envelope.fingerprint)
        if (
            _beginning(_TAG_OF[header.kind], *constant) == beginning
        ):  # else the frame is right, but of another layout
            if len(self._known) == MAX_MEMBERS:
                self._known.clear()
            self._known[beginning] = (header.kind, *constant)


def _read_layout(
    layout: _Layout, known: tuple[type[Any], str, str, str], data: bytes
) -> Header | None:
    """Read the changing part of a header; None if it must be looked at item by item."""
    numbers = layout.unpack(data)
    if numbers is None:
        return None
    kind, source, model_digest, fingerprint = known
    epoch, sequence, budget_ms = numbers[:3]
    *values, number, rank, rows, columns, depth, nbytes, crc = numbers[3:]
    dtype, dims = _DTYPES.get(number), (rows, columns, depth)
    if dtype is None or not _is_shape(dtype, rank, dims):
        return None
    envelope = Envelope(source, epoch, sequence, model_digest, fingerprint, budget_ms)
    own = (*values, "") if layout.has_text else tuple(values)
    return Header(envelope, kind, own, dtype, dims[:rank], nbytes, crc)


def decode_header(frame: Buffer) -> Header:
    """Check and read a header item by item: size, then types, then ranges.

    Raises:
        ProtocolError: the frame is none that `encode` makes.
    """
    size = memoryview(frame).nbytes
    if size > MAX_HEADER_BYTES:
        raise ProtocolError(f"header of {size} bytes, limit {MAX_HEADER_BYTES}", "size")
    items = _unpack(frame, _MAX_HEADER_ITEMS)
    if len(items) < 3 or not all(type(item) is int for item in items[:3]):
        raise ProtocolError("header without version and tag", "type")
    if items[0] != PROTOCOL_MAJOR:
        raise ProtocolError(f"protocol {items[0]}, ours is {PROTOCOL_MAJOR}", "version")
    kind = _TAGS.get(items[2])
    if kind is None:
        raise ProtocolError(f"unknown message tag {items[2]}", "type")
    own = [hint for _, hint in _OWN[kind]]
    expected = _NUM_ENVELOPE + len(own) + _NUM_PAYLOAD
    if len(items) != expected:
        raise ProtocolError(f"header of {len(items)} items, expected {expected}", "type")
    source, model_digest, fingerprint = (_checked(item, str) for item in items[3:_NUM_CONSTANT])
    epoch, sequence, budget_ms = (
        _checked(item, int) for item in items[_NUM_CONSTANT:_NUM_ENVELOPE]
    )
    stop = _NUM_ENVELOPE + len(own)
    values = tuple(map(_checked, items[_NUM_ENVELOPE:stop], own))
    dtype = _checked(items[stop], DType)
    numbers = [_checked(item, int) for item in items[stop + 1 :]]
    rank, dims, nbytes, crc = numbers[0], tuple(numbers[1 : 1 + MAX_DIMS]), numbers[-2], numbers[-1]
    if not _is_shape(dtype, rank, dims):
        raise ProtocolError(f"shape {dims} of rank {rank}", "range")
    envelope = Envelope(source, epoch, sequence, model_digest, fingerprint, budget_ms)
    return Header(envelope, kind, values, dtype, dims[:rank], nbytes, crc)


def _is_shape(dtype: DType, rank: int, dims: tuple[int, ...]) -> bool:
    return rank <= MAX_DIMS and not any(dims[rank:]) and not (rank and dtype is DType.NONE)


def decode(header: Header, data: Buffer, with_crc: bool) -> Message:
    """Check the payload against its header (size, then CRC) and build the message.

    Raises:
        ProtocolError: they do not agree, or the message cannot have such a payload.
    """
    payload = Payload(header.dtype, header.shape, data)
    size = memoryview(data).nbytes
    if not payload.nbytes == header.nbytes == size:
        raise ProtocolError(
            f"shape {header.shape} of {header.dtype.name} is {payload.nbytes} bytes, the header "
            f"says {header.nbytes}, the frame has {size}",
            "size",
        )
    if with_crc and zlib.crc32(data) != header.crc:
        raise ProtocolError("CRC-32 of the payload differs", "crc")
    kind = header.kind
    if kind is TopologyUpdate:
        return TopologyUpdate(_decode_topology(data))
    has_payload = kind in _PAYLOAD_OF
    if not has_payload and header.dtype is not DType.NONE:
        raise ProtocolError(f"{kind.__name__} has no payload, not even of {size} bytes", "size")
    message: Message = kind(*header.values, payload) if has_payload else kind(*header.values)
    return message


def _payload_of(message: Message) -> Payload:
    if isinstance(message, TopologyUpdate):
        data = _encode_topology(message.topology)
        return Payload(DType.UINT8, (len(data),), data)
    payload_of = _PAYLOAD_OF.get(type(message))
    return EMPTY if payload_of is None else payload_of(message)


def _values_of(message: Message) -> list[Any]:
    """Return a message's own fields as they are packed."""
    values = []
    for name, hint in _OWN[type(message)]:
        value = getattr(message, name)  # by the closed table above, not by a peer's string
        values.append(struct.pack("<d", value) if hint is float else value)
    return values


def _unpack(frame: Buffer, max_items: int) -> list[Any]:
    """Unpack a flat list; nested containers, maps and extension types are refused."""
    try:
        items = msgpack.unpackb(
            frame,
            use_list=True,
            raw=False,
            strict_map_key=True,
            ext_hook=_refuse_extension,
            max_map_len=0,
            max_ext_len=0,
            max_array_len=max_items,
        )
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
        raise ProtocolError(f"no MessagePack list: {error}", "type") from error
    if type(items) is not list:
        raise ProtocolError(f"a {type(items).__name__} instead of a list", "type")
    return items


def _refuse_extension(code: int, _data: bytes) -> None:
    raise ValueError(f"extension type {code}")


def _checked(value: Any, hint: type[Any]) -> Any:
    """Return a wire item as a field of this type; `ProtocolError` if it is none."""
    if hint is float:
        return _checked_float(value)
    if hint is str:
        if type(value) is not str:
            raise ProtocolError(f"a {type(value).__name__} instead of a string", "type")
        if len(value) > MAX_STRING_CHARS:
            raise ProtocolError(f"a string of {len(value)} characters", "range")
        return value
    if type(value) is not int:
        raise ProtocolError(f"a {type(value).__name__} instead of an integer", "type")
    if issubclass(hint, IntEnum):
        if value not in hint.__members__.values():
            raise ProtocolError(f"{value} is no {hint.__name__}", "range")
        return hint(value)
    if not 0 <= value < 2**63:
        raise ProtocolError(f"{value} is not in [0, 2^63)", "range")
    return value


def _checked_float(value: Any) -> float:
    if type(value) is not bytes or len(value) != 8:
        raise ProtocolError("no 8 bytes of a float", "type")
    (number,) = struct.unpack("<d", value)
    if not math.isfinite(number):
        raise ProtocolError(f"{number} is not finite", "range")
    return float(number)


def _encode_topology(topology: Topology) -> bytes:
    assert len(topology.members) <= MAX_MEMBERS, f"{len(topology.members)} members"
    rows: list[int | str] = [topology.epoch, topology.ffn_parallel]
    for member in topology.members:
        rows += [member.role, member.slot, member.incarnation, member.address, member.fingerprint]
    packed: bytes = msgpack.packb(rows)
    return packed


def _decode_topology(data: Buffer) -> Topology:
    items = _unpack(data, _MAX_TOPOLOGY_ITEMS)
    if len(items) % _NUM_MEMBER != 2:
        raise ProtocolError(f"a topology of {len(items)} items", "type")
    epoch = _checked(items[0], int)
    parallel = _checked(items[1], FFNParallel)
    return Topology(epoch, tuple(map(_decode_member, _by_member(items[2:]))), parallel)


def _by_member(items: Sequence[Any]) -> list[Sequence[Any]]:
    return [items[start : start + _NUM_MEMBER] for start in range(0, len(items), _NUM_MEMBER)]


def _decode_member(row: Sequence[Any]) -> Member:
    return Member(*map(_checked, row, (Role, int, str, str, str)))
