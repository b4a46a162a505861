"""Hugging Face transformers: attention by the name "gptkern".

    import gptkern.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained(…, attn_implementation="gptkern")

Importing this module adds the name to transformers' AttentionInterface and AttentionMaskInterface, as its documentation
tells to, and changes nothing else. `gptkern.swap(model)` gives a model that was built without it the same name:

- The name stands in a model's config, which its submodules share, and so may other models that were built from the
  same config object. So each config of the model is replaced by a copy of its own that differs in this one field.
  `unswap` puts the config back that was there; what was set on the copy in between is set on it too.
- The copy has the config's type, so that all that transformers does with a config goes on working. `model.config is
  config` is False while a model is swapped.

Masks arrive as for "sdpa", because the mask function is the same: None for plain causal attention, bool
(batch, 1, length_q, length_k) where there is padding, a sliding window, or a cache that makes the keys longer than the
queries: its last rows then say lower-right causal. A model that was built with "eager" gets such masks, too, where all
of its code is transformers' own; other code may compute with the additive ones, so the name in its config stays.

Under "sdpa" and "eager" other functions than transformers' may stand: then the attention is left alone
(attention_functions.py). What is registered under "sdpa" after a swap concerns a swapped model only where its name
stayed.

A model's own code may ask for the name, `if self.config._attn_implementation == "sdpa"`, and would then take another
way (attention_names.py finds such code). There the config stays as it is: the attention's forward is made anew with
another table in the name ALL_ATTENTION_FUNCTIONS, in which "sdpa" leads to gptkern. A model that was built by the name
"gptkern" and asks for it raises.

GPT-J computes its attention itself, in its method `_attn`: it is replaced.

Llama's RMSNorm and rotary embedding, and what has the same code, run on gptkern's (known_code.py).
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
import types
import weakref
from collections.abc import Callable, Iterator, Mapping

import torch
from torch.compiler import is_compiling
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.configuration_utils import PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from gptkern import functional as F
from gptkern.backends import dispatch, tracing
from gptkern.swapping import activations, attention_functions, attention_names, known_code
from gptkern.swapping.attention_names import Question
from gptkern.swapping.known_code import ROTARY_NAME
from gptkern.swapping.reading import followed, names_in
from gptkern.swapping.twins import ACTIVATION, ATTENTION, RMS_NORM, ROTARY, Replacement

# Without the word "flash", by which transformers tells kernels that build their masks themselves.
NAME = "gptkern"

# The implementations whose place gptkern takes: the others were asked for by name.
_REPLACED = (None, "sdpa", "eager")
# None is what a config says that no model was built from: its attention is the one that is handed over as a default.
_EAGER = (None, "eager")
# The name under which the modules that call AttentionInterface know it.
_INTERFACE = "ALL_ATTENTION_FUNCTIONS"

_logger = logging.get_logger(__name__)


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """What AttentionInterface calls: attention on gptkern.functional.scaled_dot_product_attention.

    Args:
        module: the attention module; its `is_causal` counts where the argument is None, True without either.
        query: (batch, heads, length_q, head_dim). key, value: (batch, kv_heads, length_k, head_dim); each is read by
            heads // kv_heads query heads, and not copied for it.
        attention_mask: None, bool or additive, (batch, 1 or heads, length_q, length_k). None is plain causal for a
            causal module with more than one query, and no mask for a single query.
        dropout: probability of dropping an attention weight. scaling: 1/sqrt(head_dim) where it is None.

    Returns:
        (batch, length_q, heads, head_dim), contiguous; and None, as the attention weights are never written down.

    Raises:
        ValueError: the model needs scores capped (softcap) or attention sinks (s_aux), which these kernels have not; or
            it was built by the name "gptkern", and its code asks for that name.
    """
    # In this order: torch.compile would guard on each module's id.
    if not is_compiling() and id(module) not in _ask_nothing:
        _refuse_questions(module)
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        name = "softcap" if kwargs.get("softcap") is not None else "s_aux"
        raise ValueError(f'attn_implementation="{NAME}" has no {name}; use attn_implementation="eager"')
    if kwargs.get("position_bias") is not None or kwargs.get("cache") is not None:
        # A bias that the model makes per layer, and a paged cache, are transformers' own affair.
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    if kwargs.get("output_attentions"):
        _logger.warning_once(
            f'attn_implementation="{NAME}" never writes the attention weights down: output_attentions=True gets None. '
            'Use attn_implementation="eager" for them.'
        )
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    # Without a mask, keys longer than several queries are those of a cache of fixed size at its first call: upper-left
    # causal leaves out what is not filled yet. A single query is the newest and sees all.
    (_, heads, length_q, _), (_, kv_heads, *_) = tracing.sizes(query), tracing.sizes(key)
    is_causal = length_q > 1 and attention_mask is None and is_causal
    groups = heads // kv_heads
    arguments = attention_mask, dropout, is_causal, scaling
    if groups > 1 and attention_mask is not None and query.is_cuda and _runs_on_torch(query, key, value, arguments):
        # With a mask and enable_gqa PyTorch has nothing but its slowest kernel; copies are the smaller price.
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        kv_heads = heads
    output = F.scaled_dot_product_attention(query, key, value, *arguments, enable_gqa=heads != kv_heads)
    # (batch, heads, length_q, head_dim) -> (batch, length_q, heads, head_dim): the kernels write it in this order.
    return output.transpose(1, 2).contiguous(), None


def _runs_on_torch(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, arguments: tuple) -> bool:
    """Whether PyTorch's own operator takes a call with fewer heads in key and value than in query."""
    # What torch.compile traces keeps to enable_gqa: it cannot follow `explain`.
    if is_compiling():
        return False
    choice = dispatch.explain(F.scaled_dot_product_attention, query, key, value, *arguments, enable_gqa=True)
    return choice.backend == "torch"


