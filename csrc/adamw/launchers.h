#pragma once

#include "launcher.h"

namespace gptkern {

// adamw: table (tensors, COLUMNS) int64 and owners (programs,) int32, which tensor each program's chunk is of: both as
// gptkern/operators/adamw/table.py makes them. lr, grad_scale, found_inf, clip: float32 of one element, or none.
// Dtypes are numbers of csrc/tensor.h. places: how random bits are found (gptkern/operators/adamw/walking.py).

// A program does `chunk` elements.
Unreadable adamw_update(const Tensor& table, const Tensor& owners, const Tensor& lr, const Tensor& grad_scale,
                        const Tensor& found_inf, const Tensor& clip, double lr_value, double one_less_beta1,
                        double log_beta1, double beta2, double one_less_beta2, double log_beta2, double eps,
                        double weight_decay, bool maximize, bool amsgrad, int places, int param_dtype, int grad_dtype,
                        int state_dtype, int chunk, Address stream);
// Averages in 8 bits: a program does `blocks` blocks.
Unreadable adamw_update_blocks(const Tensor& table, const Tensor& owners, const Tensor& lr, const Tensor& grad_scale,
                               const Tensor& found_inf, const Tensor& clip, double lr_value, double one_less_beta1,
                               double log_beta1, double beta2, double one_less_beta2, double log_beta2, double eps,
                               double weight_decay, bool maximize, int places, int param_dtype, int grad_dtype,
                               int blocks, Address stream);
// norm () float32: the root of the sum of squares; sums (at least ceil(chunks / chunks_of_a_sum),) float32. A program
// does `chunks_of_a_sum` chunks of `chunk` elements.
Unreadable adamw_norm(const Tensor& table, const Tensor& owners, const Tensor& sums, const Tensor& norm,
                      int grad_dtype, int chunk, int chunks_of_a_sum, Address stream);

}  // namespace gptkern
