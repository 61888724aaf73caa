"""The nouns: requests, sequences, plans, topology, model facts, errors.

Owns no behaviour beyond keeping itself consistent. Imports the standard library only, and
only `clock` reads the time. Everything else in the package may import it.
"""
