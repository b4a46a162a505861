"""Operations and bytes of one call of each operator: what times are divided into.

Operations are those of the mathematics, not of an implementation: a backward that recomputes the scores is credited
with the same number as one that kept them. Bytes are the least that has to cross the memory's bus if nothing were
read or written twice: every argument once, every result once, nothing in between (the compulsory traffic of Williams,
Waterman, Patterson, "Roofline", 2009). Both are functions of sizes alone.

    direction   forward      what inference calls; nothing is kept for a backward
                backward     the gradients, from what the forward kept
                both         forward, what it keeps included, then backward
"""

from __future__ import annotations

# Statistics that a forward keeps for its backward (mean, rstd, log-sum-exp), and the scales of int8, are float32.
FLOAT32_BYTES = 4

DIRECTIONS = ("forward", "backward", "both")

# --- attention ------------------------------------------------------------------------------------------------------

# The forward has two products, S = Q K^T and O = P V; the backward five: S once more, dV = P^T dO, dP = dO V^T,
# dQ = dS K and dK = dS^T Q.
ATTENTION_BACKWARD = 2.5
_ATTENTION_FACTOR = {"forward": 1.0, "backward": ATTENTION_BACKWARD, "both": 1.0 + ATTENTION_BACKWARD}


def attention_pairs(length_q: int, length_k: int, causal: bool) -> float:
    """How many (query, key) pairs count: all of them, or the area under the diagonal where query i sees key j <= i.

    A square has length^2, its triangle exactly half of that. Queries past the last key see all keys.
    """
    if not causal:
        return float(length_q * length_k)
    diagonal = min(length_q, length_k)
    return diagonal**2 / 2 + (length_q - diagonal) * length_k


def attention_flops(
    batch: int, heads: int, length_q: int, length_k: int, head_dim: int, causal: bool, direction: str
) -> float:
    """4 * batch * heads * pairs * head_dim forward, 2.5 times that backward, 3.5 times both.

    Softmax's own operations do not count; heads are the query's, as grouped heads share keys, not products.

    Source: the convention of FlashAttention (Dao, 2023, arXiv:2307.08691, section 4.1; and its benchmarks).
    """
    forward = 4.0 * batch * heads * attention_pairs(length_q, length_k, causal) * head_dim
    return forward * _ATTENTION_FACTOR[direction]


def attention_bytes(
    batch: int, heads: int, kv_heads: int, length_q: int, length_k: int, head_dim: int, itemsize: int, direction: str
) -> int:
    """Forward: query, key, value and output. Backward: these four, the output's gradient and the log-sum-exp are
    read, three gradients written. A causal limit hides no argument of equal lengths: every key is seen by a query.

    Source: the compulsory traffic, as at the top; what a fused kernel keeps is from Dao, 2023, section 3.1.
    """
    query = batch * heads * length_q * head_dim * itemsize  # output, dO and dQ are as large
    key = batch * kv_heads * length_k * head_dim * itemsize  # value, dK and dV are as large
    lse = batch * heads * length_q * FLOAT32_BYTES
    forward = 2 * query + 2 * key
    backward = 4 * query + 4 * key + lse
    return {"forward": forward, "backward": backward, "both": forward + lse + backward}[direction]


# --- layer_norm -----------------------------------------------------------------------------------------------------

# Operations an element, counted from layer_norm's formulas. Forward: the sum, the subtraction, the
# square and its sum, rstd; then weight and bias one each. Backward: x_hat (2), avg(g) (1), avg(g * x_hat) (2), and
# dx = rstd * (g - avg(g) - x_hat * avg(g * x_hat)) (4); weight: g = dy * weight (1) and its gradient (2); bias: 1.
_NORM_FORWARD, _NORM_FORWARD_PARAMETER = 5, 1
_NORM_BACKWARD, _NORM_BACKWARD_WEIGHT, _NORM_BACKWARD_BIAS = 9, 3, 1


def layer_norm_flops(
    rows: int, width: int, direction: str, weight: bool = True, bias: bool = True, residual: bool = False
) -> float:
    """A count of additions and multiplications, all alike; divisions and roots a row are left out.

    The operator is bound by bytes: this number says only that. Source: our own count, from the formulas.
    """
    elements = float(rows * width)
    forward = elements * (_NORM_FORWARD + _NORM_FORWARD_PARAMETER * (weight + bias) + residual)
    backward = elements * (_NORM_BACKWARD + _NORM_BACKWARD_WEIGHT * weight + _NORM_BACKWARD_BIAS * bias)
    return {"forward": forward, "backward": backward, "both": forward + backward}[direction]


