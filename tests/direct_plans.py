"""Launches that a launcher has kept (gptkern.backends.triton.direct.keep_plan), beside what it launches without.

Part of direct_launches.py, in whose process nothing is compiled and the driver is a stub.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
from collections.abc import Callable, Iterator
from types import ModuleType
from unittest import mock

import torch
from triton import knobs

from gptkern import operators
from gptkern.backends.tables import configurations
from gptkern.backends.triton import direct

NAMES = ("attention", "layer_norm")


def launchers(name: str) -> ModuleType:
    return importlib.import_module(f"gptkern.operators.{name}.triton")


def plans(name: str) -> dict:
    return launchers(name).TABLE.kept


@contextlib.contextmanager
def in_full_float32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if before == "highest" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def on_another_gpu() -> Iterator[None]:
    """Tensors say so, and the table has other tiles there."""
    module = launchers("attention")
    tiles = {("forward", 16): (((1024,), module.tiles_of("forward", torch.zeros(1), 64, None)._replace(block_m=16)),)}
    with (
        mock.patch.object(torch.Tensor, "get_device", lambda self: 1),
        mock.patch.object(torch.Tensor, "device", torch.device("cuda", 1)),
        mock.patch.dict(module.TABLE._steps, {1: tiles}),
    ):
        yield


def variations(name: str) -> dict[str, tuple[tuple, Callable]]:
    """What differs -> a call that differs from the first one in that alone, and the state that it is made in."""
    same, Call, module = contextlib.nullcontext, operators.contract(name).Call, launchers(name)
    if name == "layer_norm":
        x, other, weight = torch.zeros(64, 64), torch.zeros(16, 256), torch.zeros(256)
        w, half = weight[:64], torch.zeros(64, dtype=torch.bfloat16)
        return {
            "": (Call(x, None, w, w, 1e-5), same),
            "shape": (Call(x[:48], None, w, w, 1e-5), same),
            "width": (Call(other, None, weight, weight, 1e-5), same),
            "dtype": (Call(x.to(torch.bfloat16), None, w, w, 1e-5), same),
            "dtype of the weight": (Call(x, None, half, w, 1e-5), same),
            "dtype of the bias": (Call(x, None, w, half, 1e-5), same),
            "no weight": (Call(x, None, None, w, 1e-5), same),
            "no bias": (Call(x, None, w, None, 1e-5), same),
            "eps": (Call(x, None, w, w, 1e-6), same),
            "residual": (Call(x, x, w, w, 1e-5), same),
            "strides": (Call(torch.zeros(64, 80)[:, :64], None, w, w, 1e-5), same),
            "alignment": (Call(torch.zeros(4097)[1:].view(64, 64), None, w, w, 1e-5), same),
            "what is held": (
                Call(x, None, w, w, 1e-5), lambda: mock.patch.dict(module.REGISTER_WIDTH, {"forward": 32}),
            ),
        }  # fmt: skip
    flat, dtype = torch.zeros(2, 2, 256, 64, dtype=torch.float32), torch.bfloat16
    q = flat.to(dtype)
    packed = torch.zeros(2, 256, 2, 64, dtype=dtype).transpose(1, 2)
    half, mask = q.to(torch.float16), torch.ones(256, 256, dtype=torch.bool)
    off = torch.zeros(q.numel() + 1, dtype=dtype)[1:].view(q.shape)
    tiles = module.tiles_of("forward", q, 64, None)._replace(block_m=16)
    first = Call(q, q, q, True, 0.125)
    return {
        "": (first, same),
        "length of the query": (first._replace(query=q[:, :, :200]), same),
        "length of the keys": (first._replace(key=q[:, :, :200], value=q[:, :, :200]), same),
        "strides of the query": (first._replace(query=packed), same),
        "strides of the key": (first._replace(key=packed), same),
        "strides of the value": (first._replace(value=packed), same),
        "dtype": (Call(half, half, half, True, 0.125), same),
        "dtype of the query": (first._replace(query=half), same),
        "dtype of the key": (first._replace(key=half), same),
        "dtype of the value": (first._replace(value=half), same),
        "is_causal": (first._replace(is_causal=False), same),
        "scale": (first._replace(scale=0.25), same),
        "lower_right": (first._replace(lower_right=True), same),
        "mask": (first._replace(is_causal=False, attn_mask=mask), same),
        "dropout": (first._replace(dropout_p=0.5, seed=torch.zeros(1, dtype=torch.int64)), same),
        "copied key": (first._replace(key=q.transpose(2, 3).contiguous().transpose(2, 3)), same),
        "alignment": (first._replace(query=off), same),
        "float32": (Call(flat, flat, flat, True, 0.125), same),
        "precision of float32": (Call(flat, flat, flat, True, 0.125), in_full_float32),
        "forced tiles": (first, lambda: module.forced_tiles(32, 32)),
        "tiles": (first, lambda: configurations.override("attention", ("forward", 16, 64), tiles)),
        "another GPU": (first, on_another_gpu),
    }


# What Triton's launcher was called with.
_handed: list[tuple] = []


@contextlib.contextmanager
def recorded() -> Iterator[None]:
    """Direct launches start nothing, and are written down."""
    keep = direct.Kernel._keep

    def kept(kernel, key, compiled):
        keep(kernel, key, compiled)
        if key in kernel._kinds:
            kernel._kinds[key] = kernel._kinds[key]._replace(launch=lambda *arguments: _handed.append(arguments))

    with mock.patch.object(direct.Kernel, "_keep", kept):
        for name in NAMES:
            launchers(name)._forward_kernel._kinds.clear()
            plans(name).clear()
        yield


def launched(name: str, call: tuple) -> tuple:
    """What the launcher got, tensors in the place of their addresses; and how the results lie in memory."""
    _handed.clear()
    results = launchers(name).forward(call)
    names = {tensor.data_ptr(): f"call {index}" for index, tensor in enumerate(call) if torch.is_tensor(tensor)}
    names |= {tensor.data_ptr(): f"result {index}" for index, tensor in enumerate(results) if tensor is not None}
    (arguments,) = _handed or [()]
    named = [names.get(part, part) if type(part) is int else part for part in _flat(arguments[4:])]
    # The address of a copy is another one each time; the first of the rest is the kernel's handle.
    named[1:] = ["copy" if type(part) is int and part > 2**40 else part for part in named[1:]]
    layouts = [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in results if tensor is not None]
    return [*arguments[:4], *named], layouts


def _flat(arguments: tuple) -> Iterator:
    for argument in arguments:
        if type(argument) is tuple:
            yield from _flat(argument)
        else:
            yield argument


def launched_without(name: str) -> dict[str, tuple]:
    """What is launched for each variation where nothing was kept."""
    found = {}
    for what, (call, state) in variations(name).items():
        with state():
            # The first goes Triton's own way.
            for _ in range(2):
                plans(name).clear()
                found[what] = launched(name, call)
        assert found[what][0], what
    return found


def different(name: str, expected: dict[str, tuple]) -> list[str]:
    """The variations of which what is launched, again and after the first call, is not what is expected."""
    every, found = variations(name), []
    plans(name).clear()
    for what, (call, state) in every.items():
        with state():
            wrong = [launched(name, call) != expected[what] for _ in range(3)]
        wrong += [launched(name, every[""][0]) != expected[""] for _ in range(3)]
        with state():
            wrong.append(launched(name, call) != expected[what])
        if any(wrong):
            found.append(what)
    return found


def is_kept(name: str) -> bool:
    """Whether the third of three calls launches by what was kept."""
    call, _ = variations(name)[""]
    for _ in range(2):
        launchers(name).forward(call)
    with mock.patch.object(direct.Kernel, "__getitem__", side_effect=LookupError):
        try:
            launchers(name).forward(call)
        except LookupError:
            return False
    return True


# What a launcher is made blind to -> the text of it that is left out.
BLIND = {
    "attention": {
        "the query's shape": "of_query, ", "the key's shape": "of_key, ", "the query's strides": "query.stride(), ",
        "the key's strides": "key.stride(), ", "the value's strides": "value.stride(), ", "the dtype": "dtype, ",
        "the key's dtype": "key.dtype, ", "the value's dtype": "value.dtype,", "is_causal": "is_causal, ",
        "scale": "scale, ", "lower_right": "lower_right, ", "the GPU": "query.get_device(),",
        "precision": "dtype is torch.float32 and float32_precision(), ",
        "a mask": "attn_mask is None and ", "dropout": " and seed is None",
        "copies": " and query is call.query and key is call.key and value is call.value",
    },
    "layer_norm": {
        "the shape": "shape, ", "the dtype": "dtype, ", "eps": "eps,", "what is held": 'REGISTER_WIDTH["forward"],',
        "the weight's dtype": "None if weight is None else weight.dtype, ",
        "the bias's dtype": "None if bias is None else bias.dtype, ", "strides": " and input.is_contiguous()",
    },
}  # fmt: skip


def sees(name: str, left_out: str, expected: dict[str, tuple]) -> bool:
    """Whether the comparison finds a launcher that does not know of something."""
    module = launchers(name)
    before, begin, rest = inspect.getsource(module.forward).partition("plan_key = (\n")
    key, end, after = rest.partition("plan = ")
    parts = [key] if left_out in key else [before, after]
    assert any(left_out in part for part in parts), left_out
    key, before, after = (part.replace(left_out, "", 1) if part in parts else part for part in (key, before, after))
    source = f"from __future__ import annotations\n{before}{begin}{key}{end}{after}"
    scope: dict = {}
    exec(compile(source, "<blind>", "exec"), vars(module), scope)
    with mock.patch.object(module, "forward", scope["forward"]):
        try:
            return bool(different(name, expected))
        except TypeError as error:
            # A kept launch that takes another number of pointers.
            assert "bound()" in str(error)
            return True


def _sees_alignment(name: str, expected: dict[str, tuple]) -> bool:
    binds, left_out = launchers(name)._forward_kernel._binds, "({any_address}) & 15 or "
    assert left_out in direct._BOUND_SOURCE
    with (
        mock.patch.object(direct, "_BOUND_SOURCE", direct._BOUND_SOURCE.replace(left_out, "")),
        mock.patch.dict(binds, clear=True),
    ):
        binds.clear()
        return different(name, expected) == ["alignment"]


def gives_way() -> dict[str, bool]:
    """What is other than it was when a launch was kept -> whether Triton's own way was taken."""
    module = launchers("attention")
    kernel, active = module._forward_kernel, direct.driver.active
    hook, ran = lambda *_, **__: None, []
    states = {
        "": contextlib.nullcontext,
        "another device": lambda: mock.patch.object(active, "get_current_device", lambda: 1),
        "another driver": lambda: mock.patch.object(direct.driver, "_active", copy.copy(active)),
        "a hook of the kernel": lambda: mock.patch.object(kernel, "pre_run_hooks", kernel.pre_run_hooks),
        "a hook of launches": lambda: mock.patch.object(knobs.runtime, "launch_enter_hook", hook),
        "a global of the kernel": lambda: mock.patch.object(module, "LOWEST", -1.0),
    }
    assert is_kept("attention")
    call, _ = variations("attention")[""]
    found = {}
    for what, state in states.items():
        ran.clear()
        with state(), mock.patch.object(kernel, "run", lambda *_, **__: ran.append(1)):
            if what == "a hook of the kernel":
                kernel.pre_run_hooks.append(hook)
            module.forward(call)
        kernel.pre_run_hooks.clear()
        found[what] = bool(ran)
    return found


def report() -> dict:
    # Where Triton compiles, it has looked for the kernel's globals.
    assert launchers("attention")._forward_kernel.cache_key
    found: dict = {"different": {}, "sees": {}}
    with recorded():
        for name in NAMES:
            expected = launched_without(name)
            found["different"][name] = different(name, expected)
            for what, left_out in BLIND[name].items():
                found["sees"][f"{name}: {what}"] = sees(name, left_out, expected)
            if name == "attention":
                with mock.patch.object(configurations.Table, "find_anew", lambda table: table._steps.clear()):
                    found["sees"]["other tiles"] = bool(different(name, expected))
            found["sees"][f"{name}: alignment"] = _sees_alignment(name, expected)
        found["kept"] = {name: is_kept(name) for name in NAMES}
        found["gives way"] = gives_way()
    return found
