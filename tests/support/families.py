"""One tiny random checkpoint of each architecture, and an independent model of it."""

import atexit
import functools
import json
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2MLP, DeepseekV2Moe
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig
from transformers.models.step3p7.modeling_step3p7 import Step3p7TextModel

from support.checkpoints import VOCAB_SIZE, perturb_norms, write_checkpoint, write_tokenizer
from support.experts import draw_experts, write_mixtral, write_qwen3_moe

SIZES = {
    "hidden_size": 96,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.15,
}


class Family(NamedTuple):
    """A checkpoint, and the logits [tokens, vocab] that belong to token ids."""

    directory: Path
    logits: Callable[[list[int]], Tensor]


def _llama(directory):
    return _saved(directory, LlamaForCausalLM(LlamaConfig(**SIZES, rope_theta=1e4)))


def _qwen2(directory):
    return _saved(directory, Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)))


def _qwen2_windows(directory):
    windows = {"use_sliding_window": True, "sliding_window": 19, "max_window_layers": 1}
    return _saved(directory, Qwen2ForCausalLM(Qwen2Config(**SIZES, **windows)))


def _qwen3_windows(directory):
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    windows = {"use_sliding_window": True, "sliding_window": 19, "layer_types": kinds}
    return _saved(directory, Qwen3ForCausalLM(Qwen3Config(**SIZES, **windows, head_dim=32)))


def _qwen3(directory):
    # as in the release: the heads together are wider than the hidden size
    return _saved(directory, Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=32)))


def _saved(directory, model):
    write_checkpoint(directory, model.eval())
    return lambda ids: model(torch.tensor([ids])).logits[0]


def _step3_text(directory):
    """Step-3 of stock parts: Llama with one KV head, and a norm between two query projections."""
    model = _mfa_model()
    perturb_norms(model)
    _write(directory, STEP3, _names_of_step3(model.state_dict()))
    return lambda ids: model(torch.tensor([ids])).logits[0]


def _mfa_kr(directory):
    """Step-3 that reuses keys: its attention written down from the formula."""
    model = _mfa_model()
    for layer in model.model.layers:
        layer.self_attn = MFAKeyReuse(layer.self_attn)
    perturb_norms(model)
    _write(directory, STEP3 | {"mfa_key_reuse": True}, _names_of_step3(model.state_dict()))
    return lambda ids: model(torch.tensor([ids])).logits[0]


STEP3P5 = {
    "model_type": "step3p5",
    "hidden_size": 96,
    "intermediate_size": 176,
    "num_hidden_layers": 4,
    "num_nextn_predict_layers": 2,  # lists have entries for these too, which nobody reads
    "num_attention_heads": 4,
    "num_attention_groups": 2,
    "head_dim": 32,
    "attention_other_setting": {
        "attention_type": "sliding_attention",
        "num_attention_heads": 6,
        "num_attention_groups": 2,
        "head_dim": 32,
    },
    "sliding_window": 21,
    "layer_types": ["full_attention"] + ["sliding_attention"] * 3 + ["full_attention"] * 2,
    "rope_theta": [5e6, 1e4, 1e4, 1e4, 5e6, 5e6],
    "partial_rotary_factors": [0.5, 1.0, 1.0, 1.0, 0.5, 0.5],
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "low_freq_factor": 0.5,
        "high_freq_factor": 4.0,
    },
    "yarn_only_types": ["full_attention"],
    "moe_layers_enum": "1,2,3",
    "moe_num_experts": 8,
    "moe_top_k": 3,
    "moe_intermediate_size": 48,
    "share_expert_dim": 80,
    "moe_router_activation": "sigmoid",
    "use_moe_router_bias": True,
    "moe_router_scaling_factor": 3.0,
    "norm_expert_weight": True,
    "need_fp32_gate": True,
    "swiglu_limits": [0.0, None, 0.25, 0.5, 0.0, 0.0],
    "swiglu_limits_shared": [0.75, 0.0, 0.25, 0.5, 0.0, 0.0],
    "use_qk_norm": True,
    "use_head_wise_attn_gate": True,
    "zero_centered": True,
    "sink": False,
    "use_rope_layers": [],
    "max_position_embeddings": 512,
    "vocab_size": VOCAB_SIZE,
    "rms_norm_eps": 1e-5,
    "eos_token_id": [2],
    "initializer_range": 0.15,
}


