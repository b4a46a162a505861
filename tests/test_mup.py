"""µP: against a model with its multipliers written out, and by what it is for: sizes and learning rates keep."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from training_runs import run, state_of, stopping_at

from gptkern.cli import main
from gptkern.models.gpt import GPT, GPTConfig
from gptkern.training import loop, mup
from gptkern.training.data.loader import Batches
from gptkern.training.data.rows import Rows
from gptkern.training.data.store import Store
from gptkern.training.data.text import Text, text_store
from gptkern.training.errors import UserError
from gptkern.training.recipe import Recipe
from gptkern.training.run import train

LENGTH, BATCH, BASE, HEAD_DIM = 16, 8, 32, 16


def letters() -> Store:
    drawn = torch.randint(97, 123, (4000,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return text_store(Text("letters", drawn[:3000], drawn[3000:]))


def config_of(width: int, layers: int = 2, length: int = LENGTH) -> GPTConfig:
    return GPTConfig(vocab_size=256, context=length, layers=layers, width=width, heads=width // HEAD_DIM)


def recipe_of(**changes) -> Recipe:
    # No limit of the gradients' norm, which differs by how a factor is held.
    return Recipe(**{"steps": 6, "batch": BATCH, "length": LENGTH, "lr": 3e-3, "clip": 0.0, "seed": 3, **changes})


def trainer_of(width: int, **changes) -> loop.Trainer:
    recipe = recipe_of(**changes)
    return loop.Trainer(loop.new_model(config_of(width), recipe.seed, base_width=recipe.mup), letters(), recipe)


def test_it_is_the_table_with_its_multiplier_written_out():
    """Table 8 with the factor of the logits outside of the model, plain losses and torch's AdamW."""
    width, m, recipe = 128, 4, recipe_of(mup=BASE)
    trainer = trainer_of(width, mup=BASE)
    torch.manual_seed(recipe.seed)
    plain = GPT(config_of(width))
    hidden = [p for name, p in plain.named_parameters() if "blocks" in name and p.dim() == 2]
    embeddings = [plain.token_embedding.weight, plain.position_embedding.weight]
    vectors = [p for p in plain.parameters() if p.dim() == 1]
    with torch.no_grad():
        for weight in hidden:
            weight /= m**0.5
    optimizer = torch.optim.AdamW(
        [
            {"params": hidden, "share": 1 / m, "weight_decay": 0.1 * m},
            {"params": embeddings, "share": 1, "weight_decay": 0.1},
            {"params": vectors, "share": 1, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )
    batches = Batches(Rows(letters().train, LENGTH, recipe.seed), BATCH)
    for step in range(recipe.steps):
        # A warm-up of one update, then the cosine down to a tenth.
        lr = 3e-3 if step == 0 else 3e-4 + 2.7e-3 * (1 + math.cos(math.pi * (step - 1) / 5)) / 2
        for group in optimizer.param_groups:
            group["lr"] = lr * group["share"]
        batch = batches.next()
        loss = F.cross_entropy((plain(batch.ids)[0] / m).flatten(0, 1), batch.targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        trainer.run(1)
        assert trainer.losses[-1] == pytest.approx(loss.item(), rel=1e-5)
    for (name, ours), theirs in zip(trainer.model.named_parameters(), plain.parameters(), strict=True):
        theirs = theirs / m if name.startswith("final_norm") else theirs
        # Of an entry whose gradient is near 0 Adam's direction hangs on roundings.
        assert ((ours - theirs).norm() / theirs.norm()).item() < (2e-3 if theirs.dim() == 1 else 1e-4), name
    batches.close()
    trainer.close()


def test_at_its_base_width_it_is_the_standard_parametrisation():
    ours, standard = trainer_of(BASE, mup=BASE), trainer_of(BASE)
    for trainer in (ours, standard):
        trainer.run(3)
        trainer.close()
    assert ours.losses == standard.losses


def changes_of(width: int, base_width: int | None) -> dict[str, float]:
    """Root mean square of how far each activation moves in a few updates."""
    trainer = trainer_of(width, mup=base_width, steps=100, warmup=0.0)
    model, found = trainer.model, {}
    ids = torch.arange(97, 97 + LENGTH).expand(2, -1)

    def activations() -> dict[str, torch.Tensor]:
        kept: dict[str, torch.Tensor] = {}
        modules = [(name, each) for name, each in model.named_modules() if isinstance(each, torch.nn.Linear)]
        modules += [(f"blocks.{index}", block) for index, block in enumerate(model.blocks)]
        hooks = [
            each.register_forward_hook(lambda module, given, out, name=name: kept.update({name: out}))
            for name, each in modules
            if name != "lm_head"
        ]
        with torch.no_grad():
            kept["logits"] = model(ids)[0]
        for hook in hooks:
            hook.remove()
        return kept

    before = activations()
    trainer.run(3)
    trainer.close()
    after = activations()
    for name, value in before.items():
        found[name] = (after[name] - value).pow(2).mean().sqrt().item()
    return found


def growth_of(base_width: int | None) -> dict[str, float]:
    """The power of the width that each change grows with."""
    narrow, wide = changes_of(32, base_width), changes_of(256, base_width)
    return {name: math.log(wide[name] / narrow[name]) / math.log(8) for name in narrow}


def test_what_activations_change_by_does_not_grow_with_the_width():
    """Yang et al.'s coordinate check: measured were -0.1 to 0.1 under µP, and 0.5 to 1.6 without."""
    ours, standard = growth_of(BASE), growth_of(None)
    assert len(ours) == 11
    assert max(map(abs, ours.values())) < 0.25, ours
    assert min(standard.values()) > 0.4, standard


def test_a_killed_run_goes_on_with_the_learning_rates_of_its_groups(tmp_path):
    """`training_runs`' model is 16 wide, with heads of 8."""
    changes = {"mup": 8}
    run(tmp_path / "whole", recipe=changes)
    run(tmp_path / "ended", recipe=changes, **stopping_at(5))
    assert "mup = 8\n" in (tmp_path / "ended" / "recipe.toml").read_text()
    run(tmp_path / "ended", recipe=changes, resume=True)
    assert state_of(tmp_path / "ended") == state_of(tmp_path / "whole")
    run(tmp_path / "standard")
    assert state_of(tmp_path / "standard")["tensors"] != state_of(tmp_path / "whole")["tensors"]
    with pytest.raises(UserError, match=r"mup is 16; the run in .* began with 8"):
        run(tmp_path / "whole", recipe={"mup": 16}, resume=True)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--mup", "48"], "mup is 48; it needs a multiple of 32, the size of a head, which is the same in both models"),
        (["--mup", "0"], "--mup is 0; it needs a whole number of at least 1"),
        (["--mup", "32", "--from", "x"], "--mup and --from: µP is of a model's first weights too, and those of the "
         "folder are another's"),
    ],
)  # fmt: skip
def test_a_base_width_that_is_none_is_refused(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--context", "8", *arguments]) == 2
    assert capsys.readouterr().err == f"gptkern train: {words}\n"
    assert not list(Path().iterdir())


def test_a_model_with_weights_is_refused(tmp_path):
    with pytest.raises(UserError, match="mup is 16; it needs config alone"):
        train(recipe_of(mup=16), letters(), tmp_path / "run", model=GPT(config_of(32)), say=lambda line: None)
    with pytest.raises(UserError, match="mup is 24; it needs a multiple of 16"):
        mup.initialise(GPT(config_of(32)), 24)


# --- What it is for ---------------------------------------------------------------------------------------------------

EXPONENTS = range(-11, -7)


def best_exponent(width: int, base_width: int | None) -> tuple[int, dict[int, float]]:
    """The best peak learning rate, a power of two, by the mean loss of the last fifth of 150 updates on Python's own
    reference."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics)).encode()
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    store = text_store(Text("topics", ids[:400_000], ids[400_000:402_000]))
    losses = {}
    for exponent in EXPONENTS:
        recipe = Recipe(steps=150, batch=8, length=32, lr=2.0**exponent, mup=base_width, threads=1)
        model = loop.new_model(config_of(width, length=32), recipe.seed, base_width=base_width)
        trainer = loop.Trainer(model, store, recipe)
        trainer.run(recipe.steps)
        trainer.close()
        losses[exponent] = sum(trainer.losses[-30:]) / 30
    return min(losses, key=losses.get), losses


@pytest.mark.deep
@pytest.mark.timeout(600)
def test_the_best_learning_rate_stays_where_without_it_moves():
    """Widths of 32 and 256: measured 2^-10 for both under µP of a base of 128, and 2^-8 and 2^-10 without."""
    ours = [best_exponent(width, 128) for width in (32, 256)]
    standard = [best_exponent(width, None) for width in (32, 256)]
    assert abs(ours[0][0] - ours[1][0]) <= 1, ours
    assert abs(standard[0][0] - standard[1][0]) >= 2, standard
    # What was found for the narrow one is as good for the wide one as what would have been found there.
    assert ours[1][1][ours[0][0]] < min(ours[1][1].values()) + 0.1, ours