# The modules of models whose code was read and asks nothing, by their ids as long as they live.
_ask_nothing: dict[int, weakref.ref] = {}


def _refuse_questions(module: torch.nn.Module) -> None:
    """Raises ValueError where the module was built by the name "gptkern", and code of the model asks for it."""
    modules = [module]
    # The name was read in the config that a swap put there.
    if getattr(getattr(module, "config", None), "_attn_implementation", None) == NAME and not _is_swapped(module):
        modules = list(dict.fromkeys(each for caller in _calling(module) for each in caller.modules()))
        classes, objects = attention_names.of_modules(modules)
        question = attention_names.find(classes, objects, "sdpa", NAME, built=True)
        question = question or attention_names.comparison(classes, objects)
        if question is not None:
            raise ValueError(f'attn_implementation="{NAME}": {_asked_by(question)}; build it with "sdpa" and swap it')
    for each in modules:
        _ask_nothing[id(each)] = weakref.ref(each, functools.partial(_forget, id(each)))


def _forget(key: int, gone: weakref.ref) -> None:
    # Another module may have the same id by now.
    if _ask_nothing.get(key) is gone:
        del _ask_nothing[key]


def _is_swapped(module: torch.nn.Module) -> bool:
    return "_gptkern_configs" in vars(module)


def _calling(module: torch.nn.Module) -> list[torch.nn.Module]:
    """The module, and those whose methods are running now: a part of a model does not know the model."""
    found, frame = [module], sys._getframe(1)
    while frame is not None:
        found += [value for value in (frame.f_locals.get("self"),) if isinstance(value, torch.nn.Module)]
        frame = frame.f_back
    return found


def _asked_by(question: Question) -> str:
    return f"{question} asks for the name of the attention"


def _eager_attention_forward(module, query, key, value, attention_mask=None, dropout=0.0, scaling=None, **kwargs):
    """The same in the place of an eager function, to which None is no mask, not a causal one."""
    return attention_forward(
        module, query, key, value, attention_mask, dropout, scaling, **{**kwargs, "is_causal": False}
    )


