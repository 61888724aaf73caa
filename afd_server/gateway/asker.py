"""On whose behalf a request runs: what it may share, whom it competes with, what it may expect."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

from starlette.datastructures import Headers

from afd_server.api.body import short
from afd_server.core.errors import InvalidRequest
from afd_server.core.request import LONGEST_TARGET_MS, SLO

TARGET_HEADERS = ("x-slo-ttft-ms", "x-slo-tpot-ms")


@dataclass(frozen=True, slots=True)
class Asker:
    """What a request's headers and body say about who asks.

    Attributes:
        salt: shared by the requests that may find what it has computed.
        tenant: shared by the requests with its API key.
        priority: lower ones go first.
        slo: its targets.
        arrived_s: when its body had been read, before any work was done for it.
    """

    salt: str
    tenant: str
    priority: int
    slo: SLO
    arrived_s: float


def api_key(headers: Mapping[str, str]) -> str | None:
    """Return the API key in the form of an `authorization` header, or None if there is none.

    `x-api-key` is where Anthropic's clients send it. It is not looked at beside an
    `authorization`: who must show that one to a proxy would be as many tenants as they like.
    """
    authorization, key = headers.get("authorization"), headers.get("x-api-key")
    return f"Bearer {key}" if authorization is None and key is not None else authorization


def check_given_once(headers: Headers) -> None:
    """Refuse a target that is given twice: no server can know which one is meant.

    Raises:
        InvalidRequest: so it is; names the header.
    """
    for name in TARGET_HEADERS:
        if len(headers.getlist(name)) > 1:
            raise InvalidRequest(f"{name} is given more than once; give it once", name)


def targets_of(headers: Mapping[str, str], default: SLO) -> SLO:
    """Return the targets that `x-slo-ttft-ms` and `x-slo-tpot-ms` name, else the default ones.

    Raises:
        InvalidRequest: one of them is no number of milliseconds.
    """
    return SLO(
        ttft_s=_target_s(headers, "x-slo-ttft-ms", default.ttft_s),
        tpot_s=_target_s(headers, "x-slo-tpot-ms", default.tpot_s),
    )


def _target_s(headers: Mapping[str, str], name: str, default_s: float | None) -> float | None:
    text = headers.get(name)
    if text is None:
        return default_s
    try:
        target_ms = math.nan if "_" in text else float(text)  # Python's 1_000 is nobody else's
    except ValueError:
        target_ms = math.nan
    if not 0 < target_ms <= LONGEST_TARGET_MS:
        raise InvalidRequest(
            f"{name} is {short(text)}, expected milliseconds above 0 and up to "
            f"{LONGEST_TARGET_MS:.0f}",
            name,
        )
    return target_ms / 1e3


def tenant_salt(secret: bytes, authorization: str | None, cache_salt: str | None) -> str:
    """Return the salt shared by the requests with this API key and this `cache_salt`.

    Keyed with a secret of the gateway: a salt seen on the wire says nothing of the API key, and
    no client can choose one that another has.

    Args:
        secret: drawn when the gateway starts, 16 bytes or more.
        authorization: what `api_key` returns.
        cache_salt: the field of the body, or None.
    """
    named = json.dumps([authorization, cache_salt]).encode()
    return hashlib.blake2b(named, key=secret, digest_size=16).hexdigest()
