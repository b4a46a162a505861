"""The keys of a training: options of `gptkern train`, lines of a recipe file, what a run's folder stores.

A recipe file is TOML without tables, a key a line. A key is an option of the command line with underscores:
`save_every = 200` is `--save-every 200`. What is given in neither place has the default that stands here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import os
import stat
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gptkern.backends.tables import files
from gptkern.formatting import cut, shown, size
from gptkern.training.data.plain_files import sync_folder
from gptkern.training.errors import UserError
from gptkern.training.recipe import KINDS, PRECISIONS, SCHEDULES, Recipe
from gptkern.training.values import Choice, Kind, Real, Switch, Text, Whole, WordOrWhole

# The keys of models.gpt.PRESETS once more: that module imports PyTorch, and `--help` does not wait for it. A test holds
# the two together.
PRESETS = (
    "nano", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl",
    "gpt3-125M", "gpt3-350M", "gpt3-760M", "gpt3-1.3B", "gpt3-2.7B", "gpt3-6.7B", "gpt3-13B", "gpt3-175B",
)  # fmt: skip

# Of which a training has one.
RIVALS = (
    ("text", "data", "a training has one of them"),
    ("text", "examples", "a training has one of them"),
    ("data", "examples", "a training has one of them"),
    ("steps", "epochs", "a training ends after one of them"),
    ("held_out", "validation", "what is held out is a part of the examples, or others"),
    *((name, "from", "the sizes of the model are those of the folder that it starts from")
      for name in ("preset", "layers", "width", "heads")),
)  # fmt: skip

# Which contradict each other wherever they stand.
_APART = (("mup", "from", "µP is of a model's first weights too, and those of the folder are another's"),)

# Which have no effect without another.
_BESIDE = {
    "validation": "examples", "held_out": "examples", "epochs": "examples", "head": "examples", "examples": "from",
    "lora": "from", "lora_alpha": "lora",
}  # fmt: skip
# Places of files and folders.
_PLACES = ("text", "data", "from", "examples", "validation")
HELD_OUT = 0.1  # of examples
LORA_ALPHA = 32.0  # Hu et al., 2021 (arXiv:2106.09685), table 11, of GPT-2

MOST_BYTES = 1 << 20  # of a recipe file: what is larger is none

# What --resume may do with a key that differs from the stored one.
SAME = "same"  # another value would be another run
WARNED = "warned"  # the run goes on, no longer bit for bit
FREE = "free"  # what the model becomes does not depend on it
FOUND = "found"  # where the data lies now; that it is the same data is checked by its content


class Key(NamedTuple):
    """One key.

    Args:
        default: None where the model, the data or the machine decides.
        words: for people; of the default too, where it is none of its own.
        resume: SAME, WARNED, FREE or FOUND.
    """

    name: str
    kind: Kind
    default: Any
    words: str
    resume: str = SAME

    @property
    def option(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def metavar(self) -> str:
        kinds = {Whole: "N", Real: "X", WordOrWhole: "N", Choice: "NAME"}
        return kinds.get(type(self.kind), self.kind.metavar if isinstance(self.kind, Text) else "")


_positive = Whole(1)
_of_recipe = {field.name: field.default for field in dataclasses.fields(Recipe)}
# What the other commands call precisions.
_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def _recipe_key(name: str, words: str, **more: Any) -> Key:
    return Key(name, KINDS[name], **({"default": _of_recipe[name], "words": words} | more))


KEYS = {
    key.name: key
    for key in (
        # the data
        Key("text", Text("a file", "FILE"), None, "train on the bytes of this file; Python's language reference where "
            "nothing is given", FOUND),
        Key("data", Text("a folder", "FOLDER"), None, "train on this folder of tokens, which `gptkern data` wrote",
            FOUND),
        Key("examples", Text("a file", "FILE"), None, "train on these examples: JSONL, TACRED's JSON, or two parallel "
            "texts with a comma between (--data of `gptkern finetune`)", FOUND),
        Key("validation", Text("a file", "FILE"), None, "examples to test on (default: a part of those to train on)",
            FOUND),
        Key("held_out", Real("above 0 and below 1", lambda value: 0 < value < 1), None, "the part of the examples that "
            f"is held out to test on (default: {HELD_OUT})"),
        # the model
        Key("from", Text("a folder", "FOLDER"), None, "start from this folder's model: a run's, or GPT-2's as "
            "transformers saves it"),
        Key("preset", Choice(PRESETS), None, f"sizes of the model: {', '.join(PRESETS)} (default: nano)"),
        Key("layers", _positive, None, "blocks of the model (default: the preset's)"),
        Key("width", _positive, None, "size of a token's vector (default: the preset's)"),
        Key("heads", _positive, None, "attention heads, which divide the width (default: as many as leave the preset's "
            "size of a head)"),
        Key("lora", _positive, None, "rank of LoRA's adapters, which alone learn (default: all of the model learns)"),
        Key("lora_alpha", Real("above 0", lambda value: value > 0), None, "of the adapters' factor alpha / rank "
            f"(default: {LORA_ALPHA:g})"),
        Key("head", Switch(), False, "learn a linear head over the labels of examples, in place of their words"),
        Key("context", _positive, None, "tokens of a row, which the model sees at once (default: the model's)"),
        Key("dropout", KINDS["beta1"], 0.0, "of embeddings, attention and residual branches, while training"),
        Key("stock", Switch(), False, "leave the model on PyTorch's operators"),
        # the training
        _recipe_key("steps", "updates", default=1000),
        Key("epochs", _positive, None, "passes over the examples, in place of steps (default of `gptkern finetune`: "
            "3)"),
        _recipe_key("batch", "rows of an update, over all processes", default=8),
        _recipe_key("accumulate", "pieces in which each process computes its share of an update"),
        _recipe_key("lr", "peak learning rate", default=3e-3),
        _recipe_key("schedule", f"of the learning rate after warm-up: {', '.join(SCHEDULES)}"),
        _recipe_key("warmup", "the part of the steps in which the learning rate rises to its peak"),
        _recipe_key("decay", "the part of the steps in which wsd lets it fall, at the end"),
        _recipe_key("final_lr", "what the learning rate ends at, as a part of the peak"),
        _recipe_key("mup", "width of the smaller model for which lr was found: µP's scales for this one (default: the "
                    "standard parametrisation)"),
        _recipe_key("weight_decay", "AdamW's, of matrices alone"),
        _recipe_key("beta1", "AdamW's average of gradients"),
        _recipe_key("beta2", "AdamW's average of their squares"),
        _recipe_key("clip", "the most that the gradients' norm may be; 0 for no limit"),
        _recipe_key("label_smoothing", "the part of a target that is spread over the vocabulary"),
        _recipe_key("z_loss", "weight of the mean of lse² in the loss"),
        Key("precision", Choice(("auto", *PRECISIONS), _DTYPES), "auto", f"of matrix products: {', '.join(PRECISIONS)};"
            " auto is bf16 on a GPU and fp32 elsewhere"),
        _recipe_key("recompute", "activations that the backward computes again: none, "
                    "full, or N for every Nth block"),
        _recipe_key("compile", "torch.compile the model"),
        _recipe_key("deterministic", "PyTorch's deterministic algorithms alone"),
        _recipe_key("seed", "of the first weights, the rows' order and the dropout"),
        Key("device", Text("a device", "NAME"), "auto", "auto, cpu, cuda, cuda:1, …", WARNED),
        _recipe_key("threads", "of the CPU (default: PyTorch's number)", resume=WARNED),
        # the run
        Key("save_every", _positive, None, "updates between checkpoints (default: a tenth of the steps)", FREE),
        Key("keep", _positive, 3, "newest checkpoints that are kept", FREE),
        Key("evaluate_every", _positive, None, "updates between evaluations (default: a tenth of the steps)", FREE),
        Key("evaluate_rows", _positive, 64, "rows of the held-out part that an evaluation on the way looks at", FREE),
        Key("spike", KINDS["clip"], 3.0, "nats by which losses may be above the median of the last 100: above it "
            "nothing is saved, and 10 updates in a row, or the last one, end the run; 0 for no limit", FREE),
        Key("patience", _positive, None, "evaluations without a lower held-out loss that end the run; its model is "
            "the best one's (default: all of the steps, and the last one's)", FREE),
        Key("tensorboard", Choice(("auto", "on", "off")), "auto", "write TensorBoard's files too: auto, on, off; auto "
            "where it is installed", FREE),
    )
}  # fmt: skip


class Given(NamedTuple):
    """Values that somebody gave.

    Args:
        values: by key. names: what an error calls each of them: "--lr", "my.toml: lr".
    """

    values: dict[str, Any]
    names: dict[str, str]

    def over(self, other: Given) -> Given:
        """Both, these before the other's, of which what rules one of these out goes too."""
        pairs = [pair[:2] for pair in RIVALS]
        ruled_out = {b for pair in pairs for a, b in (pair, pair[::-1]) if a in self.values and b not in self.values}
        kept = {name: value for name, value in other.values.items() if name not in ruled_out}
        return Given(kept | self.values, other.names | self.names)


