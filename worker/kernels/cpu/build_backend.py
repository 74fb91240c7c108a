"""setuptools' build backend, and before it the kernels compiled: what pip calls to install us.

The compiler is Zig's C++ one, from PyPI, so that a machine needs none, and the libraries run on any
Linux of their architecture. They are written beside their sources, where an editable install finds
them and a wheel takes them from. Imports nothing of ours.
"""

import platform
import subprocess
import sys
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # the hooks that we leave alone

FOLDER = Path(__file__).parent
TARGETS = {
    "x86_64": {
        "x86_64_v3": "x86_64_v3",
        "x86_64_v4_bf16": "x86_64_v4+avx512bf16+avx512vnni",
    },
    "aarch64": {"aarch64": "generic"},
}
GLIBC = "2.17"
FLAGS = (
    *("-std=c++20", "-O3", "-fno-math-errno", "-fno-exceptions", "-fno-rtti", "-nostdlib++"),
    *("-shared", "-fPIC", "-s", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"),
)


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    """A wheel with the libraries of this machine's architecture, and tagged so."""
    compile_kernels()
    if platform.machine() in TARGETS and sys.platform == "linux":
        tag = f"manylinux_{GLIBC.replace('.', '_')}_{platform.machine()}"
        config_settings = {**(config_settings or {}), "--build-option": f"--plat-name={tag}"}
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    """An editable install; the libraries stay beside their sources."""
    compile_kernels()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)


def compile_kernels() -> None:
    """One library for each kind of processor of this architecture. Raises CalledProcessError with
    the compiler's words above it. Other systems than Linux run on torch's operations."""
    if sys.platform != "linux":
        return
    machine = platform.machine()
    sources = sorted(str(path) for path in FOLDER.glob("*.cpp"))
    for name, processor in TARGETS.get(machine, {}).items():
        output = FOLDER / f"kernels_{name}.so"
        target = f"{machine}-linux-gnu.{GLIBC}"
        command = [sys.executable, "-m", "ziglang", "c++", *FLAGS, f"-mcpu={processor}"]
        fresh = output.with_suffix(".tmp")
        subprocess.run([*command, "-target", target, "-o", str(fresh), *sources], check=True)
        fresh.replace(output)  # a process that has the old one mapped keeps it


if __name__ == "__main__":
    compile_kernels()
