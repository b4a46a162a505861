"""Examples as what a training reads: rows of ids of which the completion's alone are targets.

    ids       prompt, completion, end of text         each encoded by itself, so that no token is of both
    targets   -100 over the prompt, then the completion and the end

An empty prompt is the end of a text, as between documents; of a tokenizer that has none the first token of the
completion takes its place, and nothing ends a completion. Rows of an update are padded on the right to the longest of
them: behind the last target, where a causal model sees no difference.

What is longer than the context loses the beginning of its prompt; a completion that is longer by itself its end.
Prompts of labels all leave room for the longest label: where a label begins would else tell its length, and so which it
is. A text is cut into rows, of which each begins with the last token of the one before.

    row n of a training     of epoch e = n // R, and in it number order(e)(n mod R): rows.py's permutation

so that a batch depends on seed and number alone. An example is held out by its own prompt, or text: the first 64 bits
of its SHA-256, as a part of 2^64, are below `held_out`, so that none is on both sides.
"""

from __future__ import annotations

import array
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gptkern import formatting
from gptkern.formatting import shown
from gptkern.training.data.examples import LABEL, TEXT, Example, as_completion, read_examples
from gptkern.training.data.rows import Part, order_keys, permuted
from gptkern.training.errors import UserError

if TYPE_CHECKING:
    import torch

    from gptkern.training.data.loader import Batch
    from gptkern.training.data.tokenizers import Tokenizer

IGNORED = -100  # losses.IGNORED once more: that module imports PyTorch's operators
HELD_OUT = 0.1
# A row of an update has a multiple of so many ids, where the longest has room: fewer shapes, and aligned ones.
PADDED_TO = 8
ENCODED_AT_ONCE = 1024
MOST_LABELS = 2**16  # whose numbers are ids
MOST_TOLD = 1000  # labels that a checkpoint lists


class Encoded(NamedTuple):
    """An example as ids.

    Args:
        prompt: at least one; no targets. completion: what is to be said after it, the end of text included.
    """

    prompt: list[int]
    completion: list[int]


