"""What a reader would use otherwise: each library behind one small adapter, and which an operator is timed against.

An adapter takes a cell, whose sizes decide whether the library can run it, and the kind of device, and returns an
Implementation of the operator's own arguments, or Missing with the reason. `of_operator` lists those of a cell: of an
operator that it does not name PyTorch alone.

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

from gptkern import operators
from gptkern.measuring.cells import Cell, Implementation, Missing

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
DEQUANTISED = "dequantise + linear"
CHUNKED = "PyTorch chunked"
FOREACH = "PyTorch foreach"
APEX = "apex FusedAdam"
NAMES = (
    EAGER, COMPILE, COMPILE_MAX, *SDPA.values(), FLEX, LIGER, *FLASH_ATTN.values(), QUACK, BF16_LINEAR, INT_MM, TORCHAO,
    BITSANDBYTES, DEQUANTISED, CHUNKED, FOREACH, APEX,
)  # fmt: skip

# The distributions whose versions a measurement depends on, beside torch and triton.
DISTRIBUTIONS = (
    "liger-kernel", "flash-attn", "flash-attn-3", "flash-attn-4", "quack-kernels", "nvidia-cutlass-dsl", "torchao",
    "bitsandbytes", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "nvidia-cublas", "nvidia-cublas-cu12", "apex",
)  # fmt: skip

Found = dict[str, Implementation | Missing]
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


def _need_flash(cell: Cell, lower_right: str) -> None:
    """What all kernels of FlashAttention's kind have in common. lower_right: what they say of another causal limit."""
    sizes = cell.of
    _need(cell.dtype in ("float16", "bfloat16"), f"has float16 and bfloat16 alone, not {cell.dtype}")
    _need(
        sizes.head_dim % 8 == 0 and sizes.head_dim <= 256, f"has head_dim up to 256 in steps of 8, not {sizes.head_dim}"
    )
    _need(sizes.kind != "causal" or sizes.length_q == sizes.length_k, lower_right)


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


@_adapter
def compiled(function: Callable, kind: str, **search) -> Implementation:
    """torch.compile of the same function, for exactly these shapes; with `_MAX_AUTOTUNE` it searches for kernels."""
    if search:
        _compared_on_gpus(kind)
    _need_compiler(kind)
    return Implementation(fresh_compile(function, **search))


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


# --- attention: (query, key, value), each (batch, heads, length, head_dim) -------------------------------------------


