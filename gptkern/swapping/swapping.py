"""swap(model), unswap(model), kernels(): gptkern's operators in a model that was written without them.

    torch.nn.LayerNorm, RMSNorm, Softmax, GELU, SiLU
                                            change their class to the twin in gptkern.nn
    a module whose forward calls F.scaled_dot_product_attention, F.layer_norm, F.rms_norm or F.softmax inline
                                            changes its class to a subclass of its own, whose forward is the
                                            original one with those calls rerouted (gptkern.swapping.rerouting)
    a module of transformers (gptkern.swapping.transformers)
                                            gets its attention by the name "gptkern"; a rotary embedding or a norm in
                                            code that is known is rerouted as above
    a forward that multiplies with an activation, or takes its own loss (gptkern.swapping.edits)
                                            changes its class likewise; its code is changed by its source

A swapped module is the same object with the same parameters, buffers, hooks and state_dict keys; its original class
and config are noted in its `__dict__`, from where `unswap` takes them back. No global is touched.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable

import torch
from torch.overrides import TorchFunctionMode

from gptkern.backends import dispatch
from gptkern.swapping import edits, reading, routed_classes
from gptkern.swapping.reading import Calls
from gptkern.swapping.report import Replaced, Restored, Skipped, SwapReport, UnswapReport
from gptkern.swapping.residual_norms import Border, links
from gptkern.swapping.twins import (
    ACTIVATION,
    ALL,
    LOSS,
    MODULES,
    RESIDUAL_NORM,
    RMS_NORM,
    ROUTED_MODULES,
    SWAPPABLE,
    written_out,
)

_logger = logging.getLogger("gptkern")

# Where a swapped module's `__dict__` keeps its original class, and the configs that stood under its attributes.
_ORIGINAL = "_gptkern_original"
_CONFIGS = "_gptkern_configs"


def swap(
    model: torch.nn.Module, ops: Iterable[str] | None = None, strict: bool = False, *, fused_loss: bool = False
) -> SwapReport:
    """Put gptkern's operators into a model, in place.

    Replaced are modules of exactly the type `torch.nn.LayerNorm`, `RMSNorm` or `Softmax`; modules whose forward calls
    `F.scaled_dot_product_attention`, `F.layer_norm`, `F.rms_norm` or `F.softmax`, itself, in a method of its own, or in
    a function of its own package; `torch.nn.MultiheadAttention` and `torch.nn.TransformerEncoder`, which then keep to
    Python in eval mode; a block's `x = x + f(x)` for which a norm is called next, which becomes one call of that norm's
    operator with `residual=` ("residual_norm" in `ops`); and of transformers' models the attention, the rotary
    embedding and Llama's norm. `F.gelu`, `F.silu`, their modules and transformers' classes
    for them run on "nonlinearity" (while torch.compile compiles, and no backend is forced, on PyTorch, since Inductor
    writes them into other kernels); a product `act(gate) * up` with one of them, found in the forward's source, is
    swiglu or geglu in one call, of the packed tensor where gate and up are its halves and nothing else reads them.
    `F.cross_entropy` is gptkern's. A call that cannot be read off the code (a function looked up
    in a table, a tensor's method) is not found: `gptkern.kernels()` reaches it. Attention or a norm that is written out
    in Python is named as skipped, as is a method called by `super()` that makes such calls, and the generated code of a
    torch.fx.GraphModule.

    A sum and its norm are computed together at the calls at which nobody can see it: not where the norm has hooks, a
    forward or a class of its own, nor where PyTorch runs both (a CPU). The norm may be one of the block, or, in a model
    whose blocks stand in a torch.nn.ModuleList and return such a sum, the first of the next block or the model's last:
    these not inside torch.compile, inference mode or activation checkpoints, nor where one of the blocks has hooks.
    Autograd sees a sum and its norm, as in the stock model: who keeps the sum, hooks it or asks for its gradient gets
    the whole of it.

    A rerouted module gets a subclass of its class, so a class's own `__init_subclass__` runs; where that raises, where
    the module refuses another class, or its own code asks for its exact class, it is skipped. Other code that knows a
    module by its exact class (`type(block) is LayerNorm`, a registry of subclasses) sees the other one. A lazy module
    stays swapped in what its first call makes of it. A method that is patched on the class later counts, routed again,
    from the next call on, and a global that is changed at once, as they do without a swap; what torch.compile has
    traced follows where it would for the stock model (not a method other than forward that is patched).

    Parameters stay the same objects, state_dict keys stay the same; dropout, eps, hooks, requires_grad and the
    training flag are not looked at. A second call changes nothing. `gptkern.unswap` takes it back.

    Args:
        model: any module; shared submodules are swapped once.
        ops: the operators to put in, of `gptkern.swapping.SWAPPABLE`; all by default.
        strict: raise where anything asked for has to be skipped.
        fused_loss: the loss that the model's own forward takes of the logits of its head (transformers' causal models
            with `labels`, the reference GPT with `targets`, and others whose source shows no more between head and loss
            than a factor, a softcap, `.float()`, a view as rows of the vocabulary, a slice of positions or the classes
            moved to the second dimension) runs on `linear_cross_entropy`, which makes no logits: a call with targets
            then returns the loss, and None for the logits. The loss is F.cross_entropy, a torch.nn.CrossEntropyLoss
            that the forward makes or the module holds, or transformers' `loss_function`, with their options, and has
            the dtype that it had. transformers' tuples (`return_dict=False`, an output's `[…]`) leave them out: `[1]`
            is then what came behind them, as a rule the cache. A call without targets is unchanged. Where it is not
            known what a forward does with its logits, or that nothing is written between its head and its loss, it is
            left alone, and the report says why, with the file and line. Where a head or a loss is another one by the
            time of a call, or a size that the code takes for the vocabulary's is not the head's, the logits are made,
            and a warning says so; torch.jit.trace records the stock forward.

    Returns:
        The report: what was replaced, and what was left alone and why.

    Raises:
        TypeError: model is no torch.nn.Module, ops is a string, or fused_loss is no bool.
        ValueError: ops names an unknown operator.
        RuntimeError: strict, and something was skipped; the model is then unchanged.
    """
    operators = _checked_operators(ops)
    if not isinstance(fused_loss, bool):
        raise TypeError(f"swap: fused_loss is {fused_loss!r}; it needs True or False")
    operators = (*operators, LOSS) if fused_loss else operators
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"swap: model is a {type(model).__name__}; it needs a torch.nn.Module")
    plan = _Plan(model, operators)
    for name, module in model.named_modules():
        plan.decide(name or "(model)", module)
    plan.name_missing_loss()
    report = plan.report
    if strict:
        plan.refuse_to_skip()
    plan.carry_out(strict)
    _logger.info("swap: %s", report)
    return report


def unswap(model: torch.nn.Module) -> UnswapReport:
    """Take gptkern's operators out of a model again, in place: each swapped module gets its original class back.

    Modules that were built as gptkern.nn modules stay. A model that was never swapped is left as it is.

    Returns:
        The report: what was restored.

    Raises:
        TypeError: model is no torch.nn.Module.
        RuntimeError: a module's class was changed again after the swap; the model is then unchanged.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"unswap: model is a {type(model).__name__}; it needs a torch.nn.Module")
    swapped = [(name, module) for name, module in model.named_modules() if _ORIGINAL in module.__dict__]
    for name, module in swapped:
        bare, original = _bare(type(module)), _original_class(module)
        # A class with a __reduce__ of its own gives copies of its own class, with the note.
        if bare is not original and not _is_replacement(bare, original):
            raise RuntimeError(
                f"unswap: {name or '(model)'} became a {type(module).__name__} after it was swapped (a "
                "parametrisation, say); undo that first. The model is unchanged"
            )
    names = {module: name or "(model)" for name, module in model.named_modules()}
    restored: dict[str, str] = {}
    for _, module in swapped:
        # A module that refuses attributes by now has to be given back all the same.
        object.__setattr__(module, "__class__", _in_place_of(type(module), _original_class(module)))
        del module.__dict__[_ORIGINAL]
        restored[names[module]] = _bare(type(module)).__name__
    for module in model.modules():
        if _CONFIGS in module.__dict__:
            module.__dict__.pop(routed_classes.PREPARE_SCRIPTABLE, None)
        for attribute, config in module.__dict__.pop(_CONFIGS, {}).items():
            # Another config that was put there since stays.
            if module.__dict__.get(attribute) is config.current:
                module.__dict__[attribute] = config.restore()
                restored.setdefault(names[module], type(module).__name__)
    return UnswapReport([Restored(name, cls) for name, cls in restored.items()])