def _step3p5(directory):
    model = Step3p7TextModel(Step3p7TextConfig(**STEP3P5)).eval()
    head = torch.randn(VOCAB_SIZE, 96) * 0.15
    perturb_norms(model)
    draw_experts(model)
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    _write(directory, STEP3P5, _names_of_step3(tensors) | {"lm_head.weight": head})
    return lambda ids: model(torch.tensor([ids])).last_hidden_state[0] @ head.T


def _deepseek_v3(directory):
    config = DeepseekV3Config(
        **SIZES | {"num_key_value_heads": 6, "rms_norm_eps": 1e-6},
        q_lora_rank=56,
        kv_lora_rank=40,
        qk_nope_head_dim=24,
        qk_rope_head_dim=16,
        v_head_dim=32,
        first_k_dense_replace=1,
        n_routed_experts=12,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        moe_intermediate_size=48,
        n_shared_experts=2,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
        num_nextn_predict_layers=0,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0,
            "original_max_position_embeddings": 64, "beta_fast": 4.0, "beta_slow": 1.0,
            "mscale": 1.0, "mscale_all_dim": 0.7,
        },
    )  # fmt: skip
    model = DeepseekV3ForCausalLM(config)
    draw_experts(model)
    return _saved(directory, model)


HEAD_DIM, QUERY_RANK = 32, 40
STEP3 = {
    "model_type": "step3_text",
    "hidden_size": SIZES["hidden_size"],
    "intermediate_size": SIZES["intermediate_size"],
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_attention_groups": 1,
    "head_dim": HEAD_DIM,
    "share_q_dim": QUERY_RANK,
    "moe_layers_enum": "1,2",
    "moe_num_experts": 8,
    "moe_top_k": 3,
    "moe_intermediate_size": 48,
    "share_expert_dim": 80,
    "norm_expert_weight": False,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": None,
    "max_position_embedding": 512,
    "vocab_size": VOCAB_SIZE,
    "eos_token_id": 2,
}


def _mfa_model():
    sizes = SIZES | {"num_hidden_layers": 4, "num_key_value_heads": 1, "head_dim": HEAD_DIM,
                     "rms_norm_eps": 1e-5}  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**sizes, rope_theta=500000.0)).eval()
    for layer in model.model.layers:
        layer.self_attn.q_proj = nn.Sequential(
            OrderedDict(
                q_proj=nn.Linear(96, QUERY_RANK, bias=False),
                inter_norm=LlamaRMSNorm(QUERY_RANK, 1e-5),
                wq=nn.Linear(QUERY_RANK, 6 * HEAD_DIM, bias=False),
            )
        )
    experts = DeepseekV2Config(
        hidden_size=96,
        n_routed_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=STEP3["moe_intermediate_size"],
        n_shared_experts=1,
        topk_method="greedy",  # a softmax over all, whose highest are taken as they are
        norm_topk_prob=False,
        routed_scaling_factor=1.0,
    )
    for layer in model.model.layers[1:3]:
        layer.mlp = DeepseekV2Moe(experts)
        size = STEP3["share_expert_dim"]
        layer.mlp.shared_experts = DeepseekV2MLP(experts, intermediate_size=size)
        draw_experts(layer)
    return model.eval()


