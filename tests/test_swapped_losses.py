"""swap(model, fused_loss=True): the loss of a model's own forward, taken without its logits."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from sharp import deep
from swapped_models import batch, class_names, gpt
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gptkern
from gptkern.models import GPT

VOCABULARY, WIDTH = 61, 16
# The sums of a loss, and of gradients of size 0.1 and below, in float32 and another order.
LOSS = dict(rtol=1e-5, atol=1e-6)
GRADIENTS = dict(rtol=1e-4, atol=1e-6)


class Tiny(nn.Module):
    """An embedding and a head; what is between them and the loss, each subclass says."""

    def __init__(self, bias=True):
        super().__init__()
        torch.manual_seed(1)
        self.tokens, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY, bias)
        self.scale, self.weights = 3.0, torch.linspace(0.5, 1.5, VOCABULARY)


class InTwoBranches(Tiny):
    """nanoGPT's."""

    def forward(self, ids, targets=None):
        x = self.tokens(ids)
        if targets is not None:
            logits = self.head(x)
            loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)
        else:
            logits = self.head(x[:, [-1], :])
            loss = None
        return logits, loss


class Scaled(Tiny):
    def forward(self, ids, targets=None):
        logits = self.head(self.tokens(ids)).float() * self.scale
        loss = None
        if targets is not None:
            loss = nn.functional.cross_entropy(
                logits.reshape(-1, logits.shape[-1]),
                targets.reshape(-1),
                weight=self.weights,
                label_smoothing=0.1,
                ignore_index=-1,
            )
        return logits, loss


class Always(Tiny):
    def forward(self, ids, targets):
        logits = self.head(self.tokens(ids))
        logits = logits / self.scale
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), None, reduction="sum", ignore_index=-1), logits


class ByName(Tiny):
    def forward(self, ids, targets=None):
        logits = self.head(self.tokens(ids))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(target=targets.flatten(), input=logits.flatten(0, 1), ignore_index=-1)


class Prepares(Tiny):
    """The targets are made ready between the head and the loss, which writes nothing."""

    def forward(self, ids, targets, *, unused=None, **kwargs):
        logits = self.head(self.tokens(ids))
        "the next tokens"
        targets = kwargs.pop("shifted", targets)
        loss: torch.Tensor | None = None
        if self.training:
            wanted = F.pad(targets, (0, 1), value=-1)[:, 1:]
        else:
            wanted = targets.roll(-1, 1)
        wanted = wanted.contiguous().view(-1)
        loss = F.cross_entropy(logits.flatten(0, 1), wanted, ignore_index=-1)
        return logits, loss


def ids_and_targets():
    ids, targets = batch(rows=2, length=9)
    return ids, targets.masked_fill(torch.arange(9) % 4 == 1, -1)


def results(model, *arguments, **keywords):
    """The loss, and each parameter's gradient."""
    model.zero_grad()
    result = model(*arguments, **keywords)
    loss = (
        result.loss
        if hasattr(result, "loss")
        else next(part for part in result if part is not None and part.dim() == 0)
    )
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(actual, expected):
    torch.testing.assert_close(actual[0], expected[0], **LOSS)
    assert actual[1].keys() == expected[1].keys()
    for name, gradient in actual[1].items():
        torch.testing.assert_close(gradient, expected[1][name], **GRADIENTS, msg=lambda m, n=name: f"{n}: {m}")


def line_of(cls, text, file="test_swapped_losses.py"):
    """`file.py:12`, of the line in a class's source that holds the text."""
    lines, first = inspect.getsourcelines(cls)
    return f"{file}:{first + next(at for at, line in enumerate(lines) if text in line)}"


def fused(report):
    return [entry.name for entry in report.replaced if "linear_cross_entropy" in entry.operator]


def reason(report):
    found = [entry.reason for entry in report.skipped if entry.reason.startswith("its loss: ")]
    assert len(found) == 1 and not fused(report)
    return found[0].removeprefix("its loss: ")


# --- What is fused ----------------------------------------------------------------------------------------------------


