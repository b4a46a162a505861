"""What a training is said to need, against what autograd keeps and what processes that train take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gptkern
from gptkern.models import GPT, GPTConfig
from gptkern.training import free_memory, loop, losses, memory
from gptkern.training.errors import UserError
from gptkern.training.precision import autocast
from gptkern.training.recipe import Recipe

PROGRAM = Path(__file__).with_name("training_memory.py")
TINY = dict(vocab_size=300, context=24, layers=3, width=32, heads=2)
CPU = torch.device("cpu")


def recipe_of(**changes) -> Recipe:
    return Recipe(**dict(steps=4, batch=8, length=24, lr=1e-3) | changes)


@pytest.mark.parametrize("preset", ["nano", "gpt2", "gpt3-2.7B"])
def test_the_parameters_are_those_of_the_model(preset):
    config = GPTConfig.preset(preset, vocab_size=256)
    with torch.device("meta"):
        count = GPT(config).parameter_count()
    need = memory.needed(config, recipe_of(batch=1, length=1), models=2, copies=1)
    assert memory.parameter_count(config) == count
    found = need.parameters, need.optimizer, need.copies, need.checkpoint
    assert found == (2 * 4 * count, 2 * 8 * count, 4 * count, 12 * count)
    # At the end of a backward: every gradient but the norms' and biases', and the embedding's three times.
    gradients = 4 * (count + 2 * 256 * config.width)
    assert 0.98 * gradients <= need.gradients <= gradients


# --- What autograd keeps ----------------------------------------------------------------------------------------------


def kept_for_the_backward(config: GPTConfig, recipe: Recipe, swapped: bool) -> int:
    """Bytes of the tensors that a forward and its loss leave for the backward, parameters aside."""
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held: its place is no other's meanwhile
        return tensor

    torch.manual_seed(0)
    model = GPT(config).train()
    if swapped:
        gptkern.swap(model)
    model.recompute(recipe.recompute_every)
    ids = torch.randint(0, config.vocab_size, (recipe.batch // recipe.accumulate, recipe.length))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), autocast(CPU, recipe.precision):
        features, _ = model(ids, head=False)
        loss = losses.objective(features, model.lm_head.weight, ids.clone(), recipe.label_smoothing, recipe.z_loss)
    assert loss.requires_grad
    for parameter in model.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


KEPT = [
    {},
    {"precision": "bf16"},
    {"precision": "fp16", "accumulate": 2},
    {"z_loss": 1e-3, "label_smoothing": 0.1},
    {"z_loss": 1e-3, "precision": "bf16"},
    {"recompute": "full"},
    {"recompute": "2", "precision": "bf16"},
]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("swapped", [False, True], ids=["stock", "swapped"])
@pytest.mark.parametrize("changes", KEPT, ids=lambda changes: ",".join(map(str, changes.values())) or "plain")
def test_every_tensor_that_autograd_keeps_is_counted(changes, swapped, dropout):
    config, recipe = GPTConfig(**TINY, dropout=dropout), recipe_of(**changes)
    sizes = memory._Sizes(config, recipe, swapped, world=1)
    logits = sizes.tokens * config.vocab_size * 4
    counted = sum(sizes.up_to(config.layers) + sizes.ends()) + logits * (2 if recipe.z_loss else 1)
    counted += sum(sizes.casts_up_to(config.layers) + sizes.head_casts())
    kept = kept_for_the_backward(config, recipe, swapped)
    # What is not counted: positions, a number here and there, and of smoothing and z-loss a number a token or two.
    few = 8 * recipe.length + 64 + (16 * sizes.tokens if recipe.z_loss else 0)
    assert counted <= kept + few and kept <= counted + few, (counted, kept)


def test_a_validation_takes_the_rows_that_are_counted():
    assert memory.EVALUATION_ROWS == loop.EVALUATION_BATCH


# --- What a process takes ---------------------------------------------------------------------------------------------


def measured(config: dict, recipe: dict, **what) -> dict:
    """What tests/training_memory.py says of a training, in a process of its own."""
    request = json.dumps({"config": config, "recipe": recipe} | what)
    environment = dict(os.environ, OMP_NUM_THREADS="1", MALLOC_ARENA_MAX="")
    done = subprocess.run([sys.executable, str(PROGRAM), request], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def sizes(vocab_size, context, layers, width, heads, dropout=0.0) -> dict:
    return dict(vocab_size=vocab_size, context=context, layers=layers, width=width, heads=heads, dropout=dropout)


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc tells a process's peak on Linux alone")
SMALL = sizes(2000, 128, 4, 256, 4)


@on_linux
@pytest.mark.parametrize(
    "recipe, what",
    [
        (dict(batch=8, precision="bf16"), dict(saves=True)),
        (dict(batch=8, accumulate=2, recompute="full"), dict(returned=True)),
    ],
)
def test_the_peak_of_a_process_that_trains(recipe, what):
    """The truth is what the system says: the most memory that was resident, VmHWM."""
    found = measured(SMALL, recipe, **what)
    assert found["total"] == pytest.approx(found["resident"], rel=0.15)
    # Without what there was before.
    grown = found["resident"] - found["before"]
    assert found["total"] - found["before"] == pytest.approx(grown, rel=0.15)


NANO, WIDE, LONG = sizes(256, 256, 4, 128, 4), sizes(256, 256, 4, 512, 8), sizes(256, 1024, 12, 256, 4)
MEDIUM, TOKENS, DEEP = sizes(8192, 256, 6, 256, 4), sizes(50257, 128, 2, 256, 4), sizes(256, 64, 12, 768, 12)
GRID = [
    (NANO, dict(batch=1), {}),
    (NANO, dict(batch=8), {}),
    (NANO, dict(batch=32, accumulate=4), {"saves": True}),
    (NANO | {"dropout": 0.1}, dict(batch=8), {}),
    (WIDE, dict(batch=8), {}),
    (WIDE, dict(batch=8, precision="fp16"), {}),
    (WIDE, dict(batch=16, accumulate=4, precision="bf16"), {"saves": True}),
    (WIDE, dict(batch=8, recompute="2"), {"returned": True}),
    (LONG, dict(batch=2), {"swapped": False}),
    (LONG, dict(batch=2, recompute="full"), {"returned": True}),
    (LONG, dict(batch=2, recompute="full"), {}),
    (LONG | {"layers": 2, "dropout": 0.1}, dict(batch=1), {}),
    (MEDIUM, dict(batch=8), {"saves": True}),
    (MEDIUM, dict(batch=8, precision="bf16"), {}),
    (MEDIUM, dict(batch=8, precision="bf16"), {"swapped": False}),
    (MEDIUM, dict(batch=8, precision="fp16", accumulate=4), {}),
    (MEDIUM, dict(batch=8, z_loss=1e-4, label_smoothing=0.1), {}),
    (MEDIUM, dict(batch=8, z_loss=1e-4, precision="bf16"), {}),
    (MEDIUM | {"dropout": 0.1}, dict(batch=8, precision="bf16"), {}),
    (MEDIUM | {"dropout": 0.1}, dict(batch=8, precision="bf16", recompute="full"), {"returned": True}),
    (TOKENS, dict(batch=4), {}),
    (TOKENS, dict(batch=4, precision="bf16"), {}),
    (TOKENS, dict(batch=8, accumulate=4, precision="fp16"), {"saves": True}),
    (DEEP, dict(batch=1), {}),
    (DEEP, dict(batch=4, accumulate=2, precision="bf16"), {}),
]


def named(value) -> str:
    return "-".join(map(str, value.values())) or "plain"


@on_linux
@pytest.mark.deep
@pytest.mark.parametrize("config, recipe, what", GRID, ids=named)
def test_the_peak_of_every_size(config, recipe, what):
    """What the training itself takes: PyTorch has loaded what it loads at a first update."""
    found = measured(config, recipe, warm=True, **what)
    trained = found["resident"] - found["before"]
    assert found["total"] == pytest.approx(found["resident"], rel=0.15)
    assert found["total"] - found["needed"]["process"] == pytest.approx(trained, rel=0.15)


# --- What there is ----------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A function that makes /proc and /sys/fs/cgroup of what it is given: {path: content}."""

    def made(files):
        for name, content in {"proc/meminfo": "MemFree: 1 kB\nMemAvailable:  9000 kB\n"}.items() | files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        monkeypatch.setattr(free_memory, "PROC", tmp_path / "proc")
        monkeypatch.setattr(free_memory, "CGROUPS", tmp_path / "sys")
        return free_memory.available(CPU)

    return made


