"""torch.nn's encoders and MultiheadAttention, swapped, where the stock ones take PyTorch's fast path."""

from __future__ import annotations

import copy

import pytest
import torch
from sharp import sharp
from swapped_models import calls_of_twins

import gptkern

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")

STRIDED, JAGGED = torch.strided, torch.jagged


def nested(layout, lengths=(4, 6)):
    return torch.nested.nested_tensor([torch.randn(length, 16) for length in lengths], layout=layout)


def layer(**options):
    return torch.nn.TransformerEncoderLayer(**dict(d_model=16, nhead=4, dim_feedforward=32, batch_first=True) | options)


def encoder(norm=None, mask_check=True, **options):
    return torch.nn.TransformerEncoder(layer(**options), 2, norm=norm, mask_check=mask_check)


def attention(**options):
    return torch.nn.MultiheadAttention(16, 4, batch_first=True, **options)


def outcome(model, *args, **kwargs):
    """What is returned, as a list of dense tensors and its layout; or what is raised."""
    try:
        result = model(*args, **kwargs)
    except Exception as error:
        return type(error), str(error)
    result = result[0] if isinstance(result, tuple) else result
    return (result.layout, result.unbind()) if result.is_nested else (None, (result,))


def swapped_copy(model):
    swapped = copy.deepcopy(model)
    gptkern.swap(swapped)
    return swapped


def is_as_stock(model, *args, **kwargs):
    return are_alike(model, swapped_copy(model), *args, **kwargs)


def are_alike(model, swapped, *args, **kwargs):
    expected, actual = outcome(model, *args, **kwargs), outcome(swapped, *args, **kwargs)
    assert actual[0] == expected[0]
    if isinstance(expected[1], str):
        assert actual[1] == expected[1]
    else:
        torch.testing.assert_close(actual[1], expected[1])
    return expected


SELF = {
    "encoder": (encoder, lambda x: (x,)),
    "encoder with a norm": (lambda: encoder(norm=torch.nn.LayerNorm(16)), lambda x: (x,)),
    "layer": (layer, lambda x: (x,)),
    "gelu": (lambda: layer(activation="gelu"), lambda x: (x,)),
    "attention": (attention, lambda x: (x, x, x)),
}


@pytest.mark.parametrize("name", sharp(SELF, "encoder", "attention"))
def test_nested_tensors(name):
    """The fast path takes strided ones; jagged ones the stock modules refuse, and gradients for either."""
    make, arguments = SELF[name]
    model = make().eval()
    with torch.no_grad():
        layout, _ = is_as_stock(model, *arguments(nested(STRIDED)))
        assert layout == STRIDED
        is_as_stock(model, *arguments(nested(JAGGED)))
    error, _ = is_as_stock(model, *arguments(nested(STRIDED)))
    assert error is AssertionError
    with torch.no_grad():
        error, _ = is_as_stock(model.train(), *arguments(nested(STRIDED)))
    assert error is AssertionError


@torch.no_grad()
def test_nested_tensors_by_keyword_and_beside_dense_ones():
    x, dense = nested(STRIDED), torch.randn(2, 6, 16)
    is_as_stock(attention().eval(), query=x, key=x, value=x, need_weights=False)
    for query, key in ((x, dense), (dense, x)):
        error, text = is_as_stock(attention().eval(), query, key, key)
        assert error is AssertionError and "non-self attention" in text
    is_as_stock(encoder().eval(), src=x)
    is_as_stock(encoder().eval(), x, src_key_padding_mask=torch.zeros(2, 6, dtype=torch.bool))
    is_as_stock(layer().eval(), x, src_mask=torch.zeros(6, 6))


