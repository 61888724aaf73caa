import tempfile
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
torch.set_grad_enabled(False)


@pytest.fixture
def short_dir():
    """A directory whose path leaves room for a socket's name (107 bytes in all)."""
    with tempfile.TemporaryDirectory(prefix="t-") as directory:
        yield Path(directory)


def pytest_addoption(parser):
    parser.addoption(
        "--comparisons", type=int, default=150, help="of test_determinism (make determinism)"
    )
    parser.addoption("--record", type=Path, help="where test_determinism writes what it did")
