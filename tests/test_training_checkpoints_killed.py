"""Checkpoints and processes: killed before each operation of a save and at random, forked, two that save together."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from saved_checkpoints import SECONDS, counter_of, ends, kill_myself, names, run, save, start
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

import gptkern
from gptkern.training.checkpoints import Checkpoints
from gptkern.training.errors import RunError

KILLED = -signal.SIGKILL
# What a save does to the disk, as Python's audit events name it; a write and an fsync have none.
OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "os.listdir", "os.scandir"}


# --- SIGKILL ----------------------------------------------------------------------------------------------------------


def saved_until(folder: Path, operation: int, counter: int, step: int) -> None:
    """A save in which the process is killed before an operation on the disk; it ends where there are fewer."""
    seen = 0

    def watch(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event in OPERATIONS and threading.current_thread().name.startswith("checkpoint"):
            seen += 1
            if seen == operation:
                kill_myself()

    sys.addaudithook(watch)
    save(Checkpoints(folder, keep=2), counter, step)


@pytest.mark.parametrize("step", [3, 2], ids=["a new step", "a step that is there"])
def test_killed_before_each_operation_a_save_leaves_the_old_checkpoint_or_the_new(step, tmp_path):
    save(Checkpoints(tmp_path / "before"), 1)
    save(Checkpoints(tmp_path / "before"), 2)
    found, operation, status = set(), 0, KILLED
    while status == KILLED:
        operation += 1
        folder = tmp_path / str(operation)
        shutil.copytree(tmp_path / "before", folder)
        checkpoints = Checkpoints(folder, keep=2)
        status = run(saved_until, folder, operation, 3, step)
        checkpoint, passed = checkpoints.newest()
        found.add(counter_of(checkpoint))
        assert passed == [] and len(checkpoints.all()) >= 2, names(folder)
        # The next run goes on from there, and leaves nothing of the killed one.
        save(checkpoints, 4, checkpoint.step + 1)
        assert [each.step for each in checkpoints.all()] == [checkpoint.step, checkpoint.step + 1]
        assert names(folder) == [f"step-{each.step:08}" for each in checkpoints.all()]
        assert counter_of(checkpoints.all()[0]) in (2, 3) and counter_of(checkpoints.all()[1]) == 4
    assert status == 0 and found == {2, 3}
    assert operation > 20


ELEMENTS = 600_000  # some megabytes, so that most of a save is the writing


def counting(folder: Path, told: int) -> None:
    """Goes on from the newest checkpoint, a save after another; tells each that was copied, and some that are whole."""
    checkpoints = Checkpoints(folder, keep=2)
    newest, passed = checkpoints.newest()
    assert passed == []
    counter = 0 if newest is None else counter_of(newest, ELEMENTS)
    while True:
        counter += 1
        save(checkpoints, counter, elements=ELEMENTS, wait=False)
        os.write(told, f"copied {counter}\n".encode())
        if counter % 3 == 0:
            checkpoints.wait()
            os.write(told, f"whole {counter}\n".encode())


def kills(folder: Path, number: int, seed: int) -> list[int]:
    """Kills it so often; the counter of the newest checkpoint after each kill, of which at most one save was lost."""
    random_numbers, counters, partial = random.Random(seed), [0], 0
    for _ in range(number):
        reading, told = os.pipe()
        child = start(counting, folder, told)
        os.close(told)
        with os.fdopen(reading) as lines:
            said = [lines.readline()]
            time.sleep(random_numbers.uniform(0, 0.4))
            child.kill()
            said += lines.read().split("\n")[:-1]
        assert ends([child]) == [KILLED]
        partial += any(name.endswith(".partial") for name in names(folder))
        newest, passed = Checkpoints(folder).newest()
        assert passed == []
        counter = 0 if newest is None else counter_of(newest, ELEMENTS)
        copied = max(int(line.split()[1]) for line in said if line.startswith("copied"))
        whole = max([int(line.split()[1]) for line in said if line.startswith("whole")], default=0)
        # A save waits for the one before: of those that were copied the last alone can be lost.
        assert max(whole, counters[-1], copied - 1) <= counter <= copied + 1, (said, counter)
        counters.append(counter)
    assert partial, "no kill met a save"
    return counters


def test_killed_at_random_moments(tmp_path):
    assert kills(tmp_path, 3, seed=1)[-1] > 0


@pytest.mark.deep
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_25_random_moments(seed, tmp_path):
    counters = kills(tmp_path, 25, seed)
    assert counters == sorted(counters) and counters[-1] >= 10


# --- A process that is forked while its parent saves ------------------------------------------------------------------


def forked(checkpoints: Checkpoints) -> None:
    for act in (checkpoints.wait, lambda: save(checkpoints, 9)):
        try:
            act()
        except RuntimeError as error:
            assert "forked" in str(error)
        else:
            raise AssertionError("it is the parent's")
    checkpoint, _ = checkpoints.newest()
    assert counter_of(checkpoint, 12 if checkpoint.step == 1 else ELEMENTS) == checkpoint.step


def test_a_forked_process_reads_and_does_not_wait_for_its_parents_thread(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    save(checkpoints, 2, elements=ELEMENTS, wait=False)
    child = start(forked, checkpoints)
    checkpoints.wait()
    assert ends([child]) == [0]
    assert counter_of(checkpoints.all()[1], ELEMENTS) == 2


# --- Two processes that save together ---------------------------------------------------------------------------------

RANKS = 2


def together(rank: int, folder: Path, work) -> None:
    """`work` on a rank of a Gloo group."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    try:
        work(rank, folder)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def two(folder: Path, work) -> None:
    assert ends([start(together, rank, folder, work) for rank in range(RANKS)]) == [0] * RANKS


