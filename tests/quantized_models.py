"""Models that the tests of quantize and load_quantized share, and what is asked of them."""

from __future__ import annotations

import torch

from gptkern.models import GPT, GPTConfig
from gptkern.nn import Int8Linear

SMALL = dict(vocab_size=61, context=24, layers=2, width=32, heads=2)


def gpt(**changes):
    torch.manual_seed(1)
    return GPT(GPTConfig(**SMALL | changes)).eval()


def ids(rows=2, length=10):
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(2))


def logits(model, *inputs):
    """Of the reference GPT, which returns a tuple, and of transformers' models."""
    with torch.no_grad():
        output = model(*(inputs or [ids()]))
    return output.logits if hasattr(output, "logits") else output[0]


def classes(model):
    return {name: type(module) for name, module in model.named_modules()}


def int8_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, Int8Linear)]


def quantized_names(report):
    return [layer.name for layer in report.quantized]


class Pair(torch.nn.Module):
    """Two linear layers, and what a test adds to them."""

    def __init__(self, first=None, second=None):
        super().__init__()
        self.first = torch.nn.Linear(8, 6) if first is None else first
        self.second = torch.nn.Linear(6, 5) if second is None else second

    def forward(self, x):
        return self.second(self.first(x))


def on_meta(make, *arguments):
    with torch.device("meta"):
        return make(*arguments)


def saved(model, path):
    from safetensors.torch import save_model

    save_model(model, str(path))
    return path


def read(path):
    from safetensors.torch import load_file

    return load_file(str(path))