def encode(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> list[Encoded]:
    """Prompts and completions as a model is trained on them, and is to be asked; whatever their length.

    A completion is empty where there is nothing to say: an empty text, or one of a single token without a prompt by a
    tokenizer that has no end of text.
    """
    end = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    ids = [each.tolist() for each in tokenizer.encode_batch([text for pair in pairs for text in pair])]
    found = []
    for prompt, completion in zip(ids[::2], ids[1::2]):
        completion = completion + end if completion else []
        prompt = prompt or end
        if not prompt:
            # What nothing stands before cannot be predicted.
            prompt, completion = completion[:1], completion[1:]
        found.append(Encoded(prompt, completion))
    return found


def fitted(example: Encoded, length: int, longest: int | None = None) -> Encoded:
    """What of it a model sees of which rows have `length` ids: the prompt without its beginning, the completion without
    what is longer by itself. Its last id is a target alone.

    Args:
        longest: ids of the longest completion for which the prompt leaves room, of labels; None for this one's.
    """
    completion = example.completion[:length]
    room = max(1, length + 1 - (len(completion) if longest is None else min(longest, length)))
    return Encoded(example.prompt[-room:], completion)


class ExampleRows:
    """Rows of examples, in memory.

    Args:
        ids: (tokens,), of all of them. starts, stops: (rows,) int64, where each begins and ends in them.
        given: (rows,) int64, so many of its first are no targets.
    """

    def __init__(self, ids: np.ndarray, starts: np.ndarray, stops: np.ndarray, given: np.ndarray):
        self.ids, self.starts, self.stops, self.given = ids, starts, stops, given
        self.targets = stops - starts - given  # (rows,), of each

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def longest(self) -> int:
        """Ids that the model is given of the longest row."""
        return int((self.stops - self.starts).max()) - 1

    def taken(self, rows: np.ndarray) -> ExampleRows:
        """Some of them, (rows,) booleans or numbers; the ids are shared."""
        return ExampleRows(self.ids, self.starts[rows], self.stops[rows], self.given[rows])

    def padded(self, rows: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, targets) of these rows, both (rows, length) int64."""
        ids = np.zeros((len(rows), length), np.int64)
        targets = np.full((len(rows), length), IGNORED, np.int64)
        for place, row in enumerate(rows.tolist()):
            of_row = self.ids[self.starts[row] : self.stops[row]]
            ids[place, : len(of_row) - 1] = of_row[:-1]
            # The target at a place is the id behind it.
            given = self.given[row]
            targets[place, given - 1 : len(of_row) - 1] = of_row[given:]
        return ids, targets

    def width(self, rows: np.ndarray, length: int) -> int:
        """To which these rows are padded, at most `length`."""
        longest = int((self.stops[rows] - self.starts[rows]).max()) - 1
        return min(length, -(-longest // PADDED_TO) * PADDED_TO)

    def read(self, rows: np.ndarray) -> int:
        """Ids that the model is given of these rows, padding left out."""
        return int((self.stops[rows] - self.starts[rows] - 1).sum())


class ShuffledExamples:
    """The endless sequence of rows, every one of them once an epoch.

    Args:
        full: every row is padded to `length`, and not to the longest of its update.
    """

    def __init__(self, rows: ExampleRows, length: int, seed: int, full: bool = False):
        self.rows, self.length, self.seed, self.full = rows, length, seed, full

    def numbers(self, first: int, count: int) -> np.ndarray:
        """Which rows the numbers first, first + 1, … of the sequence are, (count,) int64."""
        parts, size = [], len(self.rows)
        while count > 0:
            epoch, place = divmod(first, size)
            most = min(size - place, count)
            parts.append(permuted(np.arange(place, place + most), size, order_keys(self.seed, epoch)))
            first, count = first + most, count - most
        return np.concatenate(parts)

    def part(self, update: int, batch: int, first: int, rows: int) -> Part:
        """Of an update of `batch` rows those from `first` on, as wide as the whole update."""
        whole = self.numbers(update * batch, batch)
        width = self.length if self.full else self.rows.width(whole, self.length)
        ids, targets = self.rows.padded(whole[first : first + rows], width)
        return Part(ids, targets, int(self.rows.targets[whole].sum()), self.rows.read(whole))


class ExamplesInOrder:
    """Rows in their order: so many, evenly spread, or all of them."""

    def __init__(self, rows: ExampleRows, length: int, most: int | None = None):
        if most is not None and most < 1:
            raise ValueError(f"ExamplesInOrder got most={most}; it needs at least 1")
        self.rows, self.length = rows, length
        count = len(rows) if most is None else min(most, len(rows))
        self.numbers = np.arange(count) * len(rows) // count

    def batches(self, rows: int, device: str | torch.device = "cpu") -> Iterator[Batch]:
        """All of them, at most so many rows at a time; `tokens` are those of the batch."""
        import torch

        from gptkern.training.data.loader import Batch

        for first in range(0, len(self.numbers), rows):
            some = self.numbers[first : first + rows]
            parts = self.rows.padded(some, self.rows.width(some, self.length))
            ids, targets = (torch.from_numpy(part).to(device) for part in parts)
            yield Batch(ids, targets, int(self.rows.targets[some].sum()), self.rows.read(some))


class ExampleStore(NamedTuple):
    """Examples as what a training reads; the same methods as `store.Store`.

    Args:
        train, validation: the rows of both parts. kind: as an Example's. labels: of both parts, sorted; empty of other
            kinds. length: for which the rows were made: ids of the longest, or where some were cut all that there may
            be. notes: for people, a line for whatever was left out or cut.
        tokenizer, name, fingerprint: as Store's.
    """

    train: ExampleRows
    validation: ExampleRows
    tokenizer: Tokenizer
    name: str
    fingerprint: str
    kind: str
    labels: tuple[str, ...]
    length: int
    notes: tuple[str, ...]

    @property
    def amount(self) -> str:
        tokens = int(self.train.targets.sum())
        of = "" if self.kind != LABEL else f" of {formatting.count(len(self.labels), 'label')}"
        return f"{len(self.train):,} examples{of} to train on ({tokens:,} targets), {len(self.validation):,} held out"

    @property
    def about(self) -> dict[str, Any]:
        """What a checkpoint says of them: {"examples": {"kind", "labels"}}; of very many labels none of them."""
        return {"examples": {"kind": self.kind, "labels": list(self.labels) if len(self.labels) <= MOST_TOLD else []}}

    def rows(self, length: int, seed: int, full: bool = False) -> ShuffledExamples:
        """The shuffled rows to train on. Raises UserError where one is longer than `length`."""
        self._check(length)
        return ShuffledExamples(self.train, length, seed, full)

    def held_out(self, length: int, most: int | None = None) -> ExamplesInOrder:
        """The held-out rows in order. Raises as `rows`."""
        self._check(length)
        return ExamplesInOrder(self.validation, length, most)

    def _check(self, length: int) -> None:
        if self.length > length:
            raise UserError(f"the examples were made for rows of {self.length} tokens; length is {length}")


def load_examples(
    data: str,
    tokenizer: Tokenizer,
    length: int,
    *,
    held_out: float = HELD_OUT,
    validation: str | None = None,
    head: bool = False,
    option: str = "--data",
) -> ExampleStore:
    """Read examples to train on, and those to test on.

    Args:
        data: as `read_examples` takes it. length: the most ids that the model is given of a row.
        held_out: the part of the examples that is held out, where `validation` names no others.
        head: the target is the number of the label among the store's `labels`, at the text's last token.
        option: what an error calls the data.

    Raises:
        UserError: as `read_examples`; of a part nothing is left, two kinds are mixed, or the memory does not suffice.
    """
    reading = _Reading(tokenizer, length, head)
    rows = reading.rows(data, option)
    if validation is None:
        mask = reading.held_out(held_out)
        if mask.all() or not len(rows):
            raise UserError(
                f"{option} {shown(data)}: of {formatting.count(len(rows), 'row')} with something to learn none is left "
                f"to train on, with {held_out:g} held out; it needs more examples, or --validation with others"
            )
        train, other = rows.taken(~mask), rows.taken(mask)
    else:
        kind, taught = reading.kind, len(reading.labels)
        train, other = rows, reading.rows(validation, "--validation")
        reading.untaught = list(reading.labels)[taught:]
        if reading.kind != kind:
            raise UserError(
                f"--validation {shown(validation)} is of the kind {reading.kind}, and {option} {shown(data)} of the "
                f"kind {kind}; they need to be of one"
            )
        for part, words in ((train, f"{option} {shown(data)}"), (other, f"--validation {shown(validation)}")):
            if not len(part):
                raise UserError(f"{words}: it has no example with something to learn")
    # Those to test on may have the longest label.
    train, other = (reading.fitted(part) for part in (train, other))
    labels = tuple(sorted(reading.labels))
    if head:
        number_of = {label: labels.index(label) for label in reading.labels}
        numbers = np.array(list(number_of.values()), rows.ids.dtype)
        for part in (train, other):
            part.ids[part.stops - 1] = numbers[part.ids[part.stops - 1]]
    digest = hashlib.sha256(f"{tokenizer.vocab_size} {reading.kind} {labels} {head}\n".encode())
    for part in (train, other):
        digest.update(f"{len(part)} rows\n".encode())
        for row in range(len(part)):
            digest.update(f"{part.given[row]} {part.targets[row]}\n".encode())
            digest.update(np.ascontiguousarray(part.ids[part.starts[row] : part.stops[row]]))
    name = ",".join(Path(part).name for part in data.split(","))
    longest = length if reading.dropped or reading.cut else max(train.longest, other.longest)
    about = digest.hexdigest(), reading.kind, labels, longest, tuple(reading.notes())
    return ExampleStore(train, other, tokenizer, name, *about)


class _Reading:
    """Files of examples on their way to rows, and what is to be said of them."""

    def __init__(self, tokenizer: Tokenizer, length: int, head: bool):
        self.tokenizer, self.length, self.head = tokenizer, length, head
        self.kind = ""
        self.labels: dict[str, int] = {}  # in the order in which they come
        self.untaught: list[str] = []  # labels of the examples to test on alone
        self.shares = array.array("d")  # of the rows that were read last
        self.longest = 0  # ids of the longest label
        self.dropped = self.cut = self.empty = 0

    def rows(self, data: str, option: str) -> ExampleRows:
        ids = array.array("H" if self.tokenizer.dtype == "uint16" else "I")
        starts, stops, given = (array.array("q") for _ in range(3))
        self.shares = array.array("d")
        examples = read_examples(data, option)
        while some := list(itertools.islice(examples, ENCODED_AT_ONCE)):
            for example, encoded in zip(some, self._encoded(some, f"{option} {shown(data)}")):
                if not encoded.completion:
                    self.empty += 1
                    continue
                if example.kind == LABEL:
                    self.longest = max(self.longest, len(encoded.completion))
                share = _share(example)
                for row in self._cut(example, encoded):
                    starts.append(len(ids))
                    ids.extend(row.prompt)
                    ids.extend(row.completion)
                    stops.append(len(ids))
                    given.append(len(row.prompt))
                    self.shares.append(share)
            self.kind = some[-1].kind
            _check_memory(len(ids) * ids.itemsize, f"{option} {shown(data)}")
        return ExampleRows(np.array(ids), *(np.array(each, np.int64) for each in (starts, stops, given)))

    def _encoded(self, examples: list[Example], called: str) -> list[Encoded]:
        for example in examples:
            if example.kind == LABEL:
                self.labels.setdefault(example.completion, len(self.labels))
            elif self.head:
                raise UserError(f"{called} is of the kind {example.kind}; --head needs examples of text and label")
        if not self.head:
            return encode(self.tokenizer, [as_completion(example) for example in examples])
        if len(self.labels) > MOST_LABELS:
            raise UserError(f"{called} has more than {MOST_LABELS} labels; --head needs fewer")
        end = [] if self.tokenizer.end_of_text is None else [self.tokenizer.end_of_text]
        texts = [ids.tolist() or end for ids in self.tokenizer.encode_batch([example.prompt for example in examples])]
        return [
            Encoded(text, [self.labels[example.completion]] if text else []) for text, example in zip(texts, examples)
        ]

    def _cut(self, example: Example, whole: Encoded) -> Iterator[Encoded]:
        if example.kind == TEXT:
            ids = whole.prompt + whole.completion
            for start in range(0, len(ids) - 1, self.length):
                yield Encoded(ids[start : start + 1], ids[start + 1 : start + self.length + 1])
            return
        self.cut += len(whole.completion) > self.length
        # One token more than there is room for says that there were more.
        yield Encoded(whole.prompt[-self.length - 1 :], whole.completion[: self.length])

    def fitted(self, rows: ExampleRows) -> ExampleRows:
        """Rows of which the prompts have room."""
        if self.kind == TEXT or not len(rows):
            return rows
        longest = min(self.longest, self.length) if self.kind == LABEL else rows.targets
        given = np.minimum(rows.given, np.maximum(1, self.length + 1 - longest))
        self.dropped += int((given < rows.given).sum())
        return ExampleRows(rows.ids, rows.stops - rows.targets - given, rows.stops, given)

    def held_out(self, part: float) -> np.ndarray:
        """Which of the rows that were read last are held out, (rows,) booleans: those of one example at the least."""
        shares = np.array(self.shares)
        return (shares < part) | (shares == shares.min(initial=1))

    def notes(self) -> Iterator[str]:
        room = f"the {formatting.count(self.length, 'token')} of a row"
        if self.dropped:
            yield f"{formatting.count(self.dropped, 'prompt')} lost their beginning, which {room} had no room for"
        if self.cut:
            yield f"{formatting.count(self.cut, 'completion')} lost their end, which {room} had no room for"
        if self.empty:
            yield f"{formatting.count(self.empty, 'example')} left out: nothing is to be said"
        if self.untaught:
            labels = formatting.count(len(self.untaught), "label")
            yield f"--validation has {labels} that no example to train on has, as {shown(self.untaught[0])}"
        if self.tokenizer.end_of_text is None and not self.head:
            yield f"the tokenizer ({self.tokenizer.name}) has no end of text: nothing ends a completion"


def _share(example: Example) -> float:
    """64 bits of the SHA-256 of its prompt, or where it has none of what is said, as a part of 2^64."""
    text = example.prompt or example.completion
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def _check_memory(size: int, called: str) -> None:
    import torch

    from gptkern.training import memory

    free = memory.available(torch.device("cpu"))
    if free is not None and size > free:
        raise UserError(
            f"{called}: its ids need more than {formatting.size(size)} of memory, beside as many that are joined, and "
            f"there are {formatting.size(free)}"
        )
