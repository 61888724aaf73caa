"""The door: HTTP in, tokens out.

Owns the journal of live requests and all text state: both survive a change of attention worker.
One asyncio loop, no torch. Imports api, policy, telemetry, transport and core.
"""
