"""What comes in, and how well it was served. One set of definitions for every measurement.

Plain Python over values: no sockets, no wall clock. Imports the core only.
"""
