"""The training loop, broken on purpose where faults hide: the test that is meant for each has to see it.

One expression is changed in a copy of a module; the tests run on that copy, and the package stays as it is.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import test_training_loop as on_loop
import test_training_losses as on_losses
import test_training_state as on_state

import gptkern.training
from gptkern.training import loop
from gptkern.training.errors import RunError

PACKAGE = Path(loop.__file__).parent


class Fault(NamedTuple):
    module: str
    old: str  # stands there once
    new: str
    check: Callable[[], None]


default = on_loop.test_the_loop_is_the_plain_one
option = partial(partial, on_loop.test_options)
schedule = partial(partial, on_loop.test_schedules)
from_any_step = partial(partial, on_state.test_a_training_goes_on_from_any_step)
ended_early = partial(partial, on_state.test_an_update_that_an_error_ends_has_not_been)
pieces = partial(on_loop.test_4_pieces_of_8_are_32_where_targets_are_ignored_unevenly, {})
HELD_OUT = on_loop.test_held_out_text_is_never_trained_on_and_all_other_is
VALIDATION = on_loop.test_validation_is_the_plain_mean_over_all_rows_in_eval_mode
OTHERS = on_loop.test_gradients_of_others_do_not_count
OVERFLOW = on_loop.test_a_float16_overflow_is_left_out_and_the_scale_halved
OVERFLOWS = on_loop.test_overflows_end_the_training_when_the_scale_is_down_to_1
DRAWN = on_loop.test_what_is_drawn_elsewhere_changes_nothing_and_the_other_way_round
IGNORED = on_losses.test_ignored_targets_count_for_nothing
SIXTEEN_BITS = on_losses.test_sixteen_bits_are_summed_in_float32
NAMES = on_state.test_the_names_are_stock_ones_and_each_memory_has_one
REFUSED = partial(on_state.test_a_state_that_does_not_fit_is_named_and_changes_nothing, "generator", "generators")
STREAMS = on_state.test_each_process_draws_and_resumes_a_stream_of_its_own
SIGNAL = on_state.test_a_signal_waits_for_the_step_of_the_optimizer

CLEARED = "        self.optimizer.zero_grad(set_to_none=True)\n        try:"
CLEARED_AT_ITS_END = "                self._renew_scaler()\n            self.optimizer.zero_grad(set_to_none=True)"
PIECE = "            with autocast(self.device, self.recipe.precision):\n                loss ="
CLIPPED = "grad_norm = self._clip()\n                    if self.scaler is None:\n"
LOADED = "        trainer_state.check(mine, tensors)\n"

FAULTS = {
    # Which rows are computed.
    "the next rows": Fault("loop", "batches.update = self.step", "batches.update = self.step + 1", default),
    "the same rows": Fault("loop", "batches.update = self.step", "batches.update = 0", default),
    "another order": Fault("loop", "recipe.length, recipe.seed, full", "recipe.length, 0, full", default),
    "held-out text": Fault("loop", "rows = store.rows", "rows = store._replace(train=store.validation).rows", HELD_OUT),
    "the text's own loss": Fault(
        "loop", "store.held_out(", "store._replace(validation=store.train).held_out(", VALIDATION
    ),
    "dropout in evaluation": Fault("loop", "model.eval()", "model.train()", VALIDATION),
    "smoothed evaluation": Fault("loop", "(model), batch.targets)", "(model), batch.targets, 0.3)", VALIDATION),
    "eval mode for ever": Fault("loop", "model.train(was_training)", "model.eval()", VALIDATION),
    # Pieces.
    "mean of means": Fault("loop", "/ tokens\n", "/ (targets >= 0).sum().clamp(1) / self.recipe.accumulate\n", pieces),
    "not divided": Fault("loop", "/ tokens\n", "/ (tokens / self.recipe.accumulate)\n", option("accumulate")),
    "last piece alone": Fault("loop", PIECE, f"            self.optimizer.zero_grad()\n{PIECE}", option("accumulate")),
    "first piece's loss": Fault(
        "loop", "torch.stack(losses_of_pieces).sum()", "losses_of_pieces[0]", option("accumulate")
    ),
    # Gradients.
    "not cleared": Fault("loop", CLEARED, "        try:", OTHERS),
    "kept": Fault("loop", CLEARED_AT_ITS_END, "                self._renew_scaler()", default),
    "clipped after the step": Fault(
        "loop", f"{CLIPPED}                        self.optimizer.step()\n",
        "if self.scaler is None:\n                        self.optimizer.step()\n"
        "                        grad_norm = self._clip()\n", default,
    ),
    "not clipped": Fault("loop", "if self.recipe.clip > 0", "if False", default),
    "clipped to 1": Fault("loop", "self.recipe.clip, norm", "1.0, norm", option("clip")),
    "clipped each alone": Fault("loop", "clip_grads_with_norm_(self.parameters, self.recipe.clip, norm)",
                                "clip_grad_value_(self.parameters, self.recipe.clip)", default),
    "clipped under the scale": Fault("loop", "self.scaler.unscale_(self.optimizer)", "pass", option("fp16")),
    # The scale.
    "a scale that stays": Fault("loop", "scaler.update()", "scaler.update(self.scaler.get_scale())", OVERFLOW),
    "an overflow that is taken": Fault("loop", "self.scaler.step(self.optimizer)", "self.optimizer.step()", OVERFLOW),
    "skipped and not said": Fault("loop", "next_scale < scale", "False", OVERFLOW),
    "overflows for ever": Fault("precision", "LEAST_SCALE = 1.0", "LEAST_SCALE = 0.0", OVERFLOWS),
    "fp16 for bf16": Fault("precision", '"bf16": torch.bfloat16', '"bf16": torch.float16', option("bf16")),
    # AdamW and its learning rate.
    "all decays": Fault("optimizers", "if is_matrix else 0.0", "", option("decay")),
    "no decay": Fault("optimizers", "if is_matrix else 0.0", "* 0.0", default),
    "other averages": Fault("loop", "betas=(recipe.beta1, recipe.beta2), ", "", option("averages")),
    "the rate of before": Fault("loop", "lr_at(self.recipe, self.step)", "lr_at(self.recipe, self.step - 1)", default),
    "one rate": Fault("optimizers", 'group["lr"] = lr * group["lr_scale"]\n', "pass\n", default),
    "a group's rate": Fault("optimizers", "in optimizer.param_groups:\n        group[\"lr\"]",
                            "in optimizer.param_groups[:1]:\n        group[\"lr\"]", default),
    "warm-up from 0": Fault("schedule", "(step + 1) / warmup", "step / warmup", default),
    "a longer warm-up": Fault("schedule", "step < warmup:", "step <= warmup:", default),
    "half a cosine": Fault("schedule", "math.cos(math.pi *", "math.cos(math.pi / 2 *", schedule("cosine")),
    "linear from 0": Fault("schedule", "return 1 - progress", "return 1 - step / recipe.steps", schedule("linear")),
    "wsd early": Fault("schedule", "1.0 if step < start", "1.0 if step < start - 1", schedule("wsd")),
    "wsd at once": Fault("schedule", "start) / decay", "start + 1) / decay", schedule("wsd")),
    "no floor": Fault("schedule", "floor = recipe.final_lr * recipe.lr", "floor = 0.0", schedule("linear")),
    # The objective.
    "no smoothing": Fault("losses", "label_smoothing=label_smoothing", "label_smoothing=0.0", option("smoothing")),
    "another number is ignored": Fault("losses", "ignore_index=IGNORED", "ignore_index=6", IGNORED),
    "no z-loss": Fault("losses", "z_loss=z_loss", "z_loss=0.0", option("z-loss")),
    "a loss in 16 bits": Fault("losses", "loss_dtype=torch.float32", "loss_dtype=features.dtype", SIXTEEN_BITS),
    # Random numbers.
    "another seed": Fault("process_state", "Generator().manual_seed(seed)", "Generator()", option("dropout")),
    "the same numbers": Fault("process_state", "self.states = self._of_process()\n", "pass\n", option("dropout")),
    "the process's numbers": Fault("process_state", "            self._set(outside)\n", "            pass\n", DRAWN),
    # The state.
    "no averages": Fault("trainer_state", 'found[f"optimizer.{name}.{key}"] = value', "pass", from_any_step("fp32")),
    "no generators": Fault("trainer_state", "generators.states[kind] =", "_ =", from_any_step("bf16")),
    "one stream for all": Fault("trainer_state", "generators.{generators.rank}.", "generators.0.", STREAMS),
    "the next seed's stream": Fault("process_state", "if rank:\n", "seed += rank\n        if 0:\n", STREAMS),
    "no scale": Fault("loop", "self.scaler.load_state_dict(scaler)", "pass", from_any_step("fp16")),
    "no step": Fault("loop", "self.step = step\n        self._done", "self._done", from_any_step("fp32")),
    "no names": Fault("trainer_state", "and place in seen:", "and False:", NAMES),
    "changed, then refused": Fault(
        "loop", LOADED, f"        trainer_state.load(mine, tensors, self.generators)\n{LOADED}", REFUSED
    ),
    # What ends an update.
    "drawn twice": Fault("loop", "self.generators.states = generators", "pass", ended_early("fp16", "step")),
    "a stuck scaler": Fault("loop", "                self._renew_scaler()\n", "", ended_early("fp16", "step")),
    "gradients left": Fault(
        "loop", CLEARED_AT_ITS_END, "                self._renew_scaler()", ended_early("fp16", "second piece")
    ),
    "a torn step": Fault("loop", "with postponed()", "with torch.no_grad()", SIGNAL),
}  # fmt: skip
# These run with every change; `make test-deep` runs all.
SHARP = {
    "the next rows", "held-out text", "dropout in evaluation", "mean of means", "last piece alone", "not cleared",
    "kept", "clipped after the step", "not clipped", "a scale that stays", "the rate of before", "one rate",
}  # fmt: skip


def planted(fault: Fault, monkeypatch) -> None:
    """The tests' loop is one that was imported anew beside the changed copy, until `monkeypatch` undoes it."""
    # In the order of their imports: what stands between the changed module and the loop.
    for name in dict.fromkeys((fault.module, "trainer_state", "loop")):
        path = PACKAGE / f"{name}.py"
        source = path.read_text()
        if name == fault.module:
            assert source.count(fault.old) == 1, f"{path.name}: {source.count(fault.old)} times {fault.old}"
            source = source.replace(fault.old, fault.new)
        spec = importlib.util.spec_from_file_location(f"gptkern.training.{name}", path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        monkeypatch.setattr(gptkern.training, name, module)
        exec(compile(source, str(path), "exec"), module.__dict__)
    for test in (on_loop, on_state):
        monkeypatch.setattr(test, "loop", gptkern.training.loop)
    monkeypatch.setattr(on_losses, "losses", gptkern.training.losses)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in SHARP else pytest.mark.deep) for name in FAULTS]
)
def test_a_fault_is_seen(name, monkeypatch):
    planted(FAULTS[name], monkeypatch)
    with pytest.raises((pytest.fail.Exception, Exception)) as raised:
        FAULTS[name].check()
    # A check says it, the loop does, the scaler that has begun an update twice, or a loss that is given an ignored
    # target; what only crashes was not seen.
    said = isinstance(raised.value, (AssertionError, pytest.fail.Exception, RunError))
    others = "unscale_() has already been called", "Target -100 is out of bounds"
    assert said or any(words in str(raised.value) for words in others), raised.value


def test_a_copy_without_a_fault_passes(monkeypatch):
    planted(Fault("losses", "IGNORED = -100", "IGNORED = -100", default), monkeypatch)
    default()
