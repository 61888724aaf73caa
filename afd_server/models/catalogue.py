"""Which architecture serves which model_type of config.json."""

from afd_server.core.model_spec import SUPPORTED_MODEL_TYPES
from afd_server.models.base import Architecture
from afd_server.models.deepseek_v3 import DEEPSEEK_V3
from afd_server.models.llama import LLAMA
from afd_server.models.mixtral import MIXTRAL
from afd_server.models.qwen2 import QWEN2
from afd_server.models.qwen3 import QWEN3
from afd_server.models.qwen3_moe import QWEN3_MOE
from afd_server.models.step3_text import STEP3_TEXT
from afd_server.models.step3p5 import STEP3P5

ARCHITECTURES: dict[str, Architecture] = {
    "llama": LLAMA,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "step3_text": STEP3_TEXT,
    "step3p5": STEP3P5,
    "deepseek_v3": DEEPSEEK_V3,
    "mixtral": MIXTRAL,
    "qwen3_moe": QWEN3_MOE,
}

assert set(ARCHITECTURES) == set(SUPPORTED_MODEL_TYPES), "core.model_spec lists other types"
