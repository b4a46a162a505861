"""What surrounds a CUDA kernel: launch errors, and sizes past 2^31 elements, which nobody has to allocate.

Address space is reserved without memory behind it (MAP_NORESERVE): only the pages that a kernel touches become real.
A kernel whose index arithmetic is too narrow reaches other addresses, which the emulator refuses.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import re
import shutil
import sys
import threading
import time
import types

import emulation
import numpy as np
import pytest
import simulated_gpus
import torch
from conftest import DEVICE, _forced
from cuda_modules import address, module
from far_memory import LARGE, sparse

import gptkern
import gptkern.functional as G
from gptkern.backends import dispatch
from gptkern.backends.cuda import common, emulated
from gptkern.operators.attention import cuda as attention
from gptkern.operators.int8_linear import cuda as int8_linear
from gptkern.operators.quantize_int8 import cuda as quantize_int8

if DEVICE != "cpu":
    pytest.skip("there is a GPU: the CUDA backend's tests run on it, not on the emulator", allow_module_level=True)
if emulated.compiler() is None:
    pytest.skip("there is no C++ compiler for the emulated CUDA kernels", allow_module_level=True)
if sys.platform != "linux":
    pytest.skip("memory that is reserved and not there needs Linux's MAP_NORESERVE", allow_module_level=True)


@pytest.fixture
def cuda(request):
    """The cuda backend, inside of its tensors' bounds; the test's name ends with its operator's."""
    operator = re.search(r"layer_norm|rms_norm|rotary|softmax|attention|int8_linear", request.node.name)[0]
    with _forced("cuda", f"test_{operator}.py::{request.node.name}"):
        yield


