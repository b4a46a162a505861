"""The same prediction for machine code from elsewhere: a line of bench/predict_strangers.json, on the standard output.

    python bench/predict_stranger.py CUBIN --kernel REGEX --part A100 --threads 128 --shared 65536 [--work 0.99]

--shared is a block's bytes of shared memory, --work the share of the kernel's products that the operator's convention
counts (of a causal kernel's tiles, those of the triangle).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]

import disassemble_cuda  # noqa: E402
import predict_model  # noqa: E402
import sass  # noqa: E402
from predict_parts import PARTS  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cubin", type=Path)
    parser.add_argument("--kernel", default="", help="a regular expression on the mangled name; one has to match")
    parser.add_argument("--part", required=True, choices=[part.name for part in PARTS])
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--shared", type=int, required=True)
    parser.add_argument("--work", type=float, default=1.0)
    arguments = parser.parse_args()
    code = sass.kernels(disassemble_cuda._dump("--dump-sass", arguments.cubin))
    names = [key for key in code if re.search(arguments.kernel, key[1])]
    if len(names) != 1:
        sys.exit(f"--kernel is {arguments.kernel!r}, which {len(names)} kernels match; it needs 1 of {sorted(code)}")
    usage = "\n".join(disassemble_cuda._dump("--dump-resource-usage", arguments.cubin))
    registers = int(re.search(rf"Function {re.escape(names[0][1])}:\s*REG:(\d+)", usage)[1])
    part = next(part for part in PARTS if part.name == arguments.part)
    trip = sass.main_loop(code[names[0]])
    found = predict_model.predict(part, trip, predict_model.Launch(registers, arguments.threads, arguments.shared))
    print(
        json.dumps(
            dict(
                part=part.name,
                registers=registers,
                warps=found.warps,
                counts=trip.counts,
                products=trip.products,
                busy={name: round(cycles, 1) for name, cycles in found.busy.items()},
                alone=round(found.alone, 1),
                in_step=round(found.in_step, 1),
                worst=round(found.worst * arguments.work, 4),
                best=round(found.best * arguments.work, 4),
                peak=predict_model.limit(part, trip, False),
                binds=found.binds,
            )
        )
    )


if __name__ == "__main__":
    main()
