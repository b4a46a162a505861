"""The recipe by experience: the rules against their sources' numbers, written down here again."""

from __future__ import annotations

import dataclasses
import tomllib

import numpy as np
import pytest

from gptkern.cli import main
from gptkern.models.gpt import GPTConfig
from gptkern.training import memory, recipe_files
from gptkern.training.errors import UserError
from gptkern.training.recipe import Recipe
from gptkern.training.search import experience
from gptkern.training.search.experience import choices, of_compute, of_table, recipe, scaled, text

NANO = GPTConfig.preset("nano")
SMALL = GPTConfig.preset("gpt2")
# Millions of parameters, of tokens of a batch, and the learning rate times 1e5.
PRINTED = [(125, 0.5, 60), (350, 0.5, 30), (760, 0.5, 25), (1300, 1, 20), (2700, 1, 16), (6700, 2, 12), (13000, 2, 10),
           (175000, 3.2, 6)]  # fmt: skip


def test_the_table_is_gpt3s_and_straight_between_its_sizes_in_logarithms():
    for millions, batch, rate in PRINTED:
        assert of_table(millions * 1e6) == pytest.approx((rate * 1e-5, batch * 1e6))
    logs = np.log10(np.array(PRINTED))
    for millions in np.geomspace(60, 400_000, 40):
        batch, rate = (10 ** np.interp(np.log10(millions), logs[:, 0], logs[:, column]) for column in (1, 2))
        assert of_table(millions * 1e6) == pytest.approx((rate * 1e-5, batch * 1e6))


def test_the_laws_of_compute_and_of_the_batch():
    assert of_compute(1e16) == pytest.approx((0.3118e-2, 0.2920 * 10**5.2336))
    assert scaled(1e-3, 4) == 2e-3 and scaled(1e-3, 0.25) == 5e-4
    assert scaled(1e-3, 4, "sgd") == 4e-3
    for arguments, words in (((1e-3, 0.0), "ratio is 0.0"), ((1e-3, 2.0, "lion"), "optimizer is 'lion'")):
        with pytest.raises(ValueError, match=f"^scaled: {words}; it needs "):
            scaled(*arguments)


