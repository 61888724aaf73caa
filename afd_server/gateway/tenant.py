"""Whose a request is, hence who may find what it has computed."""

import hashlib
import json


def tenant_salt(secret: bytes, authorization: str | None, cache_salt: str | None) -> str:
    """Return the salt shared by the requests with this API key and this `cache_salt`.

    Keyed with a secret of the gateway: a salt seen on the wire says nothing of the API key, and
    no client can choose one that another has.

    Args:
        secret: drawn when the gateway starts, 16 bytes or more.
        authorization: the header of that name as it came, or None.
        cache_salt: the field of the body, or None.
    """
    named = json.dumps([authorization, cache_salt]).encode()
    return hashlib.blake2b(named, key=secret, digest_size=16).hexdigest()
