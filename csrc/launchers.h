// The functions that Python calls, one declaration each. They check nothing: gptkern.ops has, and
// gptkern.cuda_kernels has allocated the outputs.
//
// Tensors arrive as addresses, with the shape and strides that the kernel needs, in elements; 0 is "no tensor". The
// last argument is the stream. A failed launch throws std::runtime_error.
#pragma once

#include <cstdint>
#include <vector>

namespace gptkern {

using Address = std::uintptr_t;

// gptkern/cuda_kernels/common.py, DTYPES.
enum Dtype : int { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };

// An address as a launcher's kernels take it.
template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

// Shapes and strides as PyTorch has them. mask: 0, or one that broadcasts to the shape, of the kind given: a Dtype, or
// 3 for bool. y, dx: contiguous. Rows wider than one_pass_limit are walked twice: tests alone set it.
void softmax_forward(Address x, int x_dtype, Address mask, int mask_kind, Address y, int y_dtype,
                     const std::vector<int64_t>& shape, const std::vector<int64_t>& x_strides,
                     const std::vector<int64_t>& mask_shape, const std::vector<int64_t>& mask_strides, int dim,
                     double scale, bool is_causal, int64_t one_pass_limit, Address stream);
void softmax_backward(Address dy, Address y, int y_dtype, Address dx, int dx_dtype, const std::vector<int64_t>& shape,
                      const std::vector<int64_t>& dy_strides, int dim, double scale, bool is_causal,
                      int64_t one_pass_limit, Address stream);
// layer_norm.cu. `dtype` is that of y, s and their gradients; parameters are of it or float32.
void layer_norm_forward(Address x, Address residual, Address weight, Address bias, Address y, Address summed,
                        Address mean, Address rstd, int64_t x_stride, int64_t residual_stride, int64_t rows, int width,
                        int x_dtype, int residual_dtype, int parameter_dtype, int dtype, double eps, Address stream);
// partial: float32 (how many of dweight and dbias are there, partials, width). partials: at least 1; where the width is
// no multiple of 8, at least min(rows, 8).
void layer_norm_backward(Address dy, Address incoming, Address s, Address weight, Address mean, Address rstd,
                         Address ds, Address dweight, Address dbias, Address partial, int64_t dy_stride,
                         int64_t incoming_stride, int64_t s_stride, int64_t rows, int width, int weight_dtype,
                         int dtype, int partials, Address stream);

// --- quantize_int8: q (rows, width) int8 and one float32 scale a row ---------------------------------------------------

void quantize_int8_rows(Address x, Address q, Address scale, int64_t rows, int64_t width, int64_t x_row_stride,
                        int64_t x_element_stride, int64_t q_pitch, int dtype, Address stream);
// Along the middle dimension of (outer, width, inner).
void quantize_int8_columns(Address x, Address q, Address scale, int64_t outer, int64_t width, int64_t inner,
                           int64_t outer_stride, int64_t width_stride, int64_t inner_stride, int dtype, Address stream);

// --- int8_linear: x (M, K), weight (N, K) int8, y (M, N) ---------------------------------------------------------------
// w8a8: q (M, K rounded up to 16) int8 and input_scale (M,) are written on the way; w8a16: both are 0.

void int8_linear_forward(Address x, Address weight, Address weight_scale, Address bias, Address q, Address input_scale,
                         Address y, int64_t M, int64_t N, int64_t K, int64_t x_stride_m, int64_t x_stride_k,
                         int64_t weight_stride_n, int64_t weight_stride_k, int64_t scale_stride, int64_t bias_stride,
                         int dtype, int bias_dtype, int activation, int multiprocessors, Address stream);
// z (M, N) float32, where there is an activation; largest () float32 and scaled (M, N), where there is dinput; partial
// (tiles of 64 rows, N) float32, where there is dbias.
void int8_linear_backward(Address dy, Address x, Address weight, Address weight_scale, Address bias, Address q,
                          Address input_scale, Address z, Address largest, Address scaled, Address partial,
                          Address dinput, Address dbias, int64_t M, int64_t N, int64_t K, int64_t dy_stride_m,
                          int64_t dy_stride_n, int64_t x_stride_m, int64_t x_stride_k, int64_t weight_stride_n,
                          int64_t weight_stride_k, int64_t scale_stride, int64_t bias_stride, int dy_dtype,
                          int x_dtype, int bias_dtype, int activation, int multiprocessors, Address stream);

// --- attention, float16 or bfloat16: strides of tensors, heads and rows; kv_heads divides heads; no size is 0 ----------

void attention_forward(Address query, Address key, Address value, Address output, Address lse,
                       int64_t query_batch_stride, int64_t query_head_stride, int query_row_stride,
                       int64_t key_batch_stride, int64_t key_head_stride, int key_row_stride,
                       int64_t value_batch_stride, int64_t value_head_stride, int value_row_stride,
                       int64_t output_batch_stride, int64_t output_head_stride, int output_row_stride, int batch,
                       int heads, int kv_heads, int length_q, int length_k, int head_dim, double scale_log2e,
                       bool is_causal, int dtype, Address stream);

// --- attention, backward: query (batch, heads, length_q, head_dim), key (batch, kv_heads, length_k, head_dim) -----------
// Strides as PyTorch has them. A gradient whose address is 0 is not computed, and its strides are not read. lse: in base
// 2, as the forward left it. delta: memory for (batch, heads, length_q) float32, where dquery or dkey is computed.
void attention_backward(Address grad_output, Address query, Address key, Address value, Address output, Address lse,
                        Address delta, Address grad_query, Address grad_key, Address grad_value,
                        const std::vector<int64_t>& grad_output_strides, const std::vector<int64_t>& query_strides,
                        const std::vector<int64_t>& key_strides, const std::vector<int64_t>& value_strides,
                        const std::vector<int64_t>& output_strides, const std::vector<int64_t>& grad_query_strides,
                        const std::vector<int64_t>& grad_key_strides, const std::vector<int64_t>& grad_value_strides,
                        int batch, int heads, int kv_heads, int length_q, int length_k, int head_dim, double scale,
                        bool is_causal, int dtype, Address stream);

}  // namespace gptkern
