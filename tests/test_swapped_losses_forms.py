"""swap(model, fused_loss=True): the ways in which forwards are known to take a loss, and the near misses."""

from __future__ import annotations

import inspect
import types
import warnings

import pytest
import torch
import torch.nn as nn
from sharp import sharp
from swapped_models import batch, calls_of_twins
from test_swapped_losses import VOCABULARY, Tiny, assert_same, fused, ids_and_targets, line_of, reason, results, told_of
from torch.nn import CrossEntropyLoss
from torch.nn import functional as F

import gptkern
from gptkern.operators.linear_cross_entropy import contract

V = VOCABULARY


class Known(Tiny):
    """Each subclass holds what its forward reads of these."""

    def __init__(self):
        super().__init__()
        self.V, self.cap = VOCABULARY, 0.7
        self.config = types.SimpleNamespace(vocab_size=VOCABULARY)
        self.criterion = nn.CrossEntropyLoss(ignore_index=-1)


class Attribute(Known):
    def forward(self, ids, targets):
        logits = self.head(self.tokens(ids))
        loss = F.cross_entropy(logits.view(-1, self.V), targets.view(-1), ignore_index=-1)
        return logits, loss


class Config(Known):
    def forward(self, ids, targets=None):
        logits = self.head(self.tokens(ids))
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.view(-1, self.config.vocab_size), targets.view(-1), ignore_index=-1)
        return loss, logits


class Literal(Known):
    def forward(self, ids, targets):
        logits = self.head(self.tokens(ids))
        return logits, F.cross_entropy(logits.reshape((-1, 61)), targets.reshape(-1), ignore_index=-1)


class GlobalSize(Known):
    def forward(self, ids, targets):
        logits = self.head(self.tokens(ids))
        return logits, F.cross_entropy(logits.view(-1, V), targets.view(-1), ignore_index=-1)


class OfTheHead(Known):
    def forward(self, ids, targets):
        vocabulary = self.head.out_features
        logits = self.head(self.tokens(ids))
        return logits, F.cross_entropy(logits.view(-1, vocabulary), targets.view(-1), ignore_index=-1)


class Lecture(Known):
    """nanoGPT's, as it is written in the lecture."""

    def forward(self, idx, targets=None):
        B, T = idx.shape
        x = self.tokens(idx)
        logits = self.head(x)
        if targets is None:
            loss = None
        else:
            B, T, C = logits.shape
            logits = logits.view(B * T, C)
            targets = targets.view(B * T)
            loss = F.cross_entropy(logits, targets, ignore_index=-1)
        return logits, loss


class LectureInferred(Known):
    def forward(self, idx, targets=None):
        logits = self.head(self.tokens(idx))
        if targets is None:
            return logits
        b, t, c = logits.size()
        flat = logits.view(b * t, -1)
        return flat, F.cross_entropy(flat, targets.reshape(b * t), ignore_index=-1) / c


class CutsWithout(Known):
    """What is done with the logits where no loss is taken is its own affair."""

    def forward(self, ids, targets=None):
        logits = self.head(self.tokens(ids))
        if targets is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        else:
            logits, loss = logits[:, -1].softmax(-1), None
        return logits, loss


class Conditional(Known):
    def forward(self, ids, targets=None):
        logits = self.head(self.tokens(ids))
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits, loss


class ConditionalInTheReturn(Known):
    def forward(self, ids, targets=None):
        logits = self.head(self.tokens(ids))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1) if (
            targets is not None
        ) else None


class Held(Known):
    """The loss is a module that the model holds, with all of its options."""

    def __init__(self):
        super().__init__()
        self.criterion = nn.CrossEntropyLoss(self.weights, ignore_index=-1, label_smoothing=0.2, reduction="sum")

    def forward(self, ids, targets=None):
        logits = self.head(self.tokens(ids))
        loss = None
        if targets is not None:
            loss = self.criterion(logits.view(-1, logits.size(-1)), targets.view(-1))
        return logits, loss


