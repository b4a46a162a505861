"""AdamW broken on purpose, its Triton kernels and what stands above every backend: the test meant for each fault has to
see it.

As in test_broken_rows.py one expression is changed; the same test passes without the change. What is Python is changed
in the source of the whole module, of which the one function then takes the place of the right one.
"""

from __future__ import annotations

import inspect
import re
import types

import pytest
import torch
from conftest import DEVICE, _forced
from mutants import Mutation, plant_in_triton, seen

if DEVICE != "cpu":
    pytest.skip("there is a GPU: kernels are changed where they are interpreted", allow_module_level=True)

import test_adamw as of_values
import test_optim as of_class
import test_optim_shards as of_shards

from gptkern.operators.adamw import blockwise, contract, optimizer, sharding, states

F32, BF16 = torch.float32, torch.bfloat16


def of(test, **arguments):
    """A test as the check of a mutation; of its arguments those that no fixture gives."""

    def check(backend, monkeypatch):
        named = dict(backend=backend, device=DEVICE, monkeypatch=monkeypatch, triton_backend=backend) | arguments
        torch.manual_seed(0)
        test(**{name: named[name] for name in inspect.signature(test).parameters})

    return check


UPDATE = of(of_values.test_an_update, dtype=F32, options={})
MAXIMISED = of(of_values.test_an_update, dtype=F32, options={"maximize": True})
AMSGRAD = of(of_values.test_an_update, dtype=F32, options={"amsgrad": True})
NEAR_ONE = of(of_values.test_hyperparameters_at_their_ends, hyper=dict(betas=(0.999, 0.9999)))
NONE = of(of_values.test_hyperparameters_at_their_ends, hyper=dict(betas=(0.0, 0.0)))
LAYOUT, GAPS = (of(of_values.test_every_layout, gaps=gaps) for gaps in (False, True))
IN_FLOAT32 = of(of_values.test_averages_in_float32)
CLIPPED = of(of_values.test_clipping_and_unscaling)
BELOW = of(of_values.test_a_norm_below_the_limit_changes_nothing)
NORM = of(of_values.test_the_norm, dtype=BF16)
OVERFLOW = of(of_values.test_an_overflow_leaves_everything, state_dtype=None, rounding=False)
NAN_BITS = of(of_values.test_every_nan_stays_one_when_it_is_rounded)
OVERFLOW_IN_8_BITS = of(of_values.test_an_overflow_leaves_everything, state_dtype="int8", rounding=True)
NO_NUMBERS = of(of_values.test_numbers_that_are_none_stay_where_they_are)
BITS = of(of_values.test_the_bits_of_the_rounding_are_pytorchs, shape=(8 * 515 + 3,), state_dtype=F32)
BITS_IN_BLOCKS = of(of_values.test_the_bits_of_the_rounding_are_pytorchs, shape=(3, 300), state_dtype="int8")
BITS_IN_WHOLE_BLOCKS = of(of_values.test_the_bits_of_the_rounding_are_pytorchs, shape=(2, 512), state_dtype="int8")
UNBIASED = of(of_values.test_rounding_at_random_is_without_bias)
DRAWS = of(of_values.test_tensors_and_seeds_draw_their_own)
IN_8_BITS = of(of_values.test_an_update_in_8_bits, shape=(2, 257), dtype=F32)
IN_WHOLE_BLOCKS = of(of_values.test_an_update_in_8_bits, shape=(33, 512), dtype=F32)
SIGNED, UNSIGNED = (of(of_values.test_the_map_is_the_dynamic_one, signed=signed) for signed in (True, False))
NO_ZEROS = of(of_values.test_no_root_is_coded_as_zero_beside_others)
PARTS = of(of_values.test_parts_of_a_tensor_are_updated_as_the_whole, kind="stochastic")
HELD = of(of_values.test_what_is_held_in_8_bits)
AUTOGRAD = of(of_values.test_what_was_written_is_known_to_autograd)
TORCHS = of(of_class.test_two_hundred_steps_are_torchs_bits, options={}, dtype=F32)
EXCHANGED = of(of_class.test_states_are_exchanged_in_the_middle_of_a_run, options={"amsgrad": True})
LOADED = of(of_class.test_the_state_of_an_optimizer_that_is_not_fused_is_loaded, fused=None, foreach=True)
CONVERTED = of(of_class.test_states_become_what_the_optimizer_holds, of=None, to="int8")
CONVERTED_BACK = of(of_class.test_states_become_what_the_optimizer_holds, of="int8", to=None)
KEPT = of(of_class.test_states_become_what_the_optimizer_holds, of=F32, to=F32)
RESUMED = of(of_class.test_a_resumed_run_rounds_as_if_it_had_not_stopped, state_dtype=F32)
COPIED = of(of_class.test_a_copied_and_a_pickled_optimizer_go_on)
SCALED = of(of_class.test_a_grad_scaler_from_end_to_end, max_norm=0.5, unscales=False)
UNSCALED = of(of_class.test_a_grad_scaler_from_end_to_end, max_norm=None, unscales=True)
SCHEDULED = of(of_class.test_schedulers_hooks_and_closures)
HOOKED = of(of_class.test_hooks_of_state_dicts_are_called_once)
SPARSE = of(of_class.test_a_sparse_gradient_is_refused_before_anything_changes)


