"""Model files: fetching them, vouching for them, reading checkpoints.

Owns the model cache and the formats on disk; may import `core`, `kernels` and `models`, and is
free of any server code. Guarantees that a directory handed out by `pull.resolve` is complete,
and that files with a manifest are the files that were pulled, byte for byte.
"""
