"""Fields of a stranger's JSON object, checked one by one; every refusal names the field."""

import math
from collections.abc import Mapping
from typing import Any  # Any: values of a stranger's JSON, checked here

from afd_server.core.errors import ModelError

Config = Mapping[str, Any]


def integer(config: Config, field: str, default: int | None = None, least: int = 1) -> int:
    """Return an integer; `ModelError` if it is missing without default, or another kind.

    `least` is 1 for a positive one, or 0.
    """
    value = config.get(field)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        kind = "a positive integer" if least else "an integer from 0 on"
        raise ModelError(f"config.json: {field} is {value!r}, expected {kind}")
    return value


def number(config: Config, field: str) -> float:
    """Return a positive finite number; `ModelError` if it is missing or another kind."""
    value = config.get(field)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ModelError(f"config.json: {field} is {value!r}, expected a positive number")
    return float(value)


def refuse_unless(config: Config, field: str, *supported: object) -> None:
    """Raise `ModelError` unless a field has a supported value; the first stands for none given."""
    value = config.get(field, supported[0])
    if value not in supported:
        raise ModelError(
            f"config.json: {field} {value!r} is not supported; expected {supported[-1]!r}"
        )


def by_layer(config: Config, field: str) -> list[object]:
    """Return a list's entries of the decoder layers; those of draft layers may follow."""
    entries, num_layers = config.get(field), integer(config, "num_hidden_layers")
    if not isinstance(entries, list) or len(entries) < num_layers:
        raise ModelError(
            f"config.json: {field} is {entries!r}, expected an entry for each of "
            f"{num_layers} layers"
        )
    return entries[:num_layers]