def layer_norm_bytes(
    rows: int,
    width: int,
    itemsize: int,
    direction: str,
    weight: bool = True,
    bias: bool = True,
    residual: bool = False,
    parameter_itemsize: int | None = None,
) -> int:
    """Forward: reads input (and residual), weight and bias; writes the output (and the sum). Backward: reads input,
    dy, weight and each row's mean and rstd; writes dx, dweight and dbias. Both: the forward writes mean and rstd too.

    The residual's backward (dx once more, and the gradient of the sum) is not counted: forward only.

    Source: llm.c's layernorm_forward benchmark counts input and output; parameters and statistics are added here.
    """
    if residual and direction != "forward":
        raise ValueError(f"layer_norm_bytes: direction is {direction!r}; with a residual it needs 'forward'")
    x = rows * width * itemsize
    parameter = width * (itemsize if parameter_itemsize is None else parameter_itemsize)
    statistics = 2 * rows * FLOAT32_BYTES
    forward = x * (4 if residual else 2) + parameter * (weight + bias)
    # The weight is read and its gradient written; of the bias the gradient alone.
    backward = 3 * x + statistics + parameter * (2 * weight + bias)
    return {"forward": forward, "backward": backward, "both": forward + statistics + backward}[direction]


# --- rms_norm -------------------------------------------------------------------------------------------------------

# Operations an element, counted from rms_norm's formulas. Forward: the square and its sum, rstd; then
# the weight. Backward: x_hat (1), avg(g * x_hat) (2), and dx = rstd * (g - x_hat * avg(g * x_hat)) (3); weight:
# g = dy * weight (1) and its gradient (2).
_RMS_FORWARD, _RMS_FORWARD_WEIGHT = 3, 1
_RMS_BACKWARD, _RMS_BACKWARD_WEIGHT = 6, 3


def rms_norm_flops(rows: int, width: int, direction: str, weight: bool = True) -> float:
    """A count of additions and multiplications, all alike; divisions and roots a row are left out.

    The operator is bound by bytes: this number says only that. Source: our own count, from the formulas.
    """
    elements = float(rows * width)
    forward = elements * (_RMS_FORWARD + _RMS_FORWARD_WEIGHT * weight)
    backward = elements * (_RMS_BACKWARD + _RMS_BACKWARD_WEIGHT * weight)
    return {"forward": forward, "backward": backward, "both": forward + backward}[direction]


def rms_norm_bytes(rows: int, width: int, itemsize: int, direction: str, weight: bool = True) -> int:
    """Forward: reads input and weight, writes the output. Backward: reads input, dy, weight and each row's rstd;
    writes dx and dweight. Both: the forward writes rstd too.

    Source: the compulsory traffic, as at the top.
    """
    x, parameter, statistics = rows * width * itemsize, width * itemsize * weight, rows * FLOAT32_BYTES
    forward = 2 * x + parameter
    backward = 3 * x + statistics + 2 * parameter
    return {"forward": forward, "backward": backward, "both": forward + statistics + backward}[direction]


# --- rotary ---------------------------------------------------------------------------------------------------------

# Operations a pair of elements: four products, a sum and a difference.
_ROTARY_PAIR = 6


