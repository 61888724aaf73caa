"""What every figure depends on."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path


def environment() -> dict[str, str | int]:
    """Return hardware, versions and, from a checkout, the commit."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "afd_server": version("afd-server"),
        "torch": version("torch"),
        "ray": version("ray"),
        "commit": _commit(),
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def _commit() -> str:
    root = Path(__file__).parents[2]
    if not (root / "pyproject.toml").is_file():
        return ""  # installed, perhaps into an environment within somebody else's repository
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=root,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    except FileNotFoundError:  # no git on this machine
        return ""
    return described.stdout.strip()