class Inline(Known):
    def forward(self, ids, targets):
        logits = self.head(self.tokens(ids))
        loss = nn.CrossEntropyLoss(self.weights, ignore_index=-1)(logits.flatten(end_dim=-2), targets.flatten())
        return logits, loss


class Shifted(Known):
    """As models of transformers used to be."""

    def forward(self, ids, labels=None):
        logits = self.head(self.tokens(ids))
        logits = logits.float()
        loss = None
        if labels is not None:
            shift_logits = logits[..., :-1, :].contiguous()
            shift_labels = labels[..., 1:].contiguous()
            loss_fct = CrossEntropyLoss(ignore_index=-1)
            shift_logits = shift_logits.view(-1, self.config.vocab_size)
            shift_labels = shift_labels.view(-1)
            shift_labels = shift_labels.to(shift_logits.device)
            loss = loss_fct(shift_logits, shift_labels)
        output = (logits,) + (ids,)  # noqa: RUF005
        return ((loss,) + output) if loss is not None else output  # noqa: RUF005


class Sliced(Known):
    def forward(self, ids):
        logits = self.head(self.tokens(ids))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()), logits


class Moved(Known):
    def forward(self, ids, targets):
        logits = self.head(self.tokens(ids))
        return logits, F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-1)


class MovedAndSummed(Known):
    def forward(self, ids, targets):
        logits = self.head(self.tokens(ids))
        losses = F.cross_entropy(logits.permute(0, 2, 1), targets, ignore_index=-1, reduction="none")
        return logits, (losses * torch.arange(9.0)).sum()


class Capped(Known):
    def forward(self, ids, targets):
        logits = self.head(self.tokens(ids))
        logits = self.cap * torch.tanh(logits / self.cap)
        return logits, F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1)


class InTheLoss(Known):
    def forward(self, ids, targets):
        x = self.tokens(ids)
        x = x.view(-1, x.size(-1))
        return F.cross_entropy(self.head(x), targets.view(-1), ignore_index=-1), None


class UnderOneName(Known):
    def forward(self, x, y):
        x = self.tokens(x)
        x = self.head(x)
        x *= 0.5
        return x, F.cross_entropy(x.reshape(-1, x.shape[2]), y.reshape(x.shape[0] * x.shape[1]), ignore_index=-1)


class ProbabilitiesMoved(Known):
    def forward(self, ids, targets):
        wanted = F.one_hot(targets.clamp(min=0), VOCABULARY).transpose(1, 2).float()
        logits = self.head(self.tokens(ids))
        return logits, F.cross_entropy(logits.mT, wanted, label_smoothing=0.1)


class HeldProbabilities(Known):
    def forward(self, ids, targets):
        wanted = F.one_hot(targets.clamp(min=0), VOCABULARY).flatten(0, 1).float()
        self.criterion.ignore_index = -100
        logits = self.head(self.tokens(ids))
        return logits, self.criterion(logits.flatten(0, 1), wanted)


class OneSequence(Known):
    def forward(self, ids, targets):
        logits = self.head(self.tokens(ids[0]))
        return logits, F.cross_entropy(logits[:-1], targets[0, 1:], ignore_index=-1)


class Regularised(Known):
    """The head's weight is used elsewhere, too."""

    def forward(self, ids, targets):
        logits = self.head(self.tokens(ids))
        loss = F.cross_entropy(logits.to(torch.float32).flatten(0, -2), targets.flatten(), ignore_index=-1)
        return logits, loss + self.head.weight.square().mean()


FORMS = [
    Attribute, Config, Literal, GlobalSize, OfTheHead, Lecture, LectureInferred, CutsWithout, Conditional,
    ConditionalInTheReturn, Held, Inline, Shifted, Sliced, Moved, MovedAndSummed, Capped, InTheLoss, UnderOneName,
    ProbabilitiesMoved, HeldProbabilities, OneSequence, Regularised,
]  # fmt: skip


def arguments_of(model):
    return ids_and_targets()[: len(inspect.signature(model.forward).parameters)]


def parts(result):
    return [part for part in (result if isinstance(result, tuple) else (result,)) if isinstance(part, torch.Tensor)]


