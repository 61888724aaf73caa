"""Functions on tensors, by device.

Owns the numerics: what a row of a result is may depend on that row's inputs alone, never on
its neighbours, its place or the batch size (docs/protocol.md, section 4). Imports the core
only. `reference` is the specification and the oracle; models call a `Kernels` table.
"""