def test_the_reference_gpt():
    stock, swapped, (ids, targets) = gpt(), gpt(), batch()
    assert fused(gptkern.swap(swapped)) == [] and swapped(ids, targets)[0] is not None
    report = gptkern.swap(swapped, fused_loss=True)
    assert fused(report) == ["(model)"] and report.skipped == []
    assert "linear_cross_entropy" in str(report)
    logits, loss = swapped(ids, targets)
    assert logits is None and loss.dtype == torch.float32
    targets = targets.masked_fill(torch.arange(24) % 5 == 3, -100)
    assert_same(results(swapped, ids, targets), results(stock, ids, targets))
    # Without targets there is no loss, and all is as it was.
    logits, loss = swapped(ids)
    assert loss is None and torch.equal(logits, stock(ids)[0])
    with pytest.raises(ValueError, match="they need ids'"):
        swapped(ids, targets[:, 1:])
    names = [call.operator for call in gptkern.explain(swapped, ids, targets).calls]
    assert "linear_cross_entropy" in names


@pytest.mark.parametrize("cls", [InTwoBranches, Scaled, Always, ByName, Prepares])
@pytest.mark.parametrize("bias", [True, False])
def test_other_forwards_of_the_kind(cls, bias):
    model, arguments = cls(bias), ids_and_targets()
    expected = results(model, *arguments)
    report = gptkern.swap(model, ops=[], fused_loss=True)
    assert fused(report) == ["(model)"] and len(report.replaced) == 1 and report.skipped == []
    assert [part is None for part in model(*arguments)].count(True) == 1
    assert_same(results(model, *arguments), expected)


def test_the_logits_are_nowhere_whole():
    """No operator's result, forward or backward, has as many elements as tokens times the vocabulary."""
    model = gpt(vocab_size=32768, layers=1, width=8, heads=1, context=512)
    ids = torch.randint(0, 32768, (4, 512))
    gptkern.swap(model, fused_loss=True)
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for part in result if isinstance(result, tuple | list) else (result,):
                if isinstance(part, torch.Tensor):
                    sizes.append(part.numel())
            return result

    with Sizes():
        model(ids, ids)[1].backward()
    assert max(sizes) <= ids.numel() * 32768 // 4, "a quarter of the logits are held at once"


@pytest.mark.parametrize("compiled", [*deep("gpt"), "branches"])
def test_compiles_without_a_graph_break(compiled):
    model = gpt(layers=1) if compiled == "gpt" else InTwoBranches()
    gptkern.swap(model, fused_loss=True)
    ids, targets = (part.contiguous() for part in batch(rows=2, length=9))
    expected = results(model, ids, targets)
    torch._dynamo.reset()
    assert_same(results(torch.compile(model, fullgraph=True, backend="aot_eager"), ids, targets), expected_of(expected))


def expected_of(found):
    return found[0], {f"_orig_mod.{name}": gradient for name, gradient in found[1].items()}


def test_under_autocast_the_product_is_in_16_bits_and_the_loss_in_32():
    stock, swapped, (ids, targets) = gpt(), gpt(), batch()
    gptkern.swap(swapped, ops=[], fused_loss=True)
    with torch.autocast("cpu", torch.bfloat16):
        (_, expected), (_, loss) = stock(ids, targets), swapped(ids, targets)
    assert loss.dtype == expected.dtype == torch.float32
    # The logits, of size 1, are rounded to bfloat16 in the stock model alone; the loss is their mean.
    torch.testing.assert_close(loss, expected, rtol=0, atol=2**-8)


# --- Before and after -------------------------------------------------------------------------------------------------


def test_copies_and_the_way_back():
    stock, model, (ids, targets) = gpt(), gpt(), batch()
    classes = class_names(model)
    gptkern.swap(model, fused_loss=True)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied(ids, targets)[0] is None
    # A later swap that does not ask for it leaves it as it is.
    gptkern.swap(model)
    assert model(ids, targets)[0] is None
    gptkern.unswap(model)
    assert class_names(model) == classes
    for ours, theirs in zip(model(ids, targets), stock(ids, targets)):
        assert torch.equal(ours, theirs)