def kernels(ops: Iterable[str] | None = None) -> TorchFunctionMode:
    """`with gptkern.kernels():` routes the calls of PyTorch's functions made inside it to gptkern's operators.

    Routed are F.scaled_dot_product_attention, F.layer_norm, F.rms_norm, F.softmax, torch.softmax and
    Tensor.softmax, F.gelu, F.silu and F.cross_entropy (what PyTorch's own modules call inside their C++ or
    composite functions, as torch.nn.MultiheadAttention does, is not seen; nor is a rotary embedding, for which
    PyTorch has no function). It holds in the thread that enters it, and nests.

    Args:
        ops: the operators to route, of `gptkern.swapping.SWAPPABLE`; all by default.

    Raises:
        TypeError: ops is a string. ValueError: ops names an unknown operator.
    """
    return routed_classes.Routing(_checked_operators(ops))


def _checked_operators(ops: Iterable[str] | None) -> tuple[str, ...]:
    if ops is None:
        return SWAPPABLE
    if isinstance(ops, str) or not isinstance(ops, Iterable):
        raise TypeError(f"ops is {ops!r}; it needs a list of operators, as ['layer_norm']")
    ops = tuple(ops)
    for operator in ops:
        if operator not in SWAPPABLE:
            raise ValueError(f"ops holds {operator!r}; it needs any of {', '.join(map(repr, SWAPPABLE))}")
    # One order, so that the same request gives the same class.
    return tuple(operator for operator in SWAPPABLE if operator in ops)


