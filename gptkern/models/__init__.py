"""Reference models, in stock PyTorch."""

from gptkern.models.gpt import GPT, GPTConfig

__all__ = ["GPT", "GPTConfig"]
