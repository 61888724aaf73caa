"""What workers sample from, written down."""

import torch

from afd_server.workers.attention.sampler import Sampler


def record_logits(monkeypatch) -> dict[tuple[int, int], torch.Tensor]:
    """Return a table that fills with every row sampled from, by (seed, position)."""
    recorded: dict[tuple[int, int], torch.Tensor] = {}

    def record(sampler, logits, params, position):
        recorded[params.seed, position] = logits.clone()
        return original(sampler, logits, params, position)

    original = Sampler.sample
    monkeypatch.setattr(Sampler, "sample", record)
    return recorded
