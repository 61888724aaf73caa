"""Which architecture serves which model_type of config.json."""

from afd_server.core.model_spec import SUPPORTED_MODEL_TYPES
from afd_server.models.base import Architecture
from afd_server.models.llama import LLAMA

ARCHITECTURES: dict[str, Architecture] = {"llama": LLAMA}

assert set(ARCHITECTURES) == set(SUPPORTED_MODEL_TYPES), "core.model_spec lists other types"
