"""Which code of a model asks for the name of its attention, and gets another answer once the name is another one.

    if self.config._attn_implementation in ("eager", "sdpa"):       a question: "gptkern" gets another answer
        attention_mask = attention_mask & chosen
    if self.config._attn_implementation == "flash_attention_2":     none: "sdpa" and "gptkern" get the same answer
    ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]       none: both are found

Read is the bytecode of all methods of the model's classes, of the classes beside them in their files, and of the
functions and classes that these name. What becomes of a name that is not used at once (a local variable, a helper's
argument, a property, getattr) is not followed: it counts as a question. So does whatever is not known here, and a
question that makes no difference costs nothing but another way of swapping.
"""

from __future__ import annotations

import dis
import functools
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from transformers.configuration_utils import PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils.generic import GeneralInterface

from gptkern.swapping.reading import contents

_FIELDS = ("_attn_implementation", "_attn_implementation_internal")
# Also the path that operator.attrgetter takes.
_FIELD_IN_A_STRING = re.compile(r"(\w+\.)*_attn_implementation(_internal)?")

# Their code asks nothing that a name without "flash" and "paged|" answers otherwise than "sdpa".
_NOT_READ = {*sys.stdlib_module_names, "torch", "numpy", "triton", "huggingface_hub", "gptkern"}
# What runs before there is a model to swap.
_CONSTRUCTION = {"__init__", "__new__", "__post_init__", "__init_subclass__", "post_init"}

_NO_OPERATION = {"EXTENDED_ARG", "CACHE", "PRECALL", "PUSH_NULL", "RESUME", "NOP", "NOT_TAKEN"}
_ATTRIBUTE = {"LOAD_ATTR", "LOAD_METHOD"}
_INTO_A_TEXT = {"FORMAT_VALUE", "FORMAT_SIMPLE", "FORMAT_WITH_SPEC", "CONVERT_VALUE"}
# What becomes of a text that is neither a message nor an exception's.
_USES = ("STORE_", "COMPARE_", "CONTAINS_", "IS_OP", "RETURN_", "YIELD_", "POP_JUMP", "JUMP_", "BINARY_SUBSCR", "SEND")
_COMPARISONS = {"IS_OP", "COMPARE_OP", "CONTAINS_OP"}
_CONTAINERS = (str, tuple, list, set, frozenset, dict, GeneralInterface)


class Question(NamedTuple):
    """Where code asks for the name of its attention."""

    function: str
    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.function} ({self.file}:{self.line})"


def find(
    classes: Iterable[type], objects: Iterable[object], name: str | None, other: str, built: bool = False
) -> Question | None:
    """The first question to which `name` and `other` get different answers.

    Args:
        classes: those of a model's modules and configs. objects: what else may hold code of the model.
        built: whether the model was built by the name `other`, so that what runs at its construction counts, too; not
            transformers' own, which there asks no more than whether to build what its other names need.
    """
    classes = list(classes)
    for function in _reached([*classes, *objects], set() if built else _CONSTRUCTION):
        if function.__name__ in _CONSTRUCTION and not is_own(function.__module__):
            continue
        for code in _codes(function.__code__):
            line = _line_of_question(function, code, name, other)
            if line is not None:
                return Question(function.__qualname__, code.co_filename, line)
    return next(filter(None, map(_field_kept_by, classes)), None)


def _field_kept_by(cls: type) -> Question | None:
    """Where a class of the model's own keeps the field's name, or gives it to an instance: any code may ask by it."""
    for base in cls.__mro__:
        if not is_read(base.__module__) or not is_own(base.__module__):
            continue
        for name, value in vars(base).items():
            code = getattr(value, "__code__", None) if name in _CONSTRUCTION else None
            if _is_a_field(value) or (code and any(_is_a_field(each.co_consts) for each in _codes(code))):
                file = getattr(sys.modules.get(base.__module__), "__file__", None) or base.__module__
                return Question(f"{base.__qualname__}.{name}", file, code.co_firstlineno if code else 1)
    return None


