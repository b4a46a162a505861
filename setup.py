"""The build. Metadata is in pyproject.toml; this file is where the CUDA extension is compiled.

There are no CUDA C++ kernels yet: the package that is built here carries the Triton and the PyTorch
backends, and says so, so that nobody takes a build without CUDA kernels for one with them.
"""

import sys

from setuptools import setup

setup()
print("gptkern: no CUDA kernels in this build; the Triton and PyTorch backends are installed.", file=sys.stderr)
