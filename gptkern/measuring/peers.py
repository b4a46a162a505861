"""What a reader would use otherwise: each library behind one small adapter.

An adapter takes the sizes that decide whether the library can run a cell, and returns an Implementation of the
operator's own arguments, or Missing with the reason:

    attention      (query, key, value), each (batch, heads, length, head_dim)
    layer_norm     (x, weight, bias), x (rows, width)
    rms_norm       (x, weight), x (rows, width)
    softmax        (x,), the last dimension
    int8_linear    (input, weight, bias), weight (out_features, in_features) in the input's dtype, before quantisation

A library is imported by its adapter, never by this module. What an adapter cannot know beforehand (a kernel that
PyTorch finds no engine for) is an error of the call, which the runner reports.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import shutil
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F

from gptkern.measuring.cells import Implementation, Missing

# --- Names, as results files and reports spell them -----------------------------------------------------------------

EAGER = "eager"
COMPILE = "compile"
COMPILE_MAX = "compile max-autotune"
SDPA = {"flash": "SDPA flash", "efficient": "SDPA efficient", "cudnn": "SDPA cuDNN"}
FLEX = "FlexAttention"
LIGER = "Liger-Kernel"
FLASH_ATTN = {2: "flash-attn 2", 3: "flash-attn 3", 4: "flash-attn 4"}
QUACK = "quack"
BF16_LINEAR = "bf16 linear"
INT_MM = "int_mm + dequantise"
TORCHAO = "torchao int8"
BITSANDBYTES = "bitsandbytes int8"
NAMES = (
    EAGER, COMPILE, COMPILE_MAX, *SDPA.values(), FLEX, LIGER, *FLASH_ATTN.values(), QUACK, BF16_LINEAR, INT_MM, TORCHAO,
    BITSANDBYTES,
)  # fmt: skip

# The distributions whose versions a measurement depends on, beside torch and triton.
DISTRIBUTIONS = (
    "liger-kernel", "flash-attn", "flash-attn-3", "flash-attn-4", "quack-kernels", "nvidia-cutlass-dsl", "torchao",
    "bitsandbytes", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "nvidia-cublas", "nvidia-cublas-cu12",
)  # fmt: skip

_SIXTEEN_BITS = (torch.float16, torch.bfloat16)
# The mode searches tiles and kernels; CUDA graphs are the runner's own.
_MAX_AUTOTUNE = {"mode": "max-autotune-no-cudagraphs"}


def versions() -> dict[str, str | None]:
    """Distribution -> its installed version, or None."""
    found: dict[str, str | None] = dict.fromkeys(DISTRIBUTIONS)
    for name in DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


# --- Why a peer is missing ------------------------------------------------------------------------------------------


class _Unable(Exception):
    """Raised inside an adapter: the peer cannot run this cell."""


def _adapter(function: Callable[..., Implementation]) -> Callable[..., Implementation | Missing]:
    @functools.wraps(function)
    def adapter(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except _Unable as error:
            return Missing(str(error))
        except Exception as error:  # Another version of the library than the adapter knows.
            return Missing(f"its adapter failed: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}")

    return adapter


def _need(condition: bool, reason: str) -> None:
    if not condition:
        raise _Unable(reason)


def _need_gpu(kind: str) -> None:
    _need(kind == "cuda", "needs a GPU")


def _compared_on_gpus(kind: str) -> None:
    """For a library that runs on a CPU as well, where nobody would choose it for speed."""
    _need(kind == "cuda", "is compared on GPUs alone")


def _need_sixteen_bits(dtype: torch.dtype) -> None:
    _need(dtype in _SIXTEEN_BITS, f"has float16 and bfloat16 alone, not {str(dtype)[6:]}")


def _need_head_dim(head_dim: int) -> None:
    _need(head_dim % 8 == 0 and head_dim <= 256, f"has head_dim up to 256 in steps of 8, not {head_dim}")


def _need_architecture(*majors: int) -> None:
    """Passes where there is no GPU to ask."""
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        names = ", ".join(f"sm_{major}x" for major in majors)
        _need(major in majors, f"runs on {names} alone, not on sm_{major}{minor}")


def _imported(module: str):
    try:
        return importlib.import_module(module)
    except Exception as error:  # A library built for another PyTorch raises almost anything.
        first_line = next(iter(str(error).splitlines()), "")
        raise _Unable(f"{module} cannot be imported: {type(error).__name__}: {first_line}") from error


def _need_compiler(kind: str) -> None:
    """What torch.compile generates for the device has to be compiled: Triton on a GPU, C++ on a CPU."""
    if kind == "cuda":
        _need(importlib.util.find_spec("triton") is not None, "torch.compile needs triton, which is not installed")
        return
    default = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    compiler = os.environ.get("CXX", default)
    _need(shutil.which(compiler) is not None, f"torch.compile needs a C++ compiler, and there is no {compiler}")


# --- PyTorch --------------------------------------------------------------------------------------------------------


def eager(function: Callable) -> Implementation:
    """PyTorch's own operators, one after another."""
    return Implementation(function)


