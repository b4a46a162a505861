"""Writes docs/cuda_resources.md, cuda_other_architectures.md and cuda_counters.md: what the CUDA kernels use and do.

It needs nvcc and a C++ compiler, and no GPU.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
os.environ["GPTKERN_EMULATE_CUDA"] = "1"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import count_cuda  # noqa: E402
import disassemble_cuda  # noqa: E402

PAGES = {
    "cuda_counters.md": count_cuda.table,
    "cuda_resources.md": disassemble_cuda.table,
    "cuda_other_architectures.md": disassemble_cuda.other_table,
}
for name, make in PAGES.items():
    try:
        (ROOT / "docs" / name).write_text(make(), encoding="utf-8")
    except disassemble_cuda.Missing as missing:
        sys.exit(f"docs/{name}: {missing}")
    print(f"docs/{name}")
