"""Growing a GPT: the larger one computes what the small one does, and learns on."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from model_folders import bpe, model, save_run

import gptkern
from gptkern import cli
from gptkern.models.gpt import GPT, GPTConfig
from gptkern.training import growing, lora
from gptkern.training.adapting import add_head
from gptkern.training.exporting import export
from gptkern.training.growing import grow, grown
from gptkern.training.loading import load_model, starting_model
from gptkern.training.optimizers import optimizer_of

CONFIG = GPTConfig(vocab_size=37, context=16, layers=2, width=24, heads=3)
IDS = torch.randint(37, (3, 16), generator=torch.Generator().manual_seed(0))
# The second are no multiples of the width; of the last ones no block has as many copies as the others.
SIZES = [(48, None), (72, None), (32, None), (40, None), (56, None), (None, 3), (None, 4), (48, 4), (40, 7)]


def small(dtype=torch.float64, stream: float = 1.0) -> GPT:
    """No bias is 0 and no gain 1.

    Args:
        stream: how large all is that is written into the residual stream; with 1e-3 LayerNorm's eps counts.
    """
    torch.manual_seed(1)
    made = GPT(CONFIG).eval().to(dtype)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
            if "embedding" in name or "project" in name:
                parameter.mul_(stream)
    return made


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("width, layers", SIZES)
@pytest.mark.parametrize("dtype, stream, near", [(torch.float64, 1e-3, 1e-13), (torch.float32, 1.0, 3e-6)])
def test_the_larger_model_computes_the_same(width, layers, dtype, stream, near):
    before = small(dtype, stream)
    kept = {name: value.clone() for name, value in before.state_dict().items()}
    after = grow(before, width, layers, seeded())
    assert after.config == dataclasses.replace(
        CONFIG, width=width or 24, layers=layers or 2, heads=(width or 24) // CONFIG.head_dim
    )
    assert {parameter.dtype for parameter in after.parameters()} == {dtype}
    assert after.lm_head.weight is after.token_embedding.weight
    (logits, loss), (expected, expected_loss) = (each(IDS[:, :-1], IDS[:, 1:]) for each in (after, before))
    largest = expected.abs().max().item()
    torch.testing.assert_close(logits, expected, rtol=0, atol=near * largest)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6 if dtype == torch.float32 else 1e-7, atol=0)
    assert all(torch.equal(value, kept[name]) for name, value in before.state_dict().items())
    apart, of = growing.difference(before, after)
    assert apart <= near * of


def test_a_longer_text_and_each_position_are_the_same_in_a_deeper_stack_of_means():
    # Grown twice: means of means, copies of copies.
    before = small()
    twice = grow(grow(before, 40, 3, seeded()), 104, 5, seeded(1))
    torch.testing.assert_close(twice(IDS)[0], before(IDS)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("width", [48, 40])
def test_copies_learn_differently(width):
    torch.manual_seed(0)
    before = GPT(CONFIG).double()
    after = grow(before, width, generator=seeded())
    after(IDS[:, :-1], IDS[:, 1:])[1].backward()

    def apart(gradient, first, second):
        """Of two copies' gradients, against their size."""
        return float((gradient[first] - gradient[second]).norm() / gradient[first].norm())

    block = after.blocks[0]
    # Units of the perceptron, channels of a copied head's value, and where the stream is copied its channels.
    pairs = {"unit": (block.perceptron.expand.weight.grad, slice(0, 16), slice(96, 112))}
    value = block.attention.qkv.weight.grad.view(3, width, width)[2]
    pairs["value"] = value, slice(0, 8), slice(24, 32)
    if width == 48:
        pairs["embedding"] = after.token_embedding.weight.grad.T, slice(0, 24), slice(24, 48)
    else:
        pairs["mean"] = after.position_embedding.weight.grad.T, slice(24, 32), slice(32, 40)
    for name, (gradient, first, second) in pairs.items():
        assert apart(gradient, first, second) > 0.05, name


def test_copied_layers_learn():
    torch.manual_seed(0)
    after = grow(GPT(CONFIG), layers=4, generator=seeded())
    copies = [after.blocks[1], after.blocks[3]]
    assert all(not block.attention.project.weight.any() and not block.perceptron.project.bias.any() for block in copies)
    assert all(after.blocks[i].attention.project.weight.any() for i in (0, 2))
    assert torch.equal(copies[0].attention.qkv.weight, after.blocks[0].attention.qkv.weight)
    optimizer, reached = optimizer_of(after, 1e-3), []
    for _ in range(2):
        optimizer.zero_grad()
        after(IDS[:, :-1], IDS[:, 1:])[1].backward()
        reached.append([bool(block.attention.qkv.weight.grad.any()) for block in copies])
        assert all(block.perceptron.project.weight.grad.any() for block in copies)
        optimizer.step()
    assert reached == [[False, False], [True, True]]


