import shutil
import tempfile
from pathlib import Path

import pytest
import torch

from support import checkpoints

torch.set_num_threads(1)
torch.set_grad_enabled(False)


@pytest.fixture(scope="session", autouse=True)
def _remove_shared_checkpoints():
    made: list = []
    build = checkpoints.tiny_llama

    def remember(*args, **kwargs):
        result = build(*args, **kwargs)
        made.append(result[0])
        return result

    checkpoints.tiny_llama = remember
    yield
    for directory in set(made):
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def short_dir():
    """A directory whose path leaves room for a socket's name (107 bytes in all)."""
    with tempfile.TemporaryDirectory(prefix="t-") as directory:
        yield Path(directory)
