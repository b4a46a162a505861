"""An nvcc that hands its sources to g++, and what the tests of the build need besides: they run without CUDA."""

from __future__ import annotations

import shutil
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from building import toolchain  # noqa: E402

NO_COMPILER = shutil.which("g++") is None or not Path(sysconfig.get_path("include"), "Python.h").is_file()
needs_compiler = pytest.mark.skipif(NO_COMPILER, reason="there is no g++, or Python's headers are missing")
needs_ninja = pytest.mark.skipif(toolchain.find_ninja() is None, reason="ninja is not installed")
needs_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="CUDA kernels are built on Linux alone")

# What a build reads of the environment.
VARIABLES = ("GPTKERN_CUDA", "GPTKERN_CUDA_ARCHS", "CUDA_HOME", "CXX", "MAX_JOBS")


def plant_nvcc(root: Path, version: str = "13.0.88") -> Path:
    """A toolkit: `nvcc` leaves a line in $NVCC_LOG for each source, and g++ compiles it."""
    for name in ("bin", "include", "lib"):
        (root / name).mkdir(parents=True)
    (root / "include" / "cuda_runtime.h").write_text("#define PLANTED_RUNTIME 1\n")
    (root / "lib" / "libcudart_static.a").write_bytes(b"!<arch>\n")
    nvcc = root / "bin" / "nvcc"
    nvcc.write_text(f"""#!/bin/sh
case "$1" in
--version) echo "Cuda compilation tools, release {version[:4]}, V{version}"; exit;;
--dryrun) echo "#$ _TARGET_DIR_="; echo "#$ TOP={root}/bin/.."; exit;;
--list-gpu-code) printf 'sm_75\\nsm_80\\nsm_90\\n'; exit;;
esac
echo "$@" >>"$NVCC_LOG"
echo "ptxas info    : what ptxas says"
left=$#
while [ $left -gt 0 ]; do
    word=$1
    shift
    left=$((left - 1))
    case "$word" in
    -Xptxas|-gencode|-Xcompiler) shift; left=$((left - 1));;
    --compress*) ;;
    *) set -- "$@" "$word";;
    esac
done
exec g++ -x c++ -fPIC "$@"
""")
    nvcc.chmod(0o755)
    return nvcc
