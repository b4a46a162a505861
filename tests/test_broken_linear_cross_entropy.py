"""linear_cross_entropy broken on purpose, its Triton kernels and what every backend shares: the test meant for each
fault has to see it.

As in test_broken_rows.py one expression is changed; the same call passes without the change. What is Python is changed
in the function's own source, which is run again in its module.
"""

from __future__ import annotations

import inspect
import re

import pytest
import torch
from conftest import DEVICE, _forced
from mutants import Mutation, plant_in_triton, seen

if DEVICE != "cpu":
    pytest.skip("there is a GPU: kernels are changed where they are interpreted", allow_module_level=True)

import test_linear_cross_entropy as of_values
import test_linear_cross_entropy_memory as of_memory

from gptkern.backends import vocabulary
from gptkern.operators.linear_cross_entropy import chunks, contract, rows

F32, BF16 = torch.float32, torch.bfloat16


def of(test, **arguments):
    """A test as the check of a mutation; of its arguments those that no fixture gives."""

    def check(backend, monkeypatch):
        fixtures = dict(
            loss_backend=backend, triton_backend=backend, device=DEVICE, monkeypatch=monkeypatch, poisoned_memory=None
        )
        named = fixtures | arguments
        torch.manual_seed(0)
        test(**{name: named[name] for name in inspect.signature(test).parameters})

    return check


IN_CHUNKS = of(of_values.test_forward_and_gradients, dtype=F32, rows=17, width=33, classes=65, tokens=4)
IN_EVEN_CHUNKS = of(of_values.test_forward_and_gradients, dtype=F32, rows=8, width=16, classes=64, tokens=1)
IN_CHUNKS_OF_16_BITS = of(of_values.test_forward_and_gradients, dtype=BF16, rows=17, width=33, classes=65, tokens=4)
Z_LOSS = of(of_values.test_options, options=dict(z_loss=0.05), reduction="sum")
CERTAIN = of(of_values.test_a_target_that_is_all_but_certain_keeps_its_digits, dtype=F32, miss=1e-6, tokens=1)
CERTAIN_IN_16_BITS = of(
    of_values.test_a_target_that_is_all_but_certain_keeps_its_digits, dtype=BF16, miss=1e-3, tokens=1
)
IMPOSSIBLE = of(of_values.test_classes_that_are_impossible, tokens=1)
SMOOTHED = of(of_values.test_options, options=dict(weighted=True, label_smoothing=0.3), reduction="mean")
IGNORED = of(of_values.test_ignored_rows, ignored="some", index=3, reduction="mean")
STATS = of(of_values.test_stats, tokens=1, softcap=2.0)
TIES = of(of_values.test_of_equal_classes_the_first_is_the_likeliest, tokens=1)
IN_BLOCKS = of(of_values.test_a_chunk_is_walked_in_blocks, classes=70)
IN_16_BITS = of(of_values.test_the_gradient_of_logits_in_sixteen_bits, dtype=BF16)
CAP = of(of_values.test_a_cap_that_is_reached)
AGAIN = of(of_values.test_a_second_backward, reduction="mean", dtype=F32)
MEMORY = of(of_memory.test_memory_and_products_of_llama)
ON_A_CPU = of(of_memory.test_memory_on_a_cpu, reduction="mean")
SKIPPED = of(of_memory.test_ignored_rows_are_not_multiplied_on_a_cpu, options=dict(reduction="none"))

TRITON = [
    Mutation("sums are not rescaled", "_update_kernel", r"exponential\(m - shift\)", "1.0", IN_CHUNKS),
    Mutation(
        "the target is summed with the others", "_update_kernel",
        r"tl\.where\(is_target, 0\.0, e\)", "e", CERTAIN_IN_16_BITS,
    ),
    Mutation("the target's logit is that of the last chunk", "_update_kernel", r"score \+= ", "score = ", IN_CHUNKS),
    Mutation("-inf is subtracted from -inf", "_update_kernel", r"finite\(largest_s\)", "largest_s", IMPOSSIBLE),
    Mutation(
        "the entropy of what was impossible so far", "_update_kernel",
        r"tl\.where\(m == float\(\"-inf\"\), 0\.0, m - shift\)", "m - shift", IMPOSSIBLE,
    ),
    Mutation("a later block forgets the target's part", "_update_kernel", r"\(at < begin\)", "(at < 0)", IN_BLOCKS),
    Mutation("of equal classes the last", "_update_kernel", r"largest > most", "largest >= most", TIES),
    Mutation("smoothing without weights", "_update_kernel", r"weighted \*= ", "weighted += 0.0 * ", SMOOTHED),
    Mutation("a chunk's last class is left out", "_update_kernel", r"column < count", "column < count - 1", IN_CHUNKS),
    Mutation("rows by the chunk's width", "_update_kernel", r"row \* z_stride", "row * count", IN_CHUNKS),
    Mutation("ignored rows are not 0", "_gradient_kernel", r"tl\.where\(counts, g, 0\.0\)", "g", IN_16_BITS),
    Mutation("G by z's rows", "_gradient_kernel", r"row \* g_stride", "row * z_stride", IN_16_BITS),
    Mutation("a target in every block", "_gradient_kernel", r"column == at", "column == at + begin", IN_BLOCKS),
    Mutation("the slope of the cap is left out", "slopes", r"if SOFTCAP", "if SOFTCAP and False", CAP),
    Mutation("smoothed without weights", "_gradient_kernel", r"g -= smooth \* ", "g -= smooth + 0.0 * ", SMOOTHED),
]  # fmt: skip
SHARP = {"the target is summed with the others", "-inf is subtracted from -inf", "G by z's rows"}

