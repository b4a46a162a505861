"""int8_linear's products in PyTorch's operators: exact ones of int8 with int8, and those with a widened int8 weight.

On a CPU PyTorch has operators that read the int8 weight as it is, several times as fast, on some processors:

    torch._int_mm               int8 with int8, in int32
    torch._weight_int8pack_mm   bfloat16 with int8, in float32, rounded to bfloat16

Neither says where it is wrong or slow. Without instructions for int8 products oneDNN adds pairs of them in 16 bits,
which saturate: 768 products of 127 with 127 are 97,920, not 12,387,072. What torch.cpu tells of the processor decides
nothing, as oneDNN may be told to leave instructions alone (ONEDNN_MAX_CPU_ISA). So each is tried, once in a process,
when a call first could use it: it must be right where a wrong one shows, and not slower by far than what it replaces.
On a machine too busy for that to end soon, calls get float32 products meanwhile, and some of them go on with the trial.
"""

from __future__ import annotations

import bisect
import math
import os
import threading
import time
from collections.abc import Callable, Generator
from typing import NamedTuple

import torch

from gptkern.backends import tracing
from gptkern.backends.registration import without_autocast

# |a * b| <= 2^14 for int8, and float32 holds every integer up to 2^24: so many terms sum exactly, in any order.
EXACT_TERMS = 1024
# The same of a row that is known: |weight| <= 2^7, so that a sum of |q| up to here leaves every partial sum exact.
EXACT_SUM = 2**24 // 2**7
# q is within ±127 and the weight within ±128: longer sums can pass int32.
INT32_TERMS = (2**31 - 1) // (127 * 128)
# Elements of the weight that are widened at once. On a CPU a slice stays in the cache: a 4096 x 4096 weight takes a
# quarter of the time of widening it whole (16 rows, AVX2). A GPU wants long products.
WIDENED_ELEMENTS = {"cpu": 2**19, "cuda": 2**26}
# Elements that PyTorch does not divide among threads when it copies them (ATen's grain).
_COPIED_BY_A_THREAD = 2**15
# torch._int_mm leaves its result unwritten on a CPU where in_features is 1 (seen in 2.13): no call so short needs it.
LEAST_TERMS = 16
# torch._weight_int8pack_mm has no tail: it would read past the end of a row (seen in 2.13 with in_features 1).
PACKED_TERMS = 32
# Up to here a product's time is that of reading the weight.
FEW_ROWS = 16


def integer_product(q, weight):
    """q @ weight^T, exact: (rows, out_features), whole numbers in a dtype that holds them.

    q: (rows, in_features) int8 within ±127. weight: (out_features, in_features) int8.
    """
    out_features, terms = tracing.sizes(weight)
    # The shapes that torch._int_mm takes on a GPU.
    fits = q.is_cuda and 0 < terms <= INT32_TERMS and terms % 8 == 0 and out_features % 8 == 0
    # It has no rule for vmap, and a trace is for any number of rows.
    if fits and not tracing.is_transformed() and q.shape[0] > 16:
        return torch._int_mm(q, weight.contiguous().t())
    return integer_product_here(q, weight) if is_integer_product(q, weight) else _product_of_floats(q, weight)


def is_integer_product(x, weight) -> bool:
    """Whether `integer_product` of rows such as x's, (…, in_features), is `integer_product_here`."""
    if not (x.is_cpu and _is_plain(x, weight)):
        return False
    out_features, terms = weight.shape
    if not (LEAST_TERMS <= terms <= INT32_TERMS and out_features):
        return False
    rows = x.numel() // terms
    return rows > 0 and integer_trial().chosen(rows) == INT_MM


def integer_product_here(q, weight):
    """The product of int8 with int8 that a CPU's trial found right and fast: (rows, out_features) int32."""
    # The second operand may lie either way.
    right = weight.t() if weight.stride() == (1, weight.shape[0]) else _rows(weight).t()
    return torch._int_mm(_rows(q), right)


def bfloat16_product(x, weight):
    """x @ weight^T with sums in float32: (rows, out_features) in float32, or in bfloat16 where that is what was chosen.

    x: (rows, in_features) bfloat16. weight: (out_features, in_features) int8.
    """
    out_features, terms = tracing.sizes(weight)
    if x.is_cpu and terms % PACKED_TERMS == 0 and _is_plain(x, weight):
        rows = x.shape[0]
        if rows and out_features and terms:
            return _BFLOAT16_PRODUCTS[bfloat16_trial().chosen(rows)](x, weight)
    return widened_product(x.float(), weight)