@_adapter
def compiled(function: Callable, kind: str) -> Implementation:
    """torch.compile of the same function, for exactly these shapes."""
    _need_compiler(kind)
    return Implementation(fresh_compile(function))


@_adapter
def compiled_max_autotune(function: Callable, kind: str) -> Implementation:
    """torch.compile that searches for the fastest kernels."""
    _compared_on_gpus(kind)
    _need_compiler(kind)
    return Implementation(fresh_compile(function, **_MAX_AUTOTUNE))


def fresh_compile(function: Callable, **options) -> Callable:
    """torch.compile for exactly these shapes. Call it while a cell's implementations are made, before any of them runs:
    it forgets whatever was compiled before.
    """
    _forget_compiled()
    return torch.compile(function, dynamic=False, **options)


def _forget_compiled() -> None:
    """After a few shapes of one function Dynamo gives up on it and runs it eagerly, without an error."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


# --- attention ------------------------------------------------------------------------------------------------------


@_adapter
def sdpa(
    backend: str, kind: str, dtype: torch.dtype, head_dim: int, causal: bool, grouped: bool, square: bool
) -> Implementation:
    """F.scaled_dot_product_attention with one of its kernels forced. On Hopper its default is not its fastest.

    Args:
        backend: "flash", "efficient" or "cudnn". grouped: fewer heads of key and value than of query.
        square: as many queries as keys.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    _need(kind == "cuda", "is a kernel for GPUs; on a CPU eager is PyTorch's only fused one")
    if backend == "efficient":
        _need(not grouped, "has no grouped heads")
    else:
        _need_sixteen_bits(dtype)
        _need_architecture(8, 9, 10, 11, 12)
        _need_head_dim(head_dim)
    if backend == "flash":
        _need(square or not causal, "has a causal limit for equal lengths alone")
    forced = getattr(SDPBackend, f"{backend.upper()}_ATTENTION")

    def call(query, key, value):
        with sdpa_kernel(forced):
            return F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=grouped)

    return Implementation(call)


@_adapter
def flex_attention(
    kind: str, length_q: int, length_k: int, head_dim: int, causal: bool, grouped: bool
) -> Implementation:
    """FlexAttention, compiled; the causal limit as a block mask, made once."""
    from torch.nn.attention import flex_attention as flex

    _compared_on_gpus(kind)
    _need_compiler(kind)
    _need(head_dim >= 16, f"needs a head_dim of at least 16, not {head_dim}")
    attend = fresh_compile(flex.flex_attention)
    masks: dict[torch.device, object] = {}

    def prepare(query, key, value):
        if causal and query.device not in masks:
            masks[query.device] = flex.create_block_mask(
                lambda batch, head, row, column: row >= column, None, None, length_q, length_k, query.device
            )
        return query, key, value

    def call(query, key, value):
        return attend(query, key, value, block_mask=masks.get(query.device), enable_gqa=grouped)

    return Implementation(call, prepare)


@_adapter
def flash_attn(
    generation: int, kind: str, dtype: torch.dtype, head_dim: int, causal: bool, square: bool, direction: str
) -> Implementation:
    """The flash-attn packages: 2 (Ampere and later), 3 (Hopper), 4 (CuTe DSL; Hopper and later)."""
    _need_gpu(kind)
    _need_sixteen_bits(dtype)
    _need_head_dim(head_dim)
    _need(square or not causal, "puts the causal limit at the last key, PyTorch at the first")
    if generation == 3:
        _need_architecture(9)
    if generation == 4 and direction != "forward":
        _need_architecture(9, 10, 11, 12)
    module = {2: "flash_attn", 3: "flash_attn_interface", 4: "flash_attn.cute"}[generation]
    function = getattr(_imported(module), "flash_attn_func", None)
    _need(function is not None, f"{module} has no flash_attn_func")

    def call(query, key, value):
        # Its tensors are (batch, length, heads, head_dim); 4, and early releases of 3, return (output, lse).
        output = function(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), causal=causal)
        return (output[0] if isinstance(output, tuple) else output).transpose(1, 2)

    return Implementation(call)


