"""`gptkern data`: what it prints, what it refuses in one line, and how it ends."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys

import pytest
from test_data_preparing import contents, streams
from test_data_sources import some_text

from gptkern import cli


@pytest.fixture
def texts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(some_text(1, 200_000))
    (tmp_path / "lines.jsonl").write_text("".join(f'{{"body": "line {n}", "text": ""}}\n' for n in range(100)))
    return tmp_path


@pytest.fixture
def refused(texts, capsys):
    """refused(*arguments): the one line that the command ends with before it has changed anything."""

    def state():
        return {path: path.lstat().st_mtime_ns for path in texts.rglob("*")}

    def run(*arguments):
        before = state()
        assert cli.main(["data", *map(str, arguments)]) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.count("\n") == 1 and printed.err.startswith("gptkern data: ")
        assert state() == before and len(printed.err) < 350
        return printed.err.removeprefix("gptkern data: ")

    return run


def command(*arguments, **options):
    program = "import sys; from gptkern import cli; sys.exit(cli.main())"
    return subprocess.run([sys.executable, "-c", program, "data", *arguments], capture_output=True, **options)


def test_what_it_prints(texts, capsys):
    assert cli.main(["data", "text.txt", "lines.jsonl", "--field", "body", "--out", "out", "--held-out", "0.3"]) == 0
    printed = capsys.readouterr().out
    manifest = json.loads((texts / "out/manifest.json").read_text())
    splits, size = manifest["splits"], manifest["text_bytes"]
    rows = {line.split()[0]: line.split() for line in printed.splitlines()[1:3]}
    for name, split in splits.items():
        assert rows[name][1:4] == [f"{split['documents']:,}", f"{split['tokens']:,}", "1"]
    on_disk = sum(
        (texts / "out" / shard["file"]).stat().st_size for split in splits.values() for shard in split["shards"]
    )
    tokens = sum(split["tokens"] for split in splits.values())
    assert size == (texts / "text.txt").stat().st_size + sum(len(f"line {n}") for n in range(100))
    assert tokens == size + sum(split["documents"] for split in splits.values())
    assert f"{on_disk / (2 * tokens):.2f} × raw ids of 16 bits" in printed
    gzipped = len(gzip.compress((texts / "text.txt").read_bytes() + b"".join(b"line %d" % n for n in range(100)), 6))
    found = float(printed.partition(" × the text under gzip")[0].split()[-1])
    assert abs(found - on_disk / gzipped) < 0.02
    assert "gptkern train --data out" in printed
    assert cli.main(["data", "text.txt", "lines.jsonl", "--field", "body", "--out", "out", "--held-out", "0.3"]) == 0
    assert "where it was already" in capsys.readouterr().out


def test_ids_of_32_bits(texts, capsys):
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(letters | {"<|endoftext|>": 70_000}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.add_special_tokens(["<|endoftext|>"])
    inner.save("wide.json")
    assert cli.main(["data", "text.txt", "--tokenizer", "wide.json", "--out", "out", "--held-out", "0"]) == 0
    assert "× raw ids of 32 bits" in capsys.readouterr().out
    ids = streams("out")["train"]
    assert ids[-1] == 70_000 and len(ids) == (texts / "text.txt").stat().st_size + 1


OPTIONS = [
    ("--held-out nan", "--held-out is nan; it needs a finite number of at least 0 and below 1"),
    ("--held-out 1", "--held-out is 1; it needs a finite number"),
    ("--held-out -0.1", "--held-out is -0.1; it needs a finite number"),
    ("--held-out inf", "--held-out is inf"),
    ("--held-out some", "--held-out is some"),
    ("--tokenizer=", "--tokenizer is empty; it needs bytes, bpe:N, or the path of a tokenizer.json"),
    ("--tokenizer none", "--tokenizer none: there is no such file; it needs bytes, bpe:N, or the path"),
    ("--tokenizer bpe", "--tokenizer is bpe; it needs bpe:N, with N from 258 to 1048576"),
    ("--tokenizer bpe:", "--tokenizer is bpe:; it needs bpe:N"),
    ("--tokenizer bpe:257", "--tokenizer is bpe:257; it needs bpe:N, with N from 258"),
    ("--tokenizer bpe:1e3", "--tokenizer is bpe:1e3; it needs bpe:N"),
    ("--tokenizer bpe:-5", "--tokenizer is bpe:-5; it needs bpe:N"),
    ("--tokenizer bpe:٣٠٠", "--tokenizer is bpe:٣٠٠; it needs bpe:N"),
    ("--tokenizer bpe:1048577", "it needs bpe:N, with N from 258 to 1048576"),
    (f"--tokenizer bpe:{'9' * 5000}", "it needs bpe:N, with N from 258 to 1048576"),
    ("--tokenizer text.txt", "--tokenizer text.txt: it is no JSON"),
    ("--tokenizer .", "--tokenizer .: it is no file; it needs a tokenizer.json"),
    ("--field=", "--field is empty; it needs the name of a field"),
    ("--field body", "--field body is of JSONL, of which nothing was given"),
    ("--overwritten", "unrecognized argument --overwritten; did you mean --overwrite?"),
    ("none", "TEXT none: No such file or directory; it needs a file, a folder, or -"),
    ("lines.jsonl", "TEXT lines.jsonl: it has no document with text; it needs text"),
    (
        "lines.jsonl --field id",
        "TEXT lines.jsonl: line 1 has no field id: --field names another one (it has body, text)",
    ),
    ("- -", "TEXT - is there twice; it can be read but once"),
    ("/dev/null", "TEXT /dev/null: it is a device; it needs a file or a folder"),
    ("--out text.txt", "--out text.txt: text.txt is no folder; it needs a folder that can be written"),
    ("--out=", "--out is empty; it needs a folder that can be written"),
    ("--out text.txt/x", "--out text.txt/x: text.txt is no folder"),
]


@pytest.mark.parametrize("arguments, words", OPTIONS, ids=[arguments[:20] for arguments, _ in OPTIONS])
def test_nonsense_is_one_line(refused, arguments, words):
    assert words in refused("text.txt", *arguments.split(), *(() if "--out" in arguments else ("--out", "out")))


def test_what_is_missing(refused, capsys):
    assert "the following arguments are required: TEXT" in refused("--out", "out")
    assert "--out" in refused("text.txt")


def test_damaged_texts_are_one_line_and_leave_nothing(refused, texts):
    for name, (data, words) in {
        "a.gz": (gzip.compress(b"to be" * 1000)[:-3], "a.gz: it is cut off"),
        "a.bin": (bytes(range(256)), "a.bin: it is binary: byte 0 is zero"),
        "a.jsonl": (b'{"text": "a"}\n{"text"', "a.jsonl: line 2 is no JSON"),
        "empty": (b"", "empty: it is empty"),
        "\x1b[31m\n": (b"\xff", r"'\x1b[31m\n': byte 0 is not UTF-8"),
    }.items():
        (texts / name).write_bytes(data)
        assert words in refused("text.txt", name, "--out", "new/out")
        if data:
            assert words.split(": ", 1)[1] in refused(".", "--out", "../elsewhere" if False else texts.parent / "out")
        (texts / name).unlink()


def test_standard_input(texts, capsys, monkeypatch):
    def run(data, *arguments):
        (texts / "input").write_bytes(data)
        with (texts / "input").open() as stream:
            monkeypatch.setattr(sys, "stdin", stream)
            status = cli.main(["data", "-", *arguments])
        return status, *capsys.readouterr()

    text = (texts / "text.txt").read_bytes()
    piped = command("-", "--out", "piped", input=text)
    assert piped.returncode == 0, piped.stderr
    assert run(text, "--out", "redirected")[0] == cli.main(["data", "text.txt", "--out", "file"]) == 0
    assert streams("piped") == streams("redirected") == streams("file")
    assert contents(texts / "piped") == contents(texts / "redirected")
    status, out, _ = run(text, "--out", "piped")
    assert status == 0 and "where it was already" in out
    for data, words in {b"": "it is empty", b"\xff": "byte 0 is not UTF-8"}.items():
        status, out, error = run(data, "--out", "other")
        assert (status, out) == (2, "") and error.startswith(f"gptkern data: TEXT standard input: {words}")
        assert not (texts / "other").exists()
    status, _, error = run(text + b"more", "--out", "piped")
    assert status == 2 and "holds other tokens: --overwrite replaces them" in error
    assert contents(texts / "piped") == contents(texts / "redirected")
    closed = command("-", "--out", "other", preexec_fn=lambda: os.close(0))
    assert closed.returncode == 2 and b"TEXT -: standard input is closed; it needs text" in closed.stderr


@pytest.mark.parametrize("name", ["SIGINT", pytest.param("SIGTERM", marks=pytest.mark.deep)])
def test_a_signal_ends_it_with_130_and_the_same_command_goes_on(texts, capsys, name):
    program = (
        "import os, signal, sys; from gptkern import cli; from gptkern.training.data import preparing\n"
        "preparing.SECONDS_BETWEEN_STATES, preparing.BATCH_BYTES = 0.0, 2**14\n"
        "save, states = preparing.Work.save, []\n"
        "def saved(self, state):\n"
        "    save(self, state); states.append(state)\n"
        f"    if len(states) == 4: os.kill(os.getpid(), signal.{name})\n"
        "preparing.Work.save = saved\n"
        "sys.exit(cli.main())"
    )
    arguments = ["data", "text.txt", "--out", "out"]
    process = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert process.returncode == 130, process.stderr
    assert process.stdout == "interrupted: the same command goes on from there\n" and process.stderr == ""
    assert not (texts / "out/manifest.json").exists()
    assert cli.main(arguments) == 0 and "after an earlier run" in capsys.readouterr().out
    assert cli.main(["data", "text.txt", "--out", "whole"]) == 0
    assert contents(texts / "out") == contents(texts / "whole")


def test_names_that_are_no_text(texts):
    """A file's name may be any bytes, and is nowhere read as markup."""
    (texts / "[red]x").mkdir()
    with open(os.fsencode(texts) + b"/[red]x/\xff.txt", "wb") as file:
        file.write(b"to be " * 100)
    found = command("[red]x", "--out", "[bold]out", "--held-out", "0", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert found.returncode == 0 and b"[bold]out" in found.stdout, found.stderr
    with open(os.fsencode(texts) + b"/[red]x/\xff.txt", "ab") as file:
        file.write(b"\xff")
    found = command("[red]x", "--out", "other", "--held-out", "0")
    assert found.returncode == 2 and found.stderr.count(b"\n") == 1 and b"byte 600 is not UTF-8" in found.stderr
