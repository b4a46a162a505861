#pragma once

#include "launcher.h"

namespace gptkern {

// attention, float16 or bfloat16: query (batch, heads, length_q, head_dim), key, value (batch, kv_heads, length_k,
// head_dim), kv_heads divides heads; no size is 0. lse (batch, heads, length_q) float32, in base 2, contiguous.

Unreadable attention_forward(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& output,
                             const Tensor& lse, bool is_causal, double scale, Address stream);
// A gradient that is none is not computed. delta: memory of lse's shape, where grad_query or grad_key is computed.
Unreadable attention_backward(const Tensor& grad_output, const Tensor& query, const Tensor& key, const Tensor& value,
                              const Tensor& output, const Tensor& lse, const Tensor& delta, const Tensor& grad_query,
                              const Tensor& grad_key, const Tensor& grad_value, bool is_causal, double scale,
                              Address stream);

}  // namespace gptkern
