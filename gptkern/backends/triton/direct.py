"""How Triton kernels are started: what Triton does for each call anew is done once for each kind of call.

`jit` takes the place of `triton.jit` for kernels that the host starts. `kernel[grid](…)` then starts what Triton itself
would start, with the same arguments: the first call of a kind goes through Triton's own `run`, which specialises and
compiles; what it chose is kept by a key, and later calls of the kind hand their arguments to Triton's launcher in C.

What a kind is has to tell apart at least what Triton tells apart, or a call would run a kernel that was compiled for
other facts. Triton's facts are: of a pointer its dtype, whether it is None and whether it is aligned to 16 bytes; of an
integer whether it is 1, whether 16 divides it, and whether it takes 32 bits, 64, or all 64 unsigned; the constants and
the options. The key has the integers themselves. Of the integers in `do_not_specialize`, which change from call to
call, Triton knows the width alone, and so does the key.

Where a launcher sees that a call is like an earlier one in all that its kernel's arguments follow from, the pointers
apart, it need not find them again: `Kernel.bound` is a launch that gets pointers alone, and `keep_plan`
keeps it.

Triton's own way is taken by every call while a profiler or another hook is attached to launches, and under a Triton
whose launcher is not known (`indirect`).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

from gptkern.backends.triton.common import INTERPRETED

_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
# The order of the launcher's arguments changed between these two, and may again.
_ARGUMENTS_APART, _ARGUMENTS_IN_A_TUPLE = (3, 6), (3, 7)
# Kinds of calls that a kernel keeps; a process that has more begins anew.
_MOST_KINDS = 4096
# Plans that a launcher keeps; likewise.
MOST_PLANS = 1024
# What a grid of so many dimensions lacks.
_ONES = ((), (1, 1), (1,), ())


def indirect() -> str | None:
    """Why every launch of this process goes through Triton's own `run`, or None."""
    if INTERPRETED:
        return "TRITON_INTERPRET=1: kernels are interpreted"
    if _VERSION not in (_ARGUMENTS_APART, _ARGUMENTS_IN_A_TUPLE):
        return f"the launcher of Triton {triton.__version__} is not known; that of 3.6 and 3.7 is"
    return None


def jit(function: Callable | None = None, *, do_not_specialize: Iterable[str] = ()):
    """Decorator: a kernel that the host starts, with `kernel[grid](…)`.

    Its arguments are first the pointers, which end in _ptr, then numbers, then the constants; the host gives the
    pointers and the numbers in this order and constants by name. A grid is a tuple of ints.

    Args:
        do_not_specialize: numbers that change from call to call and must not be compiled for: rows, lengths, and
            every float, of which Triton knows the type alone; and pointers whose alignment changes, as that of the
            second of two rows in one tensor does.
    """
    if function is None:
        return functools.partial(jit, do_not_specialize=do_not_specialize)
    if INTERPRETED:
        return triton.jit(function, do_not_specialize=list(do_not_specialize))
    return Kernel(function, do_not_specialize=list(do_not_specialize))


class _Kept(NamedTuple):
    """What a call of a known kind needs."""

    launch: Callable  # Triton's, in C
    before: tuple  # its arguments between the stream and the kernel's own
    read: list[tuple]  # what the kernel has read of modules: (what reads it again, the module's names, what it was)


# The key of a kind of call.
_KEY = """active = driver.active
    device = active.get_current_device()
    {addresses}
    unaligned = ({any_address}) & 15
    key = (active, device, num_warps, num_stages, {dtypes} unaligned and ({alignments}), {fixed} {varying} {constants})
    kept = kinds.get(key)"""
# What a kernel's call becomes: straight-line code, which takes half the time of loops over the arguments.
_SOURCE = f"""
def start(grid, {{arguments}}, /, *, {{named}}num_warps=None, num_stages=None):
    {_KEY}
    if kept is None or hooks or is_watched() or (kept[2] and has_changed(kept[2])):
        return first(key if kept is None else None, grid, ({{arguments}}), dict({{given}}), num_warps, num_stages)
    launch, before, _ = kept
    launch(*grid, *ones[len(grid)], active.get_current_stream(device), *before, {{handed}})

def found({{arguments}}, /, *, {{named}}num_warps=None, num_stages=None):
    {_KEY}
    return None if unaligned or kept is None else (active, device, *kept)
"""
# A launch of which all but the pointers is known. What is not as it was when it was made takes the other way.
_BOUND_SOURCE = """
def bind(start, grid, grid_0, grid_1, grid_2, known_active, known_device, launch, before, read, {numbers}constants):
    rest = ({rest})
    def bound({pointers}):
        active = driver.active
        {addresses}
        if (
            ({any_address}) & 15 or active is not known_active or active.get_current_device() != known_device
            or hooks or is_watched() or (read and has_changed(read))
        ):
            return start(grid, {arguments}, **constants)
        launch(grid_0, grid_1, grid_2, active.get_current_stream(known_device), *before, {addresses_and_rest})
    return bound
"""