def widened_product(x, weight):
    """x @ weight^T in x's dtype, with never more than a slice of the weight widened to it."""
    return _slice_by_slice(_times, x, weight)


def _product_of_floats(q, weight):
    """`integer_product` by float32 products of so many terms that each sum is exact."""
    x, terms = q.float(), tracing.sizes(weight)[1]
    chunks = _exact_chunks(x, weight, terms)
    if len(chunks) == 1:
        return widened_product(x, weight)
    dtype = torch.int32 if terms <= INT32_TERMS else torch.int64

    def product(x, widened):
        total = _times(x[:, chunks[0]], widened[..., chunks[0]]).to(dtype)
        for chunk in chunks[1:]:
            total.add_(_times(x[:, chunk], widened[..., chunk]).to(dtype))
        return total

    return _slice_by_slice(product, x, weight)


def _exact_chunks(x, weight, terms):
    """Slices of in_features, each of whose products float32 sums exactly.

    EXACT_TERMS whatever the values; more of them where x (rows, in_features), whole numbers within ±127, is small
    enough, as most activations are: a product in four parts takes half as long again (1 row of 4096).
    """
    starts = range(0, terms, EXACT_TERMS)
    if len(starts) <= 1:
        return [slice(0, terms)]
    sums = [EXACT_SUM] * len(starts)
    # On a GPU the values would be waited for.
    if x.is_cpu and _is_plain(x, weight) and x.shape[0]:
        # A float32 sum of what is not negative is never rounded below a bound that it has passed.
        magnitude = x.abs()
        if magnitude.sum(1).max().item() <= EXACT_SUM:
            return [slice(0, terms)]
        sums = torch.stack([part.sum(1).max() for part in magnitude.split(EXACT_TERMS, 1)]).tolist()
    chunks, total = [], 0
    for start, largest in zip(starts, sums):
        if chunks and total + largest <= EXACT_SUM:
            chunks[-1], total = slice(chunks[-1].start, start + EXACT_TERMS), total + largest
        else:
            chunks.append(slice(start, start + EXACT_TERMS))
            total = largest
    return chunks


def _times(x, widened):
    """x @ widened^T: (rows, channels), or (parts, rows, channels) of a weight in parts."""
    if widened.dim() == 2:
        return x @ widened.t()
    return torch.bmm(x.expand(len(widened), -1, -1), widened.mT)


