"""Mixtral: Llama's attention, and in every layer a softmax gate over SwiGLU experts."""

from functools import partial

from afd_server.models.base import Architecture
from afd_server.models.experts import STACKED, ExpertNames, GatedDecoder, RoutedFFN
from afd_server.models.layers import FFNTensors
from afd_server.models.llama import LlamaAttention

_EXPERT = "block_sparse_moe.experts.{expert}"
_NAMES = ExpertNames(
    gates=("block_sparse_moe.gate.weight", "mlp.gate.weight"),
    experts=(
        FFNTensors(f"{_EXPERT}.w1.weight", f"{_EXPERT}.w3.weight", f"{_EXPERT}.w2.weight"),
        STACKED,
    ),
)

MIXTRAL = Architecture(
    attention=partial(GatedDecoder, _NAMES, LlamaAttention),
    ffn=partial(RoutedFFN, _NAMES),
)
