"""Moves messages between processes; knows nothing of what they mean.

Owns the wire: the nine messages, their closed encoding, the checks on receipt, and the links that
carry frames (ZeroMQ, shared memory, and in-process for tests). Imports core only. The contract is
docs/protocol.md; nothing that fails a check is ever handed on.
"""