@pytest.mark.parametrize("width, layers", [(48, 4), (40, 3)])
def test_training_goes_on(width, layers):
    torch.manual_seed(0)
    before = GPT(CONFIG)
    train(before, 20)
    start = float(before(IDS[:, :-1], IDS[:, 1:])[1].detach())
    after = grow(before, width, layers, seeded())
    losses = train(after, 10)
    assert losses[0] == pytest.approx(start, rel=1e-5)
    assert losses[-1] < 0.9 * losses[0]


def train(gpt: GPT, steps: int) -> list[float]:
    optimizer, losses = optimizer_of(gpt, 3e-3), []
    for _ in range(steps):
        loss = gpt(IDS[:, :-1], IDS[:, 1:])[1]
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def test_a_seed_gives_the_same_model_and_the_pieces_it_is_computed_in_do_not_matter(monkeypatch):
    first = grow(small(), 40, 3, seeded(5)).state_dict()
    again = grow(small(), 40, 3, seeded(5)).state_dict()
    assert all(torch.equal(again[name], value) for name, value in first.items())
    assert not torch.equal(
        grow(small(), 40, 3, seeded(6)).state_dict()["final_norm.weight"], first["final_norm.weight"]
    )
    monkeypatch.setattr(growing, "_AT_ONCE", 100)
    pieces = grow(small(), 40, 3, seeded(5))
    torch.testing.assert_close(pieces(IDS)[0], small()(IDS)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "sizes, message",
    [
        (dict(width=16), "width is 16; it needs to be at least the model's, 24"),
        (dict(layers=1), "layers is 1; it needs to be at least the model's, 2"),
        (dict(width=44), "width is 44; it needs to be a whole number of heads of 8, as the model's are: 40 or 48"),
        (dict(width=25), "as the model's are: 24 or 32"),
        (dict(width=24, layers=2), "width is 24 and layers is 2, the model's own; one of them needs to be larger"),
        ({}, "one of them needs to be larger"),
    ],
)
def test_other_sizes_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        grown(CONFIG, **sizes)
    with pytest.raises(ValueError, match=f"grow: .*{message}"):
        grow(small(), **sizes)


@pytest.mark.parametrize("width", [48, 40])
def test_a_head_over_labels_grows_along(width):
    before = small()
    add_head(before, ("a", "b", "c"), seeded())
    before.score.to(torch.float64)
    after = grow(before, width, 3, seeded(1))
    classes = [each(IDS, head=False)[0] @ each.score.weight.T for each in (before, after)]
    torch.testing.assert_close(classes[1], classes[0], rtol=0, atol=1e-12)
    with torch.no_grad():
        after.score.weight[0, 0] += 1
    assert growing.difference(before, after)[0] > 0.01


def with_other_head(model: GPT) -> None:
    model.score = torch.nn.Linear(25, 3, bias=False)


@pytest.mark.parametrize(
    "change, message",
    [
        (gptkern.quantize, r"the model has no blocks\.0\.attention\.project\.weight"),
        (lambda model: lora.add(model, 2), r"the model has blocks\.0\.attention\.project\.lora_A of shape \(2, 24\)"),
        (with_other_head, r"the model has score\.weight of shape \(3, 25\); it needs to be the stock GPT"),
    ],
)
def test_a_model_with_other_parameters_is_refused(change, message):
    other = small(torch.float32)
    change(other)
    with pytest.raises(ValueError, match=message):
        grow(other, 48)


# --- The command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to work in, with a run in it."""
    monkeypatch.chdir(tmp_path)
    save_run(tmp_path / "run", model())
    return Path()


@pytest.fixture
def command(capsys):
    """command(arguments) -> (exit status, what was printed, the errors)"""

    def run(*arguments) -> tuple[int, str, str]:
        status = cli.main(["grow", *map(str, arguments)])
        return status, *capsys.readouterr()

    return run


