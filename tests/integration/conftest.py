import tempfile
from pathlib import Path

import pytest

from support.checkpoints import tiny_llama
from support.server import Server, serving


@pytest.fixture(scope="module")
def server() -> Server:
    """One tiny model served by 1A1F subprocesses, shared by a module's tests."""
    with tempfile.TemporaryDirectory(prefix="t-") as directory, serving(
        Path(directory),
        tiny_llama()[0],
        "--launcher", "local", "--served-model-name", "tiny", "--kv-cache-mb", "2",
        "--max-live-requests", "12", "--max-num-seqs", "32", "--max-batch-tokens", "64",
        "--quantization", "none",
    ) as running:  # fmt: skip
        yield running
