"""How Triton kernels are started: what Triton does for each call anew is done once for each kind of call.

`jit` takes the place of `triton.jit` for kernels that the host starts. `kernel[grid](…)` then starts what Triton itself
would start, with the same arguments: the first call of a kind goes through Triton's own `run`, which specialises and
compiles; what it chose is kept by a key, and later calls of the kind hand their arguments to Triton's launcher in C.

What a kind is has to tell apart at least what Triton tells apart, or a call would run a kernel that was compiled for
other facts. Triton's facts are: of a pointer its dtype, whether it is None and whether it is aligned to 16 bytes; of an
integer whether it is 1, whether 16 divides it, and whether it takes 32 bits, 64, or all 64 unsigned; the constants and
the options. The key has the integers themselves. Of those in `do_not_specialize`, which change from call to call,
Triton knows the width alone, and so does the key.

Triton's own way is taken by every call while a profiler or another hook is attached to launches, and under a Triton
whose launcher is not known (`indirect`).
"""

from __future__ import annotations

import functools
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
            every float, of which Triton knows the type alone.
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
    read: tuple[list, list, list] | None  # where, by which names and which values the kernel has read of its module


# What a kernel's call becomes: straight-line code, which takes half the time of loops over the arguments.
_SOURCE = """
def start(grid, {arguments}, /, *, {named}num_warps=None, num_stages=None):
    active = driver.active
    device = active.get_current_device()
    {addresses}
    unaligned = ({any_address}) & 15
    key = (active, device, num_warps, num_stages, {dtypes} unaligned and ({alignments}), {fixed} {varying} {constants})
    kept = kinds.get(key)
    if kept is None or hooks or is_watched() or (kept[2] and has_changed(kept[2])):
        return first(key if kept is None else None, grid, ({arguments}), dict({given}), num_warps, num_stages)
    launch, before, _ = kept
    launch(*grid, *ones[len(grid)], active.get_current_stream(device), *before, {handed})
"""


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
        self._start = self._compiled(pointers, numbers, constants, do_not_specialize)

    def _compiled(self, pointers: list[str], numbers: list[str], constants: list[str], varying: list[str]) -> Callable:
        """start(grid, *arguments, **constants), of _SOURCE."""

        def each(form: str, names: list[str], between: str = ", ") -> str:
            return between.join(form.format(name) for name in names)

        handed = each("{}_address", pointers) + each(", {}", numbers, "") + ", None" * len(constants)
        source = _SOURCE.format(
            arguments=each("{}", [*pointers, *numbers]),
            named=each("{}, ", constants, ""),
            addresses=each("{0}_address = 0 if {0} is None else {0}.data_ptr()", pointers, "\n    "),
            any_address=each("{}_address", pointers, " | "),
            dtypes=each("None if {0} is None else {0}.dtype, ", pointers, ""),
            alignments=each("{}_address & 15, ", pointers, ""),
            fixed=each("{}, ", [name for name in numbers if name not in varying], ""),
            varying=each(
                "{0} >> 31 if type({0}) is int else type({0}), ", [name for name in numbers if name in varying], ""
            ),
            constants=each("{}", constants),
            given=each("{0}={0}", constants),
            handed=handed if _VERSION == _ARGUMENTS_APART else f"({handed})",
        )
        scope = dict(
            driver=driver, kinds=self._kinds, hooks=self.pre_run_hooks, is_watched=_is_watched,
            has_changed=_has_changed, first=self._first, ones=_ONES,
        )  # fmt: skip
        exec(compile(source, f"<{self.__module__}.{self.__name__}>", "exec"), scope)
        return scope["start"]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        return functools.partial(self._start, grid)

    def _first(self, key, grid, arguments, constants, num_warps, num_stages) -> None:
        """Triton's own way; what it chose is kept under the key, if there is one."""
        options = {name: value for name, value in (("num_warps", num_warps), ("num_stages", num_stages)) if value}
        compiled = self.run(*arguments, grid=grid, warmup=False, **constants, **options)
        # True and 1.0 are equal to 1, and Triton takes them for something else.
        are_ints = all(type(arguments[index]) in (int, type(None)) for index in self._fixed)
        if key is not None and are_ints and indirect() is None:
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
        found = [(where, name, where.get(name)) for (name, _), (_, where) in self.used_global_vals.items()]
        read = tuple(map(list, zip(*found))) if found else None
        if len(self._kinds) >= _MOST_KINDS:
            self._kinds.clear()
        self._kinds[key] = _Kept(launcher.launch, before, read)


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


def _has_changed(read: tuple[list, list, list]) -> bool:
    """Whether a global that the kernel was compiled with is another one: Triton then raises."""
    where, names, values = read
    return [*map(dict.get, where, names)] != values
