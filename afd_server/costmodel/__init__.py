"""How long stages take, and what follows for the number of lanes and the size of pools.

Plain Python over numbers and the nouns of `core`: what was measured comes in, what to do goes out.
Imports the core only.
"""
