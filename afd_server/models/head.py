"""The head, and what one worker of either side holds: FFNs, the head, or both."""

from torch import Tensor

from afd_server.core.model_spec import ModelSpec
from afd_server.kernels.table import Kernels, NativeCall
from afd_server.models.base import Architecture, FFNShare, WeightSource


class Held:
    """What one worker answers calls with: its share of the FFNs and of the head.

    Args:
        architecture: makes the FFN half.
        spec, weights, kernels, share: as for it.
    """

    def __init__(
        self,
        architecture: Architecture,
        spec: ModelSpec,
        weights: WeightSource,
        kernels: Kernels,
        share: FFNShare,
    ) -> None:
        self._head_layer = spec.num_layers
        self._ffn = architecture.ffn(spec, weights, kernels, share)
        holds_head = bool(share.experts_of(self._head_layer, spec))
        self._head = _Head(spec, weights, kernels, share) if holds_head else None

    def answer(self, layer: int, rows: Tensor) -> Tensor:
        """Return this worker's answer to a call's rows.

        Returns:
            Of a layer the partial sums, as `FFNHalf` tells; of the head, which comes behind the
            last layer, the logits of its part of the vocabulary, [rows, part] float32. Behind the
            head come the layers again, each for the second half of its FFN alone.
        """
        if layer < self._head_layer:
            return self._ffn.partial_sum(layer, rows)
        if layer > self._head_layer:
            halves = self._ffn.halves(layer - self.second_from)
            assert halves is not None, f"layer {layer - self.second_from} has no halves"
            return halves[1](rows)
        assert self._head is not None, "the head is held by others"
        return self._head.logits(rows)

    @property
    def second_from(self) -> int:
        """Return by how much the number of a layer is higher for the second half of its FFN."""
        return self._head_layer + 1

    def has_halves(self, layer: int) -> bool:
        """Tell whether the second half of a dense layer's FFN can be asked for."""
        return self._ffn.halves(layer) is not None

    def native(self, layer: int) -> NativeCall | None:
        """Return what answers calls of a dense layer or the head outside of Python, if anything."""
        if layer < self._head_layer:
            return self._ffn.native(layer)
        if layer == self._head_layer:
            return None if self._head is None else self._head.native
        halves = self._ffn.halves(layer - self.second_from)
        return None if halves is None else halves[1].native


class _Head:
    """The rows of the head [vocab, hidden] for one part of the vocabulary.

    A logit is a product of its own, so parts side by side have the bits of the whole. Torch's
    products keep to that in aligned parts only (`core.topology.SHARD_ALIGNMENT`).
    """

    def __init__(
        self, spec: ModelSpec, weights: WeightSource, kernels: Kernels, share: FFNShare
    ) -> None:
        name = "model.embed_tokens.weight" if spec.tie_embeddings else "lm_head.weight"
        vocabulary, part = (spec.vocab_size, spec.hidden_size), share.vocabulary(spec.vocab_size)
        self._weight = weights.pack("lm_head", lambda: weights.read_rows(name, vocabulary, *part))
        self._kernels = kernels
        self.native = kernels.bind(self._weight)

    def logits(self, rows: Tensor) -> Tensor:
        """Return [rows, part] float32 for prepared rows."""
        return self._kernels.linear(rows, self._weight).float()
