"""Writes the tables of what the CUDA kernels use and do; needs nvcc and a C++ compiler, and no GPU.

python bench/cuda_tables.py             docs/cuda_resources.md and docs/cuda_counters.md
python bench/cuda_tables.py --check     writes nothing, and fails where one of them is not as it would be written
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    os.environ["GPTKERN_EMULATE_CUDA"] = "1"
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import count_cuda
    import disassemble_cuda

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only")
    check, stale = parser.parse_args().check, []
    for name, make in (("cuda_counters.md", count_cuda.table), ("cuda_resources.md", disassemble_cuda.table)):
        path = ROOT / "docs" / name
        try:
            text = make()
        except disassemble_cuda.Missing as missing:
            sys.exit(f"docs/{name}: {missing}")
        if not check:
            path.write_text(text, encoding="utf-8")
            print(f"docs/{name}")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(f"docs/{name}")
    if stale:
        sys.exit(f"stale: {', '.join(stale)}; run `make tables`")


if __name__ == "__main__":
    main()
