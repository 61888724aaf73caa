"""Weights as the kernels want them, packed once and kept in a file beside the model.

The file holds one worker's part in one format of one set of kernels; whatever differs makes
another file. It can be deleted at any time, and is once a later version of the formats has written.
"""

import contextlib
import hashlib
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from afd_server.kernels.table import Kernels, LinearWeight
from afd_server.models.base import TensorReader

log = logging.getLogger(__name__)

PACK_VERSION = 2  # of the kernels' formats: raise it when one of them changes
_NAME = re.compile(r"(?:v(\d+)-)?[0-9a-f]{16}\.safetensors")  # the first names had no version


def pack_path(directory: Path, *identity: object) -> Path:
    """Return where a part is kept: all that decides over its content is in `identity`."""
    digest = hashlib.sha256(repr((PACK_VERSION, *identity)).encode()).hexdigest()[:16]
    return directory / ".packed" / f"v{PACK_VERSION}-{digest}.safetensors"


class PackedWeights:
    """Gives a model half its weights, packed now or read from the file of an earlier start.

    Args:
        reader: of the checkpoint.
        kernels: that pack and use the weights.
        path: of the file, from `pack_path`; None to keep nothing.
    """

    def __init__(self, reader: TensorReader, kernels: Kernels, path: Path | None) -> None:
        self._reader = reader
        self._kernels = kernels
        self._path = path
        self._kept = {} if path is None else _read(path)
        self._made: dict[str, Tensor] = {}

    def has(self, name: str) -> bool:
        return self._reader.has(name)

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._reader.read(name, shape)

    def read_float32(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._reader.read_float32(name, shape)

    def read_rows(self, name: str, shape: tuple[int, ...], start: int, stop: int) -> Tensor:
        return self._reader.read_rows(name, shape, start, stop)

    def read_slice(self, name: str, shape: tuple[int, ...], place: tuple[slice, ...]) -> Tensor:
        return self._reader.read_slice(name, shape, place)

    def pack(self, name: str, make: Callable[[], Tensor]) -> LinearWeight:
        parts = {part: self._kept.pop(f"{name}:{part}", None) for part in self._kernels.pack_parts}
        found = {part: tensor for part, tensor in parts.items() if tensor is not None}
        if len(found) == len(parts):
            return self._kernels.unpack(found)
        weight = self._kernels.pack(make())
        if self._path is not None:
            tensors = self._kernels.dump(weight)
            self._made |= {f"{name}:{part}": tensor for part, tensor in tensors.items()}
        return weight

    def keep(self) -> None:
        """Write what was packed to the file; called once everything was."""
        if self._path is None or not self._made:
            return
        temporary = self._path.with_suffix(f".{os.getpid()}")
        try:
            self._path.parent.mkdir(exist_ok=True)
            save_file(self._made, temporary)
            temporary.replace(self._path)
            _remove_older(self._path.parent)
        except OSError as error:
            log.warning("packed weights cannot be kept in %s: %s", self._path.parent, error)
            with contextlib.suppress(OSError):
                temporary.unlink()
        self._made = {}


def _remove_older(directory: Path) -> None:
    """Remove files of earlier formats; whoever has one mapped keeps what it reads."""
    for path in directory.iterdir():
        name = _NAME.fullmatch(path.name)
        if name is not None and int(name[1] or 0) < PACK_VERSION:
            path.unlink(missing_ok=True)  # another worker may be as far


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path) if path.is_file() else {}
    except (OSError, SafetensorError) as error:
        log.warning("%s is damaged and will be written anew: %s", path, error)
        return {}
