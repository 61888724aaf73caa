"""Qwen3-MoE: Qwen3's attention, and a softmax gate over SwiGLU experts."""

from functools import partial

from afd_server.models.base import Architecture
from afd_server.models.experts import STACKED, ExpertNames, GatedDecoder, RoutedFFN
from afd_server.models.layers import tensors_of_module
from afd_server.models.qwen3 import Qwen3Attention

_NAMES = ExpertNames(
    gates=("mlp.gate.weight",), experts=(tensors_of_module("mlp.experts.{expert}"), STACKED)
)

QWEN3_MOE = Architecture(
    attention=partial(GatedDecoder, _NAMES, Qwen3Attention),
    ffn=partial(RoutedFFN, _NAMES),
)
