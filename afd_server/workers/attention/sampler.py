"""Logits to tokens, as a pure function of the request and the position.

Random numbers come from a counter-based hash of (seed, choice, position, token id): there is no
generator state to save, move or replay, and a row's token cannot depend on its neighbours.
"""

import math

import torch
from torch import Tensor

from afd_server.core.request import SamplingParams

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def sample(logits: Tensor, params: SamplingParams, position: int) -> int:
    """Choose the token at `position` of a sequence.

    Greedy at temperature 0, else the argmax of scaled logits plus Gumbel noise over the tokens
    that min-p, top-k and top-p leave; that is a draw from their softmax. Ties go to the lowest
    token id.

    Args:
        logits: [vocab] float32.
        params: of the request.
        position: index of the new token in its sequence, prompt included.
    """
    if params.temperature == 0:
        return int(torch.argmax(logits))
    scaled = logits.double() / params.temperature
    kept = _keep(scaled, params)
    noise = gumbel_noise(params.seed, params.choice, position, logits.shape[0])
    return int(torch.argmax(torch.where(kept, scaled + noise, -math.inf)))


def _keep(scaled: Tensor, params: SamplingParams) -> Tensor:
    """Mark the tokens that stay, in the order min-p, top-k, top-p; at least one does."""
    kept = torch.ones_like(scaled, dtype=torch.bool)
    if params.min_p > 0:
        kept &= scaled >= scaled.max() + math.log(params.min_p)
    if params.top_k == 0 and params.top_p == 1:
        return kept
    ranked, ids = torch.sort(torch.where(kept, scaled, -math.inf), descending=True, stable=True)
    num_kept = int(kept.sum())
    if params.top_k > 0:
        num_kept = min(num_kept, params.top_k)
    if params.top_p < 1:
        # a token stays while those before it have less than top_p of the mass
        mass = torch.softmax(ranked[:num_kept], 0).cumsum(0)
        num_kept = min(num_kept, int((mass < params.top_p).sum()) + 1)
    kept = torch.zeros_like(kept)
    kept[ids[:num_kept]] = True
    return kept


def gumbel_noise(seed: int, choice: int, position: int, vocab_size: int) -> Tensor:
    """Return standard Gumbel noise for every token id: [vocab_size] float64."""
    key = _mix_int(_mix_int(_mix_int(seed + _GOLDEN) ^ choice) ^ position)
    ids = torch.arange(vocab_size, dtype=torch.int64)
    bits = _mix(ids * _signed(_GOLDEN) + _signed(key))
    uniform = (_shift_right(bits, 11).double() + 0.5) * 2.0**-53
    return -torch.log(-torch.log(uniform))


def _mix_int(value: int) -> int:
    """Finalise 64 bits as SplitMix64 does (Steele, Lea and Flood 2014)."""
    value &= _MASK
    value = (value ^ value >> 30) * _MULTIPLIERS[0] & _MASK
    value = (value ^ value >> 27) * _MULTIPLIERS[1] & _MASK
    return value ^ value >> 31


def _mix(values: Tensor) -> Tensor:
    """Do the same to every element of an int64 tensor; products wrap around."""
    values = (values ^ _shift_right(values, 30)) * _signed(_MULTIPLIERS[0])
    values = (values ^ _shift_right(values, 27)) * _signed(_MULTIPLIERS[1])
    mixed: Tensor = values ^ _shift_right(values, 31)
    return mixed


def _shift_right(values: Tensor, bits: int) -> Tensor:
    """Shift in zeros from the left; torch's own shift of int64 copies the sign."""
    shifted: Tensor = (values >> bits) & (2 ** (64 - bits) - 1)
    return shifted


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