class _Table:
    """What stands for an AttentionInterface in a forward that is made anew: the names whose place gptkern takes lead to
    gptkern's attention."""

    def __init__(self, table: AttentionInterface):
        self._table = table

    def get_interface(self, attn_implementation: str | None, default: Callable) -> Callable:
        if attn_implementation in _EAGER:
            return _eager_attention_forward
        return _ours(self._table.get_interface(attn_implementation, default))

    def get(self, attn_implementation: str | None, default: Callable | None = None) -> Callable | None:
        if attn_implementation in _EAGER:
            return _eager_attention_forward
        return _ours(self._table.get(attn_implementation, default))

    def __getitem__(self, attn_implementation: str) -> Callable:
        return _ours(self._table[attn_implementation])

    def __contains__(self, attn_implementation: object) -> bool:
        return attn_implementation in self._table

    def __getattr__(self, name: str) -> object:
        return getattr(self._table, name)


def _ours(found: Callable | None) -> Callable | None:
    """Another function than transformers' may have been registered since."""
    return attention_forward if found is sdpa_attention_forward else found


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)


# --- What swap asks ---------------------------------------------------------------------------------------------------


def takes_attention_by_name(cls: type) -> bool:
    """Whether a module's class takes its attention from AttentionInterface, or chooses it by the config itself."""
    return _INTERFACE in names_in(cls) or any(replaced.operator == ATTENTION for replaced in overrides(cls).values())


def overrides(cls: type) -> dict[str, Replacement]:
    """The methods of a class that compute an operator in Python, and what takes their place."""
    gptj = sys.modules.get("transformers.models.gptj.modeling_gptj")
    if gptj is not None and cls is gptj.GPTJAttention:
        return {"_attn": Replacement(ATTENTION, _gptj_attention)}
    activation = activations.replaced(cls)
    if activation is not None:
        return {"forward": Replacement(ACTIVATION, activation)}
    if {"rsqrt", "variance_epsilon"} <= names_in(cls):
        from transformers.models.llama.modeling_llama import LlamaRMSNorm

        if known_code.same_code(cls.forward, LlamaRMSNorm.forward):
            return {"forward": Replacement(RMS_NORM, known_code.rms_norm)}
    return {}


# What takes a forward's place -> what gives the same of a sum, and the sum.
OF_SUMS = {known_code.rms_norm: known_code.rms_norm_of_sum}


def _checkpointing_code() -> types.CodeType | None:
    """Of the function that GradientCheckpointingLayer puts around the forward of each of its subclasses."""
    made = getattr(GradientCheckpointingLayer.__dict__.get("__init_subclass__"), "__func__", None)
    constants = () if made is None else made.__code__.co_consts
    return next((code for code in constants if isinstance(code, types.CodeType) and "self" in code.co_varnames), None)


_CHECKPOINTING = _checkpointing_code()


def without_checkpoints(forward: Callable) -> Callable:
    """The forward inside of that function; the forward itself where there is none."""
    while getattr(forward, "__code__", None) is _CHECKPOINTING and _CHECKPOINTING is not None:
        forward = forward.__wrapped__
    return forward


def with_checkpoints(forward: Callable) -> Callable:
    """The forward with that function around it, which asks whether it is itself the forward of the module's class."""
    return type("Layer", (GradientCheckpointingLayer,), {"forward": forward}).forward


def find(function: Callable) -> Replacement | None:
    """What takes the place of a function that a forward calls by its name, or of the table in which it looks it up."""
    if isinstance(function, AttentionInterface):
        return Replacement(ATTENTION, _Table(function))
    if getattr(function, "__name__", "") != ROTARY_NAME or not isinstance(function, types.FunctionType):
        return None
    replaced = known_code.rotary(function)
    return replaced and Replacement(ROTARY, replaced)


def written_out(cls: type) -> dict[str, str]:
    """Operator -> the reason why a class that computes it in Python is left alone: a rotary embedding of other code."""
    forward = inspect.unwrap(cls.forward)
    function = getattr(forward, "__globals__", {}).get(ROTARY_NAME)
    if ROTARY_NAME in names_in(cls) and find(function) is None:
        return {ROTARY: "its rotary embedding is of a form of its own"}
    return {}


def _gptj_attention(self, query, key, value, attention_mask=None):
    """GPTJAttention._attn: key (batch, heads, length_k, head_dim) and the rest as above; -> output, None."""
    output, _ = attention_forward(
        self, query, key, value, attention_mask, self.attn_dropout.p if self.training else 0.0, 1 / self.scale_attn
    )
    return output.transpose(1, 2), None


