"""`python -m building`: the CUDA kernels, compiled into the source tree, without pip and setuptools."""

import sys

from building import compiling, toolchain

try:
    plan = toolchain.plan(fetching=False)
    plan.check()
    print(compiling.compile_into(plan, toolchain.ROOT / "gptkern"))
except toolchain.BuildError as error:
    sys.exit(f"gptkern: {error}")
