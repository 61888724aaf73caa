"""What every figure depends on."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path


def environment() -> dict:
    """Return hardware, versions and commit."""
    model = next(
        (line.split(":", 1)[1].strip()
         for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines()
         if line.startswith("model name")),
        platform.processor(),
    )  # fmt: skip
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": version("torch"),
        "ray": version("ray"),
        "commit": commit.stdout.strip(),
    }
