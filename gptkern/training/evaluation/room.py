"""What an evaluation takes of memory, from its sizes alone, before it begins.

Of T = rows · length tokens, with w the width, V the vocabulary and c the bytes of a product's element (4 or 2):

    a block      four of T·w·4 (its input, a norm's output, sums), and the perceptron's two of T·4w·c
    features     T·w·4, and those of the places that are asked for once more
    logits       of a chunk (backends/vocabulary.py), or of T places where these are few, twice
    parameters   in 16 bits once more, which autocast makes
    on a CPU     a part of all that besides, which malloc holds freed (memory.HOLES)

They are not all there at once: it is 1 to 1.8 times what was measured (six sizes on a CPU, float32 and bfloat16). The
model itself is there by then, and was checked when it was loaded.
"""

from __future__ import annotations

from gptkern import formatting
from gptkern.backends import vocabulary
from gptkern.models.gpt import GPTConfig
from gptkern.training.errors import UserError
from gptkern.training.evaluation.likelihood import Computing
from gptkern.training.memory import FLOAT32, HOLES, available, parameter_count
from gptkern.training.precision import DTYPES


def needed(config: GPTConfig, how: Computing) -> int:
    """Bytes beside the model."""
    tokens, width, vocab_size = how.batch * config.context, config.width, config.vocab_size
    dtype = DTYPES[how.precision]
    block = tokens * width * (4 * FLOAT32 + 8 * dtype.itemsize)
    features = 2 * tokens * width * FLOAT32
    if tokens * vocab_size <= vocabulary.FEW_LOGITS:
        logits = 2 * tokens * vocab_size * FLOAT32
    else:
        logits = tokens * vocabulary.at_a_time(tokens, width, vocab_size, dtype) * FLOAT32
    casts = parameter_count(config) * dtype.itemsize if dtype.itemsize < FLOAT32 else 0
    holes = HOLES if how.device.type == "cpu" else 0
    return int((1 + holes) * (block + features + logits + casts))


def check(config: GPTConfig, how: Computing) -> None:
    """Raises UserError where there is less."""
    need, free = needed(config, how), available(how.device)
    if free is not None and need > free:
        smaller = f": it takes less with a smaller --batch (now {how.batch})" if how.batch > 1 else ""
        raise UserError(
            f"the evaluation needs {formatting.size(need)} of memory on {how.device} beside the model and there are "
            f"{formatting.size(free)}{smaller}"
        )
