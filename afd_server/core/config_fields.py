"""Fields of a stranger's JSON object, checked one by one; every refusal names the field."""

import math
from collections.abc import Mapping
from typing import Any  # Any: values of a stranger's JSON, checked here

from afd_server.core.errors import ModelError

Config = Mapping[str, Any]


def integer(config: Config, field: str, default: int | None = None) -> int:
    """Return a positive integer; `ModelError` if it is missing without default, or another kind."""
    value = config.get(field)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(f"config.json: {field} is {value!r}, expected a positive integer")
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
