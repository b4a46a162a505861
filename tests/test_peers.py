"""The adapters of other libraries: what they call, with what, and why they say that a library is missing.

Libraries that are not installed are replaced by what their documented function computes, so that a wrong layout or a
forgotten argument shows on any machine.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from gptkern import operators
from gptkern.measuring import peers
from gptkern.measuring.cells import Cell, Missing

BF16 = torch.bfloat16
LIBRARIES = ("liger_kernel", "flash_attn", "flash_attn_interface", "quack", "torchao", "bitsandbytes", "cutlass")


def test_importing_the_adapters_imports_no_library():
    code = (
        "import sys, gptkern.measuring.peers\n"
        f"found = [name for name in {LIBRARIES!r} + ('triton', 'torch._dynamo') if name in sys.modules]\n"
        "import gptkern, torch; sys.exit(str(found) if found else 0)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


# --- Reasons --------------------------------------------------------------------------------------------------------


def cell(operator, *sizes, dtype="bfloat16", direction="forward"):
    of = type(operators.problem(operator).cells("cuda", "smoke")[0].sizes)(*sizes)
    return Cell(operator, direction, dtype, (), "", "", of=of)


def attention(kind="causal", heads=4, kv_heads=2, lengths=(6, 6), head_dim=16, **more):
    return cell("attention", 2, heads, kv_heads, *lengths, head_dim, kind, **more)


def linear(mode, *sizes):
    return cell("int8_linear", *(sizes or (24, 64, 48)), None, mode)


GPU, LIGER, QUACK = "cuda", peers.LIGER, peers.QUACK
NORM = cell("layer_norm", 4, 8)
CROSS_ENTROPY, EXTENDED = cell("cross_entropy", 4, 8), (4, 8, 0, "classes", False, "sum", 0.1, 0.2, 3.0)
SOFTMAX, CAUSAL = (cell("softmax", (4, 4), -1, 1.0, None, causal) for causal in (False, True))


@pytest.fixture(autouse=True)
def any_gpu(monkeypatch):
    """Adapters are asked as on a GPU of any kind, with triton."""
    monkeypatch.setattr(peers, "_need_architecture", lambda *majors: None)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: name == "triton" or found(name, *rest))


def test_a_library_that_cannot_be_imported(monkeypatch):
    def import_module(name):
        # A library that is built for another PyTorch raises almost anything.
        raise OSError("undefined symbol: x\nmore")

    monkeypatch.setattr(importlib, "import_module", import_module)
    for module, peer in (
        ("liger_kernel.transformers.functional", lambda: peers.of_rows(LIGER, NORM, GPU)),
        ("flash_attn_interface", lambda: peers.flash_attn(3, attention(), GPU)),
        ("torchao.quantization", lambda: peers.torchao(linear("w8a8"), GPU)),
    ):
        assert peer() == Missing(f"{module} cannot be imported: OSError: undefined symbol: x")


@pytest.mark.parametrize(
    ("adapter", "arguments", "reason"),
    [
        (peers.flash_attn, (2, attention(lengths=(4, 6)), GPU), "causal limit at the last key"),
        (peers.flash_attn, (2, attention(dtype="float32"), GPU), "bfloat16 alone, not float32"),
        (peers.sdpa, ("flash", attention(lengths=(4, 6)), GPU), "equal lengths alone"),
        (peers.of_rows, (LIGER, cell("layer_norm", 4, 8, True), GPU), "no layer_norm with a residual"),
        (peers.of_rows, (LIGER, CAUSAL, GPU), "no causal softmax"),
        (peers.cross_entropy, (LIGER, cell("cross_entropy", 4, 8, direction="both"), GPU), "over the logits"),
        (peers.cross_entropy, (QUACK, cell("cross_entropy", 4, 8, 3), GPU), "rows of logits and classes alone"),
        (peers.of_rows, (QUACK, cell("layer_norm", 4, 8, direction="backward"), GPU), "autograd"),
        (peers.liger_gate, (cell("nonlinearity", 4, 8, "silu"), GPU), "no silu without a gate"),
        (peers.liger_gate, (cell("nonlinearity", 4, 8, "silu", "packed"), GPU), "gate and up apart"),
        (peers.liger_gate, (cell("nonlinearity", 4, 8, "gelu", "pair"), GPU), "no exact GELU"),
        (peers.liger_gate, (cell("nonlinearity", 4, 8, "silu", "pair", direction="both"), GPU), "writes over gate"),
        (peers.int_mm, (linear("w8a16"), GPU), "no w8a16"),
        (peers.bitsandbytes, (linear("w8a16"), GPU), "no w8a16"),
    ],
)
def test_what_a_library_computes_otherwise_or_not_at_all_is_left_out(adapter, arguments, reason):
    result = adapter(*arguments)
    assert isinstance(result, Missing) and reason in result.reason


# --- What is called -------------------------------------------------------------------------------------------------


def library(monkeypatch, name, **functions):
    module = types.ModuleType(name)
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, name, module)
    parent = name.rpartition(".")[0]
    if parent and parent not in sys.modules:
        library(monkeypatch, parent)
    return module


def heads_first():
    """(query, key, value, what attention makes of them), causal or not."""
    tensors, sdpa = (torch.randn(2, 4, 6, 16), *torch.randn(2, 2, 2, 6, 16)), F.scaled_dot_product_attention
    return tensors, lambda causal: sdpa(*tensors, is_causal=causal, enable_gqa=True)


@pytest.mark.parametrize("kind", ["causal", "full"])
@pytest.mark.parametrize("generation, pair", [(2, False), (3, False), (3, True), (4, True)])
def test_flash_attn_gets_its_own_layout(monkeypatch, generation, pair, kind):
    def flash_attn_func(query, key, value, *, causal):
        # (batch, length, heads, head_dim)
        assert query.shape == (2, 6, 4, 16) and key.shape == value.shape == (2, 6, 2, 16)
        tensors = (tensor.transpose(1, 2) for tensor in (query, key, value))
        output = F.scaled_dot_product_attention(*tensors, is_causal=causal, enable_gqa=True).transpose(1, 2)
        return (output, None) if pair else output

    name = {2: "flash_attn", 3: "flash_attn_interface", 4: "flash_attn.cute"}[generation]
    library(monkeypatch, name, flash_attn_func=flash_attn_func)
    tensors, expected = heads_first()
    output = peers.flash_attn(generation, attention(kind), GPU).call(*tensors)
    torch.testing.assert_close(output, expected(kind == "causal"))


@pytest.mark.parametrize("backend, grouped", [("flash", True), ("efficient", False), ("cudnn", True)])
def test_sdpa_is_forced(monkeypatch, backend, grouped):
    from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

    seen = []

    def forced(*tensors, **options):
        seen.append((_cur_sdpa_kernel_backends(), options))

    monkeypatch.setattr(F, "scaled_dot_product_attention", forced)
    peers.sdpa(backend, attention(kv_heads=2 if grouped else 4), GPU).call(*torch.randn(3, 1, 1, 4, 64))
    kernel = getattr(SDPBackend, f"{backend.upper()}_ATTENTION")
    assert seen == [([kernel], {"is_causal": True, "enable_gqa": grouped})]


def test_quacks_norm_gets_parameters_in_float32(monkeypatch):
    def layernorm_fwd(x, weight, bias, eps):
        assert x.dtype == BF16 and weight.dtype == bias.dtype == torch.float32
        return F.layer_norm(x.float(), weight.shape, weight, bias, eps).to(x.dtype)

    library(monkeypatch, "quack.rmsnorm", layernorm_fwd=layernorm_fwd)
    x, weight, bias = torch.randn(4, 8).to(BF16), torch.randn(8).to(BF16), torch.randn(8).to(BF16)
    norm = peers.of_rows(QUACK, NORM, GPU)
    prepared = norm.prepare(x, weight, bias)
    assert prepared[0] is x
    torch.testing.assert_close(norm.call(*prepared), F.layer_norm(x, (8,), weight, bias, 1e-5))


def test_liger_has_a_function_for_each_gate(monkeypatch):
    gates = dict(liger_swiglu=lambda a, b: F.silu(a) * b, liger_geglu=lambda a, b: F.gelu(a, approximate="tanh") * b)
    library(monkeypatch, "liger_kernel.transformers.functional", **gates)
    gate, up = torch.randn(2, 4, 8)
    for function in ("silu", "gelu_tanh"):
        timed = cell("nonlinearity", 4, 8, function, "pair")
        expected = operators.problem("nonlinearity").plain(timed.of)(gate, up)
        torch.testing.assert_close(peers.liger_gate(timed, GPU).call(gate, up), expected)


@pytest.mark.parametrize("peer", ["foreach_adamw", "apex_adamw"])
def test_optimizers_take_the_step_of_the_cell(monkeypatch, peer):
    """In place, the averages included: what PyTorch's fused step leaves."""

    class FusedAdam(torch.optim.AdamW):
        def __init__(self, params, lr, betas, eps, weight_decay, adam_w_mode=True):
            assert adam_w_mode
            super().__init__(params, lr, betas, eps, weight_decay)
            self.state.default_factory = dict

        def step(self):
            for state in self.state.values():
                # apex counts in the group.
                state.setdefault("step", torch.tensor(float(STEP)))
            super().step()

    from gptkern.operators.adamw.problem import STEP

    library(monkeypatch, "apex.optimizers", FusedAdam=FusedAdam)
    timed = cell("adamw", 4, 8, True, dtype="float32")
    problem = operators.problem("adamw")
    runs = [problem.inputs(timed.of, torch.float32, torch.Generator().manual_seed(0)).arguments for _ in range(2)]
    problem.plain(timed.of)(*runs[0])
    found = getattr(peers, peer)(timed, GPU if peer == "apex_adamw" else "cpu")
    prepared = found.prepare(*runs[1]) if found.prepare else runs[1]
    torch.testing.assert_close(found.call(*prepared).detach(), runs[0][0])
    for mine, theirs in zip(runs[0][2:4], runs[1][2:4]):
        torch.testing.assert_close(mine, theirs)
    assert getattr(peers, peer)(cell("adamw", 4, 8), GPU) == Missing("is compared in place alone")