# --- layer_norm, rms_norm, softmax ----------------------------------------------------------------------------------


def _liger(name: str) -> Callable:
    return getattr(_imported("liger_kernel.transformers.functional"), name)


@_adapter
def liger_layer_norm(kind: str, eps: float, residual: bool = False) -> Implementation:
    """Liger-Kernel's layer_norm, on Triton."""
    _need_gpu(kind)
    _need(not residual, "has no layer_norm with a residual")
    function = _liger("liger_layer_norm")
    return Implementation(lambda x, weight, bias: function(x, weight, bias, eps))


@_adapter
def liger_rms_norm(kind: str, eps: float) -> Implementation:
    """Liger-Kernel's rms_norm: in float32 inside ("gemma"), and into new memory, as the others."""
    _need_gpu(kind)
    function = _liger("liger_rms_norm")
    return Implementation(lambda x, weight: function(x, weight, eps, casting_mode="gemma", in_place=False))


@_adapter
def liger_softmax(kind: str, causal: bool) -> Implementation:
    """Liger-Kernel's softmax."""
    _need_gpu(kind)
    _need(not causal, "has no causal softmax")
    return Implementation(_liger("liger_softmax"))


@_adapter
def quack_layer_norm(kind: str, eps: float, direction: str, residual: bool = False) -> Implementation:
    """quack's layer_norm, on the CuTe DSL; its weight and bias are float32."""
    _need_gpu(kind)
    _need(not residual, "has no layer_norm with a residual")
    _need(direction == "forward", "has no layer_norm that autograd can differentiate")
    function = _imported("quack.rmsnorm").layernorm_fwd
    return Implementation(
        lambda x, weight, bias: function(x, weight, bias, eps),
        prepare=lambda x, weight, bias: (x, weight.float(), bias.float()),
    )


@_adapter
def quack_rms_norm(kind: str, eps: float) -> Implementation:
    """quack's rms_norm."""
    _need_gpu(kind)
    function = _imported("quack.rmsnorm").rmsnorm
    return Implementation(lambda x, weight: function(x, weight, eps=eps))


@_adapter
def quack_softmax(kind: str, causal: bool) -> Implementation:
    """quack's softmax."""
    _need_gpu(kind)
    _need(not causal, "has no causal softmax")
    return Implementation(_imported("quack.softmax").softmax)


# --- int8_linear ----------------------------------------------------------------------------------------------------

# What torch._int_mm asks of its operands on a GPU (cuBLASLt's int8 products).
_INT_MM_ROWS, _INT_MM_MULTIPLE = 16, 8


def quantised(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, width) -> int8 (rows, width) and float32 (rows, 1): rounded to max|row| / 127, in PyTorch's operators."""
    scale = x.float().abs().amax(-1, keepdim=True) / 127
    return torch.round(x / scale).clamp(-127, 127).to(torch.int8), scale


def linear_unquantised() -> Implementation:
    """F.linear with the weight in the input's dtype, as it was before quantisation."""
    return Implementation(F.linear)


def _prepare_int8(input, weight, bias):
    """-> (input, int8 weight, its scales (out_features,), bias)"""
    q, scale = quantised(weight)
    return input, q, scale[:, 0], bias


def w8a8_of_operators(input, weight, weight_scale, bias):
    """The product of int8 with int8 in PyTorch's operators: quantise, torch._int_mm, dequantise."""
    q, input_scale = quantised(input)
    product = torch._int_mm(q, weight.t())
    return (product * input_scale * weight_scale + bias).to(input.dtype)


def w8a16_of_operators(input, weight, weight_scale, bias):
    """The product with the int8 weight widened, in PyTorch's operators."""
    return F.linear(input, weight.to(input.dtype)) * weight_scale.to(input.dtype) + bias


