"""Texts with typing errors, for how much a model's decisions hang on every character.

Each character is, with a probability that is the rate, one of these, each as likely as the others:

    swapped      it changes places with the character before it; the first of a text stays
    dropped      it is not there
    inserted     a letter from a to z comes before it
    replaced     a letter from a to z, another one, stands in its place

What is drawn depends on the seed and on the text alone: not on what is evaluated before it, and not on the machine.
"""

from __future__ import annotations

import hashlib
import random

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def noisy(text: str, rate: float, seed: int = 0) -> str:
    """The text with noise at a rate from 0 to 1."""
    digest = hashlib.sha256(f"{seed}\n{text}".encode("utf-8", errors="surrogatepass")).digest()
    # Python's `random()` alone is promised to stay the same for a seed: all else is made of it.
    draw = random.Random(int.from_bytes(digest)).random
    out: list[str] = []
    for letter in text:
        if draw() >= rate:
            out.append(letter)
            continue
        kind = int(4 * draw())
        if kind == 0:
            out.insert(len(out) - 1 if out else 0, letter)
        elif kind == 2:
            out += [LETTERS[int(len(LETTERS) * draw())], letter]
        elif kind == 3:
            others = LETTERS.replace(letter, "")
            out.append(others[int(len(others) * draw())])
    return "".join(out)