@pytest.fixture
def in_chunks(monkeypatch):
    """The logits of small models are cut too."""
    monkeypatch.setattr(contract, "SMALL", 0)


@pytest.mark.parametrize("cls", FORMS)
def test_a_form_that_is_known(cls, in_chunks):
    model = cls()
    arguments = arguments_of(model)
    before, expected = parts(model(*arguments)), results(model, *arguments)
    may_be_left_out = inspect.signature(model.forward).parameters.get("targets", inspect.Parameter)
    report = gptkern.swap(model, ops=[], fused_loss=True)
    assert fused(report) == ["(model)"] and report.skipped == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = [part for part in parts(model(*arguments)) if part.is_floating_point() and part.dim()]
    assert whole == [], "the logits are still there"
    assert_same(results(model, *arguments), expected)
    if may_be_left_out.default is None:
        stock = cls()(arguments[0])
        assert all(map(torch.equal, parts(model(arguments[0])), parts(stock)))
    gptkern.unswap(model)
    assert all(map(torch.equal, parts(model(*arguments)), before))
    loss, gradients = results(model, *arguments)
    assert torch.equal(loss, expected[0])
    assert all(torch.equal(gradient, expected[1][name]) for name, gradient in gradients.items())


@pytest.mark.parametrize("cls", sharp({cls.__name__: cls for cls in FORMS}, "Lecture", "Inline"))
def test_a_form_compiles_without_a_graph_break(cls):
    model = globals()[cls]()
    arguments = arguments_of(model)
    gptkern.swap(model, fused_loss=True)
    expected = results(model, *arguments)
    torch._dynamo.reset()
    loss, gradients = results(torch.compile(model, fullgraph=True, backend="aot_eager"), *arguments)
    assert_same((loss, {name.removeprefix("_orig_mod."): one for name, one in gradients.items()}), expected)


@pytest.mark.deep
@pytest.mark.parametrize("cls", [Lecture, Shifted, UnderOneName, MovedAndSummed, Held])
def test_sizes_of_a_compiled_form_may_change(cls):
    model, (ids, targets) = cls(), ids_and_targets()
    gptkern.swap(model, fused_loss=True)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (2, 1, 5):
        arguments = ids[:1].repeat(rows, 1), targets[:1].repeat(rows, 1)
        loss, gradients = results(compiled, *arguments)
        expected = results(model, *arguments)
        assert_same((loss, {name.removeprefix("_orig_mod."): one for name, one in gradients.items()}), expected)


def test_targets_of_another_shape_than_the_logits_are_an_error():
    model, (ids, targets) = Moved(), ids_and_targets()
    for fused_loss in (False, True):
        gptkern.swap(model, ops=[], fused_loss=fused_loss)
        with pytest.raises((RuntimeError, ValueError), match="target"):
            model(ids, targets.t())


@pytest.mark.parametrize(
    ("cls", "dtype", "of_loss"),
    [
        (Attribute, torch.bfloat16, torch.bfloat16),
        (Attribute, torch.float64, torch.float64),
        (Regularised, torch.bfloat16, torch.float32),
        (Regularised, torch.float64, torch.float32),
    ],
)
def test_the_dtype_of_the_loss_is_the_stock_one(cls, dtype, of_loss):
    stock, swapped = cls().to(dtype), cls().to(dtype)
    arguments = ids_and_targets()
    gptkern.swap(swapped, ops=[], fused_loss=True)
    (expected, of_stock), (loss, gradients) = results(stock, *arguments), results(swapped, *arguments)
    assert loss.dtype == expected.dtype == (dtype if cls is Attribute else torch.promote_types(of_loss, dtype))
    tolerance = 2**-7 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=0)
    for name, gradient in gradients.items():
        largest = of_stock[name].abs().max().item()
        torch.testing.assert_close(gradient, of_stock[name], rtol=0, atol=4 * tolerance * largest)


class Weighted(Known):
    def forward(self, ids, targets):
        logits = self.head(self.tokens(ids)).float()
        return logits, F.cross_entropy(logits.view(-1, self.V), targets.view(-1), self.weights, ignore_index=-1)


