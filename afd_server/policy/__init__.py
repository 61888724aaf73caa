"""Decisions: who is admitted, which worker gets it, what runs next, in which blocks.

Plain Python over the nouns of `core`: no tensors, sockets, threads or wall clock, so the same
objects run in tests and in the simulator. Workers and the gateway do what is decided here.
"""
