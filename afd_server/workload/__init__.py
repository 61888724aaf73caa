"""What comes in, and how well it was served. One set of definitions for every measurement.

Arrivals, lengths, traces and targets make offers; records of what became of them make a report.
Plain Python over values: no sockets, no wall clock. Imports the core only.
"""
