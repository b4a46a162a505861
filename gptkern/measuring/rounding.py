"""How far honest float32 roundings move a result: the floor of the rule in tolerance.py.

    noise = max over draws of |f~(x) - f(x)|        f in float64, f~ the same with every operation rounded at random

A yardstick in float32 is one draw of its roundings: on few elements it can be exact by luck, and by what a CPU's vector
width makes of the order of a sum. Here the roundings are drawn DRAWS times from what is known of each operation, and
carried to the results by the operations that follow. A small difference of large terms gets the room that its terms
need, without anybody saying so, and a sum of three terms gets no more than three roundings' worth.

With u = 2^-24, float32's unit roundoff, an operation that gives v is moved by a uniform draw of [-size, size]:

    a + b, a * b, a / b, sqrt      size = u |v|, the standard model fl(a op b) = (a op b) (1 + d), |d| <= u  [1, 2.2]
    exp, erf, tanh, ...            size = 2 FUNCTION_ULPS u |v|: what CUDA [2] and SLEEF [3] document, 2 ulp at most
    exp                            u |x v| more: it is taken as 2^(x log2 e), whose argument is rounded as well
    a sum v of n terms t           size = u sqrt(c (v^2 / 3 + sum t^2 / 6)), c = min(n, 2 sqrt(n))
    a product of matrices          c = n, and sum t^2 more under the root: the terms are rounded products
    a product of int8 values       0: it is summed in int32, exactly
    min, max, abs, where, copies   0

The size of a sum: recursive summation has the error sum over k of d_k s_k, with the partial sums s_k [1, 4.2]. In
random order E[s_k^2] = (k v / n)^2 + k (n - k) / n^2 * (sum t^2 - v^2 / n), and so sum over k of E[s_k^2] is
n (v^2 / 3 + sum t^2 / 6): the statistical estimate of [1, 4.5] and [4], and far below what always holds,
((n - 1) u sum |t|)^2. BLAS and tensor cores do add the products of an element in one such chain. The sum of a row or a
column has vectors, tiles and cascades, though: blocks, for which sqrt(n) blocks of sqrt(n) terms is the plain form
[1, 4.1]; its errors add up to at most 2 sqrt(n) (v^2 / 3 + sum t^2 / 6), small enough for a term that a row of 33,001
lacks to stand out. To draw roundings rather than to bound them is Monte Carlo arithmetic [5].

What is not listed counts as exact: then the floor is lower than it might be, and the rule stricter, never softer.

[1] N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd edition, SIAM 2002.
[2] CUDA C++ Programming Guide, Mathematical Functions: Standard Functions, their maximum errors in ulp.
[3] N. Shibata, F. Petrogalli, SLEEF: A Portable Vectorized Library of C Standard Mathematical Functions, 2020.
[4] T. G. Robertazzi, S. C. Schwartz, Best "Ordering" for Floating-Point Addition, ACM TOMS 14 (1988).
[5] D. S. Parker, Monte Carlo Arithmetic: exploiting randomness in floating-point arithmetic, UCLA 1997.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch.utils._python_dispatch import TorchDispatchMode

UNIT_ROUNDOFF = 2.0**-24
FUNCTION_ULPS = 2
# The worst of 16 draws is below one standard deviation once in five hundred times, and never near 0.
DRAWS = 16

_WIDE = (torch.float64, torch.complex128)
_EXPONENTIALS = {"exp", "exp2", "expm1"}
_FUNCTIONS = _EXPONENTIALS | {
    "log", "log2", "log1p", "logaddexp", "erf", "erfc", "tanh", "sigmoid", "silu", "gelu", "softplus", "sin", "cos",
    "pow", "rsqrt",
}  # fmt: skip
_EXACT = {
    "abs", "neg", "clone", "where", "masked_fill", "maximum", "minimum", "clamp", "clamp_min", "clamp_max", "relu",
    "sgn", "sign", "round", "floor", "ceil", "trunc", "conj_physical", "fmax", "fmin",
}  # fmt: skip
_PRODUCTS = {"mm": (0, 1), "bmm": (0, 1), "mv": (0, 1), "dot": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}
# A gradient that several places share: one more rounding of what is added.
_ADDED_IN_PLACE = {"index_add", "index_put", "_index_put_impl", "scatter_add"}


def noise(evaluate: Callable[[], Sequence[torch.Tensor]], draws: int = DRAWS) -> tuple[float, ...]:
    """For each result of `evaluate` the worst error, over its elements and over `draws`, of random roundings.

    Args:
        evaluate: computes the float64 results from float64 tensors, as often as it is called; gradients by autograd
            within it are rounded as well. The draws are the same on every call.
    """
    exact = [result.detach() for result in evaluate()]
    worst = [0.0] * len(exact)
    for draw in range(draws):
        with _RandomRoundings(draw):
            results = evaluate()
        for index, (result, right) in enumerate(zip(results, exact, strict=True)):
            worst[index] = max(worst[index], _largest((result.detach() - right).abs()))
    return tuple(worst)


def _largest(values: torch.Tensor) -> float:
    finite = values[values.isfinite()]
    return finite.max().item() if finite.numel() else 0.0


class _RandomRoundings(TorchDispatchMode):
    """Moves the float64 result of every operation by a rounding of float32, drawn at random."""

    def __init__(self, seed: int):
        super().__init__()
        self.seed = seed
        self.generators: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # Before the call: it may write its result over an argument.
        size = _size(function, args, kwargs)
        result = function(*args, **kwargs)
        if size is not None and isinstance(result, torch.Tensor) and result.dtype in _WIDE:
            self._move(result, size(result))
        return result

    def _move(self, result: torch.Tensor, size: torch.Tensor) -> None:
        parts, size = (torch.view_as_real(result), size[..., None]) if result.is_complex() else (result, size)
        drawn = torch.rand(parts.shape, dtype=parts.dtype, device=parts.device, generator=self._on(parts.device))
        parts.add_(torch.nan_to_num((2 * drawn - 1) * size, nan=0.0, posinf=0.0, neginf=0.0))

    def _on(self, device: torch.device) -> torch.Generator:
        if device not in self.generators:
            self.generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self.generators[device]


def _size(function, args, kwargs) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The largest rounding of an operation on these arguments, as a function of its result; None: it is exact."""
    name = function.overloadpacket.__name__.rstrip("_")
    if name in _PRODUCTS:
        a, b = (args[place] for place in _PRODUCTS[name])
        if _small_integers(a) and _small_integers(b):
            return None
        terms, squares = a.shape[-1], a.abs().square() @ b.abs().square()
        return _of_sum(terms if terms > 1 else 0, squares, rounded=1)
    if name in ("sum", "mean"):
        x = args[0]
        squares = function(x.abs().square(), *args[1:], **kwargs)
        terms = x.numel() // max(squares.numel(), 1)
        # The terms of a mean are x / n; the mean of x^2 has divided their squares by n once.
        chain = min(terms, 2 * math.sqrt(terms)) if terms > 1 else 0
        return _of_sum(chain, squares / terms if name == "mean" else squares)
    if name in _ADDED_IN_PLACE:
        return _relative(1)
    if torch.Tag.pointwise not in function.tags or name in _EXACT:
        return None
    if name in _EXPONENTIALS:
        argument = args[0].abs().clone()
        return lambda v: UNIT_ROUNDOFF * v.abs() * (2 * FUNCTION_ULPS + argument)
    if name == "pow" and isinstance(args[1], (int, float)) and args[1] in (2, 3):
        return _relative(args[1] - 1)
    return _relative(2 * FUNCTION_ULPS if name in _FUNCTIONS else 1)


def _relative(roundings: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda v: roundings * UNIT_ROUNDOFF * v.abs()


def _of_sum(chain: float, squares: torch.Tensor, rounded: int = 0) -> Callable[[torch.Tensor], torch.Tensor]:
    """chain: additions one after another. squares: the sum of the terms' squares. rounded: how often each term was."""
    return lambda v: UNIT_ROUNDOFF * (chain * (v.abs().square() / 3 + squares / 6) + rounded * squares).sqrt()


def _small_integers(x: torch.Tensor) -> bool:
    """Whether all values are those of int8, whose products are summed exactly."""
    return not x.is_complex() and bool(((x == x.round()) & (x.abs() <= 128)).all())
