"""The sizes of a model, from a recipe's keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptkern.training.errors import UserError

if TYPE_CHECKING:
    from gptkern.models.gpt import GPTConfig


def configured(
    preset: str,
    context: int | None = None,
    dropout: float = 0.0,
    vocab_size: int | None = None,
    *,
    layers: int | None = None,
    width: int | None = None,
    heads: int | None = None,
) -> GPTConfig:
    """A preset, over bytes where no size of the vocabulary is given; a width without heads keeps the size of a head.

    Raises:
        UserError: the sizes do not fit together.
    """
    from gptkern.models.gpt import BYTES, GPTConfig

    given = {"context": context, "layers": layers, "width": width, "heads": heads}
    changes = {name: value for name, value in given.items() if value is not None}
    changes |= {"vocab_size": vocab_size or BYTES, "dropout": dropout}
    if width is not None and heads is None:
        head_dim = GPTConfig.preset(preset).head_dim
        if width % head_dim:
            raise UserError(
                f"width is {width}; without heads it needs to be a multiple of {head_dim}, the size of {preset}'s heads"
            )
        changes["heads"] = width // head_dim
    try:
        return GPTConfig.preset(preset, **changes)
    except ValueError as error:
        raise UserError(str(error)) from error
