"""Texts as a stream of pieces: what is found, in which order, how it is cut, and what is refused with its place."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import random
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard

from gptkern.formatting import shown
from gptkern.training.data import sources
from gptkern.training.data.sources import Reader
from gptkern.training.errors import UserError


def reader(path, field="text") -> Reader:
    return Reader(next(sources.walk([str(path)], {})), field)


def pieces(path, *place, field="text"):
    with reader(path, field) as opened:
        return list(opened.pieces(*place))


def cut(text: bytes) -> list[bytes]:
    """The rule of docs/recipe.md, by slices and searches."""
    parts = []
    while len(text) > 16384:
        window = text[8192:16384]
        paragraph = re.search(rb"\n[ \t\r]*\n", window)
        if paragraph:
            end = 8192 + paragraph.end()
        elif b"\n" in window:
            end = 8192 + window.index(b"\n") + 1
        elif b" " in window:
            end = 8192 + window.index(b" ")
        else:
            end = 16384
            while text[end] & 0xC0 == 0x80:
                end -= 1
        parts.append(text[:end])
        text = text[end:]
    return [*parts, text] if text else parts


def some_text(seed: int, length: int) -> str:
    """Lines and paragraphs, and stretches without either, without spaces, of characters of one to four bytes."""
    draw = random.Random(seed)
    parts: list[str] = []
    while sum(map(len, parts)) < length:
        words = ["".join(draw.choices("abcäß日本😀", k=draw.randint(1, 9))) for _ in range(draw.randint(1, 4000))]
        parts.append(draw.choice([" ", "\n", "\n\n", "", "\r\n", "\n \n"]).join(words))
    return "".join(parts)


PACK = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("length", [1, 5000, 16384, 16385, 100_000, 600_000])
def test_text_is_cut_as_the_rule_says_and_goes_on_from_each_place(tmp_path, packed, length):
    data = some_text(length, length).encode()[: length if length < 5000 else None]
    path = tmp_path / f"text{packed}"
    path.write_bytes(PACK[packed](data))
    found = pieces(path)
    assert [piece.text for piece in found] == cut(data)
    assert [piece.last for piece in found] == [False] * (len(found) - 1) + [True]
    assert [piece.end for piece in found] == list(itertools.accumulate(map(len, cut(data))))
    for number in {0, 1, len(found) // 2, len(found) - 1}:
        if number < len(found):
            assert pieces(path, found[number].end, 0) == found[number + 1 :]


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("name", ["lines.jsonl", "LINES.NDJSON", "lines", "lines.txt"])
def test_lines_are_documents_of_any_length(tmp_path, packed, name):
    texts = ["one\ntwo", "", "😀" * 50_000, "\u0000", "<|endoftext|>", "x" * 300_000]
    lines = [json.dumps({"id": 1, "body": text}, ensure_ascii=number % 2 == 0) for number, text in enumerate(texts)]
    data = "\n".join(["", lines[0], "  ", *lines[1:]]).replace("\n", "\r\n").encode()
    path = tmp_path / f"{name}{packed}"
    path.write_bytes(PACK[packed](data))
    found = pieces(path, field="body")
    assert [piece.text.decode() for piece in found] == texts
    assert all(piece.last for piece in found) and [piece.line for piece in found] == [2, 4, 5, 6, 7, 8]
    for number, piece in enumerate(found):
        assert pieces(path, piece.end, piece.line, field="body") == found[number + 1 :]


def test_a_name_is_not_asked_what_the_content_says(tmp_path):
    (tmp_path / "noname").write_bytes(gzip.compress(b"to be\n"))
    (tmp_path / "other.gz").write_bytes(PACK[".zst"](b"to be\n"))
    frames = zstandard.ZstdCompressor().compress(b"to "), zstandard.ZstdCompressor().compress(b"be\n")
    skippable = bytes.fromhex("502a4d18") + (3).to_bytes(4, "little") + b"???"
    (tmp_path / "frames").write_bytes(skippable + frames[0] + skippable + frames[1] + skippable)
    (tmp_path / "members.gz").write_bytes(gzip.compress(b"to ") + gzip.compress(b"be\n") + bytes(8))
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbfto be\n")
    (tmp_path / "mark.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "to be\\n"}')
    (tmp_path / "brace.txt").write_bytes(b"{to be\n")
    (tmp_path / "empty_object").write_bytes(b"{}\nto be\n")
    found = {path.name: b"".join(piece.text for piece in pieces(path)) for path in tmp_path.iterdir()}
    assert found.pop("brace.txt") == b"{to be\n" and found.pop("empty_object") == b"{}\nto be\n"
    assert len(found) == 6 and set(found.values()) == {b"to be\n"}


ZSTD = PACK[".zst"](b"to be or not to be " * 2000)
GZIP = gzip.compress(b"to be or not to be " * 2000)

REFUSED = {
    "zero.txt": (b"abc\0def", "it is binary: byte 3 is zero"),
    "late_zero.txt": (b"a b\n" * 10_000 + b"\0", "it is binary: byte 40000 is zero"),
    "latin.txt": ("né à".encode("latin-1"), "byte 1 is not UTF-8; it needs text in UTF-8"),
    "late.txt": (b"a b\n" * 10_000 + b"\xff", "byte 40000 is not UTF-8"),
    "half.txt": ("é".encode()[:1], "byte 0 is not UTF-8"),
    "late.txt.gz": (gzip.compress(b"a b\n" * 10_000 + b"\xff"), "byte 40000 of what gzip holds is not UTF-8"),
    "image.png": (b"\x89PNG\r\n\x1a\n\0\0", "it is binary: byte 0 is not UTF-8"),
    "wide.txt": ("to be".encode("utf-16"), "it is UTF-16"),
    "a.zip": (b"PK\x03\x04abc", "it is a zip archive"),
    "a.parquet": (b"PAR1abc", "it is Parquet"),
    "a.gz": (b"to be", "by its name it is compressed, and it holds neither gzip nor zstd"),
    "cut.gz": (GZIP[:-9], f"it is cut off: its gzip data goes on after its last byte, {len(GZIP) - 10}"),
    "cut.zst": (ZSTD[:-1], f"it is cut off: its zstd data goes on after its last byte, {len(ZSTD) - 2}"),
    "bad.gz": (GZIP[:-8] + b"crc!" + GZIP[-4:], "its gzip data is damaged near byte"),
    "bad.zst": (ZSTD[:-4] + b"sum!", "its zstd data is damaged near byte"),
    "after.gz": (GZIP + b"garbage", "its gzip data is damaged near byte"),
    "after.zst": (ZSTD + b"garbage", "its zstd data is damaged near byte"),
    "twice.gz": (gzip.compress(GZIP), "byte 1 of what gzip holds is not UTF-8"),
    "json.jsonl": (b'{"text": "a"}\n{"text": a}\n', "line 2 is no JSON: Expecting value"),
    "cut.jsonl": (b'{"text": "a"}\n{"text": "b', "line 2 is no JSON: Unterminated string"),
    "list.jsonl": (b'["text"]\n', 'line 1 is no JSON object; it needs one with the field "text"'),
    "field": (b'{"id": 1, "body": "a"}\n', "line 1 has no field text: --field names another one (it has id, body)"),
    "null.jsonl": (b'{"text": null}\n', "line 1: the field text is null; it needs a string"),
    "flag.jsonl": (b'{"text": true}\n', "line 1: the field text is true or false"),
    "half.jsonl": (b'{"text": "\\ud83d"}\n', "line 1: the text holds half of a surrogate pair"),
    "latin.jsonl": (b'{"text": "a"}\n\n{"text": "\xe9"}\n', "line 3 is not UTF-8 (its byte 10)"),
    "deep.jsonl": (b'{"text": ' + b"[" * 100_000, "line 1 is no JSON: maximum recursion depth exceeded"),
    "digits.jsonl": (b'{"text": ' + b"9" * 10_000 + b"}", "line 1 is no JSON: Exceeds the limit"),
    "zero.jsonl": (b'{"text": "a\0b"}', "line 1 is no JSON: Invalid control character"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_file_and_the_place(tmp_path, name):
    data, words = REFUSED[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as error:
        pieces(tmp_path / name)
    line = str(error.value)
    assert line.startswith(f"TEXT {shown(str(tmp_path / name))}: ") and words in line, line
    assert "\n" not in line and len(line) < 300


@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_no_beginning_of_a_compressed_file_passes_for_the_whole(tmp_path, packed):
    whole = PACK[packed](b"".join(b"line %d of a text\n" % number for number in range(40)))
    path = tmp_path / f"a{packed}"
    for length in range(1, len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"cut off|by its name it is compressed"):
            pieces(path)


def test_empty_lines_are_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n" * 400_000 + b"  \r\n" * 100_000 + b'{"text": "a"}\n' + b"\n" * 300_000 + b"no\n")
    with pytest.raises(UserError, match="line 800002 is no JSON"):
        pieces(path)


def test_a_line_of_jsonl_has_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LONGEST_LINE", 300_000)
    line = json.dumps({"text": "a" * 299_980})
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "b"}}\n{line:300000}\n{{"text": "c"}}')
    assert len(pieces(path)) == 3
    for end in ("\n", ""):
        path.write_text(f'{{"text": "b"}}\n{line:300001}{end}')
        with pytest.raises(UserError, match=r"line 2 is longer than 300 kB; it needs shorter documents"):
            pieces(path)


def zstd_bomb(letter: bytes, first: bytes = b"") -> bytes:
    """A frame of 256 MiB: `first`, and blocks that say "128 KiB of this letter" in four bytes."""
    window, block = b"\x58", 2**17
    raw = (len(first) << 3).to_bytes(3, "little") + first
    last = (1).to_bytes(3, "little")
    return sources.ZSTD + b"\0" + window + raw + ((block << 3 | 2).to_bytes(3, "little") + letter) * 2**11 + last


BOMBS = {
    "zeros.zst": zstd_bomb(b"\0"),
    "letters.zst": zstd_bomb(b"a"),
    "lines.zst": zstd_bomb(b"\n"),
    "line.jsonl.zst": zstd_bomb(b"a", b'{"text": "'),
    "lines.jsonl.zst": zstd_bomb(b"\n", b'{"text": "a"}'),
    "letters.gz": gzip.compress(b"a" * 2**24, 1) * 16,
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_grows_when_it_is_decompressed_is_read_in_bounded_memory(tmp_path, name):
    (tmp_path / name).write_bytes(BOMBS[name])
    program = (
        "import itertools, re, sys\n"
        # The resource module's figure is that of the process that forked, where that one was larger.
        "def peak(): return int(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])\n"
        "from gptkern.training.data import sources\nfrom gptkern.training.errors import UserError\n"
        "source = next(sources.walk([sys.argv[1]], {}))\n"
        "before = peak()\n"
        "try:\n"
        "    with sources.Reader(source) as reader:\n"
        "        for piece in itertools.islice(reader.pieces(), 20000): pass\n"
        "except UserError as error: print(error, file=sys.stderr)\n"
        "print(peak() - before)\n"
    )
    process = subprocess.run([sys.executable, "-c", program, str(tmp_path / name)], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    words = {"zeros.zst": "byte 0 of what zstd holds is zero", "line.jsonl.zst": "line 1 is longer than 16.8 MB"}
    assert words.get(name, "") in process.stderr and bool(process.stderr) == (name in words)
    # KiB: one step of zstd makes 64 MiB at most, and holds them twice while they are joined.
    assert int(process.stdout) < 200 * 1024


def test_a_frame_with_a_window_of_gigabytes_is_refused(tmp_path):
    parameters = zstandard.ZstdCompressionParameters(window_log=30)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path = tmp_path / "a.zst"
    path.write_bytes(compressor.compress(b"to be") + compressor.flush())
    with pytest.raises(UserError, match=r"zstd data is damaged near byte .*too much memory"):
        pieces(path)


# Folders --------------------------------------------------------------------------------------------------------------


def walked(*texts) -> list[str]:
    return [source.path for source in sources.walk([str(text) for text in texts], {})]


def test_folders_are_walked_in_the_order_of_their_names(tmp_path):
    names = [
        "b",
        "a/z",
        "a/b/c",
        "a.txt",
        "a-b/x",
        "Z",
        "é",
        "a/ü😀",
        "a b",
        "_",
        "a/.hidden",
        ".git/config",
        "10",
        "9",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    expected = sorted(path for path in tmp_path.rglob("*") if path.is_file() and "/." not in str(path))
    assert walked(tmp_path) == [str(path) for path in expected]
    assert len(expected) == len(names) - 2
    assert walked(tmp_path / "b", tmp_path / "a", tmp_path / ".git/config")[::3] == [
        str(tmp_path / "b"), str(tmp_path / "a/ü😀"),
    ]  # fmt: skip


def test_links_are_followed_and_loops_refused(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/text").write_text("to be")
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "a/link").symlink_to("text")
    assert walked(tmp_path) == [str(tmp_path / name) for name in ("a/link", "a/text", "b/link", "b/text")]
    (tmp_path / "a/up").symlink_to("..")
    with pytest.raises(UserError, match=r"a/up: it is a link that leads back to a folder that it is in"):
        walked(tmp_path)


def test_a_folder_may_be_deeper_than_pythons_stack(tmp_path):
    before = os.getcwd()
    try:
        os.chdir(tmp_path)
        for _ in range(1200):
            os.mkdir("a")
            os.chdir("a")
        Path("text").write_text("to be")
        os.chdir(before)
        assert len(walked(tmp_path)) == 1
    finally:
        # pytest's own clean-up of old folders is recursive.
        os.chdir(before)
        subprocess.run(["rm", "-rf", str(tmp_path / "a")], check=True)


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert sources.is_pipe(str(tmp_path / "pipe")) and sources.is_pipe("-")
    with pytest.raises(UserError, match="pipe: it is neither a file nor a folder"):
        walked(tmp_path)
    with socket.socket(socket.AF_UNIX) as listening:
        before = os.getcwd()
        os.chdir(tmp_path)
        try:
            listening.bind("s")
        finally:
            os.chdir(before)
        with pytest.raises(UserError, match="it is a socket"):
            sources.is_pipe(str(tmp_path / "s"))
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "around").symlink_to("around")
    for text, words in {
        "": "TEXT is empty", "/dev/zero": "it is a device", str(tmp_path / "dangling"): "No such file",
        str(tmp_path / "around"): "Too many levels", "a" * 5000: "File name too long", "a\0b": "null byte",
        str(tmp_path / "none"): "No such file or directory; it needs a file, a folder, or -",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=words) as error:
            sources.is_pipe(text)
        assert len(str(error.value)) < 250


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("to be\n" * 100_000)
    with reader(path) as opened:
        found = opened.pieces()
        next(found)
        with path.open("a") as file:
            file.write("or not")
        with pytest.raises(Exception, match="it was changed while it was read"):
            list(found)
