"""Recipe files: what each key may be, in a file and as an option; what is refused, and in which words."""

from __future__ import annotations

import os
import tomllib

import pytest

from gptkern.training import recipe_files, values
from gptkern.training.errors import UserError
from gptkern.training.recipe import Recipe
from gptkern.training.recipe_files import KEYS, Given, completed, of_options, read, recipe_of, resumed


@pytest.fixture
def recipe(tmp_path):
    """recipe(content): a file of it."""

    def write(content: str | bytes):
        path = tmp_path / "my.toml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


# Of each kind of value what it takes, and what it does not, as TOML and as text of a command line.
TAKEN = {
    values.Whole: [("1", "1"), ("7", "7")],
    values.Real: [("0.5", "0.5"), ("0.125", "1.25e-1")],
    values.Switch: [("true", None), ("false", None)],
    values.WordOrWhole: [('"full"', "full"), ("2", "2"), ('"3"', "3")],
    values.Text: [('"a b"', "a b")],
}
REFUSED = {
    values.Whole: ["0.5", '"7"', "true", "[1]", "nan", "1e400", str(10**40), "2020-01-01"],
    values.Real: ["nan", "inf", "-inf", '"0.5"', "true", "[0.5]", "-1e-9", "1e400"],
    values.Switch: ["1", '"true"', "[]", "nan"],
    values.Choice: ['"nonsense"', "1", "true", '""', "[]"],
    values.WordOrWhole: ['"nonsense"', "0", "-1", "1.5", "true", '""', '"0"'],
    values.Text: ["1", "true", "[]", "nan"],
}
WRONG_WORDS = {
    values.Whole: ["", "x", "0.5", "nan", str(10**40), "9" * 5000, "-1" + "0" * 30],
    values.Real: ["", "x", "nan", "inf", "-1e-9", "1e400"],
    values.Choice: ["", "nonsense", "COSINE"],
    values.WordOrWhole: ["", "nonsense", "0", "-1", "1.5", "9" * 5000],
}


@pytest.mark.parametrize("key", KEYS.values(), ids=lambda key: key.name)
def test_every_key_takes_what_is_of_its_kind(recipe, key):
    taken = TAKEN.get(type(key.kind)) or [(f'"{word}"', word) for word in key.kind.words]
    for toml, words in taken:
        found = read(recipe(f"{key.name} = {toml}")).values[key.name]
        assert words is None or found == key.kind.parsed(words)
        assert key.kind.checked(found) == found
    if key.default is not None:
        assert key.kind.checked(key.default) == key.default


@pytest.mark.parametrize("key", KEYS.values(), ids=lambda key: key.name)
def test_every_key_refuses_nonsense(recipe, key):
    for toml in REFUSED[type(key.kind)]:
        with pytest.raises(UserError, match=rf"^--recipe .*my\.toml: {key.name} is .+; it needs ") as error:
            read(recipe(f"steps = 5\n{key.name} = {toml}" if key.name != "steps" else f"steps = {toml}"))
        assert len(str(error.value)) < 600 and str(error.value).isprintable()
    for words in WRONG_WORDS.get(type(key.kind), []):
        with pytest.raises(ValueError, match=r"^is .+; it needs |^is '' ?; it needs "):
            key.kind.parsed(words)


@pytest.mark.parametrize(
    "content, words",
    [
        ("save-every = 3", "save-every is no key of a recipe; did you mean save_every?"),
        ("stepps = 3", "stepps is no key of a recipe; did you mean steps?"),
        ("learning_rate = 3", "learning_rate is no key of a recipe; it needs one of text, data, "),
        ("[train]\nsteps = 3", "train is no key of a recipe; it is a table, and a recipe is a key a line"),
        ('out = "x"', "out is no key of a recipe; --out is an option of the command line alone"),
        ("resume = true", "--resume is an option of the command line alone"),
        ("steps = 3\nsteps = 4", "it needs a TOML file"),
        ("steps = ", "it needs a TOML file"),
        ("steps", "it needs a TOML file"),
        (b"\x00\xff\xfe", "it is no text; it needs a TOML file"),
        (b"steps = 3\0", "it needs a TOML file"),
        ("a = " + "[" * 100_000, "it needs a TOML file"),
        ("# " + "x" * (1 << 20), "it has more than 1.05 MB; it needs a TOML file"),
    ],
)
def test_what_is_no_recipe(recipe, content, words):
    with pytest.raises(UserError) as error:
        read(recipe(content))
    assert str(error.value).startswith("--recipe ") and words in str(error.value) and "\n" not in str(error.value)


def test_what_is_no_file(tmp_path):
    os.symlink(tmp_path / "circle", tmp_path / "circle")
    reasons = {
        "": "is empty", str(tmp_path): "it is a folder", "/dev/zero": "it is a device", "x" * 300: "too long",
        str(tmp_path / "none"): "No such file", "a\0b": "null", str(tmp_path / "circle"): "symbolic links",
    }  # fmt: skip
    for path, why in reasons.items():
        with pytest.raises(UserError, match=r"^--recipe .*it needs a TOML file$") as error:
            read(path)
        assert why in str(error.value)


