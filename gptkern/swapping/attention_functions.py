"""What a model of transformers computes as its attention, under the name in its config.

"sdpa" is a name in two tables, for the attention and for its mask, and either may hold another function by now:
`AttentionInterface.register("sdpa", mine)`. "eager" stands in none: a model hands its own function to the look-up,

    ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)

and swap takes that function's place only where it is plain attention, softmax(query key^T scaling + mask) value.
Whether it is, small random tensors tell: it is run on them, and compared with PyTorch's operator.
"""

from __future__ import annotations

import dis
import inspect
import types
from collections.abc import Callable, Iterator, Mapping

import torch
from transformers import masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from gptkern.swapping.reading import contents

_FIELDS = {"_attn_implementation", "_attn_implementation_internal"}
_NO_OPERATION = {"EXTENDED_ARG", "CACHE", "PRECALL", "PUSH_NULL", "RESUME", "NOP", "NOT_TAKEN", "KW_NAMES"}
# What a plain attention may be given by name beside its tensors: gptkern's takes it, too, or raises.
_ARGUMENTS = {"scaling", "dropout", "softcap", "position_bias", "sliding_window", "is_causal"}
_UNKNOWN = object()


def reason_against(name: str | None, table: Mapping, functions: list[types.FunctionType], module: torch.nn.Module):
    """Why what stands under a name cannot be replaced; None where it can.

    Args:
        name: "sdpa", "eager", or None, which is "eager" to transformers.
        table: in which the module looks its attention up. functions: whose code does.
    """
    if name == "sdpa":
        found = table.get(name)
        return None if found is sdpa_attention_forward else f'"sdpa" is {_shown(found)}, not transformers\' function'
    if "eager" in table:
        return f'"eager" is {_shown(table["eager"])}, not the model\'s own function'
    defaults = [default for function in functions for default in _defaults(function)]
    if not defaults:
        return 'what it computes as "eager" cannot be read off its code'
    for default in defaults:
        if not callable(default) or not _is_plain(default, module):
            return f'{_shown(default)}, its "eager", is not known to be softmax(query key^T scaling + mask) value'
    return None


def reason_against_masks(name: str | None) -> str | None:
    """Why the masks of a name cannot be taken over: the user's own function makes them."""
    stock = {"sdpa": masking_utils.sdpa_mask, "eager": masking_utils.eager_mask}.get(name)
    found = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS.get(name)
    return None if found is stock else f'the masks of "{name}" are made by {_shown(found)}, not transformers\' function'


def _shown(function: object) -> str:
    return getattr(function, "__qualname__", None) or ("it" if function is _UNKNOWN else repr(function))


def _defaults(function: types.FunctionType) -> Iterator[object]:
    """What the function's code hands to the look-up of its attention as a default."""
    found = [each for each in dis.get_instructions(function.__code__) if each.opname not in _NO_OPERATION]
    for place, instruction in enumerate(found):
        if instruction.argval not in ("get_interface", "get") or "LOAD" not in instruction.opname:
            continue
        end = next((n for n in range(place + 1, len(found)) if found[n].opname.startswith("CALL")), len(found))
        arguments = found[place + 1 : end]
        if instruction.argval == "get" and not _FIELDS & {each.argval for each in arguments if _is_name(each)}:
            continue
        while arguments and arguments[-1].opname == "LOAD_CONST" and isinstance(arguments[-1].argval, tuple):
            arguments.pop()  # the names of those arguments that have one
        yield _value(arguments, function)


def _is_name(instruction: dis.Instruction) -> bool:
    return isinstance(instruction.argval, str)


def _value(loads: list[dis.Instruction], function: types.FunctionType) -> object:
    """What the last of the loads gives: a global, an attribute of a module, or what a closure holds."""
    attributes = []
    while loads and loads[-1].opname in ("LOAD_ATTR", "LOAD_METHOD"):
        attributes.append(loads.pop().argval)
    if loads and loads[-1].opname == "LOAD_GLOBAL":
        value = function.__globals__.get(loads[-1].argval, _UNKNOWN)
    elif loads and loads[-1].opname == "LOAD_DEREF":
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or ()))
        value = contents(cells[loads[-1].argval]) if loads[-1].argval in cells else _UNKNOWN
    else:
        return _UNKNOWN
    for attribute in reversed(attributes):
        value = getattr(value, attribute, _UNKNOWN) if isinstance(value, types.ModuleType) else _UNKNOWN
    return value


