"""The public HTTP types: what strangers send us and what they get back, nothing else.

Imports `core` and pydantic only. Guarantees that a body which passed is complete, in range
and free of everything we know and cannot honour. Knows nothing of tokenizers, routes or
workers; no field of the wire between our processes can be set through these types.
"""