@pytest.mark.parametrize("way", ["cast", "autocast"])
def test_float32_weights_of_a_product_in_16_bits_are_not_rounded(way, in_chunks):
    (stock, swapped), arguments = (Weighted(), Weighted()), ids_and_targets()
    for model in (stock, swapped):
        model.to(torch.bfloat16 if way == "cast" else torch.float32)
    gptkern.swap(swapped, ops=[], fused_loss=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        expected, (logits, loss) = stock(*arguments)[1], swapped(*arguments)
    assert torch.equal(loss, expected) and logits is None and swapped.weights.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
def test_a_trace_is_that_of_the_stock_model():
    model, (ids, targets) = Lecture(), ids_and_targets()
    gptkern.swap(model, fused_loss=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(model, (ids, targets), check_trace=False)
    assert all(map(torch.equal, traced(ids, targets), Lecture()(ids, targets)))


# --- What has changed by the time of a call ---------------------------------------------------------------------------


def test_a_vocabulary_of_another_size_is_left_to_the_stock_code():
    model = Attribute()
    model.V = 60
    said = reason(gptkern.swap(model, ops=[], fused_loss=True))
    where = line_of(Attribute, "self.head(", "test_swapped_losses_forms.py")
    assert said == f"{where}: its loss takes self.V, 60, for the vocabulary, and its head has 61 outputs"
    swapped, arguments = Attribute(), ids_and_targets()
    gptkern.swap(swapped, ops=[], fused_loss=True)
    swapped.V = 60
    with pytest.warns(UserWarning, match="takes self.V, 60"), pytest.raises(RuntimeError, match="shape"):
        swapped(*arguments)


def test_logits_of_fewer_dimensions_than_the_code_reads():
    """`logits[:, :-1]` of two dimensions cuts the vocabulary."""
    stock, swapped = OfTwo(), OfTwo()
    gptkern.swap(swapped, ops=[], fused_loss=True)
    ids, _ = ids_and_targets()
    messages, logits = told_of(swapped, ids[0], ids[0])
    assert "its hidden states have 2 dimensions, and its code takes logits of 3" in messages[0]
    assert torch.equal(logits, stock(ids[0], ids[0])[0])
    assert swapped(ids, ids)[0] is None


class OfTwo(Known):
    def forward(self, ids, targets):
        logits = self.head(self.tokens(ids))
        part = logits[:, :-1]
        part = part.reshape(-1, part.size(-1))
        return logits, F.cross_entropy(part, targets.reshape(-1)[: part.size(0)] % 8)


@pytest.mark.parametrize("change", ["hook", "another", "subclass"])
def test_a_criterion_that_is_another_one_by_now(change):
    stock, swapped, arguments = Held(), Held(), ids_and_targets()
    gptkern.swap(swapped, ops=[], fused_loss=True)
    seen = []
    for model in (stock, swapped):
        if change == "hook":
            model.criterion.register_forward_hook(lambda module, args, output: seen.append(args[0].shape))
        else:
            model.criterion = (nn.MultiMarginLoss if change == "another" else Halved)()
        if change == "another":
            arguments = (arguments[0], arguments[1].clamp(min=0))
    expected = stock(*arguments)
    messages, logits = told_of(swapped, *arguments)
    assert "its criterion" in messages[0] and torch.equal(logits, expected[0])
    assert_same(results(swapped, *arguments), results(stock, *arguments))
    assert change != "hook" or len(set(seen)) == 1


class Halved(nn.CrossEntropyLoss):
    def forward(self, input, target):
        return super().forward(input, target.clamp(min=0)) / 2


def test_a_function_that_is_another_one_by_now(monkeypatch):
    model, arguments = Attribute(), ids_and_targets()
    gptkern.swap(model, ops=[], fused_loss=True)
    own = types.SimpleNamespace(cross_entropy=lambda input, target, ignore_index: input.square().mean())
    monkeypatch.setitem(Attribute.forward.__globals__, "F", own)
    messages, logits = told_of(model, *arguments)
    assert logits is not None and "its loss is not PyTorch's F.cross_entropy any more" in messages[0]
    assert torch.equal(model(*arguments)[1], logits.square().mean())


@pytest.mark.parametrize("first", ["cross_entropy", "fused"])
def test_a_criterion_that_is_swapped_itself(first, monkeypatch):
    stock, model, arguments = Held(), Held(), ids_and_targets()
    asked = [dict(ops=["cross_entropy"]), dict(ops=[], fused_loss=True)]
    for options in asked if first == "cross_entropy" else asked[::-1]:
        report = gptkern.swap(model, **options)
    assert report.skipped == []
    assert told_of(model, *arguments) == ([], None)
    assert_same(results(model, *arguments), results(stock, *arguments))
    assert calls_of_twins(monkeypatch, lambda: model.criterion(torch.randn(4, V), torch.arange(4))) == 1
    assert [entry.name for entry in gptkern.unswap(model).restored] == ["(model)", "criterion"]
    assert calls_of_twins(monkeypatch, lambda: model.criterion(torch.randn(4, V), torch.arange(4))) == 0


# --- Near misses ------------------------------------------------------------------------------------------------------


class ReadsAccuracy(Known):
    def forward(self, ids, targets):
        logits = self.head(self.tokens(ids))
        right = (logits.argmax(-1) == targets).float().mean()
        return logits, F.cross_entropy(logits.view(-1, self.V), targets.view(-1)), right


class ReturnsProbabilities(Known):
    def forward(self, ids, targets):
        logits = self.head(self.tokens(ids))
        loss = F.cross_entropy(logits.view(-1, self.V), targets.view(-1))
        return logits.softmax(-1), loss


class ChangesAfter(Known):
    def forward(self, ids, targets):
        logits = self.head(self.tokens(ids))
        loss = F.cross_entropy(logits.view(-1, self.V), targets.view(-1))
        logits = targets
        return logits, loss


class PartOfTheVocabulary(Known):
    def forward(self, ids, targets):
        logits = self.head(self.tokens(ids))[..., :60]
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten().clamp(max=59))


class OtherAxes(Known):
    def forward(self, ids, targets):
        logits = self.head(self.tokens(ids))
        return logits, F.cross_entropy(logits.transpose(0, 1).flatten(0, 1), targets.t().flatten())


class InferredOfOthers(Known):
    def forward(self, ids, targets):
        B, T = ids.shape
        logits = self.head(self.tokens(ids))
        return logits, F.cross_entropy(logits.view(B * T, -1), targets.view(-1))


class ShadowedSize(Known):
    def forward(self, ids, targets):
        logits = self.head(self.tokens(ids))
        C = logits.shape[-1]
        C = self.V
        return logits, F.cross_entropy(logits.view(-1, C), targets.view(-1))


class ScaledTwice(Known):
    def forward(self, ids, targets):
        logits = self.head(self.tokens(ids)) * self.scale
        logits = logits / self.cap
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class CappedByTwo(Known):
    def forward(self, ids, targets):
        logits = self.scale * torch.tanh(self.head(self.tokens(ids)) / self.cap)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class MaskedUnderACondition(Known):
    def forward(self, ids, targets, mask=None):
        logits = self.head(self.tokens(ids))
        if mask is None:
            logits = logits - 1e3 * (torch.arange(VOCABULARY) > 50)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class HalvesItsHead(Known):
    def forward(self, ids, targets):
        logits = self.head(self.tokens(ids))
        _ = self.head.float()
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class CallsAnother(Known):
    def forward(self, ids, targets):
        x = self.tokens(ids)
        logits = self.head(x)
        return logits, F.cross_entropy(logits.flatten(0, 1), self.prepared(x, targets))

    def prepared(self, x, targets):
        x.data.mul_(2)
        return targets.flatten()


class OnTheTraining(Known):
    def forward(self, ids, targets=None):
        logits = self.head(self.tokens(ids))
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten()) if self.training else None
        return logits, loss


