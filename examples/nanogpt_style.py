"""gptkern under a GPT in nanoGPT's style: its own LayerNorm without bias, attention inline in a forward.

    python examples/nanogpt_style.py [--text FILE] [--steps 120] [--device cuda]

Trains the same model as it is and swapped, in turn on the same batches, and prints both losses, what `swap` did, and a
sample. On a CPU both run PyTorch's operators, so the losses are equal to the last bit; on a GPU the swapped model runs
kernels, and the median time of a step is printed too. The model below knows nothing of gptkern.
"""

from __future__ import annotations

import argparse
import copy
import pydoc_data.topics
import statistics
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import gptkern

WIDTH, LAYERS, HEADS, LENGTH, VOCABULARY = 96, 3, 4, 64, 256  # a token is a byte
BATCH = 8


class LayerNorm(nn.Module):
    """With a bias or without; in PyTorch's own it came later."""

    def __init__(self, width, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        batch, length, _ = x.shape
        # three of (batch, heads, length, head_dim)
        query, key, value = self.qkv(x).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, length, WIDTH))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm_1, self.attention = LayerNorm(WIDTH, bias=False), Attention()
        self.norm_2 = LayerNorm(WIDTH, bias=False)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x):
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = LayerNorm(WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens):
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        return self.head(self.norm(self.blocks(x)))

    @torch.no_grad()
    def generate(self, tokens, count):
        for _ in range(count):
            logits = self(tokens[:, -LENGTH:])[:, -1]
            tokens = torch.cat((tokens, torch.multinomial(F.softmax(logits, dim=-1), 1)), dim=1)
        return tokens


def train(models, text, steps, device):
    """The models in turn on the same batches. -> name -> (mean loss of the last ten steps in nats a byte, median ms)"""
    torch.manual_seed(1)
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr=2e-3) for name, model in models.items()}
    losses, milliseconds = {name: [] for name in models}, {name: [] for name in models}
    for _ in range(steps):
        first = torch.randint(len(text) - LENGTH - 1, (BATCH,))
        batch = torch.stack([text[i : i + LENGTH + 1] for i in first]).to(device).long()
        for name, model in models.items():
            start = time.perf_counter()
            loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
            optimizers[name].zero_grad()
            loss.backward()
            optimizers[name].step()
            losses[name].append(loss.item())  # waits for a GPU
            milliseconds[name].append(1e3 * (time.perf_counter() - start))
    return {name: (statistics.fmean(losses[name][-10:]), statistics.median(milliseconds[name])) for name in models}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="a text to learn; without it, the Python language reference")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps is {args.steps}; it needs at least 1")
    try:
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError):
        parser.error(f"--device {args.device}: PyTorch cannot reach it here; it needs cpu, cuda or cuda:1, …")
    if args.text and not (args.text.is_file() and args.text.stat().st_size > LENGTH + 1):
        parser.error(f"--text {args.text}: it needs a file of more than {LENGTH + 1} bytes")
    text = args.text.read_bytes() if args.text else "\n".join(pydoc_data.topics.topics.values()).encode()
    text = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    on_gpu = torch.device(args.device).type == "cuda"
    if not on_gpu:
        torch.set_num_threads(1)  # matrices as small as these are slower on more

    torch.manual_seed(0)
    stock = GPT().to(args.device)
    swapped = copy.deepcopy(stock)
    print(gptkern.swap(swapped))
    trained = train({"stock": stock, "swapped": swapped}, text, args.steps, args.device)
    for name, (loss, milliseconds) in trained.items():
        # On a CPU both are the same operators of PyTorch: a difference would be the machine's.
        speed = f", {milliseconds:.1f} ms a step" if on_gpu else ""
        print(f"{name}: loss {loss:.6f} nats/byte after {args.steps} steps{speed}")
    sample = swapped.generate(torch.tensor([list(b"The ")], device=args.device), 120)
    print(f"sample: {bytes(sample[0].tolist()).decode(errors='replace')!r}")
    gptkern.unswap(swapped)


if __name__ == "__main__":
    main()