@pytest.mark.parametrize("divergence, beta", [("forward_kl", 0.0), ("jsd", 0.5), ("reverse_kl", 1.0)])
def test_liger_gets_the_divergence_as_its_beta(monkeypatch, divergence, beta):
    """What it documents: the sum over classes, divided by the rows that count, beta the teacher's part in m."""
    seen = []

    def liger_jsd(input, target, shift_labels=None, beta=0.5, ignore_index=-100):
        seen.append(beta)
        p, q = target.exp(), input.exp()
        m = beta * p + (1 - beta) * q
        found = beta * p * (target - m.log()) + (1 - beta) * q * (input - m.log())
        found = {0.0: p * (target - input), 1.0: q * (input - target)}.get(beta, found)
        counts = shift_labels != ignore_index
        return found.sum(1)[counts].sum() / counts.sum()

    def liger_fused_linear_jsd(x, w, t, t_weight, shift_labels=None, jsd_beta=0.5, ignore_index=-100, temperature=1.0):
        log_q, log_p = torch.log_softmax(x @ w.T, 1), torch.log_softmax(t @ t_weight.T, 1)
        return liger_jsd(log_q, log_p, shift_labels, jsd_beta, ignore_index)

    functions = dict(liger_jsd=liger_jsd, liger_fused_linear_jsd=liger_fused_linear_jsd)
    library(monkeypatch, "liger_kernel.transformers.functional", **functions)
    for operator, sizes in (("distillation_loss", (9, 33)), ("linear_distillation_loss", (9, 6, 33, 8))):
        of = cell(operator, *sizes, divergence, dtype="float32")
        made = operators.problem(operator).inputs(of.of, torch.float32, torch.Generator().manual_seed(0))
        found = peers.liger_distillation(of, GPU).call(*made.arguments)
        torch.testing.assert_close(found, made.reference(*made.tensors.values()))
        assert seen.pop() == beta and not seen
        for extension, reason in ((2.0, "no T²"), (1.0, "no cross-entropy")):
            other = cell(operator, *sizes, divergence, extension, 0.5 * (extension == 1.0))
            assert reason in peers.liger_distillation(other, GPU).reason