def rotary_flops(batch: int, heads: int, length: int, rotary_dim: int, direction: str) -> float:
    """A count of operations, the angles' own not among them; backward is as much as forward.

    The operator is bound by bytes: this number says only that. Source: our own count, from the formulas.
    """
    once = float(batch * heads * length * (rotary_dim // 2) * _ROTARY_PAIR)
    return {"forward": once, "backward": once, "both": 2 * once}[direction]


def rotary_bytes(
    batch: int, heads: int, length: int, head_dim: int, rotary_dim: int, itemsize: int, direction: str
) -> int:
    """Forward: reads x, and cos and sin (length, rotary_dim / 2) of its dtype; writes y. Backward: as much.

    What passes through is read and written too, as the caller gets a full tensor. Source: the compulsory traffic, as
    at the top.
    """
    once = 2 * batch * heads * length * head_dim * itemsize + length * rotary_dim * itemsize
    return {"forward": once, "backward": once, "both": 2 * once}[direction]


# --- softmax --------------------------------------------------------------------------------------------------------

# Operations an element: the maximum, the subtraction, the exponential, the sum, the division; and backward
# dx = y * (dy - sum(dy * y)): two for the sum, a subtraction, a multiplication. A scale adds one to each.
_SOFTMAX_FORWARD, _SOFTMAX_BACKWARD = 5, 4


def _softmax_elements(rows: int, width: int, causal: bool) -> float:
    """How many elements take part; causal: of square matrices of `width` rows each, the triangle with its diagonal."""
    if not causal:
        return float(rows * width)
    if rows % width:
        raise ValueError(f"softmax: rows is {rows}; causal, it needs to be a multiple of the width, {width}")
    return rows // width * width * (width + 1) / 2


def softmax_flops(rows: int, width: int, direction: str, causal: bool = False, scaled: bool = False) -> float:
    """A count of operations, an exponential as one; causal: of the triangle only.

    The operator is bound by bytes: this number says only that. Source: our own count, from the formulas.
    """
    elements = _softmax_elements(rows, width, causal)
    forward, backward = elements * (_SOFTMAX_FORWARD + scaled), elements * (_SOFTMAX_BACKWARD + scaled)
    return {"forward": forward, "backward": backward, "both": forward + backward}[direction]


def softmax_bytes(rows: int, width: int, itemsize: int, direction: str, causal: bool = False) -> int:
    """Forward: reads x, writes y. Backward: reads y and dy, writes dx.

    Causal: of x, y and dy only the triangle has to be read, but y and dx are written whole, zeros included, as the
    caller gets a full tensor. Source: the compulsory traffic, as at the top.
    """
    whole = rows * width * itemsize
    read = int(_softmax_elements(rows, width, causal)) * itemsize
    forward, backward = read + whole, 2 * read + whole
    return {"forward": forward, "backward": backward, "both": forward + backward}[direction]


# --- int8_linear ----------------------------------------------------------------------------------------------------


def int8_linear_flops(rows: int, in_features: int, out_features: int) -> float:
    """2 * M * N * K, whatever the multiplication's precision: int8 operations are counted as FLOPs are.

    Quantisation, scales and bias do not count. Source: the convention of cuBLAS and CUTLASS for a product.
    """
    return 2.0 * rows * in_features * out_features


def int8_linear_bytes(rows: int, in_features: int, out_features: int, itemsize: int, bias: bool = True) -> int:
    """The int8 weight and its float32 scales, the input once, the bias and the output in the input's precision.

    The same for w8a8 and w8a16: w8a8's quantised input exists between its two passes alone, and would not be written
    where one pass did both. Source: the compulsory traffic, as at the top.
    """
    weight = in_features * out_features + out_features * FLOAT32_BYTES
    return weight + (rows * (in_features + out_features) + out_features * bias) * itemsize


# --- model ----------------------------------------------------------------------------------------------------------


def training_flops(parameters: int, layers: int, width: int, batch: int, length: int) -> float:
    """6 * parameters * tokens, plus attention's 6 * layers * width * length * tokens.

    Args:
        parameters: those that are multiplied with: without the position embedding, with the token embedding once
            (as the output weight; looking a token up is no product).

    The attention term is half of the source's 12 * layers * width * length, as the causal half counts here as well.

    Source: Kaplan et al., 2020 (arXiv:2001.08361), section 2.1; Chowdhery et al., "PaLM", 2022 (arXiv:2204.02311),
    appendix B.
    """
    tokens = batch * length
    attention = layers * attention_flops(batch, 1, length, length, width, True, "forward")
    # Here the backward counts twice the forward, as the products around it do, not 2.5 times.
    return 6.0 * parameters * tokens + 3 * attention


def training_bytes(parameters: int) -> int:
    """The float32 parameters and AdamW's two moments, each read and written once: 24 bytes a parameter.

    Gradients and activations come and go within the step and are not counted. Source: Loshchilov, Hutter, "Decoupled
    Weight Decay Regularization", 2019 (arXiv:1711.05101), algorithm 2.
    """
    parameter_and_moments, read_and_written = 3, 2
    return parameter_and_moments * read_and_written * FLOAT32_BYTES * parameters


def generation_flops(parameters: int, layers: int, width: int, length: int) -> float:
    """2 * parameters * length, plus attention's: a token is generated by running all `length` tokens before it.

    models.gpt keeps no keys and values between tokens. Source: as training_flops, forward only.
    """
    return 2.0 * parameters * length + layers * attention_flops(1, 1, length, length, width, True, "forward")


def generation_bytes(weight_bytes: int) -> int:
    """The weights, each once: at batch 1 that is what a token costs at least.

    Source: gpt-fast's "bandwidth achieved", the model's bytes times the tokens a second.
    """
    return weight_bytes