@_adapter
def sdpa(backend: str, cell: Cell, kind: str) -> Implementation:
    """F.scaled_dot_product_attention with one of its kernels forced: "flash", "efficient" or "cudnn". On Hopper its
    default is not its fastest."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    causal, grouped = cell.of.kind == "causal", cell.of.kv_heads != cell.of.heads
    _need(kind == "cuda", "is a kernel for GPUs; on a CPU eager is PyTorch's only fused one")
    if backend == "efficient":
        _need(not grouped, "has no grouped heads")
    else:
        _need_architecture(8, 9, 10, 11, 12)
        _need_flash(cell, "has a causal limit for equal lengths alone")
    forced = getattr(SDPBackend, f"{backend.upper()}_ATTENTION")

    def call(query, key, value):
        with sdpa_kernel(forced):
            return F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=grouped)

    return Implementation(call)


@_adapter
def flex_attention(cell: Cell, kind: str) -> Implementation:
    """FlexAttention, compiled; the causal limit as a block mask, made once."""
    from torch.nn.attention import flex_attention as flex

    sizes = cell.of
    _compared_on_gpus(kind)
    _need_compiler(kind)
    _need(sizes.head_dim >= 16, f"needs a head_dim of at least 16, not {sizes.head_dim}")
    attend = fresh_compile(flex.flex_attention)
    masks: dict[torch.device, object] = {}

    def prepare(query, key, value):
        if sizes.kind == "causal" and query.device not in masks:
            masks[query.device] = flex.create_block_mask(
                lambda batch, head, row, column: row >= column, None, None, sizes.length_q, sizes.length_k, query.device
            )
        return query, key, value

    def call(query, key, value):
        return attend(query, key, value, block_mask=masks.get(query.device), enable_gqa=sizes.kv_heads != sizes.heads)

    return Implementation(call, prepare)


@_adapter
def flash_attn(generation: int, cell: Cell, kind: str) -> Implementation:
    """The flash-attn packages: 2 (Ampere and later), 3 (Hopper), 4 (CuTe DSL; Hopper and later)."""
    _need_gpu(kind)
    _need_flash(cell, "puts the causal limit at the last key, PyTorch at the first")
    if generation == 3:
        _need_architecture(9)
    if generation == 4 and cell.direction != "forward":
        _need_architecture(9, 10, 11, 12)
    module = {2: "flash_attn", 3: "flash_attn_interface", 4: "flash_attn.cute"}[generation]
    function = getattr(_imported(module), "flash_attn_func", None)
    _need(function is not None, f"{module} has no flash_attn_func")
    causal = cell.of.kind == "causal"

    def call(query, key, value):
        # Its tensors are (batch, length, heads, head_dim); 4, and early releases of 3, return (output, lse).
        output = function(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), causal=causal)
        return (output[0] if isinstance(output, tuple) else output).transpose(1, 2)

    return Implementation(call)


# --- layer_norm: (x, weight, bias); rms_norm: (x, weight); softmax: (x,); x (rows, width) ---------------------------

_LIGER_FUNCTIONS = "liger_kernel.transformers.functional"
# (library, operator) -> (its module and function, what the call makes of the function, how it takes the arguments)
_OF_ROWS: dict[tuple[str, str], tuple[str, str, Callable, Callable | None]] = {
    (LIGER, "layer_norm"): (_LIGER_FUNCTIONS, "liger_layer_norm", lambda f: lambda x, w, b: f(x, w, b, 1e-5), None),
    # In float32 inside ("gemma"), and into new memory, as the others.
    (LIGER, "rms_norm"): (
        _LIGER_FUNCTIONS, "liger_rms_norm",
        lambda f: lambda x, w: f(x, w, 1e-6, casting_mode="gemma", in_place=False), None,
    ),
    (LIGER, "softmax"): (_LIGER_FUNCTIONS, "liger_softmax", lambda f: f, None),
    # Its weight and bias are float32.
    (QUACK, "layer_norm"): (
        "quack.rmsnorm", "layernorm_fwd", lambda f: lambda x, w, b: f(x, w, b, 1e-5),
        lambda x, w, b: (x, w.float(), b.float()),
    ),
    (QUACK, "rms_norm"): ("quack.rmsnorm", "rmsnorm", lambda f: lambda x, w: f(x, w, eps=1e-6), None),
    (QUACK, "softmax"): ("quack.softmax", "softmax", lambda f: f, None),
}  # fmt: skip


@_adapter
def of_rows(library: str, cell: Cell, kind: str) -> Implementation:
    """Liger-Kernel's functions, on Triton, and quack's, on the CuTe DSL."""
    _need_gpu(kind)
    _need(not getattr(cell.of, "residual", False), f"has no {cell.operator} with a residual")
    _need(not getattr(cell.of, "is_causal", False), f"has no causal {cell.operator}")
    differentiable = (library, cell.operator) != (QUACK, "layer_norm")
    _need(differentiable or cell.direction == "forward", "has no layer_norm that autograd can differentiate")
    module, function, called, prepare = _OF_ROWS[library, cell.operator]
    return Implementation(called(getattr(_imported(module), function)), prepare)


# --- distillation: (student's logits, teacher's, target), or (student, its weight, teacher, its weight, target) -------

# Its generalised JSD is the teacher's part in the mixture, and both divergences at the ends.
_LIGER_BETA = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}


@_adapter
def liger_distillation(cell: Cell, kind: str) -> Implementation:
    """Liger-Kernel's JSD of log-probabilities, and its fused linear JSD, which computes gradients in its forward."""
    _need_gpu(kind)
    _need(cell.of.mix == 0.0, "has no cross-entropy beside the divergence")
    _need(cell.of.temperature == 1.0, "has no T² in its loss")
    functions, beta = _imported(_LIGER_FUNCTIONS), _LIGER_BETA[cell.of.divergence]
    if hasattr(cell.of, "width"):
        fused = functions.liger_fused_linear_jsd
        # It asks for the number of rows that count: the host waits.
        return Implementation(
            lambda x, w, t, t_weight, target: fused(x, w, t, t_weight, target, jsd_beta=beta), graph=False
        )
    _need(not cell.of.stored, "has no teacher of whom the likeliest classes are known")
    jsd = functions.liger_jsd

    def call(student, teacher, target):
        log_q, log_p = (torch.log_softmax(x.float(), 1) for x in (student, teacher))
        return jsd(log_q, log_p, target, beta=beta)

    return Implementation(call, graph=False)