# --- The plan ---------------------------------------------------------------------------------------------------------


# An activation by itself, which Inductor writes into another kernel.
_LEFT_TO_COMPILER = " (PyTorch's while torch.compile compiles)"


class _Plan:
    """What to do with each module of a model; nothing is changed before `carry_out`."""

    def __init__(self, model: torch.nn.Module, operators: tuple[str, ...]):
        self.model = model
        self.operators = operators
        self.report = SwapReport([], [])
        # Whose class is to change to what; and what of it then comes by a name in its config, as the report says it.
        self.classes: list[tuple[str, torch.nn.Module, type, tuple[str, ...], str]] = []
        # Found out once per swap, and not kept: a class's methods may be patched at any time.
        self.found: dict[type, Calls] = {}
        self.sums: dict[type, tuple[list[str], Border]] = {}
        self.inherited: dict[type, dict[tuple[type, str], frozenset[str]]] = {}
        self.made: dict[tuple[type, tuple[str, ...]], type | str] = {}
        self.edits: dict[tuple[type, bool], edits.Found] = {}
        # Whether a forward takes a loss, which is fused or of which the report says why not.
        self.has_loss = False
        # The names of modules whose attention was eager's, which alone gives a call's output_attentions.
        self.was_eager: set[str] = set()
        transformers = routed_classes.transformers()
        # Of a block whose sum passes its border, and of the model around: what the report calls the norm -> operator.
        self.beyond: dict[torch.nn.Module, dict[str, str]] = {}
        if RESIDUAL_NORM in operators:
            self.follow_sums()
        self.attention = transformers.Attention(model, _original_class, _noted_configs) if transformers else None

    def decide(self, name: str, module: torch.nn.Module) -> None:
        """Adds the module to the report, and its class and config to what is to change."""
        original, current = _original_class(module), _bare(type(module))
        if original is not current and not _is_replacement(current, original):
            self.skip(name, type(module), "its class was changed after it was swapped")
            return
        by_name, refused = self.decide_attention(name, module, original)
        reason = edits.reason_against_activation(original, module) if ACTIVATION in self.operators else None
        if reason is not None:
            self.skip(name, original, reason)
            refused = (*refused, ACTIVATION)
        eager = ' (was "eager": no output_attentions)' if name in self.was_eager else ""
        twin, operator = MODULES.get(original, (None, ""))
        norms: dict[str, str] = {}
        if twin is not None:
            replacement, wanted = twin, (operator,) if operator in self.operators else ()
            shown = f"gptkern.nn.{twin.__name__}{_LEFT_TO_COMPILER * (operator == ACTIVATION)}"
        else:
            # What an earlier call routed stays routed.
            before = routed_classes.routed_operators(current)
            asked_for = tuple(o for o in ALL if o in self.operators or o in before)
            calls = self.calls_of(original).operators | self.decide_edits(name, module, original, before)
            wanted = tuple(o for o in asked_for if o in calls and o not in refused)
            norms = self.norms_of_sums(name, module, original) if RESIDUAL_NORM in wanted else {}
            if not norms:
                wanted = tuple(o for o in wanted if o != RESIDUAL_NORM)
            replacement = self.routed(original, wanted) if wanted else None
            wanted = wanted if set(wanted) & set(self.operators) else ()
            with_sums = f", sums with {', '.join(norms)}" if norms else ""
            shown = f"{original.__name__}, routed{with_sums}{eager * (not by_name)}"
            self.name_what_is_written_out(name, module, original)
            if wanted or _reason_to_skip(original, self.operators) is None:
                self.name_what_is_inherited(name, original)
        by_its_name = f'attn_implementation="gptkern"{eager}'
        if wanted and isinstance(replacement, str):
            self.skip(name, original, replacement)
            wanted = ()
        hidden = "forward" if wanted and "forward" in module.__dict__ else None
        if wanted and hidden is None and twin is None:
            hidden = routed_classes.hidden_on(module, replacement)
        if hidden is not None:
            what = "a forward" if hidden == "forward" else f"{hidden}, which its forward calls,"
            self.skip(name, original, f"{what} was set on the instance itself")
        elif wanted:
            if current is not replacement:
                self.classes.append((name, module, replacement, by_name, by_its_name))
            wanted = tuple(o for o in ALL if o in wanted or o in by_name)
            shown = f"{shown}, {by_its_name}" if by_name else shown
            self.replaced(name, module, original, shown, wanted, norms)
        elif by_name:
            self.replaced(name, module, original, by_its_name, by_name)
        else:
            reason = _reason_to_skip(original, self.operators)
            if reason is not None:
                self.skip(name, original, reason)

    def calls_of(self, cls: type) -> Calls:
        if cls not in self.found:
            self.found[cls] = routed_classes.calls(cls)
        return self.found[cls]

    def norms_of_sums(self, name: str, module: torch.nn.Module, original: type) -> dict[str, str]:
        """The modules in it that normalise a sum of its forward, and are gptkern's after this swap.

        Returns:
            attribute -> operator.
        """
        found = {}
        for attribute in self.sums_of(module)[0]:
            norm = module._modules.get(attribute)
            if norm is None:
                continue
            cls = _original_class(norm)
            operator = routed_classes.normalises_sums(cls)
            if self.will_be_ours(norm):
                found[attribute] = operator
            elif RESIDUAL_NORM not in self.operators:
                continue
            elif operator is not None:
                self.skip(name, original, f"{attribute} of its sum stays as it is: {operator!r} is not among ops")
            elif RMS_NORM in self.operators and RMS_NORM in written_out(self.calls_of(cls)):
                self.skip(name, original, f"{attribute} of its sum is a {cls.__name__}, which is left alone")
        return found | self.beyond.get(module, {})

    def sums_of(self, module: torch.nn.Module) -> tuple[list[str], Border]:
        cls = _original_class(module)
        if cls not in self.sums:
            self.sums[cls] = routed_classes.sums(cls)
        return self.sums[cls]

    def will_be_ours(self, norm: torch.nn.Module | None) -> bool:
        """Whether a module is, after this swap, a norm that is computed together with the sum before it."""
        operator = None if norm is None else routed_classes.normalises_sums(_original_class(norm))
        return operator is not None and (
            operator in self.operators or routed_classes.is_swapped_norm(_bare(type(norm)))
        )

    def follow_sums(self) -> None:
        """Finds the blocks whose sums go to a norm of the next block, or of the model around them."""
        for module in self.model.modules():
            border = self.sums_of(module)[1]
            if not border.has_loop:
                continue
            for block, norm, after in links(module, border, lambda m: self.sums_of(m)[1], self.will_be_ours):
                holder = module if after is None else after
                attribute = next(name for name, child in holder._modules.items() if child is norm)
                operator = routed_classes.normalises_sums(_original_class(norm))
                owner = "the next" if after is not None else "the model's"
                self.beyond[block] = {f"{owner} {attribute}": operator}
                self.beyond.setdefault(module, {})["the norms after its blocks"] = operator

    def decide_edits(self, name: str, module: torch.nn.Module, original: type, before: tuple) -> frozenset[str]:
        """The operators that the source of the module's forward is changed for."""
        criterion = edits.holds_criterion(module)
        if (original, criterion) not in self.edits:
            self.edits[original, criterion] = edits.found(original, criterion)
        found, operators = self.edits[original, criterion], set()
        if edits.activates(found, module):
            operators.add(ACTIVATION)
        if LOSS in self.operators or LOSS in before:
            reason = edits.reason_against_loss(found, module)
            if reason is not None and LOSS in self.operators:
                self.skip(name, original, reason)
            if LOSS in before or (reason is None and edits.takes_loss(found, module)):
                operators.add(LOSS)
            self.has_loss |= reason is not None or LOSS in operators
        return frozenset(operators)

    def name_missing_loss(self) -> None:
        if LOSS in self.operators and not self.has_loss:
            self.skip("(model)", _original_class(self.model), "its loss: no forward in it takes one of its own logits")

    def routed(self, cls: type, operators: tuple[str, ...]) -> type | str:
        """The routed class, or why there can be none."""
        if issubclass(cls, torch.fx.GraphModule):
            return "its code is generated (torch.fx): swap before tracing"
        if (cls, operators) not in self.made and reading.asks_for_its_type(cls):
            self.made[cls, operators] = "its code asks for its exact class, and a routed one is a subclass"
        if (cls, operators) not in self.made:
            try:
                self.made[cls, operators] = routed_classes.routed(cls, operators)
            except Exception as error:  # of the user's own __init_subclass__ or metaclass
                self.made[cls, operators] = f"no subclass of it can be made: {type(error).__name__}: {error}"
        return self.made[cls, operators]

    def decide_attention(self, name: str, module: torch.nn.Module, original: type) -> tuple[tuple, tuple]:
        """-> (attention,) where the module's attention is to come by the name in its config; (attention,) where its
        forward is not to be rerouted for it."""
        if self.attention is None or not routed_classes.takes_attention_by_name(original):
            return (), ()
        wanted = tuple(operator for operator in (self.attention.operator,) if operator in self.operators)
        reason = self.attention.reason_against(module) if wanted else None
        if reason is not None:
            self.skip(name, original, reason)
            return (), wanted
        if not wanted:
            return (), ()
        if self.attention.was_eager(module):
            self.was_eager.add(name)
        if self.attention.keeps_its_name(module):
            return (), ()
        self.attention.want(module)
        return wanted, () if self.attention.is_overridden(original) else wanted

    def name_what_is_written_out(self, name: str, module: torch.nn.Module, original: type) -> None:
        found = self.calls_of(original)
        if any(isinstance(child, torch.nn.Softmax) for child in module.children()):
            found = found._replace(names=found.names | {"Softmax"})
        reasons = written_out(found)
        integration = routed_classes.integration(original)
        if integration is not None:
            reasons |= integration.written_out(original)
        for operator, reason in reasons.items():
            if operator in self.operators:
                self.skip(name, original, reason)

    def name_what_is_inherited(self, name: str, original: type) -> None:
        if original not in self.inherited:
            self.inherited[original] = routed_classes.calls_by_super(original)
        for (parent, method), operators in self.inherited[original].items():
            unreached = [operator for operator in SWAPPABLE if operator in operators and operator in self.operators]
            if unreached:
                self.skip(
                    name, original, f"super().{method} of {parent.__name__} is not rerouted: {', '.join(unreached)}"
                )

    def replaced(
        self,
        name: str,
        module: torch.nn.Module,
        original: type,
        shown: str,
        operators: tuple[str, ...],
        norms: dict[str, str] | None = None,
    ) -> None:
        holder = next((held for held in (module, self.model) if next(held.parameters(), None) is not None), None)
        device = torch.device("cpu") if holder is None else next(holder.parameters()).device
        # A sum is computed with its norm, by what runs that.
        of_norms = list(dict.fromkeys((norms or {}).values()))
        rooms = [room for o in operators for room in (of_norms if o == RESIDUAL_NORM else [o])]
        expected = [dispatch.expected(room, device) for room in rooms]
        backends, reasons = (", ".join(dict.fromkeys(column)) for column in zip(*expected))
        self.report.replaced.append(Replaced(name, original.__name__, shown, ", ".join(operators), backends, reasons))

    def skip(self, name: str, cls: type, reason: str) -> None:
        self.report.skipped.append(Skipped(name, cls.__name__, reason))

    def refuse_to_skip(self) -> None:
        if self.report.skipped:
            left_alone = SwapReport([], self.report.skipped)
            raise RuntimeError(f"swap: strict, and modules had to be skipped; the model is unchanged\n{left_alone}")

    def carry_out(self, strict: bool) -> None:
        before = []
        try:
            for name, module, replacement, by_name, by_its_name in self.classes:
                cls, original = type(module), _original_class(module)
                before.append((module, cls, _ORIGINAL in module.__dict__))
                reason = _change_class(module, _in_place_of(cls, replacement))
                if reason is None:
                    module.__dict__.setdefault(_ORIGINAL, _bare(cls))
                    continue
                self.report.replaced = [entry for entry in self.report.replaced if entry.name != name]
                self.skip(name, original, reason)
                if by_name:
                    self.replaced(name, module, original, by_its_name, by_name)
            if strict:
                self.refuse_to_skip()
        except BaseException:
            for module, cls, was_swapped in before:
                if type(module) is not cls:
                    object.__setattr__(module, "__class__", cls)
                if not was_swapped:
                    module.__dict__.pop(_ORIGINAL, None)
            raise
        for module, attribute, config in self.attention.changes() if self.attention else ():
            module.__dict__.setdefault(_CONFIGS, {})[attribute] = config
            module.__dict__[attribute] = config.current
            module.__dict__[routed_classes.PREPARE_SCRIPTABLE] = routed_classes.refuse_scripting