def _slice_by_slice(product, x, weight):
    """product(x, widened) of slices of the weight (channels, in_features), widened to x's dtype, side by side."""
    out_features, terms = tracing.sizes(weight)
    # Who looks on, as a mode or forward mode, may keep the widened weight.
    needs_gradient = x.requires_grad and torch.is_grad_enabled()
    keeps_none = x.is_cpu and _is_plain(x, weight) and not (needs_gradient or tracing.is_watched())
    threads = _threads_of_a_slice(x, weight) if keeps_none else 1
    channels = max(WIDENED_ELEMENTS["cuda" if x.is_cuda else "cpu"] // max(terms, 1), 1) * threads
    products = []
    for part in [weight] if out_features <= channels else weight.split(channels):
        if not keeps_none:
            products.append(product(x, part.to(x.dtype)))
        elif threads > 1 and part.shape[0] % threads == 0:
            products.extend(product(x, _into_scratch(part, x.dtype).unflatten(0, (threads, -1))))
        else:
            products.append(product(x, _into_scratch(part, x.dtype)))
    return products[0] if len(products) == 1 else torch.cat(products, 1)


def _threads_of_a_slice(x, weight) -> int:
    """In how many parts a slice is multiplied, so that each thread finds what it widened itself.

    PyTorch copies a tensor in as many equal parts as it has threads, and MKL multiplies a batch in the same threads,
    one each. A product that is not cut so reads half of the slice out of the other core's cache: where that is far, it
    took three times as long as with one thread (1 row of 4096 x 4096 in 6.3 and in 1.9 ms; in two parts 1.2).
    """
    # A backward's weight is copied column by column; PyTorch's bfloat16 products divide the work in other ways.
    if x.dtype != torch.float32 or not weight.is_contiguous():
        return 1
    threads = torch.get_num_threads()
    return threads if weight.numel() >= threads * _COPIED_BY_A_THREAD else 1


class _Scratch(threading.local):
    """Of each thread, where it widens one slice after another: memory that is in the cache, and has its pages.

    What is allocated for a call may have none. Of a weight of 768 x 768, whose product takes 80 µs, that was 600 now
    and then.
    """

    memory: torch.Tensor | None = None


_scratch = _Scratch()


def _into_scratch(part, dtype):
    size, room = part.numel() * dtype.itemsize, 4 * WIDENED_ELEMENTS["cpu"] * torch.get_num_threads()
    if size > room:
        return part.to(dtype)
    if _scratch.memory is None or _scratch.memory.numel() < size:
        # Memory with a version: to save it for a backward and write it again is an error, not a wrong gradient.
        with torch.inference_mode(False):
            least = 4 * WIDENED_ELEMENTS["cpu"]
            _scratch.memory = torch.empty(max(size, least), dtype=torch.uint8, device="cpu")
    widened = _scratch.memory[:size].view(dtype)
    rows, columns = part.shape
    # The weight of a backward lies the other way.
    widened = widened.view(columns, rows).t() if part.stride(0) == 1 else widened.view(rows, columns)
    return widened.copy_(part)


def _is_plain(x, weight) -> bool:
    """Whether the product may be one that no tracer, transform or tensor subclass has to know."""
    return tracing.has_values(x) and type(weight) in (torch.Tensor, torch.nn.Parameter)


def _packed(x, weight):
    return torch._weight_int8pack_mm(_rows(x), _rows(weight), x.new_ones(weight.shape[0]))


def _rows(matrix):
    """The matrix with strides (columns, 1), also where one of its sizes is 1 and PyTorch calls others contiguous.

    With those torch._int_mm leaves its result unwritten (seen in 2.13).
    """
    rows, columns = matrix.shape
    matrix = matrix.contiguous()
    return matrix if matrix.stride() == (columns, 1) else matrix.view(-1).view(rows, columns)


# --- Which of them are right and fast, tried --------------------------------------------------------------------------

FLOATS, INT_MM, PACKED, BFLOAT16 = "float32", "torch._int_mm", "torch._weight_int8pack_mm", "bfloat16"
_BFLOAT16_PRODUCTS: dict[str, Callable] = {
    FLOATS: lambda x, weight: widened_product(x.float(), weight),
    PACKED: _packed,
    # Every int8 is a bfloat16.
    BFLOAT16: widened_product,
}

# Rows, in_features and out_features of the products whose results are looked at: tails of every vector and tile.
_LOOKED_AT = ((1, 64, 1), (1, 67, 33), (1, 768, 64), (3, 129, 17), (16, 68, 48), (37, 515, 65), (2, 4099, 3))
_LOOKED_AT_PACKED = ((1, 64, 1), (1, 96, 33), (1, 768, 64), (3, 160, 17), (16, 96, 48), (37, 544, 65))
# What is timed: a weight that stays in the cache, so that a try takes some milliseconds in all.
_TIMED_ROWS, _TIMED_FEATURES = (1, 32), 512
# A least time counts when so many are within so many times it: what waits for another thread takes as long as it likes.
_TIMES, _ALIKE = 3, 1.3
# Seconds of products, where two are about as fast, and rounds in any case, after which the least so far decide.
_PATIENCE, _ROUNDS = 0.005, 100
# Seconds that a trial takes of a call at most, and one product more. A quiet machine needs 7 to 30 ms, one with three
# more busy processes for each processor up to 12 s: a product in two threads waits for both.
_BUDGET = 0.1
# Times what it took of a call until the trial goes on with another: a tenth of the time at most.
_REST = 10
# The processor's time of this thread, which what else runs does not lengthen. Where it is coarse, the clock's.
_wall = time.perf_counter
_clock = time.thread_time if time.get_clock_info("thread_time").resolution < 1e-6 else _wall
# A product that is right is taken unless it takes so many times as long. What lacks its instructions takes 4 to 100
# times as long; a smaller difference may be what the machine does besides, which must not decide what runs, nor, in
# bfloat16, which bits come out.
_SLOWER = 1.5
# A candidate that takes so many times as long is timed no more.
_HOPELESS = 4


class Trial(NamedTuple):
    """What a trial found: the product that few rows get, the one that many get, and why, in words."""

    few: str
    many: str
    reason: str

    def chosen(self, rows: int) -> str:
        return self.few if rows <= FEW_ROWS else self.many

    def __str__(self) -> str:
        products = self.few if self.few == self.many else f"{self.few} up to {FEW_ROWS} rows, {self.many} beyond"
        return f"{products} ({self.reason})"


_UNDECIDED = Trial(FLOATS, FLOATS, "the machine is too busy to try others: a later call goes on")

# A trial, in steps that it can be left after: what is yielded means nothing, what is returned was found.
Steps = Generator[None, None, Trial]


class _Unfinished:
    """A trial that began."""

    def __init__(self, steps: Steps):
        self.steps, self.goes_on_at = steps, 0.0


_trials: dict[tuple[str, bool], Trial] = {}
_unfinished: dict[tuple[str, bool], _Unfinished] = {}
_lock = threading.Lock()


def _begin_anew() -> None:
    global _lock
    _lock = threading.Lock()
    _unfinished.clear()


# A child that is forked while another thread tries would wait for it forever.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)


def integer_trial(seconds: float = _BUDGET) -> Trial:
    """Of `integer_product` on this CPU: FLOATS or INT_MM, which give the same bits.

    It is kept when torch.set_num_threads changes: whether a product is right does not depend on it, and what is faster
    is so by far. Where torch.backends.mkldnn is switched off, whose kernels these are, there is another one.

    After `seconds` (math.inf: never) it is left as it stands: FLOATS for now, and a later call goes on with it.
    """
    return _tried("integer", _try_integer, seconds)


def bfloat16_trial(seconds: float = _BUDGET) -> Trial:
    """Of `bfloat16_product` on this CPU: FLOATS, PACKED or BFLOAT16. `seconds`: as of `integer_trial`."""
    return _tried("bfloat16", _try_bfloat16, seconds)


def _tried(name: str, begun: Callable[[], Steps], seconds: float) -> Trial:
    key = name, torch._C._get_mkldnn_enabled()
    found = _trials.get(key)
    if found is not None:
        return found
    if _is_resting(key, seconds):
        return _UNDECIDED
    with _lock:
        # Another thread may have been at it.
        found = _trials.get(key)
        if found is None and not _is_resting(key, seconds):
            found = _gone_on(key, begun, seconds)
    return found or _UNDECIDED


def _is_resting(key, seconds):
    unfinished = _unfinished.get(key)
    return unfinished is not None and seconds < math.inf and _wall() < unfinished.goes_on_at


def _gone_on(key, begun: Callable[[], Steps], seconds: float) -> Trial | None:
    """What the trial found, or None where `seconds` were over before."""
    begin = _wall()
    # What it found so far is kept; after an exception that is no answer it begins anew.
    unfinished = _unfinished.pop(key, None) or _Unfinished(begun())
    try:
        # Not the modes, devices or dtypes of whoever calls.
        with (
            torch._C.DisableTorchFunction(),
            torch.inference_mode(False),
            torch.no_grad(),
            without_autocast("cpu"),
        ):
            while _wall() - begin < seconds:
                next(unfinished.steps)
    except StopIteration as stop:
        _trials[key] = stop.value
        return stop.value
    now = _wall()
    unfinished.goes_on_at = now + _REST * (now - begin)
    _unfinished[key] = unfinished
    return None


def _try_integer() -> Steps:
    try:
        for sizes in _LOOKED_AT:
            q, weight = _extremes(*sizes)
            # float64 holds every sum: 2^53 is far.
            expected = q.double() @ weight.double().t()
            for laid in (weight, weight.t().contiguous().t()):
                if not torch.equal(integer_product_here(q, laid).double(), expected):
                    return Trial(FLOATS, FLOATS, f"{INT_MM} is not exact here")
                yield
    except RuntimeError as error:
        return Trial(FLOATS, FLOATS, f"{INT_MM} cannot run here ({_first_line(error)})")
    return (yield from _fastest({FLOATS: _product_of_floats, INT_MM: integer_product_here}, torch.int8))


def _try_bfloat16() -> Steps:
    right, wrong = {FLOATS: _BFLOAT16_PRODUCTS[FLOATS]}, []
    for name in (PACKED, BFLOAT16):
        reason = yield from _why_not(_BFLOAT16_PRODUCTS[name])
        if reason is None:
            right[name] = _BFLOAT16_PRODUCTS[name]
        else:
            wrong.append(f"{name} {reason}")
    trial = yield from _fastest(right, torch.bfloat16)
    return trial._replace(reason="; ".join([*([trial.reason] if len(right) > 1 else []), *wrong]))


def _why_not(product: Callable) -> Generator[None, None, str | None]:
    """None where the product's result is that of sums in float32, rounded to bfloat16 once."""
    try:
        for sizes in _LOOKED_AT_PACKED:
            x, weight = _of_bfloat16(*sizes)
            expected = x.double() @ weight.double().t()
            # a rounding to bfloat16, and roundings of the sum
            bound = expected.abs() * 2**-8 + (x.double().abs() @ weight.double().abs().t()) * 2**-16
            if not ((product(x, weight).double() - expected).abs() <= bound).all():
                return "is wrong here"
            x[0, -1] = torch.nan
            if not product(x, weight)[0].isnan().all():
                return "loses a NaN here"
            yield
    except RuntimeError as error:
        return f"cannot run here ({_first_line(error)})"
    return None


def _extremes(rows: int, terms: int, out_features: int):
    """Operands whose sums saturate where anything can: rows of one value, of two in turn, and of all."""

    def rows_of(count):
        index = torch.arange(count * terms, dtype=torch.int64, device="cpu").view(count, terms)
        kinds = torch.arange(count, dtype=torch.int64, device="cpu")[:, None] % 5
        values = (index * 7919) % 256 - 128
        values = torch.where(kinds == 1, -128, torch.where(kinds == 2, 127 - 255 * (index % 2), values))
        return torch.where(kinds == 0, 127, torch.where(kinds == 3, -127, values)).to(torch.int8)

    return rows_of(rows), rows_of(out_features)


def _of_bfloat16(rows: int, terms: int, out_features: int):
    """Values of four powers of ten and both signs; every int8."""
    index = torch.arange(rows * terms, dtype=torch.int64, device="cpu").view(rows, terms)
    x = ((index * 7919) % 509 - 254).double() * 10.0 ** -((index * 31) % 4)
    weight = torch.arange(out_features * terms, dtype=torch.int64, device="cpu") * 193 % 256 - 128
    return x.to(torch.bfloat16), weight.view(out_features, terms).to(torch.int8)


def _fastest(products: dict[str, Callable], dtype: torch.dtype) -> Steps:
    """One of the products behind the first, unless the first is faster by far; for few rows and for many.

    Of several, the first where there are few rows and the last where there are many, unless another is faster by far.
    """
    first, *others = products
    weight = torch.ones(_TIMED_FEATURES, _TIMED_FEATURES, dtype=torch.int8, device="cpu")
    seconds, chosen = [], []
    for rows in _TIMED_ROWS:
        operands = torch.ones(rows, _TIMED_FEATURES, dtype=dtype, device="cpu"), weight
        seconds.append((yield from _seconds(products, operands)))
    for times, preferred in zip(seconds, (others, others[::-1])):
        best = next(iter(preferred), first)
        for name in preferred:
            best = name if times[name] * _SLOWER < times[best] else best
        chosen.append(best if times[best] < _SLOWER * times[first] else first)
    few, many = _TIMED_ROWS
    reasons = []
    for name in others:
        of_few, of_many = (times[first] / times[name] for times in seconds)
        reasons.append(f"{name} {of_few:.1f} × as fast as {first} with {few} row, {of_many:.1f} × with {many}")
    return Trial(*chosen, "; ".join(reasons) or f"{first} alone")


def _seconds(products: dict[str, Callable], operands: tuple) -> Generator[None, None, dict[str, float]]:
    """name -> the least time of a call; in turn, so that what else the machine does meets all of them.

    As long as two are about as fast, others may have had the processors: then it goes on for a while.
    """
    for product in products.values():
        product(*operands)  # memory and kernels are made once
        yield
    first, going, spent = next(iter(products)), list(products), 0.0
    times: dict[str, list[float]] = {name: [] for name in products}
    for _ in range(_ROUNDS):
        for name in going:
            start = _clock()
            products[name](*operands)
            took = max(_clock() - start, 1e-9)
            bisect.insort(times[name], took)
            spent += took
            yield
        ratios = {name: times[name][0] / times[first][0] for name in going if name != first}
        if all(len(times[name]) >= _TIMES and times[name][_TIMES - 1] < _ALIKE * times[name][0] for name in going):
            going = [name for name in going if name == first or ratios[name] < _HOPELESS]
            if spent > _PATIENCE or all(not 0.5 < ratios[name] < 2 for name in going[1:]):
                break
    return {name: of_it[0] for name, of_it in times.items()}


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