# --- cross_entropy: (x, target); x (rows, classes) --------------------------------------------------------------------


@_adapter
def cross_entropy(library: str, cell: Cell, kind: str) -> Implementation:
    """Liger-Kernel's function, on Triton, and quack's, on the CuTe DSL."""
    sizes = cell.of
    _need_gpu(kind)
    plain = sizes.target == "classes" and not (sizes.positions or sizes.weight or sizes.logit_scale != 1.0)
    _need(plain, "is compared on rows of logits and classes alone")
    if library == LIGER:
        in_place = "writes the gradient over the logits in its forward: a second call would not see them"
        _need(cell.direction == "forward", in_place)
        function = _imported(_LIGER_FUNCTIONS).liger_cross_entropy
        options = dict(label_smoothing=sizes.label_smoothing, lse_square_scale=sizes.z_loss, softcap=sizes.softcap)
    else:
        _need(
            sizes.softcap is None and not (sizes.z_loss or sizes.label_smoothing), "has no softcap, z-loss, smoothing"
        )
        function, options = _imported("quack.cross_entropy").cross_entropy, {}
    return Implementation(lambda x, target: function(x, target, reduction=sizes.reduction, **options))


# --- linear_cross_entropy: (x, weight, target); x (rows, width), weight (classes, width) ------------------------------


@_adapter
def linear_cross_entropy(library: str, cell: Cell, kind: str) -> Implementation:
    """PyTorch's own in chunks of rows (2.13), Liger-Kernel's and quack's: gradients are computed in their forwards."""
    sizes = cell.of
    plain = not (sizes.bias or sizes.weight or sizes.z_loss or sizes.softcap or sizes.logit_scale != 1.0)
    _need(plain and not sizes.label_smoothing, "is compared on rows, a weight and classes alone")
    if library == CHUNKED:
        _need(hasattr(F, "linear_cross_entropy"), "is new in PyTorch 2.13")
        options = torch.nn.LinearCrossEntropyOptions(allow_retain_graph=True)
        return Implementation(
            lambda x, w, target: F.linear_cross_entropy(x, w, target, reduction=sizes.reduction, options=options)
        )
    _need_gpu(kind)
    if library == LIGER:
        fused = _imported(_LIGER_FUNCTIONS).liger_fused_linear_cross_entropy
        # It asks for the number of rows that count: the host waits.
        return Implementation(lambda x, w, target: fused(x, w, target, reduction=sizes.reduction), graph=False)
    _need(sizes.reduction != "none", "has no loss of each row")
    _need(not (sizes.rows % 8 or sizes.width % 8 or sizes.classes % 8), "needs sizes that are multiples of 8")
    chunked = _imported("quack.linear_cross_entropy").chunked_linear_cross_entropy
    return Implementation(lambda x, w, target: chunked(x, w, target, reduction=sizes.reduction))


# --- nonlinearity: (gate, up), (rows, width) each ---------------------------------------------------------------------


@_adapter
def liger_gate(cell: Cell, kind: str) -> Implementation:
    """Liger-Kernel's gates, whose GELU is the tanh form."""
    _need_gpu(kind)
    sizes = cell.of
    _need(sizes.gate is not None, f"has no {sizes.function} without a gate")
    _need(sizes.gate == "pair", "takes gate and up apart: of a packed tensor it would copy both")
    _need(sizes.function != "gelu", "has no exact GELU")
    _need(cell.direction == "forward", "its backward writes over gate and up, which the others are timed on")
    functions = _imported(_LIGER_FUNCTIONS)
    return Implementation(functions.liger_swiglu if sizes.function == "silu" else functions.liger_geglu)


