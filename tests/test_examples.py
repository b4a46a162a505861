"""Every example runs to its end on a CPU, without a network, in few steps."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

# What each one must have printed.
SAYS = {
    "nanogpt_style.py": ["norm_1", "stock: loss", "swapped: loss", "sample: "],
    "finetune_hf_gpt2.py": ["attention", "step 3: loss", "sample: ", "saved: "],
}


@functools.cache
def output_of(name: str) -> str:
    # As a user would: no backend is forced, nothing is interpreted or emulated.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("GPTKERN_", "TRITON_"))}
    environment |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, "--steps", "3"], env=environment, capture_output=True, text=True, timeout=240
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_run_here():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SAYS)


@pytest.mark.parametrize("name", SAYS)
def test_example(name):
    output = output_of(name)
    for text in SAYS[name]:
        assert text in output


def test_nanogpt_style_trains_alike_swapped():
    """To the last digit printed: both run the same operators on a CPU."""
    output = output_of("nanogpt_style.py")
    stock, swapped = (
        next(line for line in output.splitlines() if line.startswith(name)).partition(": ")[2].partition(",")[0]
        for name in ("stock", "swapped")
    )
    assert stock == swapped and stock.startswith("loss ")
