"""The build. Metadata is in pyproject.toml; here the CUDA kernels are compiled and packed.

What is built, and with what, is decided by building/toolchain.py, which knows the variables; building/compiling.py
compiles. Neither imports PyTorch.
"""

import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
# Where setup.py is run by hand, or by a backend that is not ours.
sys.path.insert(0, str(ROOT))

from building import compiling, toolchain  # noqa: E402


class BuildPackage(build_py):
    """Also packs csrc/, from which an installed package can build the emulator."""

    def run(self):
        super().run()
        package = ROOT / "gptkern" if self.editable_mode else Path(self.build_lib, "gptkern")
        compiling.note(package, PLAN.missing)
        if not self.editable_mode:
            shutil.copytree(ROOT / "csrc", package / "_csrc", dirs_exist_ok=True)


class BuildKernels(build_ext):
    """gptkern._cuda, by nvcc and ninja."""

    def build_extension(self, extension):
        package = Path(self.get_ext_fullpath(extension.name)).parent
        try:
            package.mkdir(parents=True, exist_ok=True)
            compiling.compile_into(PLAN, package)
        except toolchain.BuildError as error:
            sys.exit(f"gptkern: {error}")


try:
    PLAN = toolchain.plan(fetching=False)
except toolchain.BuildError as error:
    sys.exit(f"gptkern: {error}")

distribution = setup(
    cmdclass={"build_py": BuildPackage, "build_ext": BuildKernels},
    ext_modules=[Extension("gptkern._cuda", [])] if PLAN.forced or PLAN.missing is None else [],
)
if PLAN.missing and {"build_py", "build_ext"} & {name for name, run in distribution.have_run.items() if run}:
    print(f"gptkern: there are NO CUDA kernels in this build: {PLAN.missing}.", file=sys.stderr)
    print("gptkern: the Triton and the PyTorch backend are in it; `gptkern info` says what runs here.", file=sys.stderr)
