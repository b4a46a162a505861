"""Operations and bytes, against numbers worked out by hand: a factor that is wrong makes every rate wrong."""

from __future__ import annotations

import pytest

from gptkern import operators
from gptkern.measuring import model

# (sizes, the problem's function, itemsize or none, direction) -> the number, worked out in the comment above.
BY_HAND = {
    "attention": [
        # 64 heads of 4096² / 2 pairs, 128 wide, 2 products of 2 operations; backward 5 products.
        ((4, 16, 16, 4096, 4096, 128, "causal"), "flops", "forward", 274_877_906_944),
        ((4, 16, 16, 4096, 4096, 128, "causal"), "flops", "backward", 687_194_767_360),
        ((4, 16, 16, 4096, 4096, 128, "full"), "flops", "forward", 549_755_813_888),
        # Grouped heads: the query's count. 32 heads of 64 pairs, 64 wide.
        ((1, 32, 8, 8, 8, 64, "full"), "flops", "forward", 524_288),
        # Pairs: a triangle of 2 (2 queries of 10 keys), then a triangle of 4 and 6 queries that see all 4 keys.
        ((1, 1, 1, 2, 10, 1, "causal"), "flops", "forward", 8),
        ((1, 1, 1, 10, 4, 1, "causal"), "flops", "forward", 128),
        # Query and output 1024 bytes each, key and value 256; backward four of each, and the log-sum-exp, 128.
        ((2, 4, 1, 4, 4, 16, "full"), "bytes 2", "forward", 2560),
        ((2, 4, 1, 4, 4, 16, "full"), "bytes 2", "backward", 5248),
        ((2, 4, 1, 4, 4, 16, "full"), "bytes 2", "both", 7936),
        # Counted products: the triangle with its diagonal, 10 pairs of 4 queries, 8 wide; 2 and 5 of them.
        ((1, 1, 1, 4, 4, 8, "causal"), "products", "forward", 160),
        ((1, 1, 1, 4, 4, 8, "causal"), "products", "backward", 400),
    ],
    "layer_norm": [
        # 10 rows of 8: x 160 bytes, a parameter 16, mean and rstd 80. Operations: 7, 13 and 20 an element.
        ((10, 8), "bytes 2", "forward", 352),
        ((10, 8), "bytes 2", "backward", 608),
        ((10, 8), "bytes 2", "both", 1040),
        ((10, 8, True), "bytes 2", "forward", 672),
        ((10, 8, False, False), "bytes 2", "forward", 320),
        ((10, 8), "flops", "backward", 1040),
        ((10, 8, True, False), "flops", "forward", 480),
    ],
    "rms_norm": [
        # 10 rows of 8: x 160 bytes, the weight 16, rstd 40. Operations: 4 and 9 an element.
        ((10, 8), "bytes 2", "forward", 336),
        ((10, 8), "bytes 2", "backward", 552),
        ((10, 8), "bytes 2", "both", 928),
        ((10, 8, False), "bytes 2", "forward", 320),
        ((10, 8), "flops", "both", 1040),
        ((10, 8, False), "flops", "forward", 240),
        ((10, 8, True, True), "bytes 2", "forward", 656),
        ((10, 8, False, True), "flops", "forward", 320),
    ],
    "rotary": [
        # 2 x 3 heads of 5 x 8: 480 bytes; 4 elements of a head turn: 20 bytes of cos and of sin; 60 pairs, 6 each.
        ((2, 3, 5, 8, 4, False), "bytes 2", "forward", 1000),
        ((2, 3, 5, 8, 4, True), "bytes 2", "both", 2000),
        ((2, 3, 5, 8, 4, False), "flops", "backward", 360),
        ((2, 3, 5, 8, 4, False), "flops", "both", 720),
    ],
    "softmax": [
        # 6 rows of 4, float32: 96 bytes. Operations: 5 and 4 an element, a scale one more.
        (((6, 4),), "bytes 4", "forward", 192),
        (((6, 4),), "bytes 4", "both", 480),
        (((6, 4),), "flops", "forward", 120),
        (((6, 4),), "flops", "backward", 96),
        # Two 4 x 4 matrices, 64 bytes, of which 10 elements each take part, 40 bytes.
        (((2, 4, 4), -1, 0.5, None, True), "bytes 2", "backward", 144),
        (((2, 4, 4), -1, 0.5, None, True), "flops", "forward", 120),
        (((2, 4, 4), -1, 0.5, None, True), "least 2", "backward", 144),
        # Over another dimension, of 3 lanes.
        (((2, 4, 3), 1), "bytes 4", "backward", 288),
    ],
    "nonlinearity": [
        # 10 rows of 8: a tensor 160 bytes, the bias 16. Operations: 5 of GELU; 8 and 3 of a gate of SiLU; 8 and 1, and
        # 17 and 2, of a tanh GELU with a bias.
        ((10, 8), "bytes 2", "forward", 320),
        ((10, 8, "silu", "pair"), "bytes 2", "forward", 480),
        ((10, 8, "silu", "packed"), "bytes 2", "backward", 800),
        ((10, 8, "gelu", None, True), "bytes 2", "both", 848),
        ((10, 8), "flops", "forward", 400),
        ((10, 8, "silu", "pair"), "flops", "backward", 880),
        ((10, 8, "gelu_tanh", None, True), "flops", "both", 2240),
    ],
    "distillation_loss": [
        # 10 rows of 8: each model's logits 160 bytes, targets 80; the statistics 240. 11 and 9 an element.
        ((10, 8), "bytes 2", "forward", 400),
        ((10, 8), "bytes 2", "backward", 800),
        ((10, 8), "bytes 2", "both", 1440),
        # Of the teacher 2 classes a row, of 12 bytes each.
        ((10, 8, "jsd", 1.0, 0.0, 2), "bytes 2", "forward", 480),
        ((10, 8), "flops", "both", 1600),
    ],
    "linear_distillation_loss": [
        # 10 rows and 8 classes, 4 and 6 wide: 144 and 216 bytes.
        ((10, 4, 8, 6), "bytes 2", "forward", 360),
        ((10, 4, 8, 6), "bytes 2", "backward", 504),
        ((10, 4, 8, 6), "flops", "forward", 1600),
        ((10, 4, 8, 6), "flops", "backward", 1280),
    ],
    "linear_cross_entropy": [
        # 10 rows and 20 classes of 8: 160 and 320 bytes, 80 of targets, 120 of statistics. A product 3200 operations.
        ((10, 8, 20), "bytes 2", "forward", 560),
        ((10, 8, 20), "bytes 2", "backward", 1160),
        ((10, 8, 20), "bytes 4", "both", 3280),
        ((10, 8, 20, True), "bytes 2", "forward", 600),
        ((10, 8, 20), "flops", "forward", 3200),
        ((10, 8, 20), "flops", "both", 9600),
    ],
    "cross_entropy": [
        # 10 rows of 8 classes: the logits 160 bytes, targets 80, four statistics a row 160. Operations: 4 and 4.
        ((10, 8), "bytes 2", "forward", 240),
        ((10, 8), "bytes 2", "backward", 560),
        ((10, 8), "bytes 2", "both", 960),
        ((10, 8), "flops", "both", 640),
        # Probabilities are as many as logits; a class's weight 2 bytes.
        ((10, 8, 0, "probabilities"), "bytes 2", "forward", 320),
        ((5, 8, 2, "classes", True), "bytes 2", "forward", 256),
    ],
    "int8_linear": [
        # Weight 2,359,296, scales 12,288, input 1,536, output 6,144, bias 6,144.
        ((1, 768, 3072, None, "w8a16"), "bytes 2", "forward", 2_385_408),
        ((10, 32, 48, "gelu", "w8a8"), "products", "forward", 15_360),
    ],
    "quantize_int8": [
        # 10 rows of 8: x 160 bytes, q 80, and a scale for each of 10 rows, 40, or of 8 columns, 32. 4 an element.
        ((10, 8), "bytes 2", "forward", 280),
        ((10, 8), "bytes 4", "forward", 440),
        ((10, 8, 0), "bytes 2", "forward", 272),
        ((10, 8), "flops", "forward", 320),
    ],
    "adamw": [
        # 80 elements: four tensors read and three written; 15 operations each.
        ((10, 8), "bytes 4", "forward", 2240),
        ((10, 8), "bytes 2", "forward", 1120),
        ((10, 8), "flops", "forward", 1200),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    "operator, sizes, what, direction, expected",
    [(operator, *case) for operator, cases in BY_HAND.items() for case in cases],
)
def test_by_hand(operator, sizes, what, direction, expected):
    problem = operators.problem(operator)
    sizes = type(next(iter(problem.checks()["small"].values())).sizes)(*sizes)
    name, *itemsize = what.split()
    found = getattr(problem, name)(sizes, *map(int, itemsize), direction)
    assert found == expected and (name != "bytes" or isinstance(found, int))


def test_every_operator_that_is_timed_was_worked_out():
    assert set(BY_HAND) == {name for name in operators.NAMES if operators.problem(name).cells("cuda", "quick")}


def test_what_is_not_counted_is_an_error():
    sizes = operators.problem("layer_norm").cells("cpu", "full")[-1].sizes
    assert sizes.residual
    with pytest.raises(ValueError, match="direction is 'both'; with a residual it needs 'forward'"):
        operators.problem("layer_norm").bytes(sizes, 2, "both")


def test_the_whole_model():
    multiplied, in_int8, scales = model.counts("gpt2")
    # 124,439,808 parameters with the positions, 1024 x 768; 12 blocks of 12 x 768^2 weights, of 9 x 768 rows.
    assert (multiplied, in_int8, scales) == (124_439_808 - 786_432, 84_934_656, 12 * 9 * 768)
    # Attention of 1024 tokens: a triangle of 1024^2 / 2 pairs, 4 x 768 wide, in 12 layers; three times in training.
    attention = 12 * 4 * 768 * 1024 * 512
    assert model.training_flops("gpt2", 16) == 16 * (6 * multiplied * 1024 + 3 * attention)
    assert model.generation_flops("gpt2", 1024) == 2 * multiplied * 1024 + attention
    assert model.training_bytes("gpt2") == 24 * multiplied
    assert model.generation_bytes("gpt2", "bfloat16", "bfloat16") == 2 * multiplied
    # The matrices in int8 with float32 scales; the embedding, the norms and the biases in 16 bits.
    assert model.generation_bytes("gpt2", "int8", "bfloat16") == in_int8 + 4 * scales + 2 * (multiplied - in_int8)
