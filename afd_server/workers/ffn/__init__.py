"""The FFN worker: gather, compute, reply. Knows no requests and keeps nothing between calls."""
