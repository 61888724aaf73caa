"""The attention worker: requests, KV blocks, lanes, sampling, and its FFN calls."""