def _need_int_mm(kind: str, rows: int, in_features: int, out_features: int) -> None:
    if kind == "cuda":
        _need(rows > _INT_MM_ROWS, f"torch._int_mm needs more than {_INT_MM_ROWS} rows on a GPU, not {rows}")
        fits = in_features % _INT_MM_MULTIPLE == out_features % _INT_MM_MULTIPLE == 0
        _need(fits, f"torch._int_mm needs features that are multiples of {_INT_MM_MULTIPLE}")


@_adapter
def int_mm(kind: str, mode: str, rows: int, in_features: int, out_features: int) -> Implementation:
    """torch._int_mm, with quantisation before and dequantisation after it as operators of their own."""
    _need(mode == "w8a8", "multiplies int8 with int8 alone: no w8a16")
    _need_int_mm(kind, rows, in_features, out_features)
    return Implementation(w8a8_of_operators, _prepare_int8)


@_adapter
def compiled_int8(kind: str, mode: str, rows: int, in_features: int, out_features: int) -> Implementation:
    """The mode's mathematics in PyTorch's operators, compiled: Inductor fuses what is around the product."""
    _need_compiler(kind)
    if mode == "w8a8":
        _need_int_mm(kind, rows, in_features, out_features)
    function = w8a8_of_operators if mode == "w8a8" else w8a16_of_operators
    return Implementation(fresh_compile(function), _prepare_int8)


def torchao_config(mode: str):
    """The configuration of torchao for a mode. It would set Inductor's options for the whole process: not here.

    Raises _Unable where torchao cannot be imported or is too old to have them.
    """
    module = _imported("torchao.quantization")
    name = {"w8a8": "Int8DynamicActivationInt8WeightConfig", "w8a16": "Int8WeightOnlyConfig"}[mode]
    _need(hasattr(module, name), f"torchao.quantization has no {name}")
    return getattr(module, name)(set_inductor_config=False)


@_adapter
def torchao(kind: str, mode: str) -> Implementation:
    """torchao's int8 linear, compiled with max-autotune as its guide asks: dynamic activation, or weight only."""
    _compared_on_gpus(kind)
    _need_compiler(kind)
    quantize = _imported("torchao.quantization").quantize_
    config = torchao_config(mode)
    linear = fresh_compile(F.linear, **_MAX_AUTOTUNE)

    def prepare(input, weight, bias):
        with torch.device("meta"):
            layer = torch.nn.Linear(weight.shape[1], weight.shape[0])
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        layer.bias = torch.nn.Parameter(bias, requires_grad=False)
        quantize(layer, config)
        return input, layer.weight, layer.bias

    return Implementation(linear, prepare)


@_adapter
def bitsandbytes(kind: str, mode: str) -> Implementation:
    """bitsandbytes' Linear8bitLt (LLM.int8()) without its outliers; it rounds the input to float16 first."""
    _compared_on_gpus(kind)
    _need(mode == "w8a8", "quantises the input as well: no w8a16")
    library = _imported("bitsandbytes")
    # It says so at every call.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)

    def prepare(input, weight, bias):
        out_features, in_features = weight.shape
        layer = library.nn.Linear8bitLt(in_features, out_features, has_fp16_weights=False, threshold=0.0, device="meta")
        # It quantises a weight on its way from the CPU to the GPU.
        layer.weight = library.nn.Int8Params(weight.cpu(), has_fp16_weights=False, requires_grad=False)
        layer.bias = torch.nn.Parameter(bias, requires_grad=False)
        return input, layer.to(input.device).eval()

    return Implementation(lambda input, layer: layer(input), prepare)


# --- model ----------------------------------------------------------------------------------------------------------


@_adapter
def compiled_model(make: Callable[[Callable], Implementation], kind: str) -> Implementation:
    """`make(change)` of the model, where `change(model)` returns what is called in its place: the model, compiled."""
    _need_compiler(kind)
    _forget_compiled()
    return make(lambda model: torch.compile(model, dynamic=False))


@_adapter
def torchao_model(make: Callable[[Callable], Implementation], kind: str) -> Implementation:
    """The same with torchao's weight-only int8 linear layers, but the output's, whose weight is the embedding's."""
    _compared_on_gpus(kind)
    _need_compiler(kind)
    quantize = _imported("torchao.quantization").quantize_
    config = torchao_config("w8a16")
    _forget_compiled()

    def change(model):
        quantize(model, config, lambda module, _: isinstance(module, torch.nn.Linear) and module is not model.lm_head)
        return torch.compile(model, dynamic=False, **_MAX_AUTOTUNE)

    return make(change)