def group(most, used, inactive=0, version=2) -> dict:
    names = [
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ("memory.max", "memory.current", "inactive_file"),
    ]
    limit, usage, key = names[version - 1]
    return {limit: f"{most}\n", usage: f"{used}\n", "memory.stat": f"anon 5\n{key} {inactive}\n"}


def placed(folder: str, files: dict) -> dict:
    return {f"sys/{folder}/{name}": content for name, content in files.items()}


MACHINES = {
    "no group": ({}, 9000 * 1024),
    "no limit": ({"proc/self/cgroup": "0::/a\n"} | placed("a", group("max", 5)), 9000 * 1024),
    "its own": ({"proc/self/cgroup": "0::/a/b\n"} | placed("a/b", group(7000, 2000)), 5000),
    "files are given up": ({"proc/self/cgroup": "0::/a\n"} | placed("a", group(7000, 2000, 1500)), 6500),
    "of one above": (
        {"proc/self/cgroup": "0::/a/b\n"} | placed("a/b", group(7000, 100)) | placed("a", group(6000, 5000)),
        1000,
    ),
    "the root of a container": ({"proc/self/cgroup": "0::/../x\n"} | placed(".", group(3000, 1000)), 2000),
    "version 1": (
        {"proc/self/cgroup": "4:cpu,memory:/a\n1:cpuset:/\n"} | placed("memory/a", group(800, 100, 50, 1)),
        750,
    ),
    "beyond its limit": ({"proc/self/cgroup": "0::/a\n"} | placed("a", group(1000, 2000)), 0),
    "nothing to read": ({"proc/self/cgroup": "0::/a\n", "sys/a/memory.max": "x"}, 9000 * 1024),
}