def of_options(values: Mapping[str, Any]) -> Given:
    """Those of the command line's values, by key, that are not None."""
    given = {name: values[name] for name in KEYS if values.get(name) is not None}
    return Given(given, {name: KEYS[name].option for name in given})


def read(path: str | Path, option: str = "--recipe") -> Given:
    """A recipe file.

    Raises:
        UserError: it cannot be read, is no TOML, or holds a key that there is not or a value that none is.
    """
    content = toml(str(path), option)
    name = Path(path).name
    values = {}
    for key, value in content.items():
        if key not in KEYS:
            raise UserError(f"{option} {shown(str(path))}: {shown(key)} is no key of a recipe{_suggested(key, value)}")
        try:
            values[key] = KEYS[key].kind.checked(value)
        except ValueError as error:
            raise UserError(f"{option} {shown(str(path))}: {key} {error}") from None
    return Given(values, {key: f"{shown(name)}: {key}" for key in values})


def toml(path: str, option: str) -> dict[str, Any]:
    """What a TOML file holds. Raises UserError, in which the option names it."""
    if not path:
        raise UserError(f"{option} is empty; it needs a TOML file")
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode) and not stat.S_ISFIFO(found.st_mode):
            what = "a folder" if stat.S_ISDIR(found.st_mode) else "a device"
            raise UserError(f"{option} {shown(path)}: it is {what}; it needs a TOML file")
        with open(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise UserError(f"{option} {shown(path)}: it has more than {size(MOST_BYTES)}; it needs a TOML file")
        return tomllib.loads(content.decode("utf-8"))
    except UnicodeDecodeError:
        raise UserError(f"{option} {shown(path)}: it is no text; it needs a TOML file") from None
    except (OSError, ValueError, RecursionError) as error:
        why = getattr(error, "strerror", None) or cut(str(error))
        raise UserError(f"{option} {shown(path)}: {why}; it needs a TOML file") from None


def _suggested(key: str, value: Any) -> str:
    plain = key.replace("-", "_")
    if plain in ("out", "resume", "overwrite", "recipe"):
        return f"; --{plain} is an option of the command line alone"
    if isinstance(value, dict):
        return "; it is a table, and a recipe is a key a line"
    likely = difflib.get_close_matches(plain, KEYS, 1)
    return f"; did you mean {likely[0]}?" if likely else f"; it needs one of {', '.join(KEYS)}"


def completed(given: Given) -> dict[str, Any]:
    """Every key with its value: what was given, else its default; the keys are tried against one another.

    Raises:
        UserError: two of what was given contradict each other, or one has no effect beside another.
    """
    values = {name: given.values.get(name, key.default) for name, key in KEYS.items()}
    _check_together(values, given)
    if values["preset"] is None and values["from"] is None:
        values["preset"] = PRESETS[0]
    if values["examples"] is not None and values["validation"] is None and values["held_out"] is None:
        values["held_out"] = HELD_OUT
    if values["lora"] is not None and values["lora_alpha"] is None:
        values["lora_alpha"] = LORA_ALPHA
    if values["epochs"] is not None:
        values["steps"] = None  # once the examples are counted: `counted`
        return values
    for name in ("save_every", "evaluate_every"):
        if values[name] is None:
            values[name] = max(1, values["steps"] // 10)
    return values


def counted(values: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """The same with steps in place of epochs: steps = ⌈epochs · rows / batch⌉."""
    if values["epochs"] is None:
        return dict(values)
    return dict(values) | {"steps": -(-values["epochs"] * rows // values["batch"]), "epochs": None}


def _check_together(values: Mapping[str, Any], given: Given) -> None:
    for first, second, why in RIVALS + _APART:
        if first in given.values and second in given.values:
            raise UserError(f"{given.names[first]} and {given.names[second]}: {why}")
    for name, other in _BESIDE.items():
        if name in given.values and given.values[name] is not False and values[other] is None:
            needs = given.names.get(other, KEYS[other].option)
            raise UserError(f"{given.names[name]} has no effect without {needs}; it needs that, too")
    for name in _PLACES:
        if given.values.get(name) == "":
            raise UserError(f"{given.names[name]} is empty; it needs {KEYS[name].kind.needs}")
    for name in without_effect(values) & given.values.keys():
        raise UserError(f"{given.names[name]} has no effect on the schedule {values['schedule']}")
    try:
        recipe_of(values, length=1, device="cpu")
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        raise UserError(f"{given.names.get(name, KEYS[name].option)} {rest}") from None


def without_effect(values: Mapping[str, Any]) -> set[str]:
    """The keys that do nothing beside the others."""
    none = {"cosine": {"decay"}, "linear": {"decay"}, "constant": {"decay", "final_lr"}}
    return none.get(values.get("schedule"), set())


def text(values: Mapping[str, Any]) -> str:
    """The TOML of these keys; what is None or without effect is left out."""
    none = without_effect(values)
    lines = [f"{name} = {_toml(value)}\n" for name, value in values.items() if value is not None and name not in none]
    return "".join(lines)


def write(path: Path, values: Mapping[str, Any]) -> None:
    """Store a run's keys; a file that is there stays whole until the new one is on the disk. Raises OSError."""
    heading = "# What `gptkern train` ran with; `gptkern train --recipe` reads it.\n"
    files.replace(path, heading + text(values), sync=True)
    sync_folder(path.parent)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str):
        return repr(value)
    # A JSON string is a TOML one but for the delete character; what is no character at all neither has.
    value = value.encode("utf-8", "backslashreplace").decode()
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def resumed(stored: Given, given: Given) -> tuple[dict[str, Any], list[str]]:
    """What a run goes on with that stored these keys: (every key with its value, lines of warning).

    Raises:
        UserError: a key was given that would make it another run.
    """
    values = completed(stored)
    warnings = []
    for name, value in given.values.items():
        key = KEYS[name]
        if value == values[name] or (value == "auto" and name in ("device", "precision")):
            continue
        if key.resume == SAME:
            has = "nothing" if values[name] is None else shown(str(values[name]))
            raise UserError(
                f"{given.names[name]} {shown(str(value))} contradicts the run's {name}, {has}: --resume goes on with "
                f"what the run began with; leave it away, or give a new run another --out"
            )
        if key.resume == WARNED:
            warnings.append(
                f"{name} is {shown(str(value))} from here on, and was {shown(str(values[name]))}: "
                "the rest is not bit for bit what the run would have been"
            )
        values[name] = value
        if key.resume == FOUND and name in ("text", "data"):
            values["data" if name == "text" else "text"] = None
    return values, warnings


def recipe_of(values: Mapping[str, Any], *, length: int, device: str) -> Recipe:
    """The record of the mathematics; "auto" is decided by the device."""
    own = {field.name for field in dataclasses.fields(Recipe)} & values.keys()
    precision = values["precision"]
    if precision == "auto":
        precision = "bf16" if device.partition(":")[0] == "cuda" else "fp32"
    changes = {"length": length, "device": device, "precision": precision}
    return Recipe(**({name: values[name] for name in own} | changes))


def absolute(values: dict[str, Any]) -> dict[str, Any]:
    """The places that are named, as they are found from any folder.

    Raises:
        UserError: one cannot be stored, since TOML is UTF-8; what stood in its place would be another.
    """
    found = dict(values)
    for name in _PLACES:
        if found[name] is not None:
            with contextlib.suppress(OSError, ValueError):
                found[name] = ",".join(map(os.path.abspath, _parts(name, found[name])))
            try:
                str(found[name]).encode("utf-8")
            except UnicodeEncodeError:
                raise UserError(
                    f"{KEYS[name].option} {shown(found[name])}: it needs a name in UTF-8, as recipe.toml is"
                ) from None
    return found


def _parts(name: str, place: str) -> tuple[str, ...]:
    """Its files: of examples it may name two."""
    if name not in ("examples", "validation") or "," not in place:
        return (place,)
    from gptkern.training.data.examples import files_of

    return files_of(place)
