"""Decisions: which sequences run, which blocks they get, where a request goes.

Plain Python over the nouns of `core`: no tensors, sockets, threads or wall clock, so the same
objects run in tests and in a simulator. Workers and the gateway do what is decided here.
"""
