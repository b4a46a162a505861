"""How fast a training is: operations of a token, and the share of what its device can do.

    operations of a token = 6 · N + 6 · L · w · T      N parameters that a token is multiplied with (the output weight,
                                                       not the embeddings), L layers, width w, rows of T tokens

The forward does a third of it; of causal attention the half that counts is counted. What the backward computes again is
not: the share is that of useful work. Sources: Kaplan et al., 2020 (arXiv:2001.08361), section 2.1; Chowdhery et al.,
"PaLM", 2022 (arXiv:2204.02311), appendix B.
"""

from __future__ import annotations

import torch

from gptkern.models.gpt import GPTConfig

# TFLOP/s by the name that the driver gives the device, dense: of 16-bit matrix products summed in float32, and of
# float32 ones as PyTorch computes them unless TF32 is allowed. From NVIDIA's data sheets of the parts.
PEAKS = {
    "B200": (2250.0, 75.0),
    "H200": (989.4, 66.9),
    "H100 PCIe": (756.0, 51.2),
    "H100 NVL": (835.5, 60.0),
    "H100": (989.4, 66.9),
    "A100": (312.0, 19.5),
    "A10G": (70.0, 31.2),
    "A10": (125.0, 31.2),
    "L40S": (362.05, 91.6),
    "L4": (121.0, 30.3),
    "RTX 4090": (165.2, 82.6),
    "RTX 3090": (71.2, 35.6),
    "V100": (125.0, 15.7),
}


def operations(config: GPTConfig, length: int) -> float:
    """Of a token of a row of so many, forward and backward."""
    width = config.width
    multiplied = config.layers * 12 * width * width + config.vocab_size * width
    return 6.0 * multiplied + 6.0 * config.layers * width * length


def peak(device: torch.device, precision: str) -> float | None:
    """FLOP/s of the device; None where nobody has said."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    found = next((rates for part, rates in PEAKS.items() if part.lower() in name.lower()), None)
    if found is None or (precision == "fp32" and torch.backends.cuda.matmul.allow_tf32):
        return None
    return 1e12 * found[1 if precision == "fp32" else 0]