def comparison(classes: Iterable[type], objects: Iterable[object]) -> Question | None:
    """Where code of the model's own may compare what its attention is looked up as, rather than call it, with the
    function that transformers has under "sdpa": once that is another one, no name keeps the answer."""
    for function in _reached([*classes, *objects], _CONSTRUCTION):
        if is_own(function.__module__):
            for code in _codes(function.__code__):
                if _may_compare_what_was_found(function, code):
                    return Question(function.__qualname__, code.co_filename, code.co_firstlineno)
    return None


def has_own_code(classes: Iterable[type], objects: Iterable[object]) -> bool:
    """Whether any code of a model is not that of transformers."""
    reached = _reached([*classes, *objects], _CONSTRUCTION)
    return any(is_own(function.__module__) for function in reached)


# --- Which code -------------------------------------------------------------------------------------------------------


def beside(cls: type) -> list[type]:
    """The classes that are written in a class's file, it itself included."""
    values = list(vars(sys.modules.get(cls.__module__, object)).values())
    return [cls, *(value for value in values if isinstance(value, type) and value.__module__ == cls.__module__)]


def of_modules(
    modules: Iterable[torch.nn.Module], class_of: Callable[[torch.nn.Module], type] = type
) -> tuple[set[type], list[object]]:
    """The classes and objects that hold the code of modules, and of the configs that these hold."""
    modules = list(modules)
    classes = {cls for written in {class_of(module) for module in modules} for cls in beside(written)}
    held = [value for module in modules for value in vars(module).values()]
    classes |= {type(value) for value in held if isinstance(value, PreTrainedConfig)}
    return classes, [value for module in modules for value in held_by(module)]


def held_by(module: torch.nn.Module) -> Iterator[object]:
    """What a module's attributes hold that may be code of its own: a function that was set on it, a hook, a helper."""
    for value in vars(module).values():
        if value is not None and not isinstance(value, (bool, int, float, str, torch.Tensor)):
            yield value


def is_own(module: str | None) -> bool:
    """Whether code of a Python module, of those that are read, is not of transformers."""
    return (module or "").partition(".")[0] != "transformers"


def is_read(module: str | None) -> bool:
    """Whether code of a Python module is a model's own, rather than that of the libraries below it."""
    root, _, rest = (module or "").partition(".")
    if root == "transformers":
        return rest.startswith("models.") and not rest.startswith("models.auto.")
    return root not in _NOT_READ


def _reached(waiting: list[object], without: set[str]) -> Iterator[types.FunctionType]:
    """The functions of what is given, and those that they name, without methods of some names."""
    seen: set[int] = set()
    kept = []  # an id is that of an object as long as this lives
    while waiting:
        found = waiting.pop()
        if id(found) in seen or found is None:
            continue
        seen.add(id(found))
        kept.append(found)
        if isinstance(found, types.FunctionType):
            if is_read(found.__module__) and found.__name__ not in without:
                yield found
                waiting += _named_by(found)
        elif isinstance(found, type):
            if is_read(found.__module__):
                waiting += [value for name, value in vars(found).items() if name not in without]
                waiting += (*found.__bases__, type(found))
        else:
            waiting += _inside(found)


def _inside(found: object) -> list[object]:
    """The functions and classes of what is neither."""
    if isinstance(found, (staticmethod, classmethod)):
        return [found.__func__]
    if isinstance(found, types.MethodType):
        return [found.__func__, found.__self__]
    if isinstance(found, property):
        return [found.fget]
    if isinstance(found, functools.cached_property):
        return [found.func]
    if isinstance(found, (functools.partial, functools.partialmethod)):
        return [found.func, *_code_among((*found.args, *found.keywords.values()))]
    if isinstance(found, (tuple, list, set, frozenset)):
        return [value for value in found if callable(value)]
    if isinstance(found, (types.ModuleType, types.BuiltinFunctionType, str, bytes, int, float, torch.Tensor)):
        return []
    inside = [value for value in list(found.values()) if callable(value)] if isinstance(found, dict) else []
    held = getattr(found, "__dict__", {})
    own = type(found).__module__
    if (is_read(own) and is_own(own)) or isinstance(found, types.SimpleNamespace):
        inside += _code_among(list(held.values()))
    return [type(found), held.get("__wrapped__"), *inside]  # functools.lru_cache wraps