def _given(name: str) -> str:
    return f"{name}_given"


class Kernel(triton.JITFunction):
    """A Triton function that is started without Triton's own way to it where that was taken before."""

    def __init__(self, function: Callable, do_not_specialize: list[str]):
        super().__init__(function, do_not_specialize=do_not_specialize)
        names = [parameter.name for parameter in self.params if not parameter.is_constexpr]
        pointers = [name for name in names if name.endswith("_ptr")]
        numbers, constants = names[len(pointers) :], self.arg_names[len(names) :]
        if [*pointers, *numbers, *constants] != self.arg_names or not pointers or {*do_not_specialize} - {*names}:
            needs = "pointers first, which end in _ptr, then numbers, then constants, and all of do_not_specialize"
            got = f"{', '.join(self.arg_names)}, and do_not_specialize is {do_not_specialize}"
            raise TypeError(f"{self.__name__}: its arguments are {got}; it needs {needs}")
        self._kinds: dict[tuple, _Kept] = {}
        self._fixed = [index for index, name in enumerate(names) if name in numbers and name not in do_not_specialize]
        # Called by position, so that the sources below may give numbers names that are none of their own.
        self._pointers, self._numbers, self._constants = pointers, [_given(name) for name in numbers], constants
        self._start, self._found = self._compiled([_given(name) for name in do_not_specialize])
        # which pointers are None -> bind, of _BOUND_SOURCE
        self._binds: dict[tuple[bool, ...], Callable] = {}

    def bound(self, grid: tuple[int, ...], /, *arguments, num_warps=None, num_stages=None, **constants):
        """A function of the pointers that are not None, in their order, which does what `self[grid](…)` does with them
        and all else as it is here; None where no such call with aligned pointers has been started directly.

        It is for pointers of the dtypes that are given here. It gives way to `self[grid](…)` where their alignment, the
        device or the driver is another one, and where that goes Triton's own way.
        """
        constants |= {"num_warps": num_warps, "num_stages": num_stages}
        found = self._found(*arguments, **constants)
        if found is None:
            return None
        count = len(self._pointers)
        present = tuple(pointer is not None for pointer in arguments[:count])
        bind = self._binds.get(present)
        if bind is None:
            bind = self._binds[present] = self._compiled_bind(present)
        return bind(self._start, grid, *grid, *_ONES[len(grid)], *found, *arguments[count:], constants)

    def _compiled(self, varying: list[str]) -> tuple[Callable, Callable]:
        """start(grid, *arguments, **constants) and found(*arguments, **constants), of _SOURCE."""
        pointers, numbers, constants = self._pointers, self._numbers, self._constants
        handed = ", ".join([*(f"{name}_address" for name in pointers), *numbers, *["None"] * len(constants)])
        source = _SOURCE.format(
            arguments=_each("{}", [*pointers, *numbers]),
            named=_each("{}, ", constants, ""),
            addresses=_each("{0}_address = 0 if {0} is None else {0}.data_ptr()", pointers, "\n    "),
            any_address=_each("{}_address", pointers, " | "),
            dtypes=_each("None if {0} is None else {0}.dtype, ", pointers, ""),
            alignments=_each("{}_address & 15, ", pointers, ""),
            fixed=_each("{}, ", [name for name in numbers if name not in varying], ""),
            varying=_each(
                "{0} >> 31 if type({0}) is int else type({0}), ", [name for name in numbers if name in varying], ""
            ),
            constants=_each("{}", constants),
            given=_each("{0}={0}", constants),
            handed=handed if _VERSION == _ARGUMENTS_APART else f"({handed})",
        )
        scope = self._executed(source, kinds=self._kinds, first=self._first, ones=_ONES)
        return scope["start"], scope["found"]

    def _compiled_bind(self, present: tuple[bool, ...]) -> Callable:
        names = [name for name, is_there in zip(self._pointers, present) if is_there]
        given = [name if is_there else "None" for name, is_there in zip(self._pointers, present)]
        addresses = "(" + "".join("0, " if name == "None" else f"{name}_address, " for name in given) + ")"
        source = _BOUND_SOURCE.format(
            numbers=_each("{}, ", self._numbers, ""),
            pointers=_each("{}", names),
            addresses=_each("{0}_address = {0}.data_ptr()", names, "\n        "),
            any_address=_each("{}_address", names, " | "),
            arguments=_each("{}", [*given, *self._numbers]),
            addresses_and_rest=f"*{addresses}, *rest" if _VERSION == _ARGUMENTS_APART else f"{addresses} + rest",
            rest=", ".join([*self._numbers, *["None"] * len(self._constants), ""]),
        )
        return self._executed(source)["bind"]

    def _executed(self, source: str, **scope) -> dict[str, Any]:
        scope |= dict(driver=driver, hooks=self.pre_run_hooks, is_watched=_is_watched, has_changed=_has_changed)
        exec(compile(source, f"<{self.__module__}.{self.__name__}>", "exec"), scope)
        return scope

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        return functools.partial(self._start, grid)

    def _first(self, key, grid, arguments, constants, num_warps, num_stages) -> None:
        """Triton's own way; what it chose is kept under the key, if there is one."""
        options = {name: value for name, value in (("num_warps", num_warps), ("num_stages", num_stages)) if value}
        compiled = self.run(*arguments, grid=grid, warmup=False, **constants, **options)
        # True and 1.0 are equal to 1, and Triton takes them for something else: no launcher may hand them on where
        # others hand an int, since they would find what was kept of it.
        are_ints = all(type(arguments[index]) in (int, type(None)) for index in self._fixed)
        # What was compiled while somebody watched may be another kernel: with assertions, or with stages of theirs.
        if key is not None and are_ints and not _is_watched() and indirect() is None:
            self._keep(key, compiled)

    def _keep(self, key: tuple, compiled: Any) -> None:
        from triton.backends.nvidia.driver import CudaLauncher

        launcher = compiled.run if isinstance(compiled, CompiledKernel) else None
        # Scratch memory is allocated for each launch, by the launcher.
        if type(launcher) is not CudaLauncher or launcher.global_scratch_size or launcher.profile_scratch_size:
            return
        options = compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl
        if _VERSION == _ARGUMENTS_IN_A_TUPLE:
            # metadata of the kernel and of the launch, two hooks, two scratch memories
            known = launcher.arg_annotations, launcher.kernel_signature
            before = (*options, compiled.packed_metadata, None, None, None, None, None, *known)
        else:
            # two scratch memories, metadata of the kernel and of the launch, two hooks
            before = (*options, None, None, compiled.packed_metadata, None, None, None)
        # Triton, which has just compared them with its copies, holds values; here the objects are known.
        by_module: dict[int, tuple[dict, list[str]]] = {}
        for (name, _), (_, where) in self.used_global_vals.items():
            by_module.setdefault(id(where), (where, []))[1].append(name)
        # Of one name alone itemgetter makes no tuple.
        getters = [(operator.itemgetter(*names, names[0]), where) for where, names in by_module.values()]
        read = [(get, where, get(where)) for get, where in getters]
        if len(self._kinds) >= _MOST_KINDS:
            self._kinds.clear()
        self._kinds[key] = _Kept(launcher.launch, before, read)


