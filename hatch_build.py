"""Builds the native CPU kernels while the package is installed.

One library for each instruction set; the machine picks at run time. Without a C++ compiler the
package installs all the same and says so when the kernels are asked for.
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FLAGS = ["-O3", "-std=c++17", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno",
         "-Wall", "-Wno-psabi", "-Wno-maybe-uninitialized"]  # fmt: skip
BUILDS = {
    "avx512vnni": ["-march=x86-64-v4", "-mavx512vnni"],
    "avx2": ["-march=x86-64-v3"],
    "portable": [],
}


class NativeKernels(BuildHookInterface):
    """Compiles `native/kernels.cpp` beside itself and adds the libraries to the wheel."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict) -> None:
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
        if compiler is None:
            print("no C++ compiler: installing without native CPU kernels", file=sys.stderr)
            return
        folder = Path(self.root) / "afd_server" / "kernels" / "native"
        intel = platform.machine() in ("x86_64", "AMD64")
        for name in BUILDS if intel else ["portable"]:
            library = folder / f"libafd_{name}.so"
            command = [compiler, *FLAGS, *BUILDS[name], str(folder / "kernels.cpp"), "-o"]
            subprocess.run([*command, str(library)], check=True)
            build_data["artifacts"].append(str(library.relative_to(self.root)))
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