@pytest.mark.parametrize(
    "given, words",
    [
        ({"text": "a", "data": "b"}, "--text and --data: a training has one of them"),
        ({"preset": "nano", "from": "a"}, "--preset and --from: the sizes of the model are those"),
        ({"width": 64, "from": "a"}, "--width and --from: the sizes of the model are those"),
        ({"decay": 0.1}, "--decay has no effect on the schedule cosine"),
        ({"decay": 0.1, "schedule": "constant"}, "--decay has no effect on the schedule constant"),
        ({"final_lr": 0.1, "schedule": "constant"}, "--final-lr has no effect on the schedule constant"),
        ({"schedule": "wsd", "warmup": 0.6, "decay": 0.6}, "--warmup is 0.6"),
        ({"accumulate": 3}, "--accumulate is 3; it needs to divide batch, 8"),
        ({"accumulate": 16}, "--accumulate is 16; it needs to divide batch, 8"),
    ],
)
def test_keys_that_contradict_each_other(given, words):
    with pytest.raises(UserError) as error:
        completed(of_options(given))
    assert str(error.value).startswith(words)


def test_options_come_before_the_file_and_rule_out_their_rivals(recipe):
    file = read(recipe('lr = 0.1\ntext = "a"\npreset = "gpt2"\nsteps = 50'))
    found = completed(of_options({"lr": 0.2, "data": "b", "from": "c"}).over(file))
    assert (found["lr"], found["steps"], found["data"], found["from"]) == (0.2, 50, "b", "c")
    assert found["text"] is None and found["preset"] is None
    assert found["save_every"] == found["evaluate_every"] == 5


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_what_is_stored_is_read_back(tmp_path, schedule):
    odd = 'a "b"\\\n\t\x7f\x01é𝄞'
    given = {"text": odd, "lr": 1e-5, "schedule": schedule, "seed": 2**64 - 1, "compile": True, "recompute": "2"}
    found = completed(of_options(given))
    recipe_files.write(tmp_path / "recipe.toml", found)
    assert completed(read(tmp_path / "recipe.toml")) == found
    assert tomllib.loads(recipe_files.text(found))["text"] == odd
    # What is no character has none in a file of text.
    assert tomllib.loads(recipe_files.text({"text": "a\udcff"})) == {"text": "a\\udcff"}


def test_the_record_is_that_of_the_keys():
    found = completed(of_options({"precision": "auto", "steps": 7, "clip": 0.5}))
    assert recipe_of(found, length=9, device="cpu") == Recipe(steps=7, batch=8, length=9, lr=3e-3, clip=0.5)
    assert recipe_of(found, length=9, device="cuda:1").precision == "bf16"
    assert KEYS["precision"].kind.parsed("bfloat16") == "bf16"
    # Each field of the record but the length of rows, which is the context, is a key of the same default.
    for name, default in Recipe.__dataclass_fields__.items():
        if name != "length":
            assert name in KEYS
            assert name in ("steps", "batch", "lr", "precision", "device") or KEYS[name].default == default.default


# --- On the way -------------------------------------------------------------------------------------------------------

STORED = {"steps": 100, "lr": 0.1, "text": "/a", "device": "cpu", "threads": 2, "save_every": 10, "precision": "fp32"}


def stored() -> Given:
    return Given(STORED, {name: f"recipe.toml: {name}" for name in STORED})


@pytest.mark.parametrize("key", KEYS.values(), ids=lambda key: key.name)
def test_what_a_run_may_go_on_with(key):
    """What would make it another run is refused by name, whatever stands in the folder."""
    other = {
        values.Whole: 77, values.Real: 0.77, values.Switch: True, values.WordOrWhole: "full", values.Text: "other",
    }.get(type(key.kind)) or key.kind.words[-1]  # fmt: skip
    same = completed(stored())[key.name]
    if same is not None:
        assert resumed(stored(), of_options({key.name: same})) == (completed(stored()), [])
    if key.resume == recipe_files.SAME:
        with pytest.raises(UserError, match=rf"^{key.option} .*contradicts the run's {key.name}, "):
            resumed(stored(), of_options({key.name: other}))
        return
    found, warnings = resumed(stored(), of_options({key.name: other}))
    assert found[key.name] == other
    assert bool(warnings) == (key.resume == recipe_files.WARNED)
    if key.name == "data":
        assert found["text"] is None


def test_the_mathematics_stays():
    """Of the record nothing but where it is computed may change."""
    free = {name for name in Recipe.__dataclass_fields__ if name in KEYS and KEYS[name].resume != recipe_files.SAME}
    assert free == {"device", "threads"}
    assert resumed(stored(), of_options({"device": "auto", "precision": "auto"})) == (completed(stored()), [])