# (module, the backend that the check runs on, mutation)
PYTHON = [
    (chunks, "torch", Mutation("log(1 + x)", "finish", r"torch\.log1p\(rest\)", "torch.log(1.0 + rest)", CERTAIN)),
    (chunks, "torch", Mutation("p - 1", "known", r"- own \* miss", "+ own * ((1.0 - miss) - 1.0)", CERTAIN)),
    (chunks, "triton", Mutation("a mean of all", "reduced", r"row_weight\(call\)\.sum\(\)", "len(loss)", IGNORED)),
    (chunks, "torch", Mutation("half of the z-loss", "known", r"2\.0 \* call\.z_loss", "call.z_loss", Z_LOSS)),
    (chunks, "torch", Mutation("smoothed classes pull at nothing", "known",
                               r"own \+ shared, smooth", "own, smooth", SMOOTHED)),
    (chunks, "torch", Mutation("weights are not summed", "whole_weight", r"\.sum\(\)", ".mean()", SMOOTHED)),
    (rows, "torch", Mutation("sums are not rescaled", "_accumulate",
                             r"rest\.mul_\(before\)", "rest", IN_CHUNKS_OF_16_BITS)),
    (rows, "torch", Mutation("the target is summed with the others", "_accumulate",
                             r"masked_fill_\(inside, 0\.0\)", "clone()", CERTAIN)),
    (rows, "torch", Mutation("-inf is subtracted from -inf", "_accumulate",
                             r"largest\.masked_fill\(largest == -torch\.inf, 0\.0\)", "largest", IMPOSSIBLE)),
    (rows, "torch", Mutation("the entropy forgets the target", "_accumulate",
                             r"rest \* before \+ own", "rest * before", STATS)),
    (rows, "torch", Mutation("the mean is that of a part of the rows", "forward_with_gradients",
                             r"weights\.sum\(\)", "weights[:2].sum()", SMOOTHED)),
    (rows, "torch", Mutation("dx of the first rows alone", "forward_with_gradients",
                             r"out=dx\[part\]", "out=dx[:each]", IN_EVEN_CHUNKS)),
    (rows, "torch", Mutation("chunks of all", "forward_with_gradients",
                             r"each = min\(", "each = max(len(x), ", ON_A_CPU)),
    (vocabulary, "triton", Mutation("dx of one chunk", "add_input_gradient", r"if first:", "if True:", IN_CHUNKS)),
    (vocabulary, "torch", Mutation("all of the gradients' memory", "at_a_time", r"size // 2", "size", MEMORY)),
    (vocabulary, "torch", Mutation("G beside z in float32", "buffer_of_g",
                                   r"torch\.empty_like\(self\.z, dtype=dtype\)", "torch.empty_like(self.z)", MEMORY)),
    (contract, "torch", Mutation("each gradient is 1", "_scaled", r"and grad_output == 1\.0", "", AGAIN)),
    (contract, "torch", Mutation("ignored rows are not skipped", "_kept_rows",
                                 r"if ignored\.any\(\)", "if 0", SKIPPED)),
]  # fmt: skip


def replant(module, mutation, monkeypatch):
    """The function, from its own source with one expression changed, in its module or class until it is undone."""
    place = vocabulary.Chunks if mutation.function == "buffer_of_g" else module
    source = inspect.getsource(getattr(place, mutation.function))
    source = inspect.cleandoc("\n" + source) if place is not module else source
    changed, count = re.subn(mutation.old, lambda _: mutation.new, source)
    assert count == 1, f"{mutation.old} stands {count} times in {mutation.function}"
    scope = dict(vars(module))
    exec(changed, scope)
    function = scope[mutation.function]
    # The globals of the module itself, so that other changes and tests are seen.
    planted = type(function)(
        function.__code__, vars(module), mutation.function, function.__defaults__, function.__closure__
    )
    planted.__kwdefaults__ = function.__kwdefaults__
    monkeypatch.setattr(place, mutation.function, planted)


@pytest.mark.parametrize(
    "mutation", [pytest.param(m, id=m.name, marks=[] if m.name in SHARP else pytest.mark.deep) for m in TRITON]
)
def test_a_broken_triton_kernel_is_seen(mutation, tmp_path, monkeypatch):
    with _forced("triton", mutation.name):
        mutation.check("triton", monkeypatch)
        plant_in_triton("linear_cross_entropy", mutation, tmp_path, monkeypatch)
        with seen():
            mutation.check("triton", monkeypatch)


@pytest.mark.parametrize(
    ("module", "backend", "mutation"),
    [pytest.param(*case, id=f"{case[0].__name__.rpartition('.')[2]}: {case[2].name}") for case in PYTHON],
)
def test_broken_python_is_seen(module, backend, mutation, monkeypatch):
    with _forced(backend, mutation.name):
        mutation.check(backend, monkeypatch)
        replant(module, mutation, monkeypatch)
        with seen():
            mutation.check(backend, monkeypatch)
