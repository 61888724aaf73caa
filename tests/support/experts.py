"""Tiny random checkpoints with experts, written with the hub's names by transformers itself."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import torch
from torch import nn
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from support.checkpoints import VOCAB_SIZE, write_checkpoint

SIZES = {
    "hidden_size": 96,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.15,
}


def write_mixtral(
    directory: Path, *, experts: int = 8, chosen: int = 2, window: int | None = None
) -> PreTrainedModel:
    """Write a Mixtral of a few thousand weights and return transformers' model of it."""
    torch.manual_seed(0)
    config = MixtralConfig(
        **SIZES, num_local_experts=experts, num_experts_per_tok=chosen, sliding_window=window
    )
    return _write(directory, MixtralForCausalLM(config))


def write_qwen3_moe(
    directory: Path,
    *,
    experts: int = 8,
    chosen: int = 2,
    dense_layers: tuple[int, ...] = (),
    renormalises: bool = True,
    window: int | None = None,
) -> PreTrainedModel:
    """Write a Qwen3-MoE of a few thousand weights and return transformers' model of it."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        **SIZES,
        head_dim=32,
        num_experts=experts,
        num_experts_per_tok=chosen,
        moe_intermediate_size=80,
        norm_topk_prob=renormalises,
        use_sliding_window=window is not None,
        sliding_window=window,
        mlp_only_layers=list(dense_layers),
    )
    return _write(directory, Qwen3MoeForCausalLM(config))


def draw_experts(model: nn.Module) -> None:
    """Make gates, their biases and experts random: some begin at zero, others undefined."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if any(part in name for part in ("mlp.gate.", "mlp.experts.", "mlp.shared_experts.")):
                tensor.normal_(0, 0.15)


def _write(directory: Path, model: PreTrainedModel) -> PreTrainedModel:
    draw_experts(model)
    write_checkpoint(directory, model.eval())
    return model


EXPERT_WRITERS = {"mixtral": write_mixtral, "qwen3_moe": write_qwen3_moe}


@functools.cache
def tiny_routed(kind: str, **shape: object) -> tuple[Path, PreTrainedModel]:
    """Return one shared tiny checkpoint with experts; nobody may change it."""
    directory = Path(tempfile.mkdtemp(prefix=f"tiny-{kind}-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory, EXPERT_WRITERS[kind](directory, **shape)