# --- int8_linear: (input, weight, bias), weight (out_features, in_features) before quantisation, as the input ---------

# What torch._int_mm asks of its operands on a GPU (cuBLASLt's int8 products).
_INT_MM_ROWS, _INT_MM_MULTIPLE = 16, 8


def quantised(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, width) -> int8 (rows, width) and float32 (rows, 1): rounded to max|row| / 127, in PyTorch's operators."""
    scale = x.float().abs().amax(-1, keepdim=True) / 127
    return torch.round(x / scale).clamp(-127, 127).to(torch.int8), scale


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


def mode(cell: Cell) -> str:
    """ "auto" is one of the other two: what both are measured as."""
    if cell.of.mode != "auto":
        return cell.of.mode
    return "w8a16" if cell.of.rows <= operators.contract(cell.operator).AUTO_W8A16_ROWS else "w8a8"


def _need_int_mm(cell: Cell, kind: str) -> None:
    rows, in_features, out_features, *_ = cell.of
    if kind == "cuda":
        _need(rows > _INT_MM_ROWS, f"torch._int_mm needs more than {_INT_MM_ROWS} rows on a GPU, not {rows}")
        fits = in_features % _INT_MM_MULTIPLE == out_features % _INT_MM_MULTIPLE == 0
        _need(fits, f"torch._int_mm needs features that are multiples of {_INT_MM_MULTIPLE}")


@_adapter
def int_mm(cell: Cell, kind: str) -> Implementation:
    """torch._int_mm, with quantisation before and dequantisation after it as operators of their own."""
    _need(mode(cell) == "w8a8", "multiplies int8 with int8 alone: no w8a16")
    _need_int_mm(cell, kind)
    return Implementation(w8a8_of_operators, _prepare_int8)


@_adapter
def dequantised(kind: str) -> Implementation:
    """The whole int8 weight widened at each call, in PyTorch's operators: what one writes by hand."""
    _need(kind == "cpu", "is compared on CPUs alone")
    return Implementation(w8a16_of_operators, _prepare_int8)


@_adapter
def compiled_int8(cell: Cell, kind: str) -> Implementation:
    """The mode's mathematics in PyTorch's operators, compiled: Inductor fuses what is around the product."""
    _need_compiler(kind)
    if mode(cell) == "w8a8":
        _need_int_mm(cell, kind)
    function = w8a8_of_operators if mode(cell) == "w8a8" else w8a16_of_operators
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
def torchao(cell: Cell, kind: str) -> Implementation:
    """torchao's int8 linear, compiled with max-autotune as its guide asks: dynamic activation, or weight only."""
    _compared_on_gpus(kind)
    _need_compiler(kind)
    quantize = _imported("torchao.quantization").quantize_
    config = torchao_config(mode(cell))
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
def bitsandbytes(cell: Cell, kind: str) -> Implementation:
    """bitsandbytes' Linear8bitLt (LLM.int8()) without its outliers; it rounds the input to float16 first."""
    _compared_on_gpus(kind)
    _need(mode(cell) == "w8a8", "quantises the input as well: no w8a16")
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


# --- adamw ----------------------------------------------------------------------------------------------------------


@_adapter
def foreach_adamw(cell: Cell, kind: str) -> Implementation:
    """torch.optim.AdamW's own default on a GPU, a launch for each operation."""
    from gptkern.operators.adamw.problem import BETAS, EPS, WEIGHT_DECAY

    _need(cell.of.in_place, "is compared in place alone")
    adamw = _imported("torch.optim.adamw").adamw

    def call(param, grad, exp_avg, exp_avg_sq, step):
        adamw(
            [param], [grad], [exp_avg], [exp_avg_sq], [], [step], foreach=True, capturable=kind == "cuda",
            amsgrad=False, beta1=BETAS[0], beta2=BETAS[1], lr=0.0, weight_decay=WEIGHT_DECAY, eps=EPS, maximize=False,
        )  # fmt: skip
        return param

    return Implementation(torch.no_grad()(call))


