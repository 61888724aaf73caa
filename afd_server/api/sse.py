"""Server-sent events, as the OpenAI clients read them."""

import json
from collections.abc import Mapping


def event(data: str | bytes) -> bytes:
    """Frame one event; `data` must be a single line, as compact JSON always is."""
    raw = data.encode() if isinstance(data, str) else data
    assert b"\n" not in raw and b"\r" not in raw, "the data of an event must be a single line"
    return b"data: " + raw + b"\n\n"


def json_event(payload: Mapping[str, object]) -> bytes:
    """Serialise a chunk and frame it.

    The standard encoder on a plain dict: a pydantic model for every token would cost more
    than the rest of the gateway's work on it.
    """
    return event(json.dumps(payload, ensure_ascii=False, separators=(",", ":"), allow_nan=False))


DONE = event("[DONE]")
"""Ends every stream, a failed one too."""

KEEP_ALIVE = b": keep-alive\n\n"
"""A comment, dropped by clients; keeps proxies from closing an idle stream."""