def _each(form: str, names: list[str], between: str = ", ") -> str:
    return between.join(form.format(name) for name in names)


def keep_plan(plans: dict, key: tuple, kernel: Any, rest: tuple, grid: tuple, *arguments, **constants) -> None:
    """plans[key] = (kernel, kernel.bound(grid, *arguments, **constants), *rest), where there is such a launch.

    Only the second time that the key is seen: of calls that never come again, as where a sequence grows by a token each
    time, nothing is made. Of more than `MOST_PLANS` it begins anew.

    Args:
        key: all that the rest and the launch follow from, but for the addresses of tensors.
    """
    if key not in plans:
        if len(plans) >= MOST_PLANS:
            plans.clear()
        plans[key] = None
    # Not what somebody has put in a kernel's place.
    elif isinstance(kernel, Kernel):
        bound = kernel.bound(grid, *arguments, **constants)
        if bound is not None:
            plans[key] = kernel, bound, *rest


def _is_watched() -> bool:
    """Whether something wants to see launches, or to change how kernels are compiled."""
    try:
        return bool(
            _runtime.launch_enter_hook.calls
            or _runtime.launch_exit_hook.calls
            or _runtime.debug
            or _compilation.instrumentation_mode
            or _added_stages()
        )
    except AttributeError:
        # A hook that somebody put in the place of Triton's chain of them.
        return True


_runtime, _compilation = knobs.runtime, knobs.compilation


def _added_stages() -> Any:
    # Triton 3.7 has it.
    return getattr(_runtime, "add_stages_inspection_hook", None)


def _has_changed(read: list[tuple]) -> bool:
    """Whether a global that the kernel was compiled with is another one: Triton then raises."""
    for get, where, value in read:
        try:
            if get(where) != value:
                return True
        except KeyError:
            return True
    return False
