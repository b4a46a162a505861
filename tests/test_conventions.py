"""Operations and bytes, against numbers worked out by hand: a factor that is wrong makes every rate wrong."""

from __future__ import annotations

import pytest

from gptkern.measuring import conventions as of

# --- attention ------------------------------------------------------------------------------------------------------

# 4 x 16 x 4096 x 128, causal. Pairs: 4096^2 / 2 = 8,388,608; times 64 heads, 128 and 4.
FORWARD = 274_877_906_944


@pytest.mark.parametrize(
    ("causal", "direction", "flops"),
    [
        (True, "forward", FORWARD),
        (True, "backward", 687_194_767_360),
        (True, "both", 962_072_674_304),
        (False, "forward", 2 * FORWARD),
        (False, "backward", 1_374_389_534_720),
        (False, "both", 1_924_145_348_608),
    ],
)
def test_attention_flops(causal, direction, flops):
    assert of.attention_flops(4, 16, 4096, 4096, 128, causal, direction) == flops


def test_attention_flops_of_grouped_heads_are_the_query_s():
    # Keys and values are shared; there is no argument for their heads.
    assert of.attention_flops(1, 32, 8, 8, 64, False, "forward") == 4 * 32 * 8 * 8 * 64


@pytest.mark.parametrize(
    ("length_q", "length_k", "causal", "pairs"),
    [
        (6, 6, False, 36),
        (6, 6, True, 18),  # half of the square
        (2, 10, False, 20),
        (2, 10, True, 2),  # a triangle of 2: later keys are never seen
        (10, 4, True, 32),  # a triangle of 4, then 6 queries that see all 4 keys
        (1, 10, False, 10),
    ],
)
def test_attention_pairs(length_q, length_k, causal, pairs):
    assert of.attention_pairs(length_q, length_k, causal) == pairs


def test_attention_bytes():
    # Query and output 2 x 8 heads, key and value 2 x 2 heads, of 4 x 16 elements of 2 bytes; lse: 8 x 4 float32.
    query, key, lse = 8 * 4 * 16 * 2, 2 * 4 * 16 * 2, 8 * 4 * 4
    assert (query, key, lse) == (1024, 256, 128)
    arguments = 1, 8, 2, 4, 4, 16, 2
    assert of.attention_bytes(*arguments, "forward") == 2560
    assert of.attention_bytes(*arguments, "backward") == 5248
    assert of.attention_bytes(*arguments, "both") == 2560 + 128 + 5248


def test_attention_bytes_of_other_lengths():
    # Query and output 1 x 1 x 2 x 8, key and value 1 x 1 x 6 x 8, float32.
    assert of.attention_bytes(1, 1, 1, 2, 6, 8, 4, "forward") == 2 * 64 + 2 * 192


def test_attention_bytes_of_a_known_shape():
    # Four tensors of 4 x 16 x 4096 x 128 bfloat16: 64 MiB each.
    assert of.attention_bytes(4, 16, 16, 4096, 4096, 128, 2, "forward") == 4 * 64 * 2**20


# --- layer_norm -----------------------------------------------------------------------------------------------------


def test_layer_norm_bytes():
    # 10 rows of 8, bfloat16: x is 160 bytes, a parameter 16, mean and rstd together 80.
    assert of.layer_norm_bytes(10, 8, 2, "forward") == 2 * 160 + 2 * 16
    assert of.layer_norm_bytes(10, 8, 2, "backward") == 3 * 160 + 80 + 3 * 16
    assert of.layer_norm_bytes(10, 8, 2, "both") == 352 + 80 + 608


def test_layer_norm_bytes_without_parameters():
    assert of.layer_norm_bytes(10, 8, 2, "forward", weight=False, bias=False) == 320
    assert of.layer_norm_bytes(10, 8, 2, "backward", bias=False) == 3 * 160 + 80 + 2 * 16


def test_layer_norm_bytes_with_a_residual():
    # Reads input and residual, writes the output and the sum.
    assert of.layer_norm_bytes(10, 8, 2, "forward", residual=True) == 4 * 160 + 2 * 16
    with pytest.raises(ValueError, match="residual"):
        of.layer_norm_bytes(10, 8, 2, "backward", residual=True)


def test_layer_norm_bytes_of_float32_parameters():
    assert of.layer_norm_bytes(10, 8, 2, "forward", parameter_itemsize=4) == 320 + 2 * 32


def test_layer_norm_bytes_of_a_known_shape():
    # 16384 x 4096 bfloat16 is 128 MiB; the parameters are 8 KiB each.
    assert of.layer_norm_bytes(16384, 4096, 2, "forward") == 2 * 128 * 2**20 + 2 * 8192


def test_layer_norm_flops():
    assert of.layer_norm_flops(10, 8, "forward") == 7 * 80
    assert of.layer_norm_flops(10, 8, "backward") == 13 * 80
    assert of.layer_norm_flops(10, 8, "both") == 20 * 80
    assert of.layer_norm_flops(10, 8, "forward", weight=False, bias=False, residual=True) == 6 * 80