def placed(shape, mesh_shape, placements):
    return of(of_shards.test_the_place_in_the_whole, shape=shape, mesh_shape=mesh_shape, placements=placements)


COLUMNS = placed((3, 5, 7), (4,), [of_shards.Shard(1)])
ROWS_AND_COLUMNS = placed((9, 7, 3), (2, 2), [of_shards.Shard(0), of_shards.Shard(1)])
REFUSED_PLACE = of(
    of_shards.test_a_place_that_is_no_run_of_runs_is_refused,
    shape=(8, 4), placements=[of_shards._StridedShard(0, split_factor=2), of_shards.Replicate()],
)  # fmt: skip


def unfit(index: int):
    """One of the states that have to be refused."""
    mark = of_class.test_a_state_that_does_not_fit_is_refused_before_anything_changes.pytestmark[0]
    change, words = mark.args[1][index]
    return of(of_class.test_a_state_that_does_not_fit_is_refused_before_anything_changes, change=change, words=words)


TRITON = [
    Mutation("no decay", "moved_parameter", r"p = p - lr \* weight_decay \* p", "p = p * 1.0", UPDATE),
    Mutation(
        "the decay after the update", "moved_parameter", r"p = p - lr \* weight_decay \* p", "p = p / (1 + lr)", UPDATE
    ),
    Mutation(
        "eps under the root",
        "moved_parameter",
        r"\(tl.sqrt\(largest / correction2\) \+ eps\)",
        "tl.sqrt(largest / correction2 + eps)",
        UPDATE,
    ),
    Mutation("the second average is not corrected", "moved_parameter", r"largest / correction2", "largest", UPDATE),
    Mutation("a correction by the difference", "correction", r"-x \* terms", "1.0 - tl.exp(x)", NEAR_ONE),
    Mutation("a series of five terms", "correction", r"\(1\.0 / 6\)", "0.0", UPDATE),
    Mutation(
        "the logarithm of β = 0",
        "correction",
        r"tl\.where\(x > -0\.5, -x \* terms, 1\.0 - tl\.exp\(x\)\)",
        "-x * terms",
        NONE,
    ),
    Mutation("maximised as if minimised", "scaled", r"g = -g", "g = g", MAXIMISED),
    Mutation(
        "multiplied by the scale", "scaled", r"g / tl\.load\(grad_scale_ptr\)", "g * tl.load(grad_scale_ptr)", CLIPPED
    ),
    Mutation("not clipped", "scaled", r"g \* tl\.load\(clip_ptr\)", "g", CLIPPED),
    Mutation(
        "the newest average for the largest", "_update_chunk", r"tl\.maximum\(before, v,", "tl.maximum(v, v,", AMSGRAD
    ),
    Mutation(
        "the gradient's square before it is scaled",
        "_update_chunk",
        r"one_less_beta2 \* g \* g",
        "one_less_beta2 * g",
        UPDATE,
    ),
    Mutation("an average that is not stored", "_update_chunk", r"store\(m_at, m,", "store(m_at, m * 0,", UPDATE),
    Mutation("one element too many", "_update_chunk", r"e < count", "e <= count", UPDATE),
    Mutation(
        "the last chunk is left out",
        "_update_kernel",
        r"first \+ CHUNK <= count: _update_chunk",
        "first + CHUNK <= count + CHUNK:\n        _update_chunk",
        UPDATE,
    ),
    Mutation("chunks of the tensor before", "_update_kernel", r"- tl\.load\(row_ptr \+ FIRST_CHUNK\)", "- 0", UPDATE),
    Mutation("infinities are taken", "_update_kernel", r"== 0\.0, count, 0", "== 0.0, count, count", OVERFLOW),
    Mutation(
        "infinities are taken in 8 bits",
        "_update_blocks_kernel",
        r"== 0\.0, count, 0",
        "== 0.0, count, count",
        OVERFLOW_IN_8_BITS,
    ),
    Mutation(
        "a chunk of the norm twice",
        "_squares_kernel",
        r"CHUNKS_OF_A_SUM \+ index",
        "CHUNKS_OF_A_SUM + index // 2 * 2",
        NORM,
    ),
    Mutation(
        "the norm is no root", "_root_kernel", r"tl\.sqrt\(tl\.sum\(sums, axis=0\)\)", "tl.sum(sums, axis=0)", NORM
    ),
    Mutation("cut off", "rounded_at_random", r"bits \+ draws", "bits", BITS),
    Mutation("half of the bits", "rounded_at_random", r"bits \+ draws", "bits + draws // 2", UNBIASED),
    Mutation(
        "an infinity is rounded", "rounded_at_random", r"0x7F800000\) == 0x7F800000", "0x7F800000) == 0", NAN_BITS
    ),
    Mutation("high halves first", "draws", r"tl\.join\(low, high\)", "tl.join(high, low)", BITS),
    Mutation("halves anywhere", "draws", r"16 \* \(half % 2\)", "16 * (1 - half % 2)", BITS_IN_BLOCKS),
    Mutation("words anywhere", "draws", r"tl\.where\(half < 2, w0, w1\)", "tl.where(half < 2, w1, w0)", BITS_IN_BLOCKS),
    Mutation("counters of whole blocks", "draws", r"\(start \+ first\) // _DRAWS", "start // _DRAWS", BITS),
    Mutation("a step behind", "draws", r"t\.to\(tl\.int32\)", "(t - 1).to(tl.int32)", BITS),
    Mutation("one number for all tensors", "draws", r"number\.to\(tl\.uint32\) \+ zeros", "zeros", DRAWS),
    Mutation("one seed", "draws", r"seed = tl\.load\(row_ptr \+ SEED\)", "seed = tl.load(row_ptr + SEED) * 0", DRAWS),
    Mutation(
        "the block beside",
        "_update_blocks_kernel",
        r"EXP_AVG_SCALE, tl\.float32\) \+ block",
        "EXP_AVG_SCALE, tl.float32) + block // 2 * 2",
        IN_8_BITS,
    ),
    Mutation(
        "a block over the end of a row",
        "_update_blocks_kernel",
        r"& \(column < width\)",
        "& (column < width + 1)",
        IN_8_BITS,
    ),
    Mutation(
        "rows one after another",
        "_update_blocks_kernel",
        r"block // in_a_row \* width",
        "block // in_a_row * _BLOCK",
        IN_8_BITS,
    ),
    Mutation(
        "the root for its square",
        "_update_blocks_kernel",
        r"beta2 \* \(root \* root\)",
        "beta2 * root",
        IN_WHOLE_BLOCKS,
    ),
    Mutation(
        "averages without a sign",
        "_update_blocks_kernel",
        r"tl\.where\(m < 0, -1, 1\)",
        "tl.where(m < 0, 1, 1)",
        IN_WHOLE_BLOCKS,
    ),
    Mutation(
        "the largest with its sign",
        "_largest",
        r"tl\.max\(tl\.abs\(x\), axis=1\)",
        "tl.max(x, axis=1)",
        IN_WHOLE_BLOCKS,
    ),
    Mutation("NaN is forgotten", "_largest", r"float\(\"nan\"\)", "0.0", NO_NUMBERS),
    Mutation("the lower end of a level", "_magnitude", r"width \+ 0\.5", "width", IN_WHOLE_BLOCKS),
    Mutation("codes rounded up", "_code", r"tl\.floor", "1 + tl.floor", IN_WHOLE_BLOCKS),
]
# module, backend, mutation
PYTHON = [
    (
        contract,
        "torch",
        Mutation(
            "gradients are left unscaled", "_fused", r"part\[1\] = _copied\(part\[1\], part\[0\]\)", "pass", CLIPPED
        ),
    ),
    (
        contract,
        "torch",
        Mutation(
            "the layout of gradients",
            "_fused",
            r"\[\*map\(laid_out_as, grads, params\)\]",
            "[g.clone() for g in grads]",
            LAYOUT,
        ),
    ),
    (
        contract,
        "torch",
        Mutation(
            "steps of what was left out", "_fused", "call.steps, 1 - counted", "call.steps, 0 * counted", OVERFLOW
        ),
    ),
    (contract, "torch", Mutation("clipped the other way", "_fused", r"\) / clip", ") * clip", CLIPPED)),
    (
        contract,
        "torch",
        Mutation("all that is not dense is fused", "forward", r" and all\(map\(is_dense, call\.params\)\)", "", GAPS),
    ),
    (
        contract,
        "torch",
        Mutation("a step that is not counted", "forward", "call.steps, counted", "call.steps, 0 * counted", IN_FLOAT32),
    ),
    (
        contract,
        "torch",
        Mutation(
            "infinities in plain",
            "_plain",
            r"call\.found_inf\.item\(\) != 0",
            "call.found_inf.item() > 9",
            OVERFLOW_IN_8_BITS,
        ),
    ),
    (contract, "torch", Mutation("the squares' sum", "norm", r"2, dtype=dtype", "1, dtype=dtype", NORM)),
    (contract, "torch", Mutation("half the draws", "_draws_in_a_row", r"_\(0xFFFF\)", "_(0x7FFF)", UNBIASED)),
    (contract, "torch", Mutation("each part draws anew", "_plain", r"row \* width", "0 * width", PARTS)),
    (contract, "torch", Mutation("a clip of less than 1 is none", "_is_one", "== 1", "<= 1", CLIPPED)),
    (contract, "torch", Mutation("the first part alone", "_parts", "if count:", "if False:", CLIPPED)),
    (blockwise, "torch", Mutation("levels' ends", "_numbers", r"k \+ 0\.5", "k", SIGNED)),
    (blockwise, "torch", Mutation("a decade less", "_numbers", r"range\(n \+ 1\)", "range(1, n + 1)", UNSIGNED)),
    (blockwise, "torch", Mutation("zeros beside others", "encoded_square", r"\.clamp_min_\(1\)", "", NO_ZEROS)),
    (blockwise, "torch", Mutation("narrow rows in 8 bits", "is_coded", ">= LEAST_ROW", ">= 1", HELD)),
    (optimizer, "torch", Mutation("a norm under the scale", "_clip", r"norm / scale", "norm + 0 * scale", CLIPPED)),
    (optimizer, "torch", Mutation("gradients grow", "_clip", r"\.clamp\(max=1\.0\)", "", BELOW)),
    (
        optimizer,
        "torch",
        Mutation(
            "the norm after it was clipped",
            "_clip",
            "self.grad_norm = norm",
            "self.grad_norm = norm.clamp(max=self.max_norm)",
            CLIPPED,
        ),
    ),
    (
        optimizer,
        "torch",
        Mutation("numbers of what has a gradient", "_items", r"\n                number \+= 1", "", DRAWS),
    ),
    (
        optimizer,
        "torch",
        Mutation(
            "groups have the first one's rate",
            "_call",
            r'lr, on_device = group\["lr"\]',
            'lr, on_device = self.param_groups[0]["lr"]',
            TORCHS,
        ),
    ),
    (
        optimizer,
        "torch",
        Mutation("a scale that is not looked for", "_call", '"grad_scale"', '"gradient_scale"', SCALED),
    ),
    (
        optimizer,
        "torch",
        Mutation("infinities that are not looked for", "_call", '"found_inf"', '"found_infs"', UNSCALED),
    ),
    (
        optimizer,
        "torch",
        Mutation("a closure without gradients", "step", r"torch\.enable_grad\(\)", "torch.no_grad()", SCHEDULED),
    ),
    (
        optimizer,
        "torch",
        Mutation(
            "sparse gradients",
            "_checked_gradient",
            r"grad\.layout != torch\.strided",
            "False",
            SPARSE,
        ),
    ),
    (optimizer, "torch", Mutation("hooks twice", "load_state_dict", r"OrderedDict\(\)", "hooks", HOOKED)),
    (
        optimizer,
        "torch",
        Mutation(
            "PyTorch casts the state",
            "load_state_dict",
            r"_Sealed\(value\) if key in set\(given\) else value",
            "value",
            KEPT,
        ),
    ),
    (
        optimizer,
        "torch",
        Mutation(
            "the saved dtype of states",
            "__setstate__",
            r"if before: group",
            "if False:\n                group",
            CONVERTED,
        ),
    ),
    (
        optimizer,
        "torch",
        Mutation("a pickle forgets the limit", "__getstate__", '"max_norm": self.max_norm', '"max_norm": None', COPIED),
    ),
    (
        optimizer,
        "torch",
        Mutation(
            "the seed is this one's",
            "__setstate__",
            r"group\.setdefault\(key, own\[key\]\)",
            "group[key] = own[key]",
            RESUMED,
        ),
    ),
    (states, "torch", Mutation("any shape", "check", r"state\[key\]\.shape != needs", "False", unfit(1))),
    (states, "torch", Mutation("a missing average", "check", r"if key not in state", "if False", unfit(0))),
    (states, "torch", Mutation("steps as they come", "converted", r'found\["step"\] = [^\n]*', "pass", LOADED)),
    (
        states,
        "torch",
        Mutation(
            "codes of a root as of a square",
            "converted",
            r"blockwise\.encoded_square\(v\)",
            "blockwise.encoded_square(v.sqrt())",
            CONVERTED,
        ),
    ),
    (
        states,
        "torch",
        Mutation(
            "averages that are lost",
            "decoded",
            r"blockwise\.decoded\(\*codes\[:2\]\)",
            "torch.zeros_like(param)",
            CONVERTED_BACK,
        ),
    ),
    (
        sharding,
        "torch",
        Mutation(
            "the place by the local row", "place_of", r"strides\[before\[-1\]\] if before else run", "run", COLUMNS
        ),
    ),
    (
        sharding,
        "torch",
        Mutation("from the first on", "place_of", r"start = sum\([^\n]*", "start = 0", ROWS_AND_COLUMNS),
    ),
    (sharding, "torch", Mutation("any stride", "place_of", r" or not _is_nested\(param\)", "", REFUSED_PLACE)),
]