class InAGenerator(Known):
    def forward(self, ids, targets):
        logits = self.head(self.tokens(ids))
        return logits, sum(F.cross_entropy(logits.flatten(0, 1), wanted) for wanted in [targets.flatten()])


class InAMatch(Known):
    def forward(self, ids, targets, mode="train"):
        logits, loss = self.head(self.tokens(ids)), None
        match mode:
            case "train":
                loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss


class WritesInAnArgument(Known):
    def forward(self, ids, targets):
        x = self.tokens(ids)
        logits = self.head(x)
        return logits, F.cross_entropy(logits.flatten(0, 1), F.relu(x, True)[..., 0].long().flatten())


class ScalesAnAlias(Known):
    def forward(self, ids, targets):
        logits = self.head(self.tokens(ids))
        flat = logits.flatten(0, 1)
        logits *= 2
        return logits, F.cross_entropy(flat, targets.flatten())


class LooksAtTheTop(Known):
    def forward(self, ids, targets):
        logits = self.head(self.tokens(ids))
        return logits, F.cross_entropy(logits.flatten(0, 1), logits.detach().argmax(-1).flatten())


class Subclass(Known):
    def __init__(self):
        super().__init__()
        self.criterion = Halved()

    def forward(self, ids, targets):
        logits = self.head(self.tokens(ids))
        return logits, self.criterion(logits.flatten(0, 1), targets.flatten())


