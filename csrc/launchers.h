// The functions that Python calls, one declaration each. They check no argument: gptkern.ops has, and
// gptkern.cuda_kernels has allocated the outputs.
//
// Each answers null once its kernels are started, or a tensor that they cannot read in place: nothing has been started
// then, and Python copies that one, contiguous and aligned, and calls again. Where there is nothing to compute, null.
// The last argument is the stream. A failed launch throws std::runtime_error.
#pragma once

#include "tensor.h"

namespace gptkern {

using Unreadable = const Tensor*;

// An address as a launcher's kernels take it.
template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

// --- rotary: x, y (batch, heads, length, head_dim), y's last dimension contiguous ---------------------------------------
// cos, sin, of one shape and dtype: (length, width) or (batch or 1, length, width), width being rotary_dim / 2 or
// rotary_dim. inverse: by the negative angle.

Unreadable rotary(const Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor& y, int64_t rotary_dim,
                  bool interleaved, bool inverse, int multiprocessors, Address stream);

// --- softmax: x, dy (…), any strides; y, dx (…), contiguous -------------------------------------------------------------
// mask: none, or one that broadcasts to x, of any of the dtypes or bool. Rows wider than one_pass_limit are walked twice:
// tests alone set it.

Unreadable softmax_forward(const Tensor& x, const Tensor& mask, const Tensor& y, int dim, double scale, bool is_causal,
                           int64_t one_pass_limit, Address stream);
Unreadable softmax_backward(const Tensor& dy, const Tensor& y, const Tensor& dx, int dim, double scale, bool is_causal,
                            int64_t one_pass_limit, Address stream);

// --- layer_norm: x, residual, dy, s, incoming (…, width); weight, bias (width,); mean, rstd (rows,) float32 --------------
// weight and bias have one dtype: that of y or s, or float32.

// y, summed (…, width), contiguous, summed where there is a residual.
Unreadable layer_norm_forward(const Tensor& x, const Tensor& residual, const Tensor& weight, const Tensor& bias,
                              const Tensor& y, const Tensor& summed, const Tensor& mean, const Tensor& rstd, double eps,
                              Address stream);
// incoming: the gradient that reaches s by itself, or none. ds (…, width), dweight, dbias (width,) float32: any of them
// none. partial: float32 (how many of dweight and dbias are there, partials, width). partials: at least 1; where the width
// is no multiple of 8, at least min(rows, 8).
Unreadable layer_norm_backward(const Tensor& dy, const Tensor& incoming, const Tensor& s, const Tensor& weight,
                               const Tensor& mean, const Tensor& rstd, const Tensor& ds, const Tensor& dweight,
                               const Tensor& dbias, const Tensor& partial, int partials, Address stream);

// --- rms_norm: x, dy (…, width); weight (width,) of their dtype or float32, or none; rstd (rows,) float32 ------------------

// y (…, width), contiguous.
Unreadable rms_norm_forward(const Tensor& x, const Tensor& weight, const Tensor& y, const Tensor& rstd, double eps,
                            Address stream);
// dx (…, width), contiguous, or none; dweight (width,) and partial (partials, width) float32, or none of both. partials: at
// least 1; where the width is no multiple of 8, at least min(rows, 8).
Unreadable rms_norm_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& rstd,
                             const Tensor& dx, const Tensor& dweight, const Tensor& partial, Address stream);

// --- quantize_int8: x (…), q (…) int8, scale (… without dim) float32 ----------------------------------------------------

Unreadable quantize_int8(const Tensor& x, const Tensor& q, const Tensor& scale, int dim, Address stream);

// --- int8_linear: x (…, K), weight (N, K) int8, weight_scale (N,) float32, bias (N,) or none, y (…, N) -------------------
// w8a8: q (M, K rounded up to 16) int8 and input_scale (M,) float32 are written on the way; w8a16: both are none.

Unreadable int8_linear_forward(const Tensor& x, const Tensor& weight, const Tensor& weight_scale, const Tensor& bias,
                               const Tensor& q, const Tensor& input_scale, const Tensor& y, int activation,
                               int multiprocessors, Address stream);
// x and z (M, N) float32, where there is an activation; largest () float32 and scaled (M, N) of dy's dtype, where there is
// dinput (…, K); partial (tiles of 64 rows, N) float32, where there is dbias (N,) float32.
Unreadable int8_linear_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                                const Tensor& bias, const Tensor& q, const Tensor& input_scale, const Tensor& z,
                                const Tensor& largest, const Tensor& scaled, const Tensor& partial,
                                const Tensor& dinput, const Tensor& dbias, int activation, int multiprocessors,
                                Address stream);

// --- attention, float16 or bfloat16: query (batch, heads, length_q, head_dim), key, value (batch, kv_heads, length_k, ---
// head_dim), kv_heads divides heads; no size is 0. lse (batch, heads, length_q) float32, in base 2, contiguous.

Unreadable attention_forward(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& output,
                             const Tensor& lse, bool is_causal, double scale, Address stream);
// A gradient that is none is not computed. delta: memory of lse's shape, where grad_query or grad_key is computed.
Unreadable attention_backward(const Tensor& grad_output, const Tensor& query, const Tensor& key, const Tensor& value,
                              const Tensor& output, const Tensor& lse, const Tensor& delta, const Tensor& grad_query,
                              const Tensor& grad_key, const Tensor& grad_value, bool is_causal, double scale,
                              Address stream);

}  // namespace gptkern