class SwappedConfig:
    """A config in whose place a copy stands, and how the copy was then.

    Attributes:
        original: the config that was there. current: the copy.
        seen: the copy's fields when it was made.
    """

    def __init__(self, original: PreTrainedConfig):
        self.original = original
        self.current = copy.copy(original)
        self.current.__dict__["_attn_implementation_internal"] = NAME
        self.seen: dict[str, object] = {}

    def restore(self) -> PreTrainedConfig:
        """The original, with what was set on the copy since."""
        fields, now = self.original.__dict__, self.current.__dict__
        for name in now.keys() | self.seen.keys():
            if name not in now:
                fields.pop(name, None)
            elif name not in self.seen or now[name] is not self.seen[name]:
                fields[name] = now[name]
        # A module that is restored later finds nothing new.
        self.seen = dict(now)
        return self.original


def _models_beside(cls: type) -> list[type]:
    """The models that are written in the file of a module's class."""
    return [value for value in attention_names.beside(cls) if issubclass(value, PreTrainedModel)]


class Attention:
    """Which of a model's modules can take their attention by the name "gptkern".

    Args:
        model: any module.
        original_class: the class that a module had before it was swapped.
        noted: attribute -> its SwappedConfig, of a module that was swapped.
    """

    operator = ATTENTION

    def __init__(
        self,
        model: torch.nn.Module,
        original_class: Callable[[torch.nn.Module], type],
        noted: Callable[[torch.nn.Module], dict[str, SwappedConfig]],
    ):
        self._holders = [
            (module, name, value)
            for module in model.modules()
            for name, value in vars(module).items()
            if isinstance(value, PreTrainedConfig)
        ]
        self._model = model
        # Implementation -> the question to which its name and ours get different answers.
        self._questions: dict[str | None, Question | None] = {}
        # What `comparison` found; empty where that was not needed yet.
        self._compared: list[Question | None] = []
        # Whether any code of the model is not of transformers; None where that was not needed yet.
        self._own_code: bool | None = None
        self._original_class = original_class
        self._wanted: dict[int, PreTrainedConfig] = {}
        # The copies that an earlier swap made and that still stand in their places, by their own id and by their
        # originals': these are taken again.
        notes = [
            note
            for module in model.modules()
            for name, note in noted(module).items()
            if vars(module).get(name) is note.current
        ]
        self._by_copy = {id(note.current): note for note in notes}
        self._by_original = {id(note.original): note for note in notes}

    def reason_against(self, module: torch.nn.Module) -> str | None:
        """Why a module that calls the interface cannot be swapped; None where it can."""
        config = vars(module).get("config")
        if not isinstance(config, PreTrainedConfig):
            return "it has no config of transformers, in which its attention could be chosen"
        implementation = config._attn_implementation
        if implementation == NAME:
            question = None if id(config) in self._by_copy else self._question(NAME)
            return None if question is None else f'{_asked_by(question)}, which is "{NAME}"'
        if implementation not in _REPLACED:
            return f'attn_implementation="{implementation}" was asked for by name'
        if config.output_attentions:
            return "its config asks for the attention weights, which are never written down"
        if getattr(config, "attn_logit_softcapping", None) is not None:
            return "its scores are capped, which the kernels cannot"
        cls = self._original_class(module)
        if implementation is not None:
            reason = attention_functions.reason_against_masks(implementation)
            if reason is not None:
                return reason
        if self._comparison() is not None:
            return f"{self._comparison()} may compare what its attention is looked up as"
        question = self._question(implementation)
        if question is not None and implementation == "eager" and "get_interface" not in names_in(cls):
            return f'{_asked_by(question)}, which is "eager"'
        if question is not None and overrides(cls):
            return _asked_by(question)
        if not overrides(cls):
            tables, functions = self._tables(cls)
            if not tables:
                return f"its {_INTERFACE} is no AttentionInterface of transformers"
            for holder, _, held in self._holders:
                if held is config and isinstance(holder, PreTrainedModel) and not holder._supports_sdpa:
                    return f"{type(holder).__name__} cannot run on scaled_dot_product_attention"
            # A part of a model does not hold the PreTrainedModel that says so; its file does.
            models = _models_beside(cls)
            if models and not any(model._supports_sdpa for model in models):
                return f"{models[0].__name__} cannot run on scaled_dot_product_attention"
            for table in tables:
                reason = attention_functions.reason_against(implementation, table, functions, module)
                if reason is not None:
                    return reason
        return None

    def keeps_its_name(self, module: torch.nn.Module) -> bool:
        """Whether the name in the module's config has to stay, as code of the model asks for it or may compute with
        eager's additive masks: what is replaced is then the table in which the module's forward looks it up."""
        config = vars(module)["config"]
        implementation = config._attn_implementation
        if implementation == NAME:
            return False
        return self._question(implementation) is not None or (
            implementation in _EAGER and not self._makes_its_masks(config)
        )

    def _makes_its_masks(self, config: PreTrainedConfig) -> bool:
        """Whether all that a module's masks pass through is transformers' code, which makes those that a name needs."""
        if not any(held is config and isinstance(holder, PreTrainedModel) for holder, _, held in self._holders):
            return False
        if self._own_code is None:
            self._own_code = attention_names.has_own_code(*self._code())
        return not self._own_code

    @staticmethod
    def is_overridden(cls: type) -> bool:
        """Whether the class computes its attention in a method that is replaced."""
        return bool(overrides(cls))

    def _question(self, implementation: str | None) -> Question | None:
        if implementation not in self._questions:
            classes, objects = self._code()
            built = implementation == NAME
            # Where it was eager the masks become sdpa's, for which the answers have to be those of that name, too.
            names = dict.fromkeys(("sdpa",) if built else (implementation, "sdpa"))
            found = (attention_names.find(classes, objects, name, NAME, built) for name in names)
            self._questions[implementation] = next(filter(None, found), None)
        return self._questions[implementation]

    def _comparison(self) -> Question | None:
        if not self._compared:
            self._compared.append(attention_names.comparison(*self._code()))
        return self._compared[0]

    def _code(self) -> tuple[set[type], list[object]]:
        return attention_names.of_modules(self._model.modules(), self._original_class)

    def _tables(self, cls: type) -> tuple[list[Mapping], list[types.FunctionType]]:
        """Where a class's forward looks its attention up, if the name "gptkern" is found there; whose code does."""
        links = followed(cls, find)
        targets = [inspect.unwrap(cls.forward).__globals__.get(_INTERFACE)]
        targets += [target for found in links.values() for target in found.values()]
        tables = {
            id(target): target
            for target in targets
            if isinstance(target, AttentionInterface) or (isinstance(target, dict) and NAME in target)
        }
        return list(tables.values()), list(links)

    def was_eager(self, module: torch.nn.Module) -> bool:
        """Whether the module's attention was eager's before a swap."""
        config = vars(module)["config"]
        note = self._by_copy.get(id(config))
        return (config if note is None else note.original)._attn_implementation == "eager"

    def want(self, module: torch.nn.Module) -> None:
        """The module's config is to name gptkern."""
        config = vars(module)["config"]
        if config._attn_implementation != NAME:
            self._wanted[id(config)] = config

    def changes(self) -> Iterator[tuple[torch.nn.Module, str, SwappedConfig]]:
        """(a module, the name of its attribute, what takes the place of the config there)."""
        again = {key: note for key, note in self._by_original.items() if key in self._wanted}
        again |= {id(note.original): note for key, note in self._by_copy.items() if key in self._wanted}
        for note in again.values():
            note.current.__dict__["_attn_implementation_internal"] = NAME
        fresh = self._wanted.keys() - again.keys() - self._by_copy.keys()
        new = {key: SwappedConfig(self._wanted[key]) for key in self._wanted if key in fresh}
        made = {**self._by_original, **new}
        for swapped in new.values():
            # A config that holds another one as a part holds its copy.
            for name, part in swapped.current.__dict__.items():
                if id(part) in made:
                    swapped.current.__dict__[name] = made[id(part)].current
            swapped.seen = dict(swapped.current.__dict__)
        for module, name, config in self._holders:
            if id(config) in self._wanted and id(config) in made:
                yield module, name, made[id(config)]
