"""The tokenizer of bytes as a tokenizer.json, for programs that know tokenizers by such files alone.

A byte is a token, of the byte's own number: a BPE without merges over the 256 letters by which GPT-2 writes bytes. The
end of text, where there is one, is a special token of number 256, `<|endoftext|>`.
"""

from __future__ import annotations

from typing import Any

from gptkern.training.data.tokenizers import BYTES, END_OF_TEXT, Tokenizer, bytes_by_letter, bytes_tokenizer


def text(end_of_text: bool) -> str:
    """The content of the file."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab=bytes_by_letter(), merges=[]))
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
            and model["vocab"] == bytes_by_letter()
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