def test_an_error_in_the_forward_shows_its_own_line():
    model = gpt()
    gptkern.swap(model, fused_loss=True)
    with pytest.raises(ValueError, match="the context is 24") as raised:
        model(torch.zeros(1, 30, dtype=torch.long))
    lines = [str(entry.statement) for entry in raised.traceback]
    assert any("ValueError" in line and "context" in line for line in lines)


def told_of(model, *arguments):
    """What a call warns of, and its logits."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        logits, _ = model(*arguments)
    return [str(warning.message) for warning in caught], logits


def test_a_head_that_is_another_one_by_now_gets_its_logits():
    model, (ids, targets) = gpt(), batch()
    expected = model(ids, targets)
    gptkern.swap(model, ops=[], fused_loss=True)
    seen = []
    hook = model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output))
    messages, logits = told_of(model, ids, targets)
    assert len(seen) == 1 and torch.equal(logits, expected[0])
    assert messages == [
        f"GPT computes its logits whole, and its loss of them: {line_of(GPT, 'self.lm_head(hidden)', 'gpt.py')}: its "
        "lm_head has hooks, or a forward of its own"
    ]
    # Once.
    assert told_of(model, ids, targets)[0] == []
    hook.remove()
    assert told_of(model, ids, targets)[1] is None
    model.lm_head = nn.Sequential(model.lm_head)
    messages, logits = told_of(model, ids, targets)
    assert torch.equal(logits, expected[0]) and "its lm_head is a Sequential" in messages[0]


# --- What is left alone -----------------------------------------------------------------------------------------------


class Penalised(Tiny):
    def forward(self, ids, targets=None):
        logits = self.head(self.tokens(ids))
        penalty = logits.logsumexp(-1).square().mean()
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten()) + penalty


class InADictionary(Tiny):
    def forward(self, ids, targets):
        logits = self.head(self.tokens(ids))
        return {"logits": logits, "loss": F.cross_entropy(logits.flatten(0, 1), targets.flatten())}


class WhileTraining(Tiny):
    def forward(self, ids, targets=None):
        logits = self.head(self.tokens(ids))
        loss = None
        if self.training:
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss


class Twice(Tiny):
    def forward(self, ids, targets):
        logits = self.head(self.tokens(ids))
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss + F.cross_entropy(logits.flatten(0, 1), ids.flatten())


class Cut(Tiny):
    def forward(self, ids, targets):
        logits = self.head(self.tokens(ids))
        logits = logits.clamp(-5, 5)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class LeavesEarly(Tiny):
    def forward(self, ids, targets):
        logits = self.head(self.tokens(ids))
        if ids.shape[1] > 100:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Rebound(Tiny):
    def forward(self, ids, targets=None):
        targets = ids if targets is None else targets
        logits = self.head(self.tokens(ids))
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss


class WritesIntoItsInput(Tiny):
    def forward(self, ids, targets):
        x = self.tokens(ids)
        logits = self.head(x)
        x.mul_(2)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class WritesByIndex(Tiny):
    def forward(self, ids, targets):
        x = self.tokens(ids)
        logits = self.head(x)
        x[:, 0] = 0
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class WritesByAnotherName(Tiny):
    def forward(self, ids, targets):
        x = self.tokens(ids)
        logits = self.head(x)
        y = x
        y *= 2
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class WritesByAFunction(Tiny):
    def forward(self, ids, targets):
        y = x = self.tokens(ids)
        logits = self.head(x)
        y = torch.relu_(y)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class WritesUnderACondition(Tiny):
    def forward(self, ids, targets=None):
        y = x = self.tokens(ids)
        logits = self.head(x)
        loss = None
        if targets is not None:
            if self.training:
                y = F.relu(y, True)
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss


class WritesInTheLoss(Tiny):
    def forward(self, ids, targets):
        x = self.tokens(ids)
        logits = self.head(x)
        return logits, x.mul_(2).sum() + F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class WritesIntoItsHead(Tiny):
    def forward(self, ids, targets):
        logits = self.head(self.tokens(ids))
        self.head.weight.data.mul_(2)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class WritesWithoutGradients(Tiny):
    def forward(self, ids, targets):
        logits = self.head(self.tokens(ids))
        with torch.no_grad():
            self.head.weight.mul_(2)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class LearnsItsScale(Tiny):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, ids, targets):
        logits = self.head(self.tokens(ids)) * self.scale
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class DeepHead(Tiny):
    def __init__(self):
        super().__init__()
        self.head = nn.Sequential(self.head, nn.Tanh())

    def forward(self, ids, targets):
        logits = self.head(self.tokens(ids))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class InAHelper(Tiny):
    def forward(self, ids, targets):
        return with_loss(self.head(self.tokens(ids)), targets)


def with_loss(logits, targets):
    return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@pytest.mark.parametrize(
    ("cls", "says"),
    [
        (Penalised, "does something else with the logits than to return them"),
        (InADictionary, "does something else with the logits than to return them"),
        (WhileTraining, "is another condition for the loss than an argument that is given"),
        (Twice, "2 losses are taken in its forward"),
        (Cut, "makes other logits"),
        (LeavesEarly, "may leave without the loss"),
        (Rebound, "hangs on 'targets', which is no argument, or is made anew"),
        (WritesIntoItsInput, "may write into what the head is given"),
        (LearnsItsScale, "its logits are scaled by a Parameter, not by a number"),
        (DeepHead, "its head is a Sequential, not a torch.nn.Linear"),
        (InAHelper, "no forward in it takes one of its own logits"),
    ],
)
def test_another_forward_is_left_alone_with_the_reason(cls, says):
    model, (ids, targets) = cls(), batch(rows=2, length=9)
    expected = model(ids, targets)
    report = gptkern.swap(model, ops=[], fused_loss=True)
    assert says in reason(report)
    expected, actual = (list(r.values()) if isinstance(r, dict) else r for r in (expected, model(ids, targets)))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(actual, expected))
    with pytest.raises(RuntimeError, match="its loss"):
        gptkern.swap(model, ops=[], strict=True, fused_loss=True)
    gptkern.swap(model, ops=[], strict=True)


@pytest.mark.parametrize(
    "cls",
    [
        WritesByIndex,
        WritesByAnotherName,
        WritesByAFunction,
        WritesUnderACondition,
        WritesInTheLoss,
        WritesIntoItsHead,
        WritesWithoutGradients,
    ],
)
def test_what_may_write_between_head_and_loss_keeps_the_logits(cls):
    stock, swapped, (ids, targets) = cls(), cls(), batch(rows=2, length=9)
    with torch.no_grad():
        expected = stock(ids, targets)
        assert "may write into what the head is given, or into the head" in reason(
            gptkern.swap(swapped, ops=[], fused_loss=True)
        )
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(swapped(ids, targets), expected, strict=True))


def test_a_source_that_is_not_the_code_is_not_believed():
    namespace = {"Tiny": Tiny, "F": F}
    # As a notebook does whose cell was changed since: no file holds this.
    exec(
        "class Typed(Tiny):\n    def forward(self, ids, targets):\n        logits = self.head(self.tokens(ids))\n"
        "        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())\n",
        namespace,
    )
    assert reason(gptkern.swap(namespace["Typed"](), fused_loss=True)) == "<string>:2: its source is not to be had"


def test_fused_loss_is_true_or_false():
    with pytest.raises(TypeError, match="swap: fused_loss is 1; it needs True or False"):
        gptkern.swap(gpt(), fused_loss=1)
    with pytest.raises(ValueError, match="'linear_cross_entropy'"):
        gptkern.swap(gpt(), ops=["linear_cross_entropy"])
    said = reason(gptkern.swap(nn.Linear(2, 2), fused_loss=True))
    assert said.startswith("no forward in it takes one of its own logits by F.cross_entropy")