def spread(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Random values at these strides."""
    span = sum((size - 1) * stride for size, stride in zip(shape, strides)) + 1
    values = sparse(span, dtype).as_strided(shape, strides)
    values.copy_(torch.randn(shape).to(dtype))
    return values


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE


def gradients(result, *inputs):
    torch.manual_seed(1)
    return torch.autograd.grad(result, inputs, torch.randn(result.shape).to(result.dtype))


def test_the_memory_is_not_there():
    before = resident()
    values = spread((3, 8), (LARGE, 1), torch.bfloat16)
    assert values.data_ptr() + 2 * LARGE * 2 == values[2].data_ptr()
    assert resident() - before < 2**24


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("stride", [LARGE, 2**32 + 24])
def test_rows_far_apart_layer_norm(cuda, dtype, stride):
    x = spread((3, 264), (stride, 1), dtype)
    near = x.contiguous()
    weight, bias = torch.randn(2, 264).to(dtype).unbind()
    results = [(G.layer_norm(leaf, (264,), weight, bias), leaf) for leaf in (x.requires_grad_(), near.requires_grad_())]
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(*(gradients(result, leaf)[0] for result, leaf in results))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("stride", [LARGE, 2**32 + 24])
def test_rows_far_apart_rms_norm(cuda, dtype, stride):
    x = spread((3, 264), (stride, 1), dtype)
    near = x.contiguous()
    weight = torch.randn(264).to(dtype)
    results = [(G.rms_norm(leaf, (264,), weight), leaf) for leaf in (x.requires_grad_(), near.requires_grad_())]
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(*(gradients(result, leaf)[0] for result, leaf in results))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("stride", [LARGE, 2**32 + 24])
def test_rows_far_apart_softmax(cuda, dtype, stride):
    x = spread((3, 264), (stride, 1), dtype)
    near = x.contiguous()
    results = [(G.softmax(leaf, -1), leaf) for leaf in (x.requires_grad_(), near.requires_grad_())]
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(*(gradients(result, leaf)[0] for result, leaf in results))


def test_columns_far_apart_softmax(cuda):
    x = spread((2, 5, 16), (2**32, LARGE // 4 * 4, 1), torch.float32)
    assert torch.equal(G.softmax(x, 1), G.softmax(x.contiguous(), 1))


def test_masks_far_apart_softmax(cuda):
    mask = spread((3, 64), (LARGE, 1), torch.float32)
    x = torch.randn(3, 64)
    assert torch.equal(G.softmax(x, -1, mask=mask), G.softmax(x, -1, mask=mask.contiguous()))


@pytest.mark.parametrize("strides", [(2**32, LARGE, 64, 1), (LARGE, 64, 2**32 + 8, 1), (64, 2**32 + 1, LARGE, 1)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rows_far_apart_rotary(cuda, strides, interleaved):
    x = spread((2, 3, 3, 64), strides, torch.bfloat16)
    cos, sin = (spread((2, 3, 24), (LARGE, 2**32, 1), torch.float32) for _ in range(2))
    results = [
        (G.rotary_embedding(leaf, *angles, interleaved=interleaved), leaf)
        for leaf, angles in (
            (x.requires_grad_(), (cos, sin)),
            (x.detach().contiguous().requires_grad_(), (cos.contiguous(), sin.contiguous())),
        )
    ]
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(*(gradients(result, leaf)[0] for result, leaf in results))


@pytest.mark.parametrize("strides", [(2**32, LARGE // 8 * 8, 64, 1), (LARGE // 8 * 8, 2**32 + 8, 64, 1)])
def test_heads_far_apart_attention(cuda, strides):
    query, key, value = (spread((2, 2, 40, 64), strides, torch.bfloat16).requires_grad_() for _ in range(3))
    near = [tensor.detach().contiguous().requires_grad_() for tensor in (query, key, value)]
    results = [(G.scaled_dot_product_attention(*call, is_causal=True), call) for call in ((query, key, value), near)]
    assert torch.equal(results[0][0], results[1][0])
    for far, close in zip(gradients(results[0][0], *results[0][1]), gradients(results[1][0], *results[1][1])):
        assert torch.equal(far, close)


@pytest.mark.parametrize("operator", ["attention", "layer_norm", "rms_norm"])
def test_gradients_are_the_same_under_every_schedule(cuda, operator):
    """They are summed in a fixed order, whichever block comes first."""
    if operator == "attention":
        shapes = (1, 4, 70, 16), (1, 2, 130, 16), (1, 2, 130, 16)
        call = functools.partial(G.scaled_dot_product_attention, enable_gqa=True)
    else:
        shapes = ((70, 24), (24,))
        call = lambda x, weight: getattr(G, operator)(x, (24,), weight)  # noqa: E731
    inputs = [torch.randn(shape).half().requires_grad_() for shape in shapes]
    found = []
    for seed in (1, 2, 3):
        emulated.load().set_seed(seed)
        found.append(gradients(call(*inputs), *inputs))
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others))


def test_rows_far_apart_attention(cuda):
    """40 rows of a head, 2^26 elements apart: the last begins past 2^31."""
    call = [spread((1, 1, 40, 64), (1, 1, 2**26, 1), torch.float16) for _ in range(3)]
    result = G.scaled_dot_product_attention(*call, is_causal=True)
    assert torch.equal(result, G.scaled_dot_product_attention(*(t.contiguous() for t in call), is_causal=True))


@pytest.mark.parametrize("mode", ["w8a8", "w8a16"])
def test_rows_far_apart_int8_linear(cuda, mode):
    x = spread((3, 64), (LARGE // 8 * 8, 1), torch.bfloat16)
    weight, scale = torch.randint(-127, 128, (40, 64), dtype=torch.int8), torch.rand(40) + 0.01
    far, near = (G.int8_linear(tensor, weight, scale, mode=mode) for tensor in (x, x.contiguous()))
    assert torch.equal(far, near)


@pytest.mark.parametrize("mode", ["w8a8", "w8a16"])
def test_weight_rows_far_apart_int8_linear(cuda, mode):
    weight = sparse(2 * 2**32, torch.int8).as_strided((3, 64), (LARGE // 16 * 16, 1))
    weight.copy_(torch.randint(-127, 128, (3, 64), dtype=torch.int8))
    x, scale = torch.randn(5, 64).bfloat16(), torch.rand(3) + 0.01
    far, near = (G.int8_linear(x, tensor, scale, mode=mode) for tensor in (weight, weight.contiguous()))
    assert torch.equal(far, near)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_out_features_past_the_second_number_of_a_grid_int8_linear(cuda, dtype):
    """Launched, and not run: 65,535 tiles of columns would take minutes."""
    out_features = 65536 * (256 if dtype == torch.bfloat16 else 128)
    weight, scale = sparse(out_features, torch.int8)[:, None], sparse(out_features, torch.float32)
    input = torch.ones(1, 1, dtype=dtype, requires_grad=True)
    bias = sparse(out_features, torch.float32).requires_grad_()
    emulated.load().skip_launches(True)
    try:
        result = G.int8_linear(input, weight, scale, bias, mode="w8a16")
        result.backward(sparse(out_features, dtype)[None])
    finally:
        emulated.load().skip_launches(False)
    assert bias.grad.shape == (out_features,)


@pytest.mark.parametrize("operator", ["layer_norm", "rms_norm"])
def test_a_row_of_more_ranges_than_the_second_number_of_a_grid(operator, request):
    """Launched, and not run: a weight gradient's blocks share a row's columns, 256 of float32 each."""
    width = 65536 * 256
    x, weight = (sparse(width, torch.float32).requires_grad_() for _ in range(2))
    emulated.load().skip_launches(True)
    try:
        with _forced("cuda", request.node.nodeid):
            getattr(G, operator)(x[None], (width,), weight).backward(sparse(width, torch.float32)[None])
    finally:
        emulated.load().skip_launches(False)
    assert weight.grad.shape == (width,)


# --- Threads ----------------------------------------------------------------------------------------------------------


def test_python_goes_on_while_a_launcher_runs():
    """The kernel waits for what another thread of Python writes."""
    memory = np.zeros(3, np.int32)
    launch = threading.Thread(target=module("waiting").wait, args=(address(memory), 50_000_000))
    launch.start()
    while not memory[0] and launch.is_alive():
        time.sleep(0)
    memory[1] = 1
    launch.join()
    assert memory.tolist() == [1, 1, 1]


# --- A GPU's device and stream ----------------------------------------------------------------------------------------


def test_a_launcher_gets_the_current_stream_of_its_tensors_gpu_and_runs_there(monkeypatch):
    current, seen = [0], []

    @contextlib.contextmanager
    def device(index):
        current.append(index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: current[-1], raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 100 + index, raising=False)
    monkeypatch.setattr(common, "_launchers", {})
    launcher = lambda *arguments: seen.append((current[-1], *arguments[1:]))  # noqa: E731
    monkeypatch.setattr(common, "compiled", lambda: types.SimpleNamespace(launcher=launcher))
    for _ in range(2):  # the first time it is looked up
        for index in (0, 1):
            tensor = types.SimpleNamespace(is_cuda=True, get_device=lambda index=index: index)
            common.start("launcher", tensor, index, None)
    assert seen == [(0, 0, None, 100), (1, 1, None, 101)] * 2 and current == [0]


# --- What C++ cannot read ---------------------------------------------------------------------------------------------


def test_what_cannot_be_read_in_place_is_copied_once(monkeypatch):
    """One tensor may be several arguments; the others go on as they are."""
    seen = []

    def call(name, tensor, *arguments):
        seen.append(arguments)
        return next((each for each in arguments if isinstance(each, torch.Tensor) and not each.is_contiguous()), None)

    monkeypatch.setattr(common, "call", call)
    apart, dense = torch.arange(12.0).view(3, 4).t(), torch.zeros(2)
    common.start("launcher", apart, dense, None, apart, 3)
    (first, *untouched), second = seen[0], seen[1]
    assert first is apart and untouched[2] is apart
    assert second[0] is second[3] and second[0].is_contiguous() and torch.equal(second[0], apart)
    assert second[1] is dense and second[2] is None and second[4] == 3


def test_what_a_copy_does_not_help_is_an_error(monkeypatch):
    monkeypatch.setattr(common, "call", lambda name, tensor, *arguments: arguments[0])
    with pytest.raises(RuntimeError, match=r"launcher cannot read a contiguous copy: of shape \(2,\)"):
        common.start("launcher", torch.zeros(2), 1.0)


def test_a_launcher_says_which_argument_is_none_of_its_own():
    module, x, q = emulated.load(), torch.ones(2), torch.zeros(2, dtype=torch.int8)
    with pytest.raises(TypeError, match=r"^quantize_int8: it needs 5 arguments and got 3$"):
        module.quantize_int8(x, q, torch.empty(()))
    with pytest.raises(TypeError, match=r"^quantize_int8: argument 3 is a str, which it cannot be$"):
        module.quantize_int8(x, q, torch.empty(()), "0", 0)
    assert not q.any()


def test_the_table_of_tensors_is_asked_once(tmp_path):
    """And it is known before the first call whether it is there."""
    path = emulated.build(quiet=True)
    fresh = emulated.loaded(f"fresh.{emulated.NAME}", shutil.copy(path, tmp_path / path.name))
    q, x = torch.empty(2, dtype=torch.int8), torch.ones(2)
    with pytest.raises(RuntimeError, match="called before use_tensors_of"):
        fresh.quantize_int8(x, q, torch.empty(()), 0, 0)
    with pytest.raises(RuntimeError, match="called before ask_whether_unseen"):
        fresh.is_unseen((x,), None)
    assert "PyTorch 2.11 or newer" in fresh.use_tensors_of(int)
    other = types.SimpleNamespace  # a table of another library's making
    assert "has another" in fresh.use_tensors_of(type("Tensor", (), {"__dlpack_c_exchange_api__": other()}))
    with pytest.raises(ImportError, match="needs PyTorch"):
        emulated.taking_tensors(types.SimpleNamespace(use_tensors_of=lambda type: fresh.use_tensors_of(int)))
    assert emulated.taking_tensors(fresh) is fresh
    fresh.quantize_int8(x, q, torch.empty(()), 0, 0)
    assert q.tolist() == [127, 127]
    fresh.ask_whether_unseen((), (), (torch.Tensor,), ())
    assert fresh.is_unseen((x,), None)
    with pytest.raises(TypeError, match=r"^is_unseen needs a tuple"):
        fresh.is_unseen([x], None)
    _ask_about_devices(fresh)


def _ask_about_devices(fresh):
    """By a table of tensors that lie where their attribute says: there is one device here."""

    class Tensor(ctypes.Structure):
        _fields_ = [("data", ctypes.c_void_p), ("type", ctypes.c_int32), ("index", ctypes.c_int32)]

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(Tensor))
    def place(tensor, found):
        found[0].type, found[0].index = tensor.place
        return 0

    class Table(ctypes.Structure):
        _fields_ = [("version", ctypes.c_uint32 * 2), ("before", ctypes.c_void_p * 4), ("place", type(place))]

    class Placed:
        def __init__(self, *place):
            self.place = place

    table = Table((1, 3), (None,) * 4, place)
    capsule = ctypes.pythonapi.PyCapsule_New
    capsule.restype, capsule.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    Placed.__dlpack_c_exchange_api__ = capsule(ctypes.addressof(table), b"dlpack_exchange_api", None)
    assert fresh.use_tensors_of(Placed) is None
    fresh.ask_whether_unseen((), (), (Placed,), (type(None),))
    here = Placed(2, 1)
    assert fresh.is_unseen((here, None, Placed(2, 1)), "a device")
    for there in (Placed(2, 0), Placed(1, 1)):
        assert not fresh.is_unseen((None, here, there), "a device") and fresh.is_unseen((here, there), None)


def test_what_is_no_tensor_is_an_error():
    module = emulated.load()
    with pytest.raises(RuntimeError, match=r"cast .*<class 'int'>"):
        module.quantize_int8(torch.empty(2), 3, None, 0, 0)


# --- Errors -----------------------------------------------------------------------------------------------------------


def test_a_failed_launch_names_the_kernel_and_its_configuration_softmax(cuda, monkeypatch):
    """Memory that belongs to nobody, as a GPU would refuse it too."""
    monkeypatch.setattr(emulation, "extent", lambda tensor: (0, 0))
    with pytest.raises(RuntimeError) as raised:
        G.softmax(torch.randn(4, 64), -1)
    assert re.search(
        r"gptkern: the emulated kernel failed: load of \d+ bytes at \w+\.\w+:\d+: the address is outside .*"
        r"\(softmax_\w+<.*>, grid \(\d+, \d+, \d+\), \d+ threads, \d+ bytes of shared memory\)",
        str(raised.value),
    )


def test_a_launcher_that_is_not_there_is_an_error():
    with pytest.raises(AttributeError, match="no_such_launcher"):
        common.call("no_such_launcher", torch.empty(1))


def test_unable_says_why_attention(cuda):
    query = torch.randn(1, 1, 8, 64)
    with pytest.raises(gptkern.backends.dispatch.BackendError, match=r"attention: .*float32"):
        G.scaled_dot_product_attention(query, query, query)


# --- Tiles ------------------------------------------------------------------------------------------------------------


def products(module, dtype: torch.dtype, mode: str, rows: int, *tile: int) -> torch.Tensor:
    """x @ weight^T by the tile, of small integers: exact whatever its order."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-3, 4, (rows, 48), generator=generator).to(dtype)
    # Rows' largest values are 127 times a scale of 1.
    x[:, 0] = 127
    weight = torch.randint(-4, 5, (70, 48), dtype=torch.int8, generator=generator)
    weight[:, 0] = 0
    q = scale = None
    if mode == "w8a8":
        q, scale = torch.empty(rows, 48, dtype=torch.int8), torch.empty(rows)
    y = torch.empty(rows, 70, dtype=dtype)
    assert module.int8_linear_forward(x, weight, torch.ones(70), None, q, scale, y, 0, *tile, 0) is None
    assert torch.equal(y.double(), x.double() @ weight.double().T)
    return y


@pytest.mark.parametrize("kernel", ["w8a8", "w8a16", "w8a32"])
def test_every_tile_that_was_compiled_computes_the_product(kernel):
    module = emulated.load()
    tiles = module.int8_linear_tiles()
    assert tiles.keys() == {"w8a8", "w8a16", "w8a32"} and len(set(tiles[kernel])) == len(tiles[kernel]) > 1
    dtype = torch.float32 if kernel == "w8a32" else torch.float16
    for tile in tiles[kernel]:
        products(module, dtype, "w8a8" if kernel == "w8a8" else "w8a16", min(tile[0], 33), *tile)


@pytest.mark.parametrize(
    ("kernel", "dtype", "there"),
    [
        ("w8a8", torch.bfloat16, "64×64 128×128"),
        ("w8a16", torch.bfloat16, "16×16 16×32 16×64 64×64"),
        ("w8a32", torch.float32, "16×16 64×64"),
    ],
)
def test_a_tile_that_was_not_compiled_is_an_error_that_lists_those_there_are(kernel, dtype, there):
    with pytest.raises(ValueError, match=f"{kernel} was not compiled for tiles of 48×96; there are {there}$"):
        products(emulated.load(), dtype, "w8a8" if kernel == "w8a8" else "w8a16", 2, 48, 96)


def test_few_rows_tiles_refuse_more_rows():
    with pytest.raises(ValueError, match="tiles of 16 rows are for as many, and the input has 17"):
        products(emulated.load(), torch.bfloat16, "w8a16", 17, 16, 32)


@pytest.mark.parametrize(
    ("mode", "dtype", "rows", "out_features", "multiprocessors", "expected"),
    [
        ("w8a8", torch.bfloat16, 65, 128, 1, (128, 128)),
        ("w8a8", torch.bfloat16, 64, 4096, 1, (64, 64)),
        ("w8a8", torch.bfloat16, 1024, 1024, 64, (128, 128)),
        ("w8a8", torch.bfloat16, 1024, 1024, 65, (64, 64)),
        ("w8a16", torch.bfloat16, 17, 4096, 1, (64, 64)),
        ("w8a16", torch.bfloat16, 16, 4096, 64, (16, 64)),
        ("w8a16", torch.bfloat16, 1, 4096, 65, (16, 32)),
        ("w8a16", torch.bfloat16, 1, 4096, 128, (16, 32)),
        ("w8a16", torch.bfloat16, 1, 4096, 129, (16, 16)),
        ("w8a16", torch.float32, 16, 4096, 1, (16, 16)),
        ("w8a16", torch.float32, 17, 4096, 1, (64, 64)),
    ],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_the_tile_that_a_call_takes(
    mode, dtype, rows, out_features, multiprocessors, expected, transposed, monkeypatch
):
    """The larger one where every multiprocessor has a block; a transposed weight is read by tiles of 64 rows alone."""
    monkeypatch.setattr(int8_linear, "multiprocessors", lambda device: multiprocessors)
    weight = torch.empty(8, out_features, dtype=torch.int8).T if transposed else shape_only(out_features, 8)
    call = int8_linear.Call(shape_only(rows, 8, dtype=dtype), weight, None, None, None, mode)
    found = int8_linear.tile(call, rows)
    assert found == ((64, 64) if transposed and mode == "w8a16" else expected)
    kernel = "w8a32" if mode == "w8a16" and dtype == torch.float32 else mode
    assert found in emulated.load().int8_linear_tiles()[kernel]


def shape_only(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("M, N, K", [(2**31, 8, 8), (8, 2**31, 8), (8, 8, 2**31)])
def test_sizes_that_32_bits_do_not_count_are_refused_int8_linear(M, N, K):
    weight, scale = shape_only(N, K, dtype=torch.int8), shape_only(N, dtype=torch.float32)
    reason = int8_linear.unsupported(int8_linear.Call(shape_only(M, K), weight, scale, None, None, "w8a16"))
    assert "32 bits" in reason
    smaller = [size // 2 if size == 2**31 else size for size in (M, N, K)]
    M, N, K = smaller
    assert (
        int8_linear.unsupported(int8_linear.Call(shape_only(M, K), shape_only(N, K), scale, None, None, "w8a16"))
        is None
    )


@pytest.mark.parametrize("shape, dim", [((2**31,), 0), ((2**31, 8), 1), ((2**31, 8), 0), ((8, 2**31, 2), 2)])
def test_sizes_that_32_bits_do_not_count_are_refused_quantize_int8(shape, dim):
    assert "32 bits" in quantize_int8.unsupported(quantize_int8.Call(shape_only(*shape), dim))
    assert quantize_int8.unsupported(quantize_int8.Call(shape_only(*(min(size, 2**20) for size in shape)), dim)) is None


def test_more_heads_than_a_grid_are_refused_attention():
    query = shape_only(1, 65536, 8, 64)
    assert "65536 heads" in attention.unsupported(attention.Call(query, query, query, False, 1.0))
    query = query[:, 1:]
    assert attention.unsupported(attention.Call(query, query, query, False, 1.0)) is None


def test_what_is_written_in_a_copy_goes_back(monkeypatch):
    """A launcher that cannot read a caller's tensor in place writes a copy of it."""
    parameter, gradient = torch.ones(4, 6)[:, ::2], torch.full((4, 3), 2.0)

    def call(name, tensor, parameter, gradient):
        if not parameter.is_contiguous():
            return parameter
        parameter -= gradient
        return None

    monkeypatch.setattr(common, "call", call)
    common.start("step", parameter, gradient)
    assert (parameter == 1).all()
    common.start("step", parameter, gradient, written=(parameter,))
    assert (parameter == -1).all() and (gradient == 2).all()


def test_a_users_tile_that_was_not_compiled_is_ignored_with_a_warning(monkeypatch, tmp_path):
    monkeypatch.setenv("GPTKERN_CACHE", str(tmp_path))
    device = simulated_gpus.simulate(monkeypatch, (simulated_gpus.H200.name, (9, 0)))
    row = {"kernel": "w8a8", "rows": None, "share": None, "block_m": 48, "block_n": 40}
    simulated_gpus.users_file(configurations={"int8_linear, cuda": [row]})
    with pytest.warns(UserWarning, match="block_m=48, block_n=40.* is not compiled"):
        assert int8_linear.TABLE.find(device, (4096, 10**6), "w8a8") == (128, 128)
    dispatch.forget()