def test_the_command_writes_a_model_to_start_from(here, command):
    status, printed, errors = command("run", "--width", 96, "--layers", 3, "--out", "large")
    assert (status, errors) == (0, "")
    first, second, third, last = printed.splitlines()
    assert first == f"from 2 layers, width 48, 3 heads: {model().parameter_count():,} parameters"
    loaded = load_model("large")
    assert second == f"to   3 layers, width 96, 6 heads: {loaded.model.parameter_count():,} parameters"
    assert third.startswith("logits differ by at most ") and last == "model: large   (gptkern train --from large …)"
    ids = torch.randint(300, (2, 24), generator=seeded())
    torch.testing.assert_close(loaded.model(ids)[0], model()(ids)[0], rtol=0, atol=1e-4)
    assert json.loads(Path("large/config.json").read_text())["gptkern"]["grown"] == {
        "width": 48, "layers": 2, "heads": 3, "seed": 0,
    }  # fmt: skip
    assert starting_model("large", bpe()).model.config.width == 96
    # From what it wrote, and onto it.
    assert command("large", "--layers", 4, "--out", "larger")[0] == 0
    before = Path("larger/model.safetensors").read_bytes()
    status, _, errors = command("large", "--layers", 5, "--out", "larger")
    assert status == 2 and "--overwrite replaces it" in errors
    assert Path("larger/model.safetensors").read_bytes() == before
    assert command("large", "--layers", 5, "--out", "larger", "--overwrite")[0] == 0
    assert load_model("larger").model.config.layers == 5


def test_a_classifier_stays_one(here, command):
    loaded = load_model("run")
    add_head(loaded.model, ("no", "yes"), seeded())
    export(loaded._replace(about={"labels": ["no", "yes"]}), "classifier")
    assert command("classifier", "--width", 64, "--out", "large")[0] == 0
    larger, ids = load_model("large"), torch.randint(300, (2, 24), generator=seeded())
    assert larger.about["labels"] == ["no", "yes"]
    classes = [each.model(ids, head=False)[0] @ each.model.score.weight.T for each in (loaded, larger)]
    torch.testing.assert_close(classes[1], classes[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["run", "--out", "out"], "--width and --layers are not given; one of them is needed"),
        (["run", "--width", "0", "--out", "out"], "--width is 0; it needs a whole number of at least 1"),
        (["run", "--width", "50", "--out", "out"], "--width is 50; it needs to be a whole number of heads of 16"),
        (["run", "--width", "32", "--out", "out"], "--width is 32; it needs to be at least the model's, 48"),
        (["run", "--layers", "2", "--out", "out"], "the model's own; one of them needs to be larger"),
        (["run", "--width", 16 * 10**8, "--out", "out"], "growing needs "),
        (["none", "--layers", "3", "--out", "out"], "CHECKPOINT none is no checkpoint: there is no such folder"),
        (["run", "--layers", "3", "--out", "run"], "--out run holds a run; it needs another folder"),
        (["run", "--layers", "3", "--out", "run/tokenizer.json"], "--out run/tokenizer.json"),
    ],
)
def test_the_command_refuses_in_one_line(here, command, arguments, message):
    before = sorted(map(str, here.rglob("*")))
    status, printed, errors = command(*arguments)
    assert (status, printed) == (2, "") and message in errors and errors.count("\n") == 1
    assert sorted(map(str, here.rglob("*"))) == before


def test_what_is_not_the_same_is_not_written(here, command, monkeypatch):
    # Without shares: what reads a copied head reads it twice.
    monkeypatch.setattr(growing._Wide, "shared", lambda self, value, source: value[:, source])
    status, _, errors = command("run", "--width", 64, "--out", "out")
    assert (status, errors.count("\n"), os.path.exists("out")) == (1, 1, False)
    assert "gptkern grow: the larger model's logits differ by " in errors and "nothing was written" in errors


def test_a_full_disk_is_seen_before_any_work(here, command, monkeypatch):
    free = shutil.disk_usage(here)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    monkeypatch.setattr(growing, "grow", lambda *arguments: pytest.fail("it began"))
    status, _, errors = command("run", "--width", 64, "--out", "out")
    assert status == 2 and "on the disk and there are 10.0 kB" in errors and not os.path.exists("out")


@pytest.mark.deep
def test_transformers_reads_a_grown_model(here, command):
    from transformers import AutoModelForCausalLM

    assert command("run", "--width", 64, "--layers", 3, "--out", "large")[0] == 0
    ids = torch.randint(300, (2, 24), generator=seeded())
    theirs = AutoModelForCausalLM.from_pretrained("large")
    torch.testing.assert_close(theirs(ids).logits, model()(ids)[0], rtol=0, atol=1e-4)
