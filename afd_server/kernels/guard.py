"""GUARD: how many candidates a token has, and how much less likely each repetition is.

The method (EMNLP 2025 Findings, following the authors' code) steers by how uncertain the model
is now, was lately and was over the whole answer, as entropies of its distributions. Everything
here is a function of the entropies so far.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

GAMMA = 0.95  # how an entropy fades in the global average, per token
REACH = 750  # entropies averaged: 0.95^750 < 2^-55, a double does not notice older ones
EPSILON = 1e-4


class GuardStep(NamedTuple):
    """What GUARD says for one token.

    Attributes:
        num_candidates: the most probable tokens to draw from, 5 to 14.
        penalty: what a candidate's probability is multiplied with for each of its occurrences.
    """

    num_candidates: int
    penalty: float


def entropy(logits: Tensor, temperature: float) -> float:
    """Return −Σ p · ln(p + 1e-5) of softmax(logits / temperature), rounded to float32.

    It travels as float32, so every attempt at a request must see what that holds.
    """
    probabilities = torch.softmax(logits.double() / temperature, 0)
    total = -(probabilities * torch.log(probabilities + 1e-5)).sum()
    return float(total.float())


def guard_step(entropies: Sequence[float], window: int, vocab_size: int) -> GuardStep:
    """Decide over the next token.

    Args:
        entropies: of the tokens generated so far and, last, of the one to be drawn.
        window: how many of them are "lately", at least 2.
        vocab_size: at least 2.
    """
    now = entropies[-1]
    recent = _lower_median(entropies[-window:])
    trend = 0.0
    certainty = 1.0 if len(entropies) == 1 else 1.0 + _change(now, entropies[-2])
    if len(entropies) >= window:
        before, overall = _lower_median(entropies[1 - window :]), _faded_mean(entropies)
        trend = before - overall
        certainty += _change(overall, before)
    quality = 0.9 + 0.1 * certainty
    share = _steer(now - recent, trend, quality, math.log(vocab_size))
    num_candidates = 10 * share + 5
    penalty = _steer(now - recent, trend, quality, math.log(num_candidates + EPSILON))
    return GuardStep(int(num_candidates), penalty)


def _steer(deviation: float, trend: float, quality: float, scale: float) -> float:
    """Weigh both signals by their own size; 0.5 when nothing stands out."""
    local, overall = (quality * _atanh(signal / scale) for signal in (deviation, trend))
    weight = abs(local) / (abs(overall) + abs(local) + EPSILON)
    return 1 / (1 + math.exp(-(weight * local + (1 - weight) * overall)))


def _atanh(value: float) -> float:
    return math.atanh(max(EPSILON - 1, min(1 - EPSILON, value)))


def _change(value: float, reference: float) -> float:
    return min(1.0, abs(value - reference) / (reference + EPSILON))


def _lower_median(values: Sequence[float]) -> float:
    return sorted(values)[(len(values) - 1) // 2]


def _faded_mean(values: Sequence[float]) -> float:
    total = weight = 0.0
    for value in values[-REACH:]:
        total, weight = GAMMA * total + value, GAMMA * weight + 1
    return total / weight