@torch.no_grad()
def test_a_layer_of_its_own_around_a_swapped_one():
    """As a model that holds encoders does."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.encoder = torch.nn.LayerNorm(16), encoder()

        def forward(self, x):
            return self.encoder(self.norm(x))

    is_as_stock(Model().eval(), nested(STRIDED))


PADDINGS = {
    "at the end": [[0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]],
    "at the end of all": [[0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]],
    "a row of nothing else": [[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]],
    "at the beginning": [[1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]],
    "at the end and at the beginning": [[0, 0, 0, 0, 1, 1], [1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]],
    "none": [[0, 0, 0, 0, 0, 0]] * 3,
}


@pytest.mark.parametrize("where", PADDINGS)
@torch.no_grad()
def test_padded_positions(where):
    """Where the padding is at the end alone, the stock encoder drops it and gives zeros (of its norm, the bias)."""
    padding, x = torch.tensor(PADDINGS[where]).bool(), torch.randn(3, 6, 16)
    norm = torch.nn.LayerNorm(16)
    torch.nn.init.normal_(norm.bias)
    for model in (encoder(), encoder(norm=norm), encoder(activation="gelu")):
        is_as_stock(model.eval(), x, src_key_padding_mask=padding)
    is_as_stock(encoder().eval(), x, src_key_padding_mask=torch.zeros(3, 6).masked_fill(padding, -torch.inf))


def test_padded_positions_where_the_stock_encoder_computes_them():
    padding, x = torch.tensor(PADDINGS["at the end"]).bool(), torch.randn(3, 6, 16)
    is_as_stock(encoder().eval(), x, src_key_padding_mask=padding)
    with torch.no_grad():
        is_as_stock(encoder(dropout=0.0), x, src_key_padding_mask=padding)
        is_as_stock(encoder().eval(), x, torch.zeros(6, 6), padding.float().masked_fill(padding, -torch.inf))
        whole = torch.nn.TransformerEncoder(layer(), 2, enable_nested_tensor=False)
        is_as_stock(whole.eval(), x, src_key_padding_mask=padding)


@torch.no_grad()
def test_the_encoder_s_own_operators_run_with_padding(monkeypatch):
    model = encoder().eval()
    gptkern.swap(model)
    x, padding = torch.randn(3, 6, 16), torch.tensor(PADDINGS["at the end"]).bool()
    assert calls_of_twins(monkeypatch, lambda: model(x, src_key_padding_mask=padding)) == 2 * 3


def test_is_causal_without_a_mask():
    """The stock fast path ignores it; elsewhere it is an error."""
    x, padding = torch.randn(3, 6, 16), torch.tensor(PADDINGS["at the end"]).bool()
    unlike = layer(dropout=0.0)
    unlike.norm2.eps = 1e-2  # the layer leaves the fast path, and its attention takes it
    models = {"encoder": encoder(dropout=0.0), "layer": layer(dropout=0.0), "unlike": unlike, "odd": layer(nhead=1)}
    found = {}
    for name, model in models.items():
        swapped = swapped_copy(model)
        for gradients, training in ((False, False), (True, False), (False, True)):
            with torch.set_grad_enabled(gradients):
                both = model.train(training), swapped.train(training)
                found[name, gradients, training] = are_alike(*both, x, is_causal=True)[0]
                are_alike(*both, x, None, None, True)
                are_alike(*both, x, src_key_padding_mask=padding, is_causal=True)
                are_alike(*both, x[0], is_causal=True)
    runs = [case for case, raised in found.items() if raised is None]
    assert runs == [(name, False, False) for name in ("encoder", "layer", "unlike")]


@torch.no_grad()
def test_is_causal_without_a_mask_in_attention():
    x, model = torch.randn(3, 6, 16), attention(dropout=0.0)
    swapped = swapped_copy(model)
    for training, expected in ((False, None), (True, RuntimeError)):
        both = model.train(training), swapped.train(training)
        assert are_alike(*both, x, x, x, is_causal=True)[0] is expected
        assert are_alike(*both, x, x, x, None, False, None, True, True)[0] is expected
        assert are_alike(*both, x, x + 1, x, is_causal=True, need_weights=False)[0] is RuntimeError


@torch.no_grad()
def test_is_causal_without_a_mask_runs_the_encoder_s_own_operators(monkeypatch):
    model, x = encoder().eval(), torch.randn(3, 6, 16)
    gptkern.swap(model)
    assert calls_of_twins(monkeypatch, lambda: model(x, is_causal=True)) == 2 * 3
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, is_causal=True), model(x))
