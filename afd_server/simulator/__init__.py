"""The policy objects that serve, on a virtual clock and a machine given by a formula.

Imports core and policy. Guarantees that equal inputs give equal outcomes.
"""