def whole() -> dict[str, torch.Tensor]:
    """Rows that two do not divide, fewer rows than processes, no rows, columns to shard, a scalar."""
    numbers = torch.Generator().manual_seed(3)
    shapes = {"odd": (7, 3), "one": (1, 4), "none": (0, 4), "wide": (2, 9), "vector": (5,), "same": (3,), "scalar": ()}
    return {name: torch.randn(shape, generator=numbers) for name, shape in shapes.items()}


def state_of(rank: int, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As FSDP2 has it: shards of rows, and of columns; some whole on both; one of each process's own."""
    mesh = init_device_mesh("cpu", (RANKS,))
    sharded = {name: distribute_tensor(tensors[name], mesh, [Shard(0)]) for name in ("odd", "one", "none", "vector")}
    sharded["wide"] = distribute_tensor(tensors["wide"], mesh, [Shard(1)])
    plain = {name: tensors[name].clone() for name in ("same", "scalar")}
    return sharded | plain | {f"generators.{rank}": torch.full((4,), rank, dtype=torch.uint8)}


def save_on_two(rank: int, folder: Path) -> None:
    checkpoints = Checkpoints(folder / "run", keep=1)
    state = state_of(rank, whole())
    for step in (1, 2):
        checkpoints.save(step, state, {"step": step})
        with torch.no_grad():
            # Both train on meanwhile, and talk to each other.
            summed = torch.ones(1)
            dist.all_reduce(summed)
            assert summed.item() == RANKS
    checkpoints.wait()
    load_on_two(rank, folder)


def load_on_two(rank: int, folder: Path) -> None:
    newest, passed = Checkpoints(folder / "run").newest()
    assert (newest.step, newest.about, passed) == (2, {"step": 2}, [])
    expected = state_of(rank, whole())
    into = state_of(rank, {name: torch.zeros_like(tensor) for name, tensor in whole().items()})
    into[f"generators.{rank}"].zero_()
    newest.read(into)
    for name, tensor in expected.items():
        local = [each.to_local() if isinstance(each, DTensor) else each for each in (into[name], tensor)]
        assert torch.equal(*local), name


def test_two_processes_save_their_parts_and_one_reads_the_whole(tmp_path):
    two(tmp_path, save_on_two)
    (checkpoint,) = Checkpoints(tmp_path / "run").all()
    assert sorted(checkpoint.files()) == ["about.json", *(f"tensors-0000{n}-of-00002.safetensors" for n in (1, 2))]
    into = {name: torch.zeros_like(tensor) for name, tensor in whole().items()}
    checkpoint.read(into)
    for name, tensor in whole().items():
        assert torch.equal(into[name], tensor), name
    # Each part is there once, and no file holds everything.
    sizes = [entry["bytes"] for name, entry in checkpoint.files().items() if name.startswith("tensors")]
    assert all(len(parts) <= 2 for parts in checkpoint.chunks().values())
    assert len(checkpoint.chunks()["odd"]) == len(checkpoint.chunks()["wide"]) == 2
    assert len(checkpoint.chunks()["same"]) == len(checkpoint.chunks()["scalar"]) == 1
    assert max(sizes) < 2 * min(sizes)


@pytest.mark.deep
def test_one_process_saves_and_two_read_their_parts(tmp_path):
    state = whole() | {f"generators.{rank}": torch.full((4,), rank, dtype=torch.uint8) for rank in range(RANKS)}
    Checkpoints(tmp_path / "run").save(2, state, {"step": 2}, wait=True)
    two(tmp_path, load_on_two)


def fail_on_one(rank: int, folder: Path) -> None:
    """The disk of the second process is full: both say so, and nothing has the new name."""
    import resource

    checkpoints = Checkpoints(folder / "run")
    checkpoints.save(1, {"a": torch.ones(3)}, {}, wait=True)
    mesh = init_device_mesh("cpu", (RANKS,))
    large = distribute_tensor(torch.ones(40_000), mesh, [Shard(0)])
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    checkpoints.save(2, {"a": large}, {})
    with pytest.raises(RunError, match=r"step-00000002 was not saved: process 1: File too large; step-00000001 is"):
        checkpoints.wait()
    dist.barrier()
    assert names(folder / "run") == ["step-00000001"]


@pytest.mark.deep
def test_what_fails_in_one_process_is_said_in_both(tmp_path):
    two(tmp_path, fail_on_one)


def fsdp(rank: int, folder: Path) -> None:
    torch.manual_seed(5)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))
    plain = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    fully_shard(model)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    Checkpoints(folder / "run").save(1, dict(model.named_parameters()), {}, wait=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    newest, _ = Checkpoints(folder / "run").newest()
    newest.read(dict(model.named_parameters()))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.full_tensor(), plain[name]), name
    if rank == 0:
        torch.save(plain, folder / "plain.pt")


