"""swap on classes that are patched, refuse, copy themselves or go away."""

from __future__ import annotations

import copy
import gc
import weakref

import torch
import torch.nn.functional as F
from swapped_models import BiaslessNorm, CausalAttention, calls_of_twins

import gptkern
from gptkern.swapping.routed_classes import calls


def attend(x):
    return F.scaled_dot_product_attention(x, x, x, is_causal=True)


class CallsAFunction(torch.nn.Module):
    def forward(self, x):
        return attend(x)


def test_calls_in_functions_of_the_same_package_are_found():
    assert calls(CallsAFunction).operators == {"attention"}


def plain(x):
    return x


class CallsTwoFunctions(torch.nn.Module):
    def forward(self, x):
        return F.softmax(plain(x), dim=-1)


def zeros(self, x):
    return torch.zeros_like(x)


def test_a_forward_that_is_patched_after_a_swap_counts(monkeypatch):
    model, x = BiaslessNorm(), torch.randn(2, 8)
    gptkern.swap(model)
    expected = model(x)
    with monkeypatch.context() as patch:
        patch.setattr(BiaslessNorm, "forward", zeros)
        assert torch.equal(model(x), torch.zeros_like(x))
        fresh = BiaslessNorm()
        assert gptkern.swap(fresh).replaced == []
        assert torch.equal(fresh(x), torch.zeros_like(x))
        patch.setattr(BiaslessNorm, "forward", lambda self, x: 2 * F.layer_norm(x, (8,)))
        assert calls_of_twins(monkeypatch, lambda: model(x)) == 1
        torch.testing.assert_close(model(x), 2 * expected)
    assert calls_of_twins(monkeypatch, lambda: model(x)) == 1
    assert torch.equal(model(x), expected)
    gptkern.unswap(model)
    assert type(model) is BiaslessNorm


def test_a_forward_that_somebody_holds_sees_a_patch(monkeypatch):
    """As functools.partial(checkpoint, block.forward) does, at each call and not at the first alone."""
    model, x = BiaslessNorm(), torch.randn(2, 8)
    gptkern.swap(model)
    forward, expected = model.forward, model(x)
    with monkeypatch.context() as patch:
        patch.setattr(BiaslessNorm, "forward", zeros)
        for _ in range(2):
            assert torch.equal(forward(x), torch.zeros_like(x))
    for _ in range(2):
        assert torch.equal(forward(x), expected)


def test_a_method_that_is_patched_after_a_swap_counts(monkeypatch):
    model, x = CausalAttention(), torch.randn(2, 5, 8)
    gptkern.swap(model)
    with monkeypatch.context() as patch:
        patch.setattr(CausalAttention, "attend", zeros)
        assert torch.equal(model(x), torch.zeros_like(x))
    assert calls_of_twins(monkeypatch, lambda: model(x)) == 1


def test_a_function_that_is_patched_between_two_swaps_is_found(monkeypatch):
    first, x = CallsAFunction(), torch.randn(1, 2, 5, 8)
    gptkern.swap(first)
    with monkeypatch.context() as patch:
        patch.setitem(globals(), "attend", lambda x: 2 * F.scaled_dot_product_attention(x, x, x))
        second = CallsAFunction()
        gptkern.swap(second)
        assert calls_of_twins(monkeypatch, lambda: second(x)) == 1
        assert torch.equal(second(x), 2 * F.scaled_dot_product_attention(x, x, x))


def test_each_swap_reads_the_code_anew(monkeypatch):
    """A function that called no operator when the first model was swapped, and calls one now."""
    first, second, x = CallsTwoFunctions(), CallsTwoFunctions(), torch.randn(2, 8)
    gptkern.swap(first)
    monkeypatch.setitem(globals(), "plain", lambda x: x.softmax(-1) + F.softmax(x, dim=-1))
    gptkern.swap(second)
    assert calls_of_twins(monkeypatch, lambda: second(x)) == 2
    assert torch.equal(second(x), F.softmax(2 * F.softmax(x, dim=-1), dim=-1))


def test_a_swapped_class_does_not_outlive_its_models():
    class Local(BiaslessNorm):
        def forward(self, x):
            return F.layer_norm(x, (8,))

    model = Local()
    gptkern.swap(model)
    model(torch.randn(2, 8))
    gptkern.unswap(model)
    alive = weakref.ref(Local)
    del model, Local
    gc.collect()
    assert alive() is None


class StaticForward(torch.nn.Module):
    @staticmethod
    def forward(x):
        return F.softmax(x, dim=-1)


def test_a_static_forward_stays_static(monkeypatch):
    model, x = StaticForward(), torch.randn(2, 8)
    expected = model(x)
    gptkern.swap(model)
    assert calls_of_twins(monkeypatch, lambda: model(x)) == 1
    assert torch.equal(model(x), expected)


def test_a_class_that_refuses_subclasses_is_skipped_with_the_reason():
    class Final(BiaslessNorm):
        def __init_subclass__(cls, **kwargs):
            raise TypeError("final")

    model = torch.nn.Sequential(Final(), BiaslessNorm())
    report = gptkern.swap(model)
    assert type(model[0]) is Final
    assert [(entry.name, entry.reason) for entry in report.skipped] == [
        ("0", "no subclass of it can be made: TypeError: final")
    ]


class ReducesItself(BiaslessNorm):
    def __reduce__(self):
        return ReducesItself, (), self.__dict__


def test_a_copy_that_is_made_by_the_class_itself_can_be_unswapped():
    model = ReducesItself()
    gptkern.swap(model)
    twin = copy.deepcopy(model)
    keys = list(ReducesItself().__dict__)
    gptkern.unswap(twin)
    assert type(twin) is ReducesItself and list(twin.__dict__) == keys