def test_gpt2_gets_gpt3s_smallest_row():
    """124 million parameters, 20 tokens each: 4747 updates of 512 rows of 1024, at √1.05 times 6e-4."""
    found = recipe(choices(SMALL))
    assert (found["batch"], found["steps"]) == (512, 20 * 124_439_808 // 524_288)
    assert found["lr"] == pytest.approx(6e-4 * (524_288 / 5e5) ** 0.5, rel=2e-3)
    assert found["warmup"] == pytest.approx(40 / found["steps"], rel=2e-3)
    fixed = {"schedule": "cosine", "final_lr": 0.1, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "clip": 1.0}
    assert found.items() >= fixed.items() and found["dropout"] == 0.0


def test_a_small_model_gets_the_laws_of_its_compute():
    """Nano on 512,000 tokens in rows of 64: 1000 updates of 512, and the law's rate times √ of what the batch lacks."""
    tokens, length = 512_000, 64
    found = recipe(choices(NANO, tokens, length=length))
    operations = tokens * (72 * 4 * 128**2 + 12 * 4 * 128 * length)
    batch = 0.2920 * operations**0.3271
    assert (found["batch"], found["steps"]) == (8, 1000)
    assert found["lr"] == pytest.approx(0.3118 * operations**-0.125 * (512 / batch) ** 0.5, rel=2e-3)
    # More tokens than the limit of 1000 updates asks for, and fewer.
    assert recipe(choices(NANO, 10**9, length=length))["batch"] == 2 ** round(
        np.log2(0.2920 * (operations / tokens * 10**9) ** 0.3271 / length)
    )
    few = recipe(choices(NANO, 1000, length=length))
    assert (few["batch"], few["steps"], few["warmup"]) == (1, 15, 0.1)


def test_tokens_are_those_that_compute_is_best_spent_with_or_four_epochs():
    parameters = memory.parameter_count(NANO)
    for text_tokens, expected in ((None, 20 * parameters), (5 * parameters, 20 * parameters), (10**5, 4 * 10**5)):
        found = recipe(choices(NANO, text=text_tokens, length=64))
        per_update = found["batch"] * 64
        assert expected - per_update < found["steps"] * per_update <= expected
        assert found["dropout"] == 0.0
    assert recipe(choices(NANO, 500_000, text=100_000))["dropout"] == 0.1
    assert recipe(choices(NANO, 400_000, text=100_000))["dropout"] == 0.0


def test_an_update_is_cut_into_the_fewest_pieces_that_fit():
    device = {"device": "cuda", "precision": "bf16"}

    def needed(accumulate: int, recompute: str) -> int:
        made = Recipe(steps=1, batch=512, length=1024, lr=1, accumulate=accumulate, recompute=recompute, **device)
        return memory.needed(SMALL, made).total

    least = needed(512, "full")
    seen = set()
    for available in (400 * 10**9, 12 * 10**9, needed(512, "none") - 1, least):
        found = recipe(choices(SMALL, memory=available, **device))
        recompute = found.get("recompute", "none")
        assert needed(found["accumulate"], recompute) <= available
        assert found["accumulate"] == 1 or needed(found["accumulate"] // 2, recompute) > available
        assert recompute == "none" or needed(512, "none") > available
        seen.add((found["accumulate"] > 1, recompute))
    assert seen == {(False, "none"), (True, "none"), (True, "full")}


def test_what_fits_nowhere_says_so():
    (words,) = [choice.reason for choice in choices(SMALL, memory=10**9) if choice.key == "accumulate"]
    assert words.endswith("are needed and there are 1.00 GB")


def test_a_learning_rate_that_was_found_is_transferred():
    found = {choice.key: choice for choice in choices(NANO, 10**6, found=(64, 0.0125))}
    assert (found["mup"].value, found["lr"].value) == (64, 0.0125)
    assert "Tensor Programs V" in found["lr"].source
    with pytest.raises(UserError, match=r"^mup is 48; it needs a multiple of 32"):
        choices(NANO, found=(48, 0.01))


def test_every_choice_has_a_reason_and_a_source_or_follows_from_what_is_given():
    for choice in choices(NANO, 10**6, text=10**5, memory=10**10, batch=4):
        assert choice.reason and (choice.source or choice.key in ("steps", "batch", "accumulate")), choice
        assert choice.key in recipe_files.KEYS
    for name in ("tokens", "text", "length", "batch", "memory"):
        with pytest.raises(ValueError, match=f"^choices: {name} is 0; it needs to be at least 1"):
            choices(NANO, **{name: 0})


def test_the_text_is_a_recipe_whatever_stands_in_it(tmp_path):
    chosen = choices(NANO, 10**6, text=10**5, memory=10**10)
    given = {"preset": "nano", "text": 'a"\n# b = 1.txt', "lr": 0.5, "width": None}
    written = text([*chosen, experience.Choice("seed", 1, "two\nlr = 7", "a\nsource")], given)
    (tmp_path / "by.toml").write_text(written, encoding="utf-8")
    values = recipe_files.read(tmp_path / "by.toml").values
    expected = recipe(chosen) | {"seed": 1, "preset": "nano", "text": given["text"], "lr": 0.5}
    assert values == expected == tomllib.loads(written)
    assert recipe_files.completed(recipe_files.read(tmp_path / "by.toml"))["schedule"] == "cosine"
    comments = [line for line in written.splitlines() if line.startswith("#")]
    assert sum("Brown et al. 2020" in line for line in comments) >= 6


@pytest.mark.deep
def test_it_goes_straight_into_train(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(NANO, context=8, layers=1, width=64, heads=2)
    given = {"context": 8, "layers": 1, "width": 64, "threads": 1, "tensorboard": "off"}
    (tmp_path / "by.toml").write_text(text(choices(config, 100, found=(32, 1e-3)), given), encoding="utf-8")
    assert main(["train", "--recipe", "by.toml", "--out", "run"]) == 0
    stored = tomllib.loads((tmp_path / "run" / "recipe.toml").read_text())
    assert stored.items() >= {"mup": 32, "lr": 1e-3, "steps": 12, "batch": 1, "beta2": 0.95}.items()
    assert "12 updates are done" in capsys.readouterr().out
