"""What `swap` does with each module of a model: decided for all of them before any is changed."""

from __future__ import annotations

import torch

from gptkern.backends import dispatch
from gptkern.swapping import edits, reading, routed_classes
from gptkern.swapping.originals import (
    BY_NAME,
    CONFIGS,
    ORIGINAL,
    bare,
    in_place_of,
    is_replacement,
    noted_configs,
    original_class,
)
from gptkern.swapping.reading import Calls
from gptkern.swapping.report import Replaced, Skipped, SwapReport
from gptkern.swapping.residual_norms import Border, links
from gptkern.swapping.twins import (
    ACTIVATION,
    ALL,
    CROSS_ENTROPY,
    LOSS,
    MODULES,
    RESIDUAL_NORM,
    RMS_NORM,
    ROUTED_MODULES,
    SWAPPABLE,
    written_out,
)

# An activation by itself, which Inductor writes into another kernel.
_LEFT_TO_COMPILER = "PyTorch's while torch.compile compiles"


class Plan:
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
        # The modules whose attention comes by the name in their config.
        self.by_name: list[torch.nn.Module] = []
        # The names of modules whose attention was eager's, which alone gives a call's output_attentions.
        self.was_eager: set[str] = set()
        transformers = routed_classes.transformers()
        # Of a block whose sum passes its border, and of the model around: what the report calls the norm -> operator.
        self.beyond: dict[torch.nn.Module, dict[str, str]] = {}
        if RESIDUAL_NORM in operators:
            self.follow_sums()
        self.attention = transformers.Attention(model, original_class, noted_configs) if transformers else None

    def decide(self, name: str, module: torch.nn.Module) -> None:
        """Adds the module to the report, and its class and config to what is to change."""
        original, current = original_class(module), bare(type(module))
        if original is not current and not is_replacement(current, original):
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
            shown = f"gptkern.nn.{twin.__name__}{f' ({_LEFT_TO_COMPILER})' * (operator == ACTIVATION)}"
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
            if ACTIVATION in wanted and self.activates_alone(module, original):
                shown += f", activations by themselves {_LEFT_TO_COMPILER}"
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
            cls = original_class(norm)
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
        cls = original_class(module)
        if cls not in self.sums:
            self.sums[cls] = routed_classes.sums(cls)
        return self.sums[cls]

    def will_be_ours(self, norm: torch.nn.Module | None) -> bool:
        """Whether a module is, after this swap, a norm that is computed together with the sum before it."""
        operator = None if norm is None else routed_classes.normalises_sums(original_class(norm))
        return operator is not None and (operator in self.operators or routed_classes.is_swapped_norm(bare(type(norm))))

    def follow_sums(self) -> None:
        """Finds the blocks whose sums go to a norm of the next block, or of the model around them."""
        for module in self.model.modules():
            border = self.sums_of(module)[1]
            if not border.has_loop:
                continue
            for block, norm, after in links(module, border, lambda m: self.sums_of(m)[1], self.will_be_ours):
                holder = module if after is None else after
                attribute = next(name for name, child in holder._modules.items() if child is norm)
                operator = routed_classes.normalises_sums(original_class(norm))
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

    def activates_alone(self, module: torch.nn.Module, original: type) -> bool:
        """Whether the module's forward has an activation that is no part of a product."""
        found = self.edits[original, edits.holds_criterion(module)]
        is_product = found.products is not None and found.products.functions > 0
        return ACTIVATION in self.calls_of(original).operators and not is_product

    def name_loss_elsewhere(self, name: str, module: torch.nn.Module) -> None:
        """Says that a loss of transformers is not the function that the operator takes the place of."""
        cls = original_class(module)
        if CROSS_ENTROPY in self.operators and LOSS not in self.operators and edits.loss_elsewhere(cls) is not None:
            self.skip(name, cls, edits.loss_elsewhere(cls))

    def name_missing_loss(self) -> None:
        if LOSS in self.operators and not self.has_loss:
            known = "F.cross_entropy, a torch.nn.CrossEntropyLoss or transformers' self.loss_function"
            reason = f"its loss: no forward in it takes one of its own logits by {known}"
            self.skip("(model)", original_class(self.model), reason)

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
        self.by_name.append(module)
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
                cls, original = type(module), original_class(module)
                before.append((module, cls, ORIGINAL in module.__dict__))
                reason = _change_class(module, in_place_of(cls, replacement))
                if reason is None:
                    module.__dict__.setdefault(ORIGINAL, bare(cls))
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
                    module.__dict__.pop(ORIGINAL, None)
            raise
        for module, attribute, config in self.attention.changes() if self.attention else ():
            module.__dict__.setdefault(CONFIGS, {})[attribute] = config
            module.__dict__[attribute] = config.current
            module.__dict__[routed_classes.PREPARE_SCRIPTABLE] = routed_classes.refuse_scripting
        for module in self.by_name:
            module.__dict__[BY_NAME] = True


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
