"""The reference GPT: sizes, initialisation, causality, generation, errors."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from gptkern.models.gpt import GPT, PRESETS, GPTConfig

TINY = GPTConfig(vocab_size=61, context=16, layers=2, width=32, heads=4)

# Published totals: GPT-2's of the released checkpoints. GPT-3's are those of table 2.1, to the digits printed there.
GPT2_PARAMETERS = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}
GPT3_PARAMETERS = {
    "gpt3-125M": 125e6, "gpt3-350M": 350e6, "gpt3-760M": 760e6, "gpt3-1.3B": 1.3e9,
    "gpt3-2.7B": 2.7e9, "gpt3-6.7B": 6.7e9, "gpt3-13B": 13.0e9, "gpt3-175B": 175.0e9,
}  # fmt: skip


@pytest.fixture
def model() -> GPT:
    return GPT(TINY)


def _on_meta(name: str) -> GPT:
    with torch.device("meta"):
        return GPT(GPTConfig.preset(name))


@pytest.mark.parametrize("name", GPT2_PARAMETERS)
def test_gpt2_has_the_published_parameter_count(name):
    assert _on_meta(name).parameter_count() == GPT2_PARAMETERS[name]


@pytest.mark.parametrize("name", GPT3_PARAMETERS)
def test_gpt3_has_the_published_parameter_count(name):
    assert _on_meta(name).parameter_count() == pytest.approx(GPT3_PARAMETERS[name], rel=0.025)


def test_every_preset_is_counted():
    assert set(PRESETS) == {"nano", *GPT2_PARAMETERS, *GPT3_PARAMETERS}


def test_head_dims_of_gpt3():
    dims = {name: config.head_dim for name, config in PRESETS.items() if name.startswith("gpt3")}
    assert dims == {
        "gpt3-125M": 64, "gpt3-350M": 64, "gpt3-760M": 96, "gpt3-1.3B": 128,
        "gpt3-2.7B": 80, "gpt3-6.7B": 128, "gpt3-13B": 128, "gpt3-175B": 128,
    }  # fmt: skip


def test_the_output_weight_is_the_embedding(model):
    assert model.lm_head.weight is model.token_embedding.weight
    counted = sum(parameter.numel() for parameter in set(model.parameters()))
    assert model.parameter_count() == counted
    # 4 matrices of attention and 8 of the perceptron, width x width each, and the vectors beside them
    block = 12 * 32 * 32 + 13 * 32
    assert counted == 61 * 32 + 16 * 32 + 2 * block + 2 * 32


def test_initialisation_is_gpt2s():
    model = GPT(dataclasses.replace(TINY, width=256, layers=8))
    block = model.blocks[3]
    assert block.attention.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.token_embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for project in (block.attention.project, block.perceptron.project):
        assert project.weight.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.05)
        assert project.bias.abs().max() == 0


def test_first_loss_is_that_of_guessing(model):
    ids = torch.randint(61, (4, 17))
    logits, loss = model(ids[:, :-1], ids[:, 1:])
    assert logits.shape == (4, 16, 61)
    assert loss.item() == pytest.approx(math.log(61), abs=0.1)


def test_the_loss_is_the_mean_cross_entropy(model):
    ids, targets = torch.randint(61, (2, 5)), torch.randint(61, (2, 5))
    targets[0, 3] = -100
    logits, loss = model(ids, targets)
    probabilities = torch.softmax(logits.double(), -1)
    terms = [
        -math.log(probabilities[row, column, targets[row, column]].item())
        for row in range(2)
        for column in range(5)
        if targets[row, column] != -100
    ]
    assert loss.item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_without_its_head_it_gives_what_the_head_would_get(model):
    ids = torch.randint(0, model.config.vocab_size, (2, 5))
    features, loss = model(ids, head=False)
    assert features.shape == (2, 5, model.config.width) and loss is None
    assert torch.equal(model.lm_head(features), model(ids)[0])
    with pytest.raises(ValueError, match="head is False and targets are given"):
        model(ids, ids, head=False)


def test_no_token_sees_a_later_one(model):
    ids = torch.randint(61, (1, 16))
    before, _ = model(ids)
    for position in (1, 9, 15):
        changed = ids.clone()
        changed[0, position] = (ids[0, position] + 1) % 61
        after, _ = model(changed)
        assert torch.equal(after[:, :position], before[:, :position])
        assert not torch.equal(after[:, position], before[:, position])


def test_a_token_sees_every_earlier_one(model):
    ids = torch.randint(61, (1, 16))
    before, _ = model(ids)
    ids[0, 0] = (ids[0, 0] + 1) % 61
    after, _ = model(ids)
    assert (after != before).any(-1).all()


def test_dropout_acts_in_training_alone():
    model = GPT(dataclasses.replace(TINY, dropout=0.5))
    ids = torch.randint(61, (1, 8))
    assert not torch.equal(model(ids)[0], model(ids)[0])
    model.eval()
    assert torch.equal(model(ids)[0], model(ids)[0])


def test_it_learns_a_batch_by_heart(model):
    ids = torch.randint(61, (2, 17))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        _, loss = model(ids[:, :-1], ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


def test_every_parameter_gets_a_gradient(model):
    ids = torch.randint(61, (2, 17))
    model(ids[:, :-1], ids[:, 1:])[1].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


class TestGenerate:
    def test_it_continues_the_prompt(self, model):
        prompt = torch.randint(61, (3, 4))
        generated = model.generate(prompt, 6)
        assert generated.shape == (3, 10)
        assert torch.equal(generated[:, :4], prompt)
        assert torch.equal(model.generate(prompt, 0), prompt)

    def test_greedy_takes_the_likeliest_token(self, model):
        prompt = torch.randint(61, (2, 4))
        generated = model.generate(prompt, 5, temperature=0)
        logits, _ = model(generated[:, :-1])
        assert torch.equal(generated[:, 4:], logits[:, 3:].argmax(-1))
        assert torch.equal(model.generate(prompt, 5, top_k=1), generated)

    def test_a_generator_repeats_it(self, model):
        prompt = torch.randint(61, (1, 4))
        first, second, other = (
            model.generate(prompt, 12, generator=torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)
        )
        assert torch.equal(first, second)
        assert not torch.equal(first, other)

    @pytest.mark.parametrize("top_k", [None, 5])
    def test_temperature_sharpens(self, model, top_k):
        prompt = torch.zeros(256, 1, dtype=torch.int64)
        logits, _ = model(prompt[:1])
        best = logits[0, -1].topk(top_k or 61).values
        expected = torch.softmax(best / 0.05, -1)[0].item()
        assert expected > 2 * torch.softmax(best, -1)[0].item()  # a temperature that is left out shows
        drawn = model.generate(prompt, 1, temperature=0.05, top_k=top_k)[:, 1]
        assert (drawn == logits[0, -1].argmax()).float().mean().item() == pytest.approx(expected, abs=0.15)

    def test_top_k_draws_from_the_k_likeliest(self, model):
        prompt = torch.zeros(256, 1, dtype=torch.int64)
        logits, _ = model(prompt[:1])
        best = set(logits[0, -1].topk(3).indices.tolist())
        assert set(model.generate(prompt, 1, top_k=3)[:, 1].tolist()) == best

    def test_past_the_context_only_the_last_tokens_are_seen(self, model):
        long = torch.randint(61, (1, 30))
        generated = model.generate(long, 3, temperature=0)
        assert generated.shape == (1, 33)
        assert torch.equal(generated[:, 30:], model.generate(long[:, -16:], 3, temperature=0)[:, 16:])

    def test_the_mode_is_put_back(self, model):
        prompt = torch.zeros(1, 1, dtype=torch.int64)
        for training in (True, False):
            model.train(training)
            model.generate(prompt, 1)
            assert model.training is training

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"max_new_tokens": -1}, "max_new_tokens is -1"),
            ({"max_new_tokens": 1, "temperature": -0.5}, "temperature is -0.5"),
            ({"max_new_tokens": 1, "top_k": 0}, "top_k is 0"),
            ({"max_new_tokens": 1, "ids": torch.zeros(1, 0, dtype=torch.int64)}, r"ids have shape \(1, 0\)"),
            ({"max_new_tokens": 1, "ids": torch.zeros(3, dtype=torch.int64)}, r"ids have shape \(3,\)"),
        ],
    )
    def test_errors(self, model, arguments, message):
        with pytest.raises(ValueError, match=message):
            model.generate(**{"ids": torch.zeros(1, 1, dtype=torch.int64), **arguments})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 5}, "width is 32; it needs to be a multiple of heads, 5"),
        ({"layers": 0}, "layers is 0"),
        ({"context": -1}, "context is -1"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_config_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'gpt5'.*nano.*gpt3-175B"):
        GPTConfig.preset("gpt5")


def test_preset_takes_changes():
    assert GPTConfig.preset("gpt2", vocab_size=256).vocab_size == 256


@pytest.mark.parametrize(
    ("ids", "targets", "message"),
    [
        (torch.zeros(2, 17, dtype=torch.int64), None, "length 17; the context is 16"),
        (torch.zeros(4, dtype=torch.int64), None, r"shape \(4,\)"),
        (torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.int64), "targets have shape"),
    ],
)
def test_forward_errors(model, ids, targets, message):
    with pytest.raises(ValueError, match=message):
        model(ids, targets)


# --- Recomputation ----------------------------------------------------------------------------------------------------


def computed(every: int | None):
    """-> loss, gradients, and the bytes that the forward keeps for the backward, with dropout."""
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(TINY, layers=4, dropout=0.3))
    model.recompute(every)
    ids = torch.randint(0, TINY.vocab_size, (2, TINY.context))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (kept.append(tensor.nbytes), tensor)[1], lambda t: t):
        _, loss = model(ids, ids)
    loss.backward()
    return loss, [parameter.grad for parameter in model.parameters()], sum(kept)


def test_recomputed_blocks_give_the_same_numbers_and_keep_less():
    loss, gradients, most = computed(None)
    kept = []
    for every in (3, 2, 1):
        other, others, bytes_kept = computed(every)
        assert torch.equal(other, loss) and all(torch.equal(*pair) for pair in zip(others, gradients))
        kept.append(bytes_kept)
    # Of 4 blocks 2, 2 and 4 keep their input alone.
    assert most > kept[0] == kept[1] > kept[2] and kept[2] < 0.6 * most


def test_nothing_is_recomputed_without_gradients(model, monkeypatch):
    import gptkern.models.gpt as module

    model.recompute(1)
    monkeypatch.setattr(module, "checkpoint", None)
    with torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(TypeError):
        model(torch.zeros(1, 4, dtype=torch.long))


@pytest.mark.parametrize("every", [0, -1])
def test_recompute_refuses(model, every):
    with pytest.raises(ValueError, match=rf"every is {every}; it needs to be at least 1, or None"):
        model.recompute(every)
