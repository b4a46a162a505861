"""The tokenizer of bytes as a tokenizer.json, for programs that know tokenizers by such files alone.

A byte is a token, of the byte's own number: a BPE without merges over the 256 letters by which GPT-2 writes bytes. The
end of text, where there is one, is a special token of number 256, `<|endoftext|>`.
"""

from __future__ import annotations

from typing import Any

from gptkern.training.data.tokenizers import Tokenizer, bytes_tokenizer

BYTES = 256
END_OF_TEXT = "<|endoftext|>"

# Bytes that are a visible letter of Latin-1 are written as it; the others, in their order, as the letters from 256 on.
_VISIBLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))


def letters() -> list[str]:
    """The letter of each byte, (256,), all of them different."""
    hidden = iter(range(BYTES, 2 * BYTES))
    return [chr(byte if byte in _VISIBLE else next(hidden)) for byte in range(BYTES)]


def text(end_of_text: bool) -> str:
    """The content of the file."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {letter: byte for byte, letter in enumerate(letters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if end_of_text:
        tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return tokenizer.to_str(pretty=True) + "\n"


def recognised(content: dict[str, Any]) -> Tokenizer | None:
    """The tokenizer of bytes, where a tokenizer.json is it; None where it is another."""
    try:
        model, before, added = content["model"], content["pre_tokenizer"], content["added_tokens"]
        ends = [(token["id"], token["content"]) for token in added]
        is_bytes = (
            model["type"] == "BPE"
            and model["vocab"] == {letter: byte for byte, letter in enumerate(letters())}
            and not model["merges"]
            and content.get("normalizer") is None
            and content.get("truncation") is None
            and before["type"] == "ByteLevel"
            and before["add_prefix_space"] is False
            and before["use_regex"] is False
            and ends in ([], [(BYTES, END_OF_TEXT)])
        )
    except (LookupError, TypeError):
        return None
    return bytes_tokenizer(end_of_text=bool(ends)) if is_bytes else None