def _code_among(values: Iterable[object]) -> list[object]:
    return [value for value in values if callable(value) or isinstance(value, (dict, list, tuple, set))]


def _named_by(function: types.FunctionType) -> Iterator[object]:
    """What the function's code may call: by a global's name, through a module or a closure, as a default."""
    yield function.__dict__.get("__wrapped__")
    yield from (contents(cell) for cell in function.__closure__ or ())
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    for code in _codes(function.__code__):
        named = [function.__globals__.get(name) for name in code.co_names]
        yield from named
        modules, names = list(named), set(code.co_names)
        if is_own(function.__module__):
            modules += _imported_by(code, function.__globals__)
            # An attribute's name may be given to getattr.
            names |= {text for constant in code.co_consts for text in _strings(constant)}
        seen = set()
        while modules:
            module = modules.pop()
            if isinstance(module, types.ModuleType) and is_read(module.__name__) and id(module) not in seen:
                seen.add(id(module))
                values = [vars(module)[name] for name in names & vars(module).keys()]
                yield from values
                modules += values


def _imported_by(code: types.CodeType, own: dict[str, object]) -> Iterator[types.ModuleType | None]:
    """The modules that code imports where it runs, or names to importlib; those that are there by now."""
    found = list(dis.get_instructions(code))
    for place, instruction in enumerate(found):
        if instruction.opname == "IMPORT_NAME":
            level = next((each.argval for each in found[:place][-2::-1] if isinstance(each.argval, int)), 0)
            package = str(own.get("__package__") or "").split(".")
            base = ".".join(package[: len(package) - level + 1]) if level else ""
            name = ".".join(filter(None, (base, instruction.argval)))
            yield from (sys.modules.get(part) for part in (name, name.partition(".")[0]))
        elif instruction.opname == "LOAD_CONST" and isinstance(instruction.argval, str):
            yield sys.modules.get(instruction.argval)


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code, and that of the functions and comprehensions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


# --- What it asks -----------------------------------------------------------------------------------------------------


def _line_of_question(function: types.FunctionType, code: types.CodeType, name: str | None, other: str) -> int | None:
    strings = {text for constant in code.co_consts for text in _strings(constant)}
    named = {name for name in code.co_names if _is_a_field(function.__globals__.get(name))}
    if not named and not set(_FIELDS) & set(code.co_names) and not any(map(_FIELD_IN_A_STRING.fullmatch, strings)):
        return None
    instructions = [found for found in dis.get_instructions(code) if found.opname not in _NO_OPERATION]
    for place, found in enumerate(instructions):
        if found.opname in _ATTRIBUTE and found.argval in _FIELDS:
            asks = not _is_the_same(instructions, place, function, name, other)
        elif found.opname == "STORE_ATTR":
            asks = False
        elif found.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            asks = found.argval in named
        elif found.opname == "LOAD_SUPER_ATTR":
            asks = found.argval in _FIELDS
        else:
            asks = found.opname in ("LOAD_CONST", "KW_NAMES") and any(
                map(_FIELD_IN_A_STRING.fullmatch, _strings(found.argval))
            )
        if asks:
            return found.positions.lineno or code.co_firstlineno
    return None


def _may_compare_what_was_found(function: types.FunctionType, code: types.CodeType) -> bool:
    strings = {text for constant in code.co_consts for text in _strings(constant)}
    its_name = sdpa_attention_forward.__name__
    named = its_name in {*strings, *code.co_names} or any(
        function.__globals__.get(name) is sdpa_attention_forward for name in code.co_names
    )
    return named and any(found.opname in _COMPARISONS for found in dis.get_instructions(code))


def _is_a_field(value: object) -> bool:
    return any(map(_FIELD_IN_A_STRING.fullmatch, _strings(value)))