@pytest.mark.parametrize(
    ("cls", "text", "says"),
    [
        (
            ReadsAccuracy,
            "right =",
            "does something else with the logits than to return them; the loss is F.cross_entropy",
        ),
        (ReturnsProbabilities, "softmax", "does something else with the logits than to return them"),
        (ChangesAfter, "logits = targets", "makes other logits; known is a factor, a softcap"),
        (PartOfTheVocabulary, ":60", "takes a part of the vocabulary"),
        (OtherAxes, "transpose", "moves the logits' dimensions in a way of its own"),
        (InferredOfOthers, "-1), targets", "gives its rows a length that is not known to be the vocabulary's"),
        (ShadowedSize, "view(-1, C)", "is not known to be the vocabulary's size"),
        (ScaledTwice, "self.cap", "scales the logits a second time, or behind a cap"),
        (CappedByTwo, "tanh", "caps the logits in a way of its own"),
        (MaskedUnderACondition, "if mask", "makes other logits"),
        (HalvesItsHead, "self.head.float", "may write into what the head is given, or into the head"),
        (CallsAnother, "self.prepared(x", "may write into what the head is given, or into the head"),
        (OnTheTraining, "self.training", "is another condition for the loss than an argument that is given"),
        (InAGenerator, "sum(", "is called in a function inside its forward"),
        (InAMatch, "loss = F", "is called inside the block of line"),
        (WritesInAnArgument, "F.relu", "may write into what the head is given, or into the head"),
        (ScalesAnAlias, "*= 2", "makes other logits"),
        (LooksAtTheTop, "argmax", "does something else with the logits than to return them"),
        (Subclass, "self.head(", "its criterion is a Halved, not a torch.nn.CrossEntropyLoss"),
    ],
)
def test_a_near_miss_is_left_alone_with_the_place(cls, text, says):
    stock, swapped, arguments = cls(), cls(), [part.contiguous() for part in batch(rows=2, length=9)]
    said = reason(gptkern.swap(swapped, ops=[], fused_loss=True))
    assert said.startswith(f"{line_of(cls, text, 'test_swapped_losses_forms.py')}: ") and says in said, said
    expected, actual = stock(*arguments), swapped(*arguments)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(actual, expected, strict=True))


def test_a_loss_of_another_kind_is_none_that_is_known():
    class Other(Known):
        def __init__(self):
            super().__init__()
            self.criterion = nn.MultiMarginLoss()

        def forward(self, ids, targets):
            logits = self.head(self.tokens(ids))
            return logits, self.criterion(logits.flatten(0, 1), targets.flatten())

    assert "no forward in it takes one of its own logits" in reason(gptkern.swap(Other(), fused_loss=True))
