"""Recorded load, in Mooncake's JSON lines: when requests came, their lengths, what they shared.

One object a line: `timestamp` in milliseconds, `input_length` and `output_length` in tokens, and
`hash_ids`, one for each block of the prompt; blocks with the same id have the same tokens.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass

from afd_server.core.errors import ConfigError

MOONCAKE_BLOCK_TOKENS = 512  # of a hash id, in the traces that Mooncake published


@dataclass(frozen=True, slots=True)
class TraceEntry:
    """One recorded request. `block_ids` may be fewer than the prompt has blocks, or none."""

    at_s: float
    num_input_tokens: int
    num_output_tokens: int
    block_ids: tuple[int, ...] = ()


def parse_trace(lines: Iterable[str], block_tokens: int, source: str) -> list[TraceEntry]:
    """Read a trace; fields not used here may be present.

    Raises:
        ConfigError: a line is wrong, or there is none; the text names source, line and field.
    """
    entries: list[TraceEntry] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = _parse_entry(line, block_tokens)
            if entries and entry.at_s < entries[-1].at_s:
                raise ConfigError("timestamp is before that of the line above")
        except ConfigError as error:
            raise ConfigError(f"{source} line {number}: {error}") from error
        entries.append(entry)
    if not entries:
        raise ConfigError(f"{source} has no requests")
    return entries


def _parse_entry(line: str, block_tokens: int) -> TraceEntry:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ConfigError(f"{record!r} is no JSON object")
    at_ms = record.get("timestamp")
    if not isinstance(at_ms, int | float) or isinstance(at_ms, bool) or not 0 <= at_ms < 1e15:
        raise ConfigError(f"timestamp is {at_ms!r}, must be milliseconds from 0")
    lengths = [_length(record.get(name), name) for name in ("input_length", "output_length")]
    ids = record.get("hash_ids", [])
    if not isinstance(ids, list) or not all(type(block) is int for block in ids):
        raise ConfigError(f"hash_ids is {ids!r}, must be a list of whole numbers")
    most = -(-lengths[0] // block_tokens)
    if len(ids) > most:
        raise ConfigError(
            f"{len(ids)} hash_ids, but {lengths[0]} tokens are {most} blocks of {block_tokens}"
        )
    return TraceEntry(at_ms / 1000, lengths[0], lengths[1], tuple(ids))


def _length(value: object, name: str) -> int:
    if type(value) is not int or value < 1:
        raise ConfigError(f"{name} is {value!r}, must be a whole number of at least 1")
    return value
