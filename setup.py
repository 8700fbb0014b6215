"""Maps the two source folders onto one package, fastgrow/ and kernels/ -> fastgrow.kernels, and builds its loop."""

import sys

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

UNIX = ["-O3", "-g0", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
# Apple's compiler comes without OpenMP
OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]
WINDOWS = ["/O2", "/std:c++17", "/openmp"]


class BuildLoop(build_ext):
    """Flags by compiler; without one, the installation goes on and optimizers take torch's own kernels."""

    def build_extensions(self) -> None:
        unix = self.compiler.compiler_type != "msvc"
        for extension in self.extensions:
            extension.extra_compile_args = [*UNIX, *OPENMP] if unix else WINDOWS
            extension.extra_link_args = OPENMP if unix else []
        super().build_extensions()


kernels = find_packages(include=["kernels", "kernels.*"])
setup(
    packages=[*find_packages(include=["fastgrow", "fastgrow.*"]), *(f"fastgrow.{name}" for name in kernels)],
    package_dir={"fastgrow": "fastgrow", "fastgrow.kernels": "kernels"},
    ext_modules=[
        Extension("fastgrow.kernels._block_update_cpu", ["kernels/block_update_cpu.cpp"], language="c++", optional=True)
    ],
    cmdclass={"build_ext": BuildLoop},
)
