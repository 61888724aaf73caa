"""The attention worker: requests, KV blocks, lanes, sampling. Knows no FFN weights."""