SHARP = {
    "no decay", "a correction by the difference", "the last chunk is left out", "infinities are taken",
    "high halves first", "a step behind", "a block over the end of a row", "NaN is forgotten",
    "counters of whole blocks", "not clipped",
}  # fmt: skip


def replant(module: types.ModuleType, mutation: Mutation, monkeypatch) -> None:
    """The function runs the changed code, with the globals of the module as it is."""
    is_method = mutation.function not in vars(module)
    old = inspect.unwrap(getattr(module.AdamW if is_method else module, mutation.function))
    text = inspect.getsource(old)
    changed, count = re.subn(mutation.old.replace(" ", r"\s+"), lambda _: mutation.new, text)
    assert count == 1, f"{mutation.old} stands {count} times in {mutation.function}"
    scope = dict(vars(module))
    # A method belongs to its class, which super() asks for.
    source = inspect.getsource(module).replace(text, changed) if is_method else changed
    exec(compile(source, module.__file__, "exec"), scope)
    new = vars(scope["AdamW"])[mutation.function] if is_method else scope[mutation.function]
    monkeypatch.setattr(old, "__code__", inspect.unwrap(new).__code__)
    forget(module)


def forget(module: types.ModuleType) -> None:
    """What the module's functions keep, of the code as it was."""
    for value in vars(module).values():
        if hasattr(value, "cache_clear"):
            value.cache_clear()


@pytest.fixture(autouse=True)
def _nothing_broken_is_kept():
    yield
    forget(blockwise)


@pytest.mark.parametrize(
    "mutation", [pytest.param(m, id=m.name, marks=[] if m.name in SHARP else pytest.mark.deep) for m in TRITON]
)
def test_a_broken_triton_kernel_is_seen(mutation, tmp_path, monkeypatch):
    with _forced("triton", mutation.name):
        mutation.check("triton", monkeypatch)
        plant_in_triton("adamw", mutation, tmp_path, monkeypatch)
        with seen():
            mutation.check("triton", monkeypatch)


@pytest.mark.parametrize(("module", "backend", "mutation"), [pytest.param(*each, id=each[2].name) for each in PYTHON])
def test_broken_python_is_seen(module, backend, mutation, monkeypatch):
    with _forced(backend, mutation.name):
        mutation.check(backend, monkeypatch)
        replant(module, mutation, monkeypatch)
        with pytest.raises(BaseException):  # noqa: B017 (a fault may show as any error, `Failed` of pytest.raises too)
            mutation.check(backend, monkeypatch)