@_adapter
def apex_adamw(cell: Cell, kind: str) -> Implementation:
    """apex's multi-tensor Adam with decoupled decay, the optimizer's step."""
    from gptkern.operators.adamw.problem import BETAS, EPS, WEIGHT_DECAY

    _need_gpu(kind)
    _need(cell.of.in_place, "is compared in place alone")
    library = _imported("apex.optimizers")

    def prepare(param, grad, exp_avg, exp_avg_sq, step):
        param = torch.nn.Parameter(param)
        param.grad = grad
        options = dict(lr=0.0, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, adam_w_mode=True)
        optimizer = library.FusedAdam([param], **options)
        optimizer.state[param] = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        return optimizer, param

    def call(optimizer, param):
        optimizer.step()
        return param

    return Implementation(call, prepare)


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


# --- Of an operator ---------------------------------------------------------------------------------------------------

# Attention written out keeps the scores: a model that does so does not get longer than this.
LONGEST_WRITTEN_OUT = 4096


def of_operator(plain: Callable | None, written_out: Callable | None, cell: Cell, kind: str, compiling: bool) -> Found:
    """Name -> Implementation, or Missing with the reason, of every peer of a cell.

    Args:
        plain, written_out: the operator in PyTorch, as its problem has it, for eager and for torch.compile.
        compiling: False for what stands for PyTorch eager alone: where a run only shows that the bench runs, compiling
            would be all of its time.
    """
    found: Found = {}
    if plain is not None:
        found[EAGER] = Implementation(plain)
    if cell.operator == "int8_linear":
        # What the weight was before it was quantised; under the name that says its precision.
        found[BF16_LINEAR if cell.dtype == "bfloat16" else EAGER] = _of_float_weight(Implementation(F.linear), cell)
    if not compiling:
        return found
    if plain is not None:
        found[COMPILE] = compiled(written_out, kind)
        found[COMPILE_MAX] = compiled(written_out, kind, **_MAX_AUTOTUNE)
    if cell.operator == "attention":
        # A compiler that tries many kernels finds none for attention that is written out.
        del found[COMPILE_MAX]
        if cell.of.length_q > LONGEST_WRITTEN_OUT:
            reason = f"attention written out keeps the scores: not beyond length {LONGEST_WRITTEN_OUT}"
            found[COMPILE] = Missing(reason)
        found |= {name: sdpa(backend, cell, kind) for backend, name in SDPA.items()}
        found[FLEX] = flex_attention(cell, kind)
        found |= {name: flash_attn(generation, cell, kind) for generation, name in FLASH_ATTN.items()}
    if cell.operator in ("distillation_loss", "linear_distillation_loss"):
        found[LIGER] = liger_distillation(cell, kind)
    if cell.operator == "nonlinearity":
        found[LIGER] = liger_gate(cell, kind)
    if cell.operator == "int8_linear":
        adapters = {COMPILE: compiled_int8, INT_MM: int_mm, TORCHAO: torchao, BITSANDBYTES: bitsandbytes}
        found |= {name: _of_float_weight(adapter(cell, kind), cell) for name, adapter in adapters.items()}
        found[DEQUANTISED] = _of_float_weight(dequantised(kind), cell)
    if cell.operator == "cross_entropy":
        found |= {library: cross_entropy(library, cell, kind) for library in (LIGER, QUACK)}
    if cell.operator == "adamw":
        found |= {FOREACH: foreach_adamw(cell, kind), APEX: apex_adamw(cell, kind)}
    if cell.operator == "linear_cross_entropy":
        found |= {library: linear_cross_entropy(library, cell, kind) for library in (CHUNKED, LIGER, QUACK)}
    return found | {lib: of_rows(lib, cell, kind) for lib, operator in _OF_ROWS if operator == cell.operator}


def _of_float_weight(peer: Implementation | Missing, cell: Cell) -> Implementation | Missing:
    """A peer that packs (input, float weight, bias) in its own way, on gptkern's (input, bias, int8 weight, scales)."""
    if isinstance(peer, Missing):
        return peer
    dtype, pack = getattr(torch, cell.dtype), peer.prepare or (lambda *arguments: arguments)

    def prepare(input, bias, weight, weight_scale):
        return pack(input, (weight.float() * weight_scale[:, None]).to(dtype), bias)

    return Implementation(peer.call, prepare, peer.graph)