@pytest.mark.parametrize(
    ("peer", "module", "name"),
    [
        (LIGER, "liger_kernel.transformers.functional", "liger_cross_entropy"),
        (QUACK, "quack.cross_entropy", "cross_entropy"),
    ],
)
def test_cross_entropies_get_the_cells_options(monkeypatch, peer, module, name):
    given = []

    def function(x, target, **options):
        given.append(options)
        return F.cross_entropy(x, target, reduction=options["reduction"])

    library(monkeypatch, module, **{name: function})
    x, target = torch.randn(4, 8), torch.tensor([0, 7, -100, 2])
    right = F.cross_entropy(x, target)
    torch.testing.assert_close(peers.cross_entropy(peer, CROSS_ENTROPY, GPU).call(x, target), right)
    extended = peers.cross_entropy(peer, cell("cross_entropy", *EXTENDED), GPU)
    if peer == LIGER:
        extended.call(x, target)
        assert given[-1] == dict(reduction="sum", label_smoothing=0.1, lse_square_scale=0.2, softcap=3.0)
    else:
        assert "has no softcap" in extended.reason


@pytest.mark.parametrize(
    ("peer", "module", "name"),
    [
        (LIGER, "liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy"),
        (QUACK, "quack.linear_cross_entropy", "chunked_linear_cross_entropy"),
        (peers.CHUNKED, None, None),
    ],
)
def test_linear_cross_entropies_get_the_cells_options(monkeypatch, peer, module, name):
    if module is None and not hasattr(F, "linear_cross_entropy"):
        assert "2.13" in peers.linear_cross_entropy(peer, cell("linear_cross_entropy", 8, 16, 24), GPU).reason
        return
    if module is not None:

        def function(x, w, target, reduction):
            return F.cross_entropy(x @ w.T, target, reduction=reduction)

        library(monkeypatch, module, **{name: function})
    x, w, target = torch.randn(8, 16), torch.randn(24, 16), torch.tensor([0, 7, -100, 2, 23, 5, -100, 1])
    for reduction in ("mean", "sum"):
        of = cell("linear_cross_entropy", 8, 16, 24, False, False, reduction)
        right = F.cross_entropy(x @ w.T, target, reduction=reduction)
        torch.testing.assert_close(peers.linear_cross_entropy(peer, of, GPU).call(x, w, target), right)
    capped = cell("linear_cross_entropy", 8, 16, 24, False, False, "mean", 0.0, 0.0, 3.0)
    assert "classes alone" in peers.linear_cross_entropy(peer, capped, GPU).reason
    if peer == QUACK:
        odd = cell("linear_cross_entropy", 8, 16, 23)
        assert "multiples of 8" in peers.linear_cross_entropy(peer, odd, GPU).reason


