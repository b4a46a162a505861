"""Byte planes: every bit comes back, damage never does, and no memory is taken for what a file claims and has not."""

from __future__ import annotations

import hashlib
import json
import struct

import numpy as np
import pytest
import torch
import zstandard
from model_folders import header_of
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from gptkern.training import byte_planes
from gptkern.training.byte_planes import FRAME, BytePlanes

INTEGERS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(INTEGERS[tensor.dtype])


def any_bits(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Whatever bits there are, NaNs of any payload among them."""
    integers = {2: np.int16, 4: np.int32}[dtype.itemsize]
    limits = np.iinfo(integers)
    values = np.random.default_rng(0).integers(limits.min, limits.max, shape, integers, endpoint=True)
    return torch.from_numpy(np.asarray(values)).view(dtype)


SPECIAL = [
    0x7F800001,
    0xFF812345,
    0x7FFFFFFF,
    0xFFFFFFFF,
    0x7F800000,
    0xFF800000,
    0x80000000,
    0,
    1,
    0x80000001,
    0x7FFFFF,
]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "planes.safetensors"


def comes_back(tensors: dict[str, torch.Tensor], path) -> byte_planes.Sizes:
    sizes = byte_planes.save(tensors, path)
    planes = BytePlanes(path)
    assert planes.headers.keys() == tensors.keys()
    for name, tensor in tensors.items():
        read = planes.read(name)
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(bits(read), bits(tensor)), name
    return sizes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_each_of_the_values_of_16_bits_comes_back(path, dtype):
    comes_back({"all": torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).view(256, 256)}, path)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_every_bit_of_every_shape_comes_back(path, dtype):
    shapes = [(), (1,), (0,), (0, 5), (3, 0, 2), (7,), (3, 5, 7), (FRAME // 1024, 1024), (FRAME + 1,)]
    tensors = {f"a/{index} é": any_bits(dtype, *shape) for index, shape in enumerate(shapes)}
    tensors["turned"] = any_bits(dtype, 6, 10).T
    tensors["every other"] = any_bits(dtype, 6, 10)[:, ::2]
    special = torch.tensor(SPECIAL, dtype=torch.int64).to(torch.int32)
    tensors["special"] = (special if dtype == torch.float32 else (special >> 16).to(torch.int16)).view(dtype)
    sizes = comes_back(tensors, path)
    assert sizes.raw == sum(tensor.numel() * dtype.itemsize for tensor in tensors.values())
    assert sizes.stored == path.stat().st_size


def test_no_tensor_at_all_and_one_of_another_dtype(path):
    assert comes_back({}, path).raw == 0
    with pytest.raises(TypeError, match=r"whole is torch\.int64; it needs bfloat16, float16 or float32"):
        byte_planes.save({"good": torch.ones(2), "whole": torch.ones(2, dtype=torch.int64)}, path)


def test_weights_shrink_to_what_their_exponents_and_digits_hold(path):
    """Of normal weights the exponent holds 2.55 bits: (2.55 + 8) / 16 and (2.55 + 24) / 32, at best."""
    weights = 0.02 * torch.randn(2**20, generator=torch.Generator().manual_seed(0))
    assert 0.659 < comes_back({"weight": weights.bfloat16()}, path).ratio < 0.667
    assert 0.829 < comes_back({"weight": weights}, path).ratio < 0.835
    # Digits that are not there cost nothing.
    assert comes_back({"weight": weights.bfloat16().float()}, path).ratio < 0.36


def test_each_plane_is_zstd_frames_that_anybody_can_read(path):
    weight = any_bits(torch.bfloat16, FRAME + 5)
    byte_planes.save({"weight": weight}, path)
    planes = load_file(path)
    frames = json.loads(header_of(path)["__metadata__"]["tensors"])["weight"]["frames"]
    for number in range(2):
        data = planes[f"weight/{number}"].tobytes()
        first, second = frames[number]
        whole = b"".join(zstandard.ZstdDecompressor().decompress(part) for part in (data[:first], data[first:]))
        assert len(data) == first + second and len(whole) == FRAME + 5
        values = bits(weight).numpy().view(np.uint16).astype(np.uint32)
        turned = (values * 2 % 2**16) + values // 2**15
        assert np.array_equal(np.frombuffer(whole, np.uint8), (turned // 256 if number == 0 else turned % 256))
        assert zstandard.get_frame_parameters(data[:first]).has_checksum


# --- Damage and claims ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.deep)])
def test_no_changed_byte_is_read_as_weights(path, step):
    """A changed byte is an error, or changes nothing that is read."""
    tensors = {"a": any_bits(torch.bfloat16, 3, 5), "b": any_bits(torch.float32, 4)}
    byte_planes.save(tensors, path)
    whole = path.read_bytes()
    refused = 0
    for place in range(0, len(whole), step):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        try:
            planes = BytePlanes(path)
            read = {name: planes.read(name) for name in planes.headers}
        except ValueError:
            refused += 1
            continue
        assert read.keys() == tensors.keys(), place
        for name, tensor in tensors.items():
            assert read[name].dtype == tensor.dtype and torch.equal(bits(read[name]), bits(tensor)), place
    # Of the header a few bytes say nothing (a blank, one that is escaped, or of the descriptor of a frame).
    assert refused > 0.95 * len(whole) / step


def rewritten(path, change, planes=lambda planes: planes) -> None:
    """The file with another description of its tensors, whose digest is right."""
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    entries = json.loads(metadata["tensors"])
    text = json.dumps(change(entries))
    metadata |= {"tensors": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    save_file(planes(load_file(path)), path, metadata)


CLAIMS = {
    "a shape of terabytes": lambda entry: entry | {"shape": [2**40]},
    "a shape past 64 bits": lambda entry: entry | {"shape": [2**40, 2**40]},
    "a shape of floats": lambda entry: entry | {"shape": [6.0]},
    "a shape of booleans": lambda entry: entry | {"shape": [6, True]},
    "a negative shape": lambda entry: entry | {"shape": [-2, -3]},
    "65 dimensions": lambda entry: entry | {"shape": [6, *[1] * 64]},
    "no shape": lambda entry: {"dtype": "BF16", "frames": entry["frames"]},
    "another number of elements": lambda entry: entry | {"shape": [5]},
    "another dtype of the same size": lambda entry: entry | {"dtype": "I16"},
    "a dtype of another size": lambda entry: entry | {"dtype": "F32"},
    "a plane too few": lambda entry: entry | {"frames": entry["frames"][:1]},
    "frames of no number": lambda entry: entry | {"frames": [["1"], ["2"]]},
    "frames of less than nothing": lambda entry: entry | {"frames": [[-1], entry["frames"][1]]},
    "frames of other sizes": lambda entry: entry | {"frames": [[entry["frames"][0][0] + 1], entry["frames"][1]]},
    "frames beyond the file": lambda entry: entry | {"frames": [[2**62], [2**62]]},
    "frames that are none": lambda entry: entry | {"frames": {"0": 1, "1": 2}},
    "a text": lambda entry: "BF16",
    "nothing": lambda entry: None,
}


@pytest.mark.parametrize("what", CLAIMS)
def test_a_claim_that_is_not_so_is_refused_before_it_costs_memory(path, what, monkeypatch):
    byte_planes.save({"weight": any_bits(torch.bfloat16, 6)}, path)
    rewritten(path, lambda entries: {"weight": CLAIMS[what](entries["weight"])})
    taken, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda shape, **keywords: taken.append(shape) or empty(shape, **keywords))
    with pytest.raises(ValueError, match=r"^planes\.safetensors"):
        BytePlanes(path).read("weight")
    # What the frames could hold.
    assert taken in ([], [[5]])


def frame(content: bytes, **changes) -> bytes:
    return zstandard.ZstdCompressor(level=1, **{"write_checksum": True} | changes).compress(content)


def bomb(size: int) -> bytes:
    """A frame that says that it holds `size` bytes: a header of 8 bytes of size, and a block of repeated zeros."""
    descriptor = bytes([0b11100100])  # 8 bytes of content size, a single segment, a checksum
    return b"\x28\xb5\x2f\xfd" + descriptor + struct.pack("<Q", size) + b"\x03\x00\x10" + b"\0" + b"\0\0\0\0"


FRAMES = {
    "a bomb of a terabyte": lambda: bomb(2**40),
    "more than it should": lambda: frame(bytes(7)),
    "less than it should": lambda: frame(bytes(5)),
    "no checksum": lambda: frame(bytes(6), write_checksum=False),
    "no size": lambda: frame(bytes(6), write_content_size=False),
    "two frames": lambda: frame(bytes(6)) + frame(bytes(6)),
    "a frame cut off": lambda: frame(bytes(6))[:-1],
    "no frame": lambda: b"not zstd at all",
    "not a byte": lambda: b"",
    "a frame to skip": lambda: b"\x50\x2a\x4d\x18\x02\x00\x00\x00ab",
}


@pytest.mark.parametrize("what", FRAMES)
def test_a_frame_that_is_not_what_it_should_be_is_named(path, what):
    byte_planes.save({"weight": any_bits(torch.bfloat16, 6)}, path)
    data = FRAMES[what]()

    def change(entries):
        entries["weight"]["frames"][1] = [len(data)]
        return entries

    rewritten(path, change, lambda planes: planes | {"weight/1": np.frombuffer(data, np.uint8)})
    with pytest.raises(ValueError, match=r"^planes\.safetensors: frame 0 of plane 1 of weight is damaged"):
        BytePlanes(path).read("weight")


@pytest.mark.parametrize(
    "metadata, message",
    [
        ({"format": "pt"}, "holds no byte planes"),
        ({"version": "2"}, "is of version 2; it needs 1"),
        ({"sha256": "0" * 64}, "is damaged: its list of tensors"),
        ({"tensors": "{}"}, "is damaged: its list of tensors"),
    ],
)
def test_a_file_of_others_is_said_to_be_one(path, metadata, message):
    byte_planes.save({"weight": any_bits(torch.bfloat16, 6)}, path)
    with safe_open(path, "np") as file:
        save_file(load_file(path), path, file.metadata() | metadata)
    with pytest.raises(ValueError, match=message):
        BytePlanes(path)


@pytest.mark.parametrize(
    "text", ["[", "[]", "3", '{"weight": ' * 100_000], ids=["cut off", "a list", "a number", "deep"]
)
def test_a_list_of_tensors_that_is_none(path, text):
    digest = hashlib.sha256(text.encode()).hexdigest()
    metadata = {"format": byte_planes.FORMAT, "version": "1", "tensors": text, "sha256": digest}
    save_file({"weight/0": np.zeros(3, np.uint8)}, path, metadata)
    with pytest.raises(ValueError, match="its list of tensors"):
        BytePlanes(path)