def _change_class(module: torch.nn.Module, cls: type) -> str | None:
    """Gives the module the class; or leaves it as it is, and says why."""
    before, reason = type(module), "its class stayed what it was when another was set"
    try:
        module.__class__ = cls
        if type(module) is cls:
            return None
    except Exception as error:  # of the user's own __setattr__, or Python's
        reason = f"its class cannot be changed: {type(error).__name__}: {error}"
    if type(module) is not before:
        object.__setattr__(module, "__class__", before)
    return reason


def _original_class(module: torch.nn.Module) -> type:
    """The class without a swap: of a lazy module that was swapped and called since, the one that it became."""
    current = _bare(type(module))
    noted = module.__dict__.get(_ORIGINAL, current)
    after = routed_classes.becomes(noted)
    return after if after is not None and (current is after or _is_replacement(current, after)) else noted


def _noted_configs(module: torch.nn.Module) -> dict:
    return module.__dict__.get(_CONFIGS, {})


def _reason_to_skip(cls: type, operators: tuple[str, ...]) -> str | None:
    """Why a module that one of the operators might serve is left alone, or None where none would."""
    bases = {base: ((operator,), twin) for base, (twin, operator) in MODULES.items()}
    bases |= {base: (of, base) for base, of in ROUTED_MODULES.items()}
    for base, (of, twin) in bases.items():
        if set(of) & set(operators) and issubclass(cls, base) and cls not in (base, twin):
            if cls.forward is base.forward:
                return f"a subclass of torch.nn.{base.__name__}: only that class itself is replaced"
            return f"a subclass of torch.nn.{base.__name__} with a forward of its own, in which no call was found"
    if issubclass(cls, torch.jit.ScriptModule):
        return "a TorchScript module has no Python forward"
    return None


def _is_replacement(cls: type, original: type) -> bool:
    """Whether `cls` is what a swap makes of `original`."""
    return cls is MODULES.get(original, (None,))[0] or routed_classes.is_routed(cls, original)


# --- fully_shard, where it is in use ----------------------------------------------------------------------------------


def _bare(cls: type) -> type:
    """The class that a module had before torch.distributed.fsdp.fully_shard made one of FSDPModule and it.

    That is the one to swap: the other has no code of its own.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or len(cls.__bases__) != 2 or not issubclass(cls.__bases__[0], fsdp.FSDPModule):
        return cls
    return cls.__bases__[1]


def _in_place_of(cls: type, replacement: type) -> type:
    """`replacement`; where fully_shard has made `cls`, what it would make of `replacement`."""
    if _bare(cls) is cls:
        return replacement
    bases = cls.__bases__[0], replacement
    for known in type.__subclasses__(replacement):
        if known.__bases__ == bases:
            return known
    # its __deepcopy__, which says that there is none
    own = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls.__name__, bases, own)