@pytest.mark.parametrize("name", MACHINES)
def test_what_control_groups_leave(machine, name):
    files, left = MACHINES[name]
    assert machine(files) == left


def test_a_limit_of_the_shell_leaves_what_is_not_used(monkeypatch):
    resource = pytest.importorskip("resource")
    limits = {resource.RLIMIT_AS: (10**15, 10**15), resource.RLIMIT_DATA: (resource.RLIM_INFINITY,) * 2}
    monkeypatch.setattr(resource, "getrlimit", limits.__getitem__)
    monkeypatch.setattr(free_memory, "_status", {"VmSize": 10**15 - 12345, "VmData": 1}.get)
    assert free_memory.available(CPU) == 12345


# --- What does not fit ------------------------------------------------------------------------------------------------


def test_what_fits_is_returned(monkeypatch):
    config, recipe = GPTConfig.preset("nano"), recipe_of(length=256)
    need = memory.needed(config, recipe)
    monkeypatch.setattr(memory, "available", lambda device: need.more + 10**7)
    assert memory.check(config, recipe).total == pytest.approx(need.total, rel=0.01)
    monkeypatch.setattr(memory, "available", lambda device: need.more - 10**7)
    with pytest.raises(UserError, match=r"^the training needs .* of memory on cpu and there are "):
        memory.check(config, recipe)


@pytest.mark.parametrize(
    "preset, changes, named, words",
    [
        ("gpt3-175B", dict(batch=1), "a smaller preset, a shorter context (now 2048)", "parameters 698 GB"),
        (
            "nano",
            dict(batch=10**9),
            "a smaller batch (now 1000000000), more pieces of it (accumulate, now 1)",
            "in the",
        ),
        ("gpt2", dict(batch=10**6, accumulate=10**6), "a smaller preset", "a checkpoint's copy 1.49 GB"),
        ("gpt2", dict(batch=4096), "recompute full, precision bf16", "activations"),
        ("gpt2", dict(batch=4096, recompute="full", precision="bf16"), "(now 1024), a smaller preset", "in 16 bits"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_parts(monkeypatch, preset, changes, named, words):
    monkeypatch.setattr(GPT, "__init__", lambda *_: pytest.fail("a model was made"))
    monkeypatch.setattr(memory, "available", lambda device: 10**9)
    config = GPTConfig.preset(preset)
    with pytest.raises(UserError) as refused:
        memory.check(config, recipe_of(length=config.context, **changes), name=f"--preset {preset}")
    line = str(refused.value)
    assert line.startswith(f"--preset {preset} needs ") and "of memory on cpu and there are 1.00 GB (" in line
    assert named in line and words in line, line


def test_a_gpu_and_the_memory_beside_it_are_asked(monkeypatch):
    """Each by itself: the model and its update there; here the first weights, a checkpoint's copy and the process."""
    config, recipe = GPTConfig.preset("gpt2"), recipe_of(length=1024, device="cuda", precision="bf16")
    need = memory.needed(config, recipe)
    parameters = 4 * memory.parameter_count(config)
    assert need.heap == 0 and need.host == parameters + need.checkpoint + need.batches + need.process
    assert need.total == sum(need[:6])
    left = {"cuda": need.total - 1, "cpu": 10**13}
    monkeypatch.setattr(memory, "available", lambda device: left[device.type])
    with pytest.raises(UserError, match="of memory on cuda and"):
        memory.check(config, recipe)
    left.update(cuda=need.total, cpu=need.checkpoint)
    with pytest.raises(UserError, match="of memory on cpu and"):
        memory.check(config, recipe)
    # A mask of dropout is a byte an element there, and no probabilities are written down.
    dropped = memory.needed(GPTConfig.preset("gpt2", dropout=0.1), recipe).activations - need.activations
    assert dropped == 8 * 1024 * 768 * (1 + 2 * 12)
