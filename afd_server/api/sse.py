"""Server-sent events, as the clients of either dialect read them."""

import json
from collections.abc import Mapping


def event(data: str | bytes, name: str | None = None) -> bytes:
    """Frame one event; `data` must be a single line, as compact JSON always is."""
    raw = data.encode() if isinstance(data, str) else data
    assert b"\n" not in raw and b"\r" not in raw, "the data of an event must be a single line"
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + raw + b"\n\n"


def json_event(payload: Mapping[str, object], name: str | None = None) -> bytes:
    """Serialise a chunk and frame it.

    The standard encoder on a plain dict: a pydantic model for every token would cost more
    than the rest of the gateway's work on it.
    """
    data = json.dumps(payload, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return event(data, name)


DONE = event("[DONE]")
"""Ends every stream of OpenAI's dialect, a failed one too."""

KEEP_ALIVE = b": keep-alive\n\n"
"""A comment, dropped by clients; keeps proxies from closing an idle stream."""
