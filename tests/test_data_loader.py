"""Rows and batches: the same whatever the number of processes and wherever a run is continued; every row once in an
epoch; a thread that reads ahead, loses nothing and ends."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import pytest
import torch

from gptkern.training.data import text
from gptkern.training.data.loader import Batch, Batches, windows
from gptkern.training.data.rows import Rows, permuted
from gptkern.training.data.shards import Layout, ShardTokens, ShardWriter, open_shard
from gptkern.training.data.store import ArrayTokens
from gptkern.training.errors import UserError

MASK = 2**64 - 1


def batch_of(ids: list[int], length: int, seed: int, batch: int, update: int) -> list[list[int]]:
    """The rows of an update, written once more from the definition, with Python's whole numbers alone."""
    rows = []
    for number in range(update * batch, (update + 1) * batch):
        count = max(1, len(ids) // length - 1)
        epoch, place = number // count, number % count
        drawn = [hashlib.blake2b(f"{seed} {epoch} {word}".encode()).digest() for word in ("order", "offset")]
        keys = [int.from_bytes(drawn[0][at : at + 8], "little") for at in range(0, 64, 8)]
        while True:
            bits = max(6, (count - 1).bit_length())
            left, right, left_bits = place >> (bits - bits // 2), place % 2 ** (bits - bits // 2), bits // 2
            for key in keys:
                mixed = right ^ key
                mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & MASK
                mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & MASK
                left, right = right, left ^ (mixed ^ mixed >> 31) >> 64 - left_bits
                left_bits = bits - left_bits
            place = left << (bits - bits // 2) | right
            if place < count:
                break
        offset = int.from_bytes(drawn[1], "little") % (len(ids) - count * length)
        rows.append(ids[offset + place * length :][: length + 1])
    return rows


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """(ids, the same as shards) of 5,003 ids."""
    folder = tmp_path_factory.mktemp("tokens")
    ids = np.random.default_rng(0).integers(0, 257, 5003)
    layout = Layout("uint16", 257, frame_tokens=96)
    writer = ShardWriter(folder, "train", layout, shard_tokens=960)
    writer.write(ids)
    entries = writer.close()
    return ids, ShardTokens([open_shard(folder, entry, layout) for entry in entries], "uint16", cache_bytes=2000)


@pytest.fixture(autouse=True)
def no_thread_stays():
    yield
    if running():  # of a cycle of a test's own
        gc.collect()
    assert running() == 0


# Rows -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length, batch, seed", [(16, 24, 0), (7, 8, 123), (300, 16, -5)])
def test_batches_are_those_of_the_definition_for_any_number_of_processes_from_any_update(stored, length, batch, seed):
    """Of 16 rows of 300 an update crosses into the next epoch; processes read ahead by as much as they like."""
    ids, tokens = stored
    whole = [np.array(batch_of(ids.tolist(), length, seed, batch, update)) for update in range(30)]
    for world, update in [(1, 0), (2, 0), (4, 11), (8, 3), (1, 29), (8, 29)]:
        parts = [
            Batches(Rows(tokens, length, seed), batch, update=update, rank=rank, world=world, prefetch=rank % 4)
            for rank in range(world)
        ]
        for number in range(update, 30):
            got = [part.next() for part in parts]
            rows = np.concatenate([np.hstack([part.ids, part.targets[:, -1:]]) for part in got])
            np.testing.assert_array_equal(rows, whole[number])
            for part in got:
                assert part.ids.dtype == part.targets.dtype == torch.int64
                assert part.ids.is_contiguous() and part.targets.is_contiguous()
                assert torch.equal(part.ids[:, 1:], part.targets[:, :-1])
                assert part.tokens == batch * length
            assert all(part.update == number + 1 for part in parts)
        for part in parts:
            part.close()


def test_an_update_that_is_set_is_the_next(stored):
    ids, tokens = stored
    for prefetch in (0, 1, 3):
        with Batches(Rows(tokens, 16, 0), 4, prefetch=prefetch) as batches:
            for update in (0, 1, 7, 8, 8, 2, 3, 100, 0):
                batches.update = update
                right = np.array(batch_of(ids.tolist(), 16, 0, 4, update))
                np.testing.assert_array_equal(batches.next().targets, right[:, 1:])


@pytest.mark.parametrize("size", [*range(1, 70), 127, 128, 129, 1000, 4095, 4097, 65537])
def test_an_order_is_a_permutation(size):
    for seed in range(3):
        keys = np.random.default_rng(seed).integers(0, 2**64, 8, np.uint64)
        order = permuted(np.arange(size), size, keys)
        assert sorted(order.tolist()) == list(range(size))


def test_orders_are_as_many_and_as_frequent_as_chance_has_it():
    """The 24 orders of 4 rows over 480 epochs: chi squared of 23 degrees of freedom, below its 1 in 10,000."""
    rows = Rows(ArrayTokens(np.arange(5 * 3)), 3, seed=0)
    assert rows.per_epoch == 4
    starts = rows.starts(0, 4 * 480).reshape(480, 4)
    orders, counts = np.unique(starts.argsort(1), axis=0, return_counts=True)
    assert len(orders) == 24 and ((counts - 20) ** 2 / 20).sum() < 60
    # And where the rows are cut.
    assert np.bincount(starts.min(1)).min() > 120 and starts.min(1).max() == 2


@pytest.mark.parametrize("count", [4, 5, 6, 7, 8, 9, 40, 41, 1001])
def test_every_token_is_trained_on_once_an_epoch_but_for_the_rest(count):
    length = 3
    rows = Rows(ArrayTokens(np.arange(count)), length, seed=1)
    ever = np.zeros(count, int)
    for epoch in range(40):
        ids = rows.rows(epoch * rows.per_epoch, rows.per_epoch)
        assert (np.diff(ids) == 1).all()
        times = np.bincount(ids[:, 1:].ravel(), minlength=count)
        assert times.max() == 1
        assert count - times.sum() <= 2 * length
        ever += times
    assert (ever[1:] > 0).all(), "a token that is never a target, in 40 epochs"


def test_no_held_out_token_is_ever_in_a_row(tmp_path):
    """Training ids are even, held-out ones odd, in files that lie side by side."""
    layout = Layout("uint16", 200, frame_tokens=32)
    splits = {}
    for rest, split in enumerate(("train", "validation")):
        writer = ShardWriter(tmp_path, split, layout, shard_tokens=64)
        writer.write(np.random.default_rng(rest).integers(0, 100, 500) * 2 + rest)
        splits[split] = ShardTokens([open_shard(tmp_path, entry, layout) for entry in writer.close()], "uint16")
    rows = Rows(splits["train"], 10, 0)
    assert not (rows.rows(0, 20 * rows.per_epoch) % 2).any()
    assert all((window % 2).all() for window in windows(splits["validation"], 10))


def test_another_seed_or_epoch_is_another_order():
    tokens = ArrayTokens(np.arange(3000))
    starts = [Rows(tokens, 10, seed).starts(epoch * 299, 299) // 10 for seed in (0, 1) for epoch in (0, 1)]
    for index, one in enumerate(starts):
        for other in starts[:index]:
            assert (one == other).mean() < 0.05
    # So it was when it was first written: a checkpoint of another version goes on in the same order.
    assert Rows(tokens, 10, 0).starts(0, 4).tolist() == [1543, 1723, 2303, 1853]


def test_a_split_that_is_too_short_is_refused():
    for count in (0, 1, 10):
        for make in (lambda tokens: Rows(tokens, 10, 0), lambda tokens: windows(tokens, 10)):
            with pytest.raises(UserError, match=f"text has {count} tokens; rows of 10 need at least 11"):
                make(ArrayTokens(np.zeros(count, int)))
    assert Rows(ArrayTokens(np.arange(11)), 10, 0).row(12345).tolist() == list(range(11))


def test_a_batch_that_cannot_be_divided_is_refused():
    rows = Rows(ArrayTokens(np.arange(100)), 10, 0)
    with pytest.raises(UserError, match="--batch 6 cannot be divided among 4 processes; it needs a multiple of 4"):
        Batches(rows, 6, world=4)
    with pytest.raises(UserError, match="--batch 0"):
        Batches(rows, 0)
    with pytest.raises(ValueError, match="rank=2"):
        Batches(rows, 6, rank=2, world=2)


def test_windows_go_through_all_of_the_held_out_text_in_order():
    tokens = ArrayTokens(np.arange(1005, dtype=np.uint16))
    every = list(windows(tokens, 10))
    assert len(every) == len(windows(tokens, 10)) == 100
    np.testing.assert_array_equal(np.array(every), np.arange(100)[:, None] * 10 + np.arange(11))
    some = np.array(list(windows(tokens, 10, most=7)))
    np.testing.assert_array_equal(some[:, 0], [0, 140, 280, 420, 570, 710, 850])
    assert len(windows(tokens, 10, most=1000)) == 100
    batches = list(windows(tokens, 10, most=7).batches(3))
    assert [len(batch.ids) for batch in batches] == [3, 3, 1] and [batch.tokens for batch in batches] == [30, 30, 10]
    np.testing.assert_array_equal(torch.cat([batch.targets for batch in batches]), some[:, 1:])
    with pytest.raises(ValueError, match="most=0"):
        windows(tokens, 10, most=0)


# The thread -----------------------------------------------------------------------------------------------------------


class Slow:
    """Tokens of which reading takes as long as it is told to; what is read is noted."""

    def __init__(self, seconds: float = 0.0):
        self.seconds, self.reads, self.go = seconds, 0, threading.Event()
        self.go.set()

    def __len__(self) -> int:
        return 1001

    def read(self, start: int, stop: int) -> np.ndarray:
        self.go.wait()
        time.sleep(self.seconds)
        self.reads += 1
        return np.arange(start, stop)


def settled(condition) -> bool:
    """Whether it comes true within some seconds."""
    end = time.monotonic() + 20
    while not (found := bool(condition())) and time.monotonic() < end:
        time.sleep(0.002)
    return found


def ended(child: int) -> int | None:
    """The exit status of a forked process; None while it runs."""
    process, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if process else None


def running() -> int:
    return sum(thread.name == "gptkern batches" for thread in threading.enumerate())


def test_so_many_batches_are_read_ahead_and_no_more():
    tokens = Slow()
    with Batches(Rows(tokens, 10, 0), 2, prefetch=3) as batches:
        assert tokens.reads == 0  # nothing before it is asked for
        batches.next()
        assert settled(lambda: tokens.reads == 2 * (1 + 3))
        time.sleep(0.05)
        assert tokens.reads == 8
        batches.next()
        assert settled(lambda: tokens.reads == 10)
        line = batches._ahead._line
        for number in range(60):  # first the thread is waited for, then the training
            assert number < 40 or settled(lambda: len(line.ready) == 4)
            batches.next()
            assert line.made.qsize() <= 6 and line._allowed.qsize() <= 6
    assert running() == 0


def test_a_thread_ends_with_its_batches_however_they_end():
    rows = Rows(Slow(), 10, 0)
    for end in ("close", "drop", "raise", "cycle"):
        batches = Batches(rows, 2)
        batches.next()
        assert running() == 1
        gone = weakref.ref(batches)
        if end == "close":
            batches.close()
            batches.close()
            with pytest.raises(RuntimeError, match="closed"):
                batches.next()
        elif end == "raise":
            with pytest.raises(ZeroDivisionError), batches:
                1 / 0  # noqa: B018
        elif end == "cycle":
            batches.itself = batches
        del batches
        gc.collect()
        assert gone() is None and running() == 0
    Batches(rows, 2).close()  # which has no thread yet


def test_an_error_comes_with_the_batch_that_it_belongs_to_and_comes_again():
    class Damaged(Slow):
        def read(self, start, stop):
            if start <= 500 < stop - 1:
                raise UserError("train-00002.zst: frame 17 is damaged")
            return super().read(start, stop)

    rows = Rows(Damaged(), 10, 0)
    number = next(row for row in range(rows.per_epoch) if rows.starts(row, 1)[0] <= 500 < rows.starts(row, 1)[0] + 10)
    update = number // 2
    assert update > 3
    for prefetch in (0, 4):
        batches = Batches(rows, 2, prefetch=prefetch)
        for _ in range(update):
            batches.next()
        for _ in range(3):
            with pytest.raises(UserError, match="frame 17"):
                batches.next()
            assert batches.update == update
        assert running() == 0
        batches.update = update + 1  # which is whole
        assert batches.next().tokens == 20
        batches.close()


def test_an_interrupt_ends_the_wait_and_loses_no_batch():
    """Ctrl-C at many moments: the updates that `next` returned follow one another without a hole."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    rows = Rows(Slow(0.0005), 10, 0)
    batches = Batches(rows, 2, prefetch=2)
    right, got, interrupts = rows.rows(0, 400).reshape(200, 2, 11), [], 0
    try:
        while len(got) < 100 or interrupts < 20:
            signal.setitimer(signal.ITIMER_REAL, 0.0003 + 0.0007 * (interrupts % 7))
            signal.signal(signal.SIGALRM, signal.default_int_handler)
            try:
                while len(got) < 200:
                    update = batches.update
                    got.append((update, batches.next()))
                    assert batches.update == update + 1
                break
            except KeyboardInterrupt:
                interrupts += 1
                if batches.update > len(got):
                    # It came after the batch was counted, as of what the trainer does with it: it goes back.
                    batches.update = len(got)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, before)
    assert interrupts >= 20 and [update for update, _ in got] == list(range(len(got)))
    for update, batch in got:
        np.testing.assert_array_equal(batch.ids, right[update, :, :-1])
    batches.close()
    assert settled(lambda: running() == 0)


def ends_well(work) -> bool:
    """Whether a forked process does the work, returns true and ends, some locks being held while it is forked."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if work() else 1
        finally:
            os._exit(status)
    try:
        return settled(lambda: ended(child) == 0)
    except ChildProcessError:  # it ended with another status
        return False
    finally:
        with contextlib.suppress(OSError):
            os.kill(child, signal.SIGKILL)


@contextlib.contextmanager
def held_by_a_thread(lock):
    taken, over = threading.Event(), threading.Event()

    def hold():
        with lock:
            taken.set()
            over.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_a_forked_process_reads_on_and_ends():
    """The thread is the parent's; the child's own one reads the same batches."""
    rows = Rows(Slow(), 10, 0)
    batches = Batches(rows, 2, prefetch=2)
    batches.next()

    def read():
        for update in (1, 2):
            if not np.array_equal(batches.next().ids, rows.rows(2 * update, 2)[:, :-1]):
                return False
        batches.close()
        gc.collect()
        return True

    assert ends_well(read) and read()


def test_shards_are_read_by_threads_and_by_forked_processes(stored):
    ids, tokens = stored
    wrong = []

    def read(seed):
        draw = np.random.default_rng(seed)
        for _ in range(100):
            start, stop = sorted(draw.integers(0, 5004, 2))
            if not np.array_equal(tokens.read(start, min(stop, start + 300)), ids[start : min(stop, start + 300)]):
                wrong.append((start, stop))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    with held_by_a_thread(tokens._lock):
        assert ends_well(lambda: np.array_equal(tokens.read(100, 900), ids[100:900]))


PROGRAM = """
import sys, time, threading, signal
import numpy as np
from gptkern.training.data.loader import Batches
from gptkern.training.data.rows import Rows

class Stuck:
    def __len__(self): return 1001
    def read(self, start, stop):
        if reads and sys.argv[1] == "interrupted": time.sleep(0.05)
        reads.append(start)
        return np.arange(start, stop)

reads = []
batches = Batches(Rows(Stuck(), 10, 0), 4)
batches.next()
print("reading", flush=True)
while sys.argv[1] == "interrupted":
    batches.next()
"""


@pytest.mark.parametrize("how", ["left", pytest.param("interrupted", marks=pytest.mark.deep)])
def test_a_program_that_closes_nothing_ends(how):
    program = subprocess.Popen(
        [sys.executable, "-X", "faulthandler", "-c", PROGRAM, how],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert program.stdout.readline() == "reading\n"
    if how == "interrupted":
        program.send_signal(signal.SIGINT)
    try:
        _, errors = program.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        # Where each thread stands.
        program.send_signal(signal.SIGABRT)
        pytest.fail(f"it goes on:\n{program.communicate(timeout=60)[1]}")
    assert program.returncode == (0 if how == "left" else -signal.SIGINT)
    assert ("KeyboardInterrupt" in errors) == (how == "interrupted") and "Fatal" not in errors


# A text ---------------------------------------------------------------------------------------------------------------


def test_a_text_is_a_store(tmp_path):
    path = tmp_path / "a text"
    path.write_bytes(bytes(range(256)) * 40)
    loaded = text.load(str(path))
    store = text.text_store(loaded)
    assert store.name == "a text" and store.manifest is None and store.tokenizer.vocab_size == 256
    train, held_out = (part.read(0, len(part)) for part in (store.train, store.validation))
    assert bytes(train) == bytes(loaded.train.tolist()) and bytes(held_out) == bytes(loaded.validation.tolist())
    assert len(train) + len(held_out) == 10240
    path.write_bytes(bytes(range(256)) * 39 + bytes(256))
    assert text.text_store(text.load(str(path))).fingerprint != store.fingerprint
    assert Batches(Rows(store.train, 8, 0), 2, prefetch=0).next()._fields == Batch._fields
