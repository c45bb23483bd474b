"""Compile the kernels for the CPU where that is possible; pyproject.toml has everything else."""

import hashlib
import os
import pathlib
import platform
import sys

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

FOLDER = "src/mezzotint/kernels"
SOURCES = b"".join(path.read_bytes() for path in sorted(pathlib.Path(FOLDER).glob("*.[ch]")))
AVX512 = [f"-mavx512{name}" for name in ("f", "bw", "dq", "vl", "bf16")]


def library(name: str, sources: list[str], flags: list[str]) -> Extension:
    """Return the recipe of a library of kernels."""
    return Extension(
        f"mezzotint.kernels.{name}",
        [f"{FOLDER}/{source}.c" for source in sources],
        depends=[f"{FOLDER}/{header}.h" for header in ("exponential", "parallel", "product", "simd")],
        define_macros=[("SOURCES", f'"{hashlib.sha256(SOURCES).hexdigest()}"')],  # see kernels/__init__.py
        extra_compile_args=["-O3", "-g0", "-std=c11", "-mavx2", "-mfma", "-ffp-contract=fast", "-pthread", *flags],
        extra_link_args=["-pthread", "-lm"],
        optional=True,  # without a compiler there are no kernels, and torch does everything
    )


LIBRARIES = [
    library("float32", ["attention", "convolution", "linear", "parallel"], []),
    library("bfloat16", ["attention", "parallel"], ["-DBFLOAT16", *AVX512]),
]


class BuildLibrary(build_ext):
    """Build plain shared libraries, which know nothing of Python."""

    def get_ext_filename(self, fullname: str) -> str:
        """Name the file without the version of Python."""
        return os.path.join(*fullname.split(".")) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """Export no function that initializes a module."""
        return []


class Wheel(bdist_wheel):
    """Name the wheel for every Python 3, and for every platform where nothing was compiled."""

    def run(self) -> None:
        """Build first, so that the name can follow from what was built."""
        self.run_command("build")
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tags of the wheel."""
        build = self.get_finalized_command("build_ext")
        compiled = any(os.path.exists(path) for path in build.get_outputs())
        self.root_is_pure = not compiled
        return "py3", "none", super().get_tag()[2] if compiled else "any"


x86 = sys.platform == "linux" and platform.machine() in ("x86_64", "AMD64")
setup(ext_modules=LIBRARIES if x86 else [], cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel})