def _strings(constant: object) -> list[str]:
    if isinstance(constant, (tuple, frozenset)):
        return [text for part in constant for text in _strings(part)]
    return [constant] if isinstance(constant, str) else []


def _is_the_same(instructions: list, place: int, function: types.FunctionType, name: str | None, other: str) -> bool:
    """Whether what is done with the name that is loaded at a place is known to be the same for both."""
    following = instructions[place + 1 : place + 2]
    operation = following[0].opname if following else ""
    if operation in _INTO_A_TEXT:
        return _is_said(instructions[place + 1 :])
    if operation == "RETURN_VALUE":
        return function.__name__ in _FIELDS  # a property that passes it on
    if operation.startswith("POP_JUMP"):  # whether it is None, or false
        return bool(name)
    if operation == "BINARY_SUBSCR" or (operation == "BINARY_OP" and following[0].argrepr == "[]"):
        return _finds(_value_before(instructions, _start_of_chain(instructions, place), function), name, other)
    start = _start_of_chain(instructions, place)
    before = instructions[start - 1] if start else None
    if before is not None and before.opname in _ATTRIBUTE and before.argval in ("get_interface", "get"):
        table = _value_before(instructions, start - 1, function)
        if isinstance(table, GeneralInterface):
            return _finds(table, name, other)
    return _compares_equally(instructions, place + 1, function, name, other)


def _is_said(following: list) -> bool:
    """Whether a text that is being made is handed to one function, of whose result nothing becomes: a message, or an
    exception that is raised."""
    calls = 0
    for found in following:
        if found.opname in ("POP_TOP", "RAISE_VARARGS"):
            return calls == 1
        if found.opname.startswith(_USES):
            return False
        calls += found.opname.startswith("CALL")
    return False


def _finds(table: object, name: str | None, other: str) -> bool:
    """Whether both names stand in a table; "eager" and None have their place in the call."""
    return isinstance(table, GeneralInterface) and other in table


def _compares_equally(
    instructions: list, place: int, function: types.FunctionType, name: str | None, other: str
) -> bool:
    """Whether both names compare equally with what is loaded at a place."""
    if place >= len(instructions):
        return False
    first = instructions[place]
    place += 1
    if first.opname in ("LOAD_CONST", "LOAD_CONST_IMMORTAL"):
        value = first.argval
    elif first.opname == "LOAD_GLOBAL" and first.argval in function.__globals__:
        value = function.__globals__[first.argval]
        while place < len(instructions) and instructions[place].opname in _ATTRIBUTE:
            if not isinstance(value, (types.ModuleType, GeneralInterface)):
                return False
            value = getattr(value, instructions[place].argval, None)
            place += 1
    else:
        return False
    if place >= len(instructions):
        return False
    comparison = instructions[place]
    if comparison.opname == "IS_OP":
        return value is None and name is not None
    if value == "eager" and "reorder_and_upcast_attn" in function.__code__.co_names and not is_own(function.__module__):
        return True  # GPT-2 asks whether to compute scores in float32, in which they are here
    if comparison.opname == "COMPARE_OP" and isinstance(value, str):
        return comparison.argrepr.removeprefix("bool(").rstrip(")") in ("==", "!=") and (name == value) == (
            other == value
        )
    if comparison.opname == "CONTAINS_OP" and isinstance(value, _CONTAINERS):
        return name is not None and (name in value) == (other in value)
    return False


def _start_of_chain(instructions: list, place: int) -> int:
    """Where the name begins whose attribute of an attribute … is loaded at a place."""
    while place > 0 and instructions[place].opname in _ATTRIBUTE:
        place -= 1
    return place


def _value_before(instructions: list, place: int, function: types.FunctionType) -> object:
    """The global, or the attribute of a module, that is loaded just before a place."""
    end = place - 1
    start = _start_of_chain(instructions, end)
    if end < 0 or instructions[start].opname != "LOAD_GLOBAL":
        return None
    value = function.__globals__.get(instructions[start].argval)
    for found in instructions[start + 1 : end + 1]:
        value = getattr(value, found.argval, None) if isinstance(value, types.ModuleType) else None
    return value
