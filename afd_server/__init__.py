"""A disaggregated inference server: attention and FFN in separate pools, joined by ZeroMQ."""
