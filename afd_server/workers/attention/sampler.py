"""Logits to tokens, as a pure function of the request and the position."""

from torch import Tensor

from afd_server.core.request import SamplingParams
from afd_server.kernels.sampling import noise_key
from afd_server.kernels.table import Kernels


class Sampler:
    """Chooses tokens with the sampling functions of some kernels; keeps nothing between calls."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels

    def sample(self, logits: Tensor, params: SamplingParams, position: int) -> int:
        """Choose the token at `position` of a sequence.

        Greedy at temperature 0, else a draw from the softmax of the scaled logits over the tokens
        that min-p, top-k and top-p leave.

        Args:
            logits: [vocab] float32.
            params: of the request.
            position: index of the new token in its sequence, prompt included.
        """
        if params.temperature == 0:
            return self._kernels.argmax(logits)
        ids = None
        if params.top_k > 0 or params.top_p < 1 or params.min_p > 0:
            ids = self._kernels.select(
                logits, params.temperature, params.top_k, params.top_p, params.min_p
            )
        key = noise_key(params.seed, params.choice, position)
        return self._kernels.gumbel_argmax(logits, ids, params.temperature, key)