# --- rms_norm -------------------------------------------------------------------------------------------------------


def test_rms_norm_bytes():
    # 10 rows of 8, bfloat16: x is 160 bytes, the weight 16, rstd 40.
    assert of.rms_norm_bytes(10, 8, 2, "forward") == 2 * 160 + 16
    assert of.rms_norm_bytes(10, 8, 2, "backward") == 3 * 160 + 40 + 2 * 16
    assert of.rms_norm_bytes(10, 8, 2, "both") == 336 + 40 + 552
    assert of.rms_norm_bytes(10, 8, 2, "forward", weight=False) == 320
    # 16384 x 4096 bfloat16 is 128 MiB.
    assert of.rms_norm_bytes(16384, 4096, 2, "forward") == 2 * 128 * 2**20 + 8192


def test_rms_norm_flops():
    assert of.rms_norm_flops(10, 8, "forward") == 4 * 80
    assert of.rms_norm_flops(10, 8, "backward") == 9 * 80
    assert of.rms_norm_flops(10, 8, "both") == 13 * 80
    assert of.rms_norm_flops(10, 8, "forward", weight=False) == 3 * 80


# --- rotary ---------------------------------------------------------------------------------------------------------


def test_rotary():
    # 2 x 3 heads of 5 x 8, bfloat16: 480 bytes; of 4 elements a head is turned, 2 pairs: 5 x 2 of cos and of sin.
    assert of.rotary_bytes(2, 3, 5, 8, 4, 2, "forward") == 2 * 480 + 40
    assert of.rotary_bytes(2, 3, 5, 8, 4, 2, "both") == 2 * of.rotary_bytes(2, 3, 5, 8, 4, 2, "backward") == 2000
    # 2 x 3 x 5 positions of 2 pairs, 6 operations each.
    assert of.rotary_flops(2, 3, 5, 4, "forward") == of.rotary_flops(2, 3, 5, 4, "backward") == 360
    assert of.rotary_flops(2, 3, 5, 4, "both") == 720


# --- softmax --------------------------------------------------------------------------------------------------------


def test_softmax_bytes():
    # 6 rows of 4, float32: 96 bytes.
    assert of.softmax_bytes(6, 4, 4, "forward") == 2 * 96
    assert of.softmax_bytes(6, 4, 4, "backward") == 3 * 96
    assert of.softmax_bytes(6, 4, 4, "both") == 5 * 96


def test_softmax_bytes_causal():
    # Two 4 x 4 matrices, bfloat16: 64 bytes; of each 10 elements take part, together 40 bytes.
    assert of.softmax_bytes(8, 4, 2, "forward", causal=True) == 40 + 64
    assert of.softmax_bytes(8, 4, 2, "backward", causal=True) == 2 * 40 + 64
    with pytest.raises(ValueError, match="multiple"):
        of.softmax_bytes(6, 4, 2, "forward", causal=True)


def test_softmax_flops():
    assert of.softmax_flops(6, 4, "forward") == 5 * 24
    assert of.softmax_flops(6, 4, "backward") == 4 * 24
    assert of.softmax_flops(8, 4, "forward", causal=True, scaled=True) == 6 * 20
    assert of.softmax_flops(8, 4, "both", causal=True) == 9 * 20


# --- int8_linear ----------------------------------------------------------------------------------------------------


def test_int8_linear():
    assert of.int8_linear_flops(16384, 4096, 16384) == 2_199_023_255_552
    # One row, 768 -> 3072, bfloat16: 2,359,296 of the weight, 12,288 of the scales, 1,536 in, 6,144 out, 6,144 bias.
    assert of.int8_linear_bytes(1, 768, 3072, 2) == 2_359_296 + 12_288 + 1_536 + 6_144 + 6_144
    assert of.int8_linear_bytes(10, 768, 3072, 2, bias=False) == 2_359_296 + 12_288 + 15_360 + 61_440


# --- model ----------------------------------------------------------------------------------------------------------


def test_training():
    # 1000 parameters, 2 layers 8 wide, 3 rows of 4 tokens: 6 x 1000 x 12, and 6 x 2 x 8 x 4 x 12 of attention.
    assert of.training_flops(1000, 2, 8, 3, 4) == 72_000 + 4_608
    assert of.training_bytes(1000) == 24_000


def test_training_flops_of_gpt2():
    # A token of GPT-2 124M at length 1024: 123,653,376 parameters without the positions, 12 layers 768 wide.
    per_token = 6 * 123_653_376 + 6 * 12 * 768 * 1024
    assert of.training_flops(123_653_376, 12, 768, 16, 1024) == per_token * 16 * 1024


def test_generation():
    # 4 tokens are run: 2 x 1000 x 4, and a triangle of 8 pairs, 4 x 8 wide, in 2 layers.
    assert of.generation_flops(1000, 2, 8, 4) == 8_000 + 2 * 4 * 8 * 8
    assert of.generation_bytes(1234) == 1234
