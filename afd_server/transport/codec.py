"""Messages to frames and back; the first half of the checks on receipt.

A message is two frames: a MessagePack list of at most 2 KiB with fixed positions, and the raw
payload. The list holds the envelope, the message's own fields in order of declaration, and the
payload's facts. No maps, no extension types, no nesting (docs/protocol.md, section 1).
"""

import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any, get_type_hints  # Any: what MessagePack gives, checked before use

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
    Heartbeat,
    LoadReport,
    Message,
    Payload,
    Submit,
    TokenChunk,
    TopologyUpdate,
)

PROTOCOL_MAJOR, PROTOCOL_MINOR = 1, 0
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
}
_TAG_OF = {kind: tag for tag, kind in _TAGS.items()}
_FIELDS = {kind: tuple(get_type_hints(kind).items()) for kind in _TAGS.values()}
_NUM_ENVELOPE = 9
_NUM_PAYLOAD = 1 + 1 + MAX_DIMS + 1 + 1  # dtype, rank, dimensions, nbytes, crc
_NUM_MEMBER = 5
# A list may declare no more than its kind ever has: what is declared is allocated.
_MAX_HEADER_ITEMS = _NUM_ENVELOPE + max(map(len, _FIELDS.values())) + _NUM_PAYLOAD
_MAX_TOPOLOGY_ITEMS = 2 + _NUM_MEMBER * MAX_MEMBERS


@dataclass(frozen=True, slots=True)
class Envelope:
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


@dataclass(frozen=True, slots=True)
class Header:
    """A header that passed the checks of size, type and range; the payload is still unchecked."""

    envelope: Envelope
    kind: type[Any]
    values: tuple[Any, ...]  # the message's fields without the payload
    dtype: DType
    shape: tuple[int, ...]
    nbytes: int
    crc: int


def encode(envelope: Envelope, message: Message, with_crc: bool) -> list[Buffer]:
    """Return the two frames of a message."""
    payload, values = _payload_of(message), []
    for name, kind in _FIELDS[type(message)]:
        if kind is Payload or kind is Topology:
            continue
        value = getattr(message, name)  # by the closed table above, not by a peer's string
        values.append(struct.pack("<d", value) if kind is float else value)
    shape = (*payload.shape, *(0,) * (MAX_DIMS - len(payload.shape)))
    crc = zlib.crc32(payload.data) if with_crc else 0
    header = msgpack.packb(
        [
            PROTOCOL_MAJOR,
            PROTOCOL_MINOR,
            _TAG_OF[type(message)],
            envelope.source,
            envelope.epoch,
            envelope.sequence,
            envelope.model_digest,
            envelope.fingerprint,
            envelope.budget_ms,
            *values,
            payload.dtype,
            len(payload.shape),
            *shape,
            payload.nbytes,
            crc,
        ]
    )
    assert len(header) <= MAX_HEADER_BYTES, f"header of {len(header)} bytes"
    return [header, payload.data]


def decode_header(frame: Buffer) -> Header:
    """Check and read a header: size, then types, then ranges.

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
    own = [hint for _, hint in _FIELDS[kind] if hint is not Payload and hint is not Topology]
    expected = _NUM_ENVELOPE + len(own) + _NUM_PAYLOAD
    if len(items) != expected:
        raise ProtocolError(f"header of {len(items)} items, expected {expected}", "type")
    envelope = Envelope(
        source=_checked(items[3], str),
        epoch=_checked(items[4], int),
        sequence=_checked(items[5], int),
        model_digest=_checked(items[6], str),
        fingerprint=_checked(items[7], str),
        budget_ms=_checked(items[8], int),
    )
    stop = _NUM_ENVELOPE + len(own)
    values = tuple(map(_checked, items[_NUM_ENVELOPE:stop], own))
    dtype = _checked(items[stop], DType)
    numbers = [_checked(item, int) for item in items[stop + 1 :]]
    rank, dims, nbytes, crc = numbers[0], numbers[1 : 1 + MAX_DIMS], numbers[-2], numbers[-1]
    if rank > MAX_DIMS or any(dims[rank:]) or (rank and dtype is DType.NONE):
        raise ProtocolError(f"shape {dims} of rank {rank}", "range")
    return Header(envelope, kind, values, dtype, tuple(dims[:rank]), nbytes, crc)


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
    has_payload = any(hint is Payload for _, hint in _FIELDS[kind])
    if not has_payload and header.dtype is not DType.NONE:
        raise ProtocolError(f"{kind.__name__} has no payload, not even of {size} bytes", "size")
    message: Message = kind(*header.values, payload) if has_payload else kind(*header.values)
    return message


def _payload_of(message: Message) -> Payload:
    if isinstance(message, TopologyUpdate):
        data = _encode_topology(message.topology)
        return Payload(DType.UINT8, (len(data),), data)
    last = fields(message)[-1].name
    value = getattr(message, last)
    return value if isinstance(value, Payload) else EMPTY


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
