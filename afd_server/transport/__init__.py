"""Moves messages between processes; knows nothing of what they mean.

Owns the wire: the eight messages, their closed encoding, the checks on receipt, and the links
that carry frames (in-process for tests, ZeroMQ for real). Imports core only. The contract is
docs/protocol.md; nothing that fails a check is ever handed on.
"""
