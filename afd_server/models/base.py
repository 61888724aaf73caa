"""What a model half offers and what it asks for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from afd_server.core.model_spec import ModelSpec
from afd_server.core.topology import ColumnShard, column_shard
from afd_server.kernels.table import (
    BoundSwiGLU,
    Kernels,
    KVLayer,
    LinearWeight,
    NativeCall,
    PagedRows,
)


class FFNCall(NamedTuple):
    """What crosses A→F.

    Attributes:
        layer: whose FFN is wanted; `num_layers` stands for the head.
        rows: the layer's normed rows, prepared, [tokens, …] (`RowFormat`); in a routed layer with
            their experts behind them (`models.routing.join`).
        num_chosen: experts of each row; 0 in a dense layer.
        is_head: whether logits are wanted: parts are put side by side, not added.
        way: how to go on with the answer; None if whoever asks does that.
    """

    layer: int
    rows: Tensor
    num_chosen: int = 0
    is_head: bool = False
    way: "Way | None" = None


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one lane computes in one step.

    Attributes:
        token_ids: [tokens] int64.
        positions: [tokens] int64, each row's place in its sequence.
        slots: [tokens] int64, where each row's keys and values go: block · block_size + offset.
        rows: which keys each row sees.
        logit_rows: [rows] int64, the rows whose logits are wanted.
        kv: the blocks of every layer; written in place.
        by_layer: where layers have several block tables, each layer's own batch: alike but for
            `slots` and `rows`. Else empty.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    rows: PagedRows
    logit_rows: Tensor
    kv: tuple[KVLayer, ...]
    by_layer: tuple["MicroBatch", ...] = ()

    def of_layer(self, layer: int) -> "MicroBatch":
        """Return the batch as the attention of a layer has to see it."""
        return self.by_layer[layer] if self.by_layer else self


class NativeLayers(NamedTuple):
    """How code outside of Python takes a micro-batch from one layer's FFN output to the next FFN.

    Of each layer addresses, for `function` (`kernels.table.NativeAttention`).

    Attributes:
        function: of all layers the same.
        contexts, blocks, seen: of arrays of addresses by layer.
        owner: keeps the memory.
    """

    function: int
    contexts: int
    blocks: int
    seen: int
    owner: object


class Progress(NamedTuple):
    """How far a micro-batch has come and may go, for code outside of Python.

    Attributes:
        attended: address of an int64, the number of layers whose keys are written.
        ahead: address of that of another micro-batch, which goes ahead and writes keys that this
            one sees in each layer; 0 if there is none.
        end: the layer before which only Python goes on.
    """

    attended: int
    ahead: int
    end: int


class Way(NamedTuple):
    """How to go on with the answer to a call, and where to leave what that gives.

    Attributes:
        layers: take the steps.
        hidden: [tokens, hidden] float32, the residual behind the attention of the call's layer;
            whoever goes on makes it that of a later layer.
        progress: is kept up to date.
    """

    layers: NativeLayers
    hidden: Tensor
    progress: Progress


class Reached(NamedTuple):
    """The answer to a call of a later layer than was asked for.

    The residual before it is in the `hidden` of the way.

    Attributes:
        layer: whose FFN output it is.
        answer: [tokens, hidden].
    """

    layer: int
    answer: Tensor


class FFNShare(NamedTuple):
    """What one worker holds: one of `num_parts` column shards of some experts of each layer.

    `experts` lists them by layer; None means all. A dense layer counts as one expert, and so does
    the head behind the last layer, whose columns are those of the logits. `head` is which of how
    many parts of the vocabulary; None if it is cut as the others are.
    """

    part: int = 0
    num_parts: int = 1
    experts: tuple[tuple[int, ...], ...] | None = None
    head: tuple[int, int] | None = None

    def columns(self, intermediate_size: int) -> ColumnShard:
        """Return the shard of an FFN with so many columns."""
        return column_shard(intermediate_size, self.part, self.num_parts)

    def vocabulary(self, vocab_size: int) -> ColumnShard:
        """Return the part of so many tokens whose logits are computed."""
        return column_shard(vocab_size, *(self.head or (self.part, self.num_parts)))

    def experts_of(self, layer: int, spec: ModelSpec) -> Sequence[int]:
        """Return the experts of a layer that are held."""
        if self.experts is None:
            return range(spec.placed_by_layer[layer])
        return self.experts[layer]


class TensorReader(Protocol):
    """Gives checkpoint tensors one at a time, as copies in the compute dtype.

    Each method that reads raises `ModelError` if the tensor is missing or its shape differs.
    """

    def has(self, name: str) -> bool:
        """Tell whether there is such a tensor."""
        ...

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return the whole tensor."""
        ...

    def read_float32(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return the whole tensor in float32, whatever the compute dtype is."""
        ...

    def read_rows(self, name: str, shape: tuple[int, ...], start: int, stop: int) -> Tensor:
        """Return rows start … stop − 1 of a tensor of this whole shape."""
        ...

    def read_slice(self, name: str, shape: tuple[int, ...], place: tuple[slice, ...]) -> Tensor:
        """Return a part of a tensor of this whole shape; dimensions not named are whole."""
        ...


class WeightSource(TensorReader, Protocol):
    """Gives tensors, and weights as the kernels pack them."""

    def pack(self, name: str, make: Callable[[], Tensor]) -> LinearWeight:
        """Return the packed form of the weight [out, in] of this name.

        `make` reads it from the checkpoint, with its errors; it is not called for a weight that
        was kept from an earlier start.
        """
        ...


class AttentionHalf(Protocol):
    """Embeddings, norms and attention: all that touches a request."""

    num_layers: int

    def embed(self, token_ids: Tensor) -> Tensor:
        """Return [tokens, hidden] for [tokens]."""
        ...

    def attend(
        self, layer: int, hidden: Tensor, delta: Tensor | None, batch: MicroBatch
    ) -> tuple[Tensor, FFNCall]:
        """Return the residual after attention, [tokens, hidden], and the layer's FFN call.

        `delta` is the FFN output of the layer before, not yet added to the residual.
        """
        ...

    def head_call(self, hidden: Tensor, delta: Tensor | None, rows: Tensor) -> FFNCall:
        """Return the call for the logits of some rows."""
        ...

    def native_layers(self, batch: MicroBatch) -> NativeLayers | None:
        """Return how a micro-batch goes on outside of Python, if it can."""
        ...


class FFNHalf(Protocol):
    """The feed-forward weights that a worker of either side holds, and nothing else."""

    def partial_sum(self, layer: int, rows: Tensor) -> Tensor:
        """Return this part's share of the layer's FFN output, of a call's rows.

        Returns:
            [rows, hidden]; in a routed layer with experts elsewhere as `models.routing.answers_of`
            tells.
        """
        ...

    def native(self, layer: int) -> NativeCall | None:
        """Return what computes a dense layer's partial sum outside of Python, if there is such."""
        ...

    def halves(self, layer: int) -> tuple[BoundSwiGLU, BoundSwiGLU] | None:
        """Return what computes the two summands of a dense layer's partial sum, if it has such."""
        ...


@dataclass(frozen=True, slots=True)
class Architecture:
    """How to build the halves of one model_type."""

    attention: Callable[[ModelSpec, WeightSource, Kernels, int], AttentionHalf]
    ffn: Callable[[ModelSpec, WeightSource, Kernels, FFNShare], FFNHalf]
