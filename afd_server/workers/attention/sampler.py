"""Logits to tokens, as a pure function of the request, the position and, with GUARD, its past."""

import math

import torch
from torch import Tensor

from afd_server.core.batch import Sampled
from afd_server.core.request import SamplingParams
from afd_server.core.sequence import History
from afd_server.kernels.guard import REACH, entropy, guard_step
from afd_server.kernels.sampling import noise_key, num_before_cliff, num_within_sigma
from afd_server.kernels.table import Kernels


class Sampler:
    """Chooses tokens with the sampling functions of some kernels; keeps nothing between calls."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels

    def sample(self, logits: Tensor, params: SamplingParams, position: int) -> int:
        """Choose the token at `position` of a sequence.

        Greedy at temperature 0, else a draw from the softmax of the scaled logits over the tokens
        that the filters leave: top-nσ, Min-k, min-p and top-k each look at the whole vocabulary
        and leave its highest tokens, of which the shortest list stays; top-p looks at that.

        Args:
            logits: [vocab] float32.
            params: of the request.
            position: index of the new token in its sequence, prompt included.
        """
        if params.temperature == 0:
            return self._kernels.argmax(logits)
        ids = None
        top_k = _most_tokens(logits, params)
        if top_k > 0 or params.top_p < 1 or params.min_p > 0:
            ids = self._kernels.select(
                logits, params.temperature, top_k, params.top_p, params.min_p
            )
        key = noise_key(params.seed, params.choice, position)
        return self._kernels.gumbel_argmax(logits, ids, params.temperature, key)

    def sample_guarded(
        self, logits: Tensor, params: SamplingParams, position: int, history: History
    ) -> Sampled:
        """Choose the token at `position` as GUARD does.

        Drawn from as many of the most probable tokens as GUARD says, each less probable by the
        penalty for every time it has occurred, the prompt included.

        Args:
            logits: [vocab] float32.
            params: of the request; the temperature is above 0.
            position: index of the new token in its sequence, prompt included.
            history: of the tokens before it.
        """
        temperature, now = params.temperature, entropy(logits, params.temperature)
        step = guard_step([*history.entropies[-REACH:], now], params.guard_window, len(logits))
        ids = self._kernels.select(logits, temperature, step.num_candidates, 1.0, 0.0)
        counts = torch.tensor([history.counts[token_id] for token_id in ids.tolist()])
        damped = logits.clone()
        damped[ids] += counts * (temperature * math.log(step.penalty))
        key = noise_key(params.seed, params.choice, position)
        return Sampled(self._kernels.gumbel_argmax(damped, ids, temperature, key), now)


def _most_tokens(logits: Tensor, params: SamplingParams) -> int:
    """Return the least of the counts that top-nσ, Min-k and top-k leave; 0 if all are off."""
    counts = [params.top_k] if params.top_k > 0 else []
    if params.top_n_sigma > 0:
        counts.append(num_within_sigma(logits, params.top_n_sigma))
    if params.min_k > 0:
        counts.append(num_before_cliff(logits, params.min_k))
    return min(counts, default=0)
