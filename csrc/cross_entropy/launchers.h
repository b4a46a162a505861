#pragma once

#include "launcher.h"

namespace gptkern {

// cross_entropy: x, dx (rows, classes), the classes of a row next to each other; target (rows,) int64; weight (classes,)
// of x's dtype or float32, or none; statistics (4, rows) float32: m, log_total, log_others, rest. softcap: 0 for none.

// loss: (rows,), or () with partial (2, rows) float32, of which the first of each are used: sums of losses and of
// weights; denominator () float32, or none; lse, entropy (rows,) float32 and correct (rows,) bool, or none of them.
Unreadable cross_entropy_forward(const Tensor& x, const Tensor& target, const Tensor& weight, const Tensor& loss,
                                 const Tensor& statistics, const Tensor& partial, const Tensor& denominator,
                                 const Tensor& lse, const Tensor& entropy, const Tensor& correct, int64_t ignore_index,
                                 double smoothing, double z_loss, double softcap, double logit_scale, Address stream);
// grad: (rows,) or (), of a dtype of its own; denominator () float32, or none. dx may be x.
Unreadable cross_entropy_backward(const Tensor& x, const Tensor& target, const Tensor& weight, const Tensor& statistics,
                                  const Tensor& grad, const Tensor& denominator, const Tensor& dx,
                                  int64_t ignore_index, double smoothing, double z_loss, double softcap,
                                  double logit_scale, Address stream);

}  // namespace gptkern