class MFAKeyReuse(nn.Module):
    """Key j as query i sees its value: rotated by j − i, then times I + diag(α) N."""

    def __init__(self, attention):
        super().__init__()
        self.q_proj, self.k_proj = attention.q_proj, attention.k_proj
        self.o_proj = attention.o_proj
        self.value_gate = nn.Parameter(torch.randn(HEAD_DIM))
        self.value_mix = nn.Linear(HEAD_DIM, HEAD_DIM, bias=False)

    def forward(self, hidden_states, **_):
        rows = hidden_states[0]
        count = rows.shape[0]
        apart = torch.arange(count)[None] - torch.arange(count)[:, None]  # j − i, [i, j]
        turn = torch.outer(apart.flatten(), 500000.0 ** -(torch.arange(16) / 16))
        turn = torch.polar(torch.ones_like(turn), turn).view(count, count, 16)
        keys = self.k_proj(rows)
        keys = torch.complex(keys[:, :16], keys[:, 16:]) * turn  # [i, j, 16]
        keys = torch.cat((keys.real, keys.imag), -1)
        query = self.q_proj(rows).view(count, 6, HEAD_DIM)
        scores = torch.einsum("ihd,ijd->hij", query, keys) / HEAD_DIM**0.5
        weights = scores.masked_fill(apart > 0, -torch.inf).softmax(-1)
        values = keys + self.value_mix(keys) * self.value_gate
        attended = torch.einsum("hij,ijd->ihd", weights, values).flatten(1)
        return self.o_proj(attended)[None], None


STEP3_NAMES = {
    ".self_attn.q_proj.q_proj.": ".self_attn.q_proj.",
    ".self_attn.q_proj.inter_norm.": ".self_attn.inter_norm.",
    ".self_attn.q_proj.wq.": ".self_attn.wq.",
    ".mlp.gate.weight": ".moe.gate.weight",
    ".mlp.gate.e_score_correction_bias": ".moe.router_bias",
    ".mlp.experts.down_proj": ".moe.down_proj.weight",
    ".mlp.experts.": ".moe.",
    ".mlp.shared_experts.": ".share_expert.",
}


def _names_of_step3(tensors):
    """Return tensors by the hub's names: parts of `q_proj` stand beside it there."""
    renamed = {}
    for name, tensor in tensors.items():
        for ours, theirs in STEP3_NAMES.items():
            name = name.replace(ours, theirs, 1)
        renamed[name] = tensor
    for name in [name for name in renamed if name.endswith("gate_up_proj")]:
        gate, up = renamed.pop(name).chunk(2, 1)
        prefix = name.removesuffix("gate_up_proj")
        renamed |= {f"{prefix}gate_proj.weight": gate.contiguous(),
                    f"{prefix}up_proj.weight": up.contiguous()}  # fmt: skip
    return renamed


def _write(directory, config, tensors):
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    write_tokenizer(directory)


def _mixtral(directory):
    model = write_mixtral(directory)
    return lambda ids: model(torch.tensor([ids])).logits[0]


def _mixtral_windows(directory):
    model = write_mixtral(directory, window=19)
    return lambda ids: model(torch.tensor([ids])).logits[0]


def _qwen3_moe_windows(directory):
    model = write_qwen3_moe(directory, window=19)
    return lambda ids: model(torch.tensor([ids])).logits[0]


def _qwen3_moe(directory):
    model = write_qwen3_moe(directory, chosen=3, dense_layers=(1,))
    return lambda ids: model(torch.tensor([ids])).logits[0]


WRITERS = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "step3_text": _step3_text,
    "mfa_kr": _mfa_kr,
    "step3p5": _step3p5,
    "deepseek_v3": _deepseek_v3,
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "qwen2_windows": _qwen2_windows,
    "qwen3_windows": _qwen3_windows,
    "mixtral_windows": _mixtral_windows,
    "qwen3_moe_windows": _qwen3_moe_windows,
}


ROUTED = ("step3_text", "mfa_kr", "step3p5", "deepseek_v3", "mixtral", "qwen3_moe")


@functools.cache
def family(name: str) -> Family:
    """Return one shared tiny checkpoint; nobody may change it."""
    directory = Path(tempfile.mkdtemp(prefix=f"tiny-{name}-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    torch.manual_seed(0)
    return Family(directory, WRITERS[name](directory))
