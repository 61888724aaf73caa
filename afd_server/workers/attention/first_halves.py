"""What an attention worker computes of FFNs that others hold: the first half of dense ones."""

import ctypes

from torch import Tensor

from afd_server.core.model_spec import ModelSpec
from afd_server.kernels.table import Kernels
from afd_server.models.base import Architecture, FFNShare, WeightSource


class FirstHalves:
    """The first halves of the dense FFNs, for native code that asks for the second ones.

    Memory: those FFNs, as a worker has them that holds them whole.

    Attributes:
        function: address of what computes any of them; 0 if there are none.
        contexts: address of an array of contexts for it, by layer; 0 for a layer without.
    """

    def __init__(
        self, architecture: Architecture, spec: ModelSpec, weights: WeightSource, kernels: Kernels
    ) -> None:
        layers = range(spec.num_layers)
        dense = tuple(() if spec.num_chosen(layer) else (0,) for layer in layers)
        self._ffn = architecture.ffn(spec, weights, kernels, FFNShare(experts=(*dense, ())))
        halves = [self._ffn.halves(layer) if dense[layer] else None for layer in layers]
        self._firsts = [None if pair is None else pair[0] for pair in halves]
        calls = [None if first is None else first.native for first in self._firsts]
        contexts = [0 if call is None else call.context for call in calls]
        self._contexts = (ctypes.c_void_p * len(contexts))(*contexts)
        self.function = next((call.function for call in calls if call is not None), 0)
        self.contexts = ctypes.addressof(self._contexts)

    def holds(self, layer: int) -> bool:
        """Tell whether there is one of a layer, or of the head, which has none."""
        return layer < len(self._firsts) and self._firsts[layer] is not None

    def compute(self, layer: int, rows: Tensor) -> Tensor:
        """Return the first half of a layer's output, [rows, hidden], of a call's rows."""
        first = self._firsts[layer]
        assert first is not None, f"nobody was asked for the second half of layer {layer}"
        return first(rows)
