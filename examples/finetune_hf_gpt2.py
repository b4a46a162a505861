"""Fine-tune Hugging Face's GPT-2 on gptkern's kernels, dropout and padded batches included, then quantise it.

    pip install 'gptkern[cli]' transformers
    python examples/finetune_hf_gpt2.py [--text FILE] [--steps 30] [--model gpt2] [--device cuda]

Without --model the weights are random and small, and a token is a byte: nothing is downloaded. With it (the name of a
pretrained GPT-2, or a folder that holds one) its own tokenizer reads the text.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import tempfile
from pathlib import Path

import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

import gptkern

LENGTH, BATCH = 64, 8
IGNORED = -100  # cross_entropy's and transformers' label of a position that has no loss


def load(name, text):
    """-> the model, the text's tokens (n,), the function that makes a string of tokens"""
    if name:
        tokenizer = AutoTokenizer.from_pretrained(name)
        return AutoModelForCausalLM.from_pretrained(name), torch.tensor(tokenizer(text)["input_ids"]), tokenizer.decode
    config = GPT2Config(
        vocab_size=256, n_positions=128, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )  # fmt: skip
    tokens = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
    return AutoModelForCausalLM.from_config(config), tokens, lambda ids: bytes(ids).decode(errors="replace")


def padded_batch(tokens):
    """BATCH pieces of different lengths, padded on the right: input_ids, attention_mask, labels (batch, length)"""
    lengths = torch.randint(LENGTH // 2, LENGTH + 1, (BATCH, 1))
    first = torch.randint(len(tokens) - LENGTH, (BATCH, 1))
    mask = torch.arange(LENGTH) < lengths
    input_ids = tokens[first + torch.arange(LENGTH)].masked_fill(~mask, 0)
    return {
        "input_ids": input_ids, "attention_mask": mask.long(), "labels": input_ids.masked_fill(~mask, IGNORED)
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="a text to learn; without it, the Python language reference")
    parser.add_argument("--model", help="a pretrained GPT-2; without it, a small one with random weights")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device_type = torch.device(args.device).type
    if device_type == "cpu" and args.model is None:
        torch.set_num_threads(1)  # matrices as small as these are slower on more
    torch.manual_seed(0)
    text = args.text.read_text(encoding="utf-8") if args.text else "\n".join(pydoc_data.topics.topics.values())
    model, tokens, decode = load(args.model, text)
    model.to(args.device).train()

    print(gptkern.swap(model))

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(1, args.steps + 1):
        batch = {name: tensor.to(args.device) for name, tensor in padded_batch(tokens).items()}
        with torch.autocast(device_type, dtype=torch.bfloat16):
            loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == args.steps:
            print(f"step {step}: loss {loss.item():.3f} nats/token")

    model.eval()
    print(gptkern.quantize(model))
    prompt = tokens[None, :8].to(args.device)
    ids = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False, pad_token_id=0
    )  # fmt: skip
    print(f"sample: {decode(ids[0].tolist())!r}")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        safetensors.torch.save_model(model, path)
        print(f"saved: {path.stat().st_size / 1e6:.2f} MB with int8 weights")
    gptkern.unswap(model)


if __name__ == "__main__":
    main()
