"""Builds the native parts while the package is installed: CPU kernels and the rings.

The kernels are one library for each instruction set; the machine picks at run time. Without a C++
compiler the package installs all the same and says so when a native part is asked for.
"""

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FLAGS = ["-O3", "-std=c++17", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno",
         "-Wall", "-Wno-psabi", "-Wno-maybe-uninitialized"]  # fmt: skip
BUILDS = {
    "avx512vnni": ["-march=x86-64-v4", "-mavx512vnni"],
    "avx2": ["-march=x86-64-v3"],
    "portable": [],
}


class NativeParts(BuildHookInterface):
    """Compiles the sources beside themselves and adds the libraries to the wheel."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict) -> None:
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
        if compiler is None:
            print("no C++ compiler: installing without native parts", file=sys.stderr)
            return
        package = Path(self.root) / "afd_server"
        kernels = package / "kernels" / "native" / "kernels.cpp"
        intel = platform.machine() in ("x86_64", "AMD64")
        parts = [(kernels, name, BUILDS[name]) for name in (BUILDS if intel else ["portable"])]
        if sys.platform == "linux":
            parts.append((package / "transport/native/ring.cpp", "ring", []))
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # a build takes a minute or two of a core
            libraries = list(pool.map(lambda part: self.compile(compiler, *part), parts))
        build_data["artifacts"] += [str(library.relative_to(self.root)) for library in libraries]
        build_data["pure_python"] = False
        build_data["infer_tag"] = True

    def compile(self, compiler: str, source: Path, name: str, flags: list[str]) -> Path:
        library = source.parent / f"libafd_{name}.so"
        command = [compiler, *FLAGS, *flags, str(source), "-o", str(library)]
        subprocess.run(command, check=True)
        return library