# --- int8 -----------------------------------------------------------------------------------------------------------

# The products of values that are rounded to 1 / 127 of a row's largest differ by about 1 %.
INT8_ERROR = 0.02


def int8_inputs(dtype):
    return torch.randn(24, 64).to(dtype), (torch.randn(48, 64) / 8).to(dtype), torch.randn(48).to(dtype)


def assert_near(output, input, weight, bias):
    right = input.double() @ weight.double().t() + bias.double()
    assert output.dtype == input.dtype
    error = ((output.double() - right).norm() / right.norm()).item()
    assert error < INT8_ERROR
    # And it is the quantised product, not the product.
    assert error > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_products_of_operators(dtype):
    inputs = int8_inputs(dtype)
    peer = peers.int_mm(linear("w8a8"), "cpu")
    prepared = peer.prepare(*inputs)
    assert prepared[1].dtype == torch.int8 and prepared[2].shape == (48,)
    assert_near(peer.call(*prepared), *inputs)
    assert_near(peers.w8a16_of_operators(*prepared), *inputs)


# --- torch.compile --------------------------------------------------------------------------------------------------


def test_every_cell_is_compiled_afresh():
    """Dynamo gives up on a function after its recompile_limit and runs it eagerly, without an error."""
    from torch._dynamo import config
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    cells = config.recompile_limit + 3
    for rows in range(2, 2 + cells):
        fresh = peers.fresh_compile(_negated_sum, backend=counter)
        torch.testing.assert_close(fresh(torch.ones(rows)), torch.tensor(-float(rows)))
    assert counter.frame_count == cells


def _negated_sum(x):
    return (-x).sum()
