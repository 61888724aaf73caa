"""Reads safetensors checkpoints one tensor at a time.

A float8 tensor `X` with factors `X_scale_inv` beside it is multiplied by them: which tensors of a
checkpoint are quantised is seen from the tensors, not from config.json.

Knows nothing of what a tensor is for; models say which names and shapes they want.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from afd_server.core.errors import ModelError
from afd_server.core.model_spec import read_json
from afd_server.weights.block_fp8 import (
    BLOCK,
    FP8,
    dequantise,
    scale_name,
    scale_part,
    scale_shape,
)

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INDEX_NAME = "model.safetensors.index.json"


class Checkpoint:
    """A model directory's tensors, as copies in one dtype.

    A file is mapped only while one of its tensors is read, so the memory in use never holds
    more of the checkpoint than that tensor (or its asked-for part).

    Args:
        directory: holds one or more *.safetensors files.
        dtype: of the tensors returned.

    Raises:
        ModelError: no file, an unreadable one, or an index that names a missing file.
    """

    def __init__(self, directory: Path, dtype: torch.dtype) -> None:
        self._directory = directory
        self._dtype = dtype
        self._files = _find_tensors(directory)

    def has(self, name: str) -> bool:
        """Tell whether a file holds this tensor."""
        return name in self._files

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return the whole tensor; `ModelError` if it is missing or of another shape."""
        return self.read_slice(name, shape, ())

    def read_float32(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return the whole tensor in float32; errors as for `read`."""
        return self._read(name, shape, (), torch.float32)

    def read_rows(self, name: str, shape: tuple[int, ...], start: int, stop: int) -> Tensor:
        """Return rows start … stop − 1; errors as for `read`."""
        return self.read_slice(name, shape, (slice(start, stop),))

    def read_slice(self, name: str, shape: tuple[int, ...], place: tuple[slice, ...]) -> Tensor:
        """Return a part of a tensor; errors as for `read`."""
        return self._read(name, shape, place, self._dtype)

    def _read(
        self, name: str, shape: tuple[int, ...], place: tuple[slice, ...], dtype: torch.dtype
    ) -> Tensor:
        place += (slice(None),) * (len(shape) - len(place))
        place = tuple(slice(*p.indices(n)[:2]) for p, n in zip(place, shape, strict=True))
        tensor = self._stored(name, shape, place)
        if tensor.dtype is FP8:
            rank = len(shape)
            scales = self._stored(scale_name(name), scale_shape(shape), scale_part(place, rank))
            offsets = (piece.start % BLOCK for piece in place[-2:])
            return dequantise(tensor, scales, *offsets).to(dtype)
        # clone: a tensor of the right dtype would else keep the file's mapping alive
        return tensor.to(dtype).clone(memory_format=torch.contiguous_format)

    def _stored(self, name: str, shape: tuple[int, ...], part: tuple[slice, ...]) -> Tensor:
        """Return a part of a tensor as it is in its file, which it keeps mapped."""
        path = self._files.get(name)
        if path is None:
            raise ModelError(
                f"{self._directory} has no tensor {name}, expected shape {list(shape)}"
            )
        with safe_open(path, framework="pt") as file:
            view = file.get_slice(name)
            found = tuple(view.get_shape())
            if found != shape:
                raise ModelError(
                    f"{path.name}: tensor {name} has shape {list(found)}, "
                    f"config.json says {list(shape)}"
                )
            tensor: Tensor = view[part]
            if tensor.dtype not in FLOATS and not (tensor.dtype is FP8 and tensor.dim() > 1):
                raise ModelError(f"{path.name}: tensor {name} is {tensor.dtype}, expected floats")
            return tensor


def _find_tensors(directory: Path) -> dict[str, Path]:
    index = directory / INDEX_NAME
    paths = sorted(directory.glob("*.safetensors"))
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ModelError(f"{index} has no weight_map from tensor names to files")
        paths = [directory / str(name) for name in sorted(set(weight_map.values()))]
    if not paths:
        raise ModelError(f"{directory} holds no *.safetensors file")
    found: dict[str, Path] = {}
    for path in paths:
        if not path.is_file():
            raise ModelError(f"{directory} lacks {path.name}, which {INDEX_NAME} names")
        try:
            with safe_open(path, framework="pt") as file:
                found.update(dict.fromkeys(file.keys(), path))
        except SafetensorError as error:
            raise ModelError(f"{path} is damaged or no safetensors file: {error}") from error
    return found