# --- Whether it is plain ----------------------------------------------------------------------------------------------


def _is_plain(function: Callable, module: torch.nn.Module) -> bool:
    """Whether the function, called for a module, gives what scaled_dot_product_attention gives."""
    named = _named_arguments(function)
    if named is None:
        return False
    groups, head_dim = _size(module, "num_key_value_groups", 1), _size(module, "head_dim", 8)
    heads = _size(getattr(module, "config", None), "num_attention_heads", 2 * groups)
    heads = heads if heads % groups == 0 else 2 * groups
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device="cpu", dtype=torch.float32)

        # Long enough for what a function does by the distance of two positions.
        length, kept = 24, 16
        query = random(2, heads, length, head_dim)
        key, value = (random(2, heads // groups, length + kept, head_dim) for _ in range(2))
        sees = torch.ones(length, length + kept, dtype=torch.bool, device="cpu").tril(kept)[None, None]
        bias = random(2, 1, length, length + kept).masked_fill(~sees, torch.finfo(torch.float32).min)

        def agrees(mask: torch.Tensor | None, **arguments) -> bool | None:
            """None where the function takes no such arguments."""
            ours, theirs = (key, value) if mask is not None else (key[:, :, :length], value[:, :, :length])
            copies = (x.repeat_interleave(groups, 1) for x in (ours, theirs))
            expected = torch.nn.functional.scaled_dot_product_attention(
                query, *copies, attn_mask=mask, scale=arguments.get("scaling") if "scaling" in named else None
            ).transpose(1, 2)
            try:
                found = function(
                    module, query, ours, theirs, mask, **{n: a for n, a in arguments.items() if n in named}
                )
                output = found[0]
                same_shape = output.shape == expected.shape
            except Exception:  # of code that knows nothing of this call
                return None
            return same_shape and torch.allclose(output.to(torch.float32), expected, rtol=1e-3, atol=1e-4)

        # A function may take the module's own instead of what it is given.
        scaled = dict(scaling=_size(module, "scaling", 0.3), dropout=0.0)
        with_mask = agrees(bias, **scaled)
        if with_mask is None:  # a model that makes bool masks for its own function
            with_mask = agrees(sees, **scaled)
        if not with_mask or agrees(None, **scaled) is False:
            return False
        has_a_scale = "scaling" in inspect.signature(function).parameters
        return not has_a_scale or agrees(bias, dropout=0.0) is not False


def _size(holder: object, name: str, default: float) -> float:
    found = getattr(holder, name, None)
    return found if type(found) is type(default) and found > 0 else default


def _named_arguments(function: Callable) -> set[str] | None:
    """Which arguments a function takes by name; None where it takes more of them than a plain attention does."""
    try:
        parameters = list(inspect.signature(function).parameters.values())[5:]
    except (TypeError, ValueError):
        return None
    rest = [found.name for found in parameters if found.kind is found.VAR_KEYWORD]
    named = {found.name for found in parameters} - set(rest)
    if any(found.kind is found.VAR_POSITIONAL for found in parameters) or not named <= _ARGUMENTS:
        return None
    code = getattr(inspect.unwrap(function), "__code__", None)
    if rest and (code is None or any(_loads(found, rest[0]) for found in dis.get_instructions(code))):
        return None
    return {"scaling", "dropout"} if rest else named


def _loads(instruction: dis.Instruction, local: str) -> bool:
    names = instruction.argval if isinstance(instruction.argval, tuple) else (instruction.argval,)
    return local in names and instruction.opname.startswith(("LOAD_FAST", "LOAD_DEREF", "STORE_FAST_LOAD"))
