"""Mixtral: Llama's attention, and in every layer a softmax gate over SwiGLU experts."""

from functools import partial

from afd_server.models.base import Architecture
from afd_server.models.experts import ExpertNames, GatedDecoder, RoutedFFN
from afd_server.models.llama import LlamaAttention

_NAMES = ExpertNames("block_sparse_moe", gate="w1", up="w3", down="w2")

MIXTRAL = Architecture(
    attention=partial(GatedDecoder, _NAMES, LlamaAttention),
    ffn=partial(RoutedFFN, _NAMES),
)