@pytest.mark.deep
def test_a_fully_sharded_model_is_read_by_one_process(tmp_path):
    two(tmp_path, fsdp)
    plain = torch.load(tmp_path / "plain.pt")
    into = {name: torch.zeros_like(tensor) for name, tensor in plain.items()}
    Checkpoints(tmp_path / "run").newest()[0].read(into)
    assert all(torch.equal(into[name], plain[name]) for name in plain)


# --- A full disk, and one that cannot be written ----------------------------------------------------------------------

DISK = """
import os, sys
from pathlib import Path
from saved_checkpoints import counter_of, names, save
from gptkern.training.checkpoints import Checkpoints
from gptkern.training.errors import RunError

folder = Path(sys.argv[1])

def failed(*words, **how):
    checkpoints = Checkpoints(folder / "run", keep=1)
    try:
        save(checkpoints, 2, **how)
    except RunError as error:
        assert all(word in str(error) for word in words), error
    else:
        raise AssertionError("there was room")
    assert names(folder / "run") == ["step-00000001"]
    assert counter_of(checkpoints.newest()[0]) == 1

save(Checkpoints(folder / "run"), 1)
# More than there is, and then less and less by a page, until room is lacking for the list of files alone.
free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
for missing in (2**20, 1, -4096, -8192):
    words = "step-00000002 was not saved: No space left on device", "step-00000001 is whole"
    failed(*words, elements=(free + missing) // 4)
filler = folder / "filler"
with open(filler, "wb", buffering=0) as file:
    try:
        while file.write(bytes(4096)):
            pass
    except OSError as error:
        assert "No space" in str(error)
failed("No space left on device", "step-00000001 is whole")
filler.unlink()
assert os.system(f"mount -o remount,ro {folder}") == 0
failed("Read-only file system", "step-00000001 is whole")
assert os.system(f"mount -o remount,rw {folder}") == 0
save(Checkpoints(folder / "run", keep=1), 2)
assert counter_of(Checkpoints(folder / "run").newest()[0]) == 2 and names(folder / "run") == ["step-00000002"]
"""


@pytest.mark.deep
def test_a_full_disk_and_a_read_only_one(tmp_path):
    """A small tmpfs, in a mount namespace that no root is needed for."""
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    mounted = [*unshare, "sh", "-c", f'mount -t tmpfs -o size=1m none {tmp_path} && exec "$@"', "sh"]
    if shutil.which("unshare") is None or subprocess.run([*mounted, "true"], capture_output=True).returncode:
        pytest.skip(f"no tmpfs can be mounted here: {' '.join(unshare)} fails")
    path = os.pathsep.join([str(Path(gptkern.__file__).parents[1]), *sys.path])
    done = subprocess.run(
        [*mounted, sys.executable, "-c", DISK, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
