// cross_entropy, backward: of what forward.cu has kept of each row.
//
//     p_j  = exp(s_j - m - log_total)                                   s: the scores (cross_entropy.cuh)
//     dx_j = g * ds/dx * (p_j * (rest + 2 * z_loss * lse * w_y)  -  rest_j  +  (1 - e) * w_y * (p_j - [j = y]))
//     p_y - 1 = -exp(log_others - log_total),  rest_j = e / C * w_j
//
// Memory is the floor: 2 elements a class, x in and dx out, and 16 bytes a row. Rows are cut into chunks, a block each:
// no class needs another one. dx may be x itself: a thread writes what it has read, and nothing else reads it. Of an
// ignored row nothing is read, and zeros are written.
#include "cross_entropy/cross_entropy.cuh"

namespace gptkern {
namespace {

// Batches of a chunk: a block's threads read a row's statistics for so many.
constexpr int BATCHES = 2;

struct Backward {
    Call of;
    const float* statistics;   // (4, rows)
    const void* grad;          // (rows,) where `each`, else (); of grad_dtype
    const float* denominator;  // (), or null
    Rows dx;                   // (rows, classes)
    int grad_dtype;
    bool each;
    int steps;  // vectors of a thread, of a chunk
};

template <int BYTES, bool PLAIN>
__global__ void __launch_bounds__(MOST_LANES) cross_entropy_backward_kernel(const __grid_constant__ Backward backward) {
    constexpr int V = 16 / BYTES;
    const Call& call = backward.of;
    const int group = int(threadIdx.x) / call.lanes, lane = int(threadIdx.x) % call.lanes;
    const int64_t row = int64_t(blockIdx.x) * (int(blockDim.x) / call.lanes) + group;
    if (row >= call.rows) return;
    const Line<BYTES> dx_line(backward.dx.start, row * backward.dx.stride, 1, true);
    const Columns<V> columns{lane, call.lanes, dx_line.shift()};
    const auto x_line = line_of<V, BYTES>(call.x, row, 0, columns.shift);
    const int first = int(blockIdx.y) * backward.steps, last = first + backward.steps, end = call.classes;

    const Target target = target_of(call, row);
    const int y = target.y;
    if (y == NO_CLASS) {
        float filling[V];
#pragma unroll
        for (int e = 0; e < V; ++e) filling[e] = target.counts ? NOT_A_NUMBER : 0.0f;
        for (int i = first; i < last && columns[i] < end; ++i) store(dx_line, columns[i], end, filling, call.is_half);
        return;
    }
    auto kept = [&](int k) { return load_global(backward.statistics + (k * call.rows + row)); };
    const float m = kept(0), log_total = kept(1);
    const float of_target = -exp_of(kept(2) - log_total);
    // rest + 2 * z_loss * lse * w_y
    const float factor = kept(3) + 2.0f * call.z_loss * (m + log_total) * target.own;
    const float target_factor = (1.0f - call.smoothing) * target.own, of_p = factor + target_factor;
    float g = value_at(backward.grad, backward.grad_dtype, backward.each ? row : 0);
    if (backward.denominator) g = divide_rn(g, load_global(backward.denominator));
    const float slope = g * call.scale;

#pragma unroll 1
    for (int i = first; i < last && columns[i] < end; i += BATCH) {
        Raw<BYTES, V> raw[BATCH];
#pragma unroll
        for (int b = 0; b < BATCH; ++b) raw[b] = load<V, Reuse::ONCE>(x_line, columns[i + b], end, end);
#pragma unroll
        for (int b = 0; b < BATCH; ++b) {
            const int n = columns[i + b];
            if (n >= end) break;
            const unsigned target_at = unsigned(y - n);
            float x[V], weight[V];
            to_floats(raw[b], call.is_half, x);
            const bool spread = !PLAIN && call.smoothing > 0.0f;
            if (spread) load_parameter<BYTES>(weight, call.weight, 1.0f, call.is_half, 0, n, end, columns.shift);
#pragma unroll
            for (int e = 0; e < V; ++e) {
                const float p = exp_of(score_of<PLAIN>(call, x[e]) - m - log_total);
                float ds = p * of_p;
                if (target_at == unsigned(e)) ds = p * factor + target_factor * of_target;
                if (spread) ds -= call.share * weight[e];
                ds *= slope;
                if (!PLAIN && call.softcap > 0.0f) {
                    // 1 - tanh(v)² = 4e / (1 + e)², e = exp(-2 |v|): the difference loses all digits where tanh is near 1
                    const float exponential = exp_of(fabsf(x[e] * call.inverse) * -2.0f);
                    const float reciprocal = reciprocal_approx(1.0f + exponential);
                    ds *= 4.0f * exponential * reciprocal * reciprocal;
                }
                x[e] = ds;
            }
            store(dx_line, n, end, x, call.is_half);
        }
    }
}

template <int BYTES>
void launch_backward(const Backward& backward, const LaunchShape& shape, void* stream) {
    if (is_plain(backward.of))
        GPTKERN_LAUNCH((cross_entropy_backward_kernel<BYTES, true>), shape, stream, backward);
    else
        GPTKERN_LAUNCH((cross_entropy_backward_kernel<BYTES, false>), shape, stream, backward);
}

}  // namespace

Unreadable cross_entropy_backward(const Tensor& x, const Tensor& target, const Tensor& weight, const Tensor& statistics,
                                  const Tensor& grad, const Tensor& denominator, const Tensor& dx,
                                  int64_t ignore_index, double smoothing, double z_loss, double softcap,
                                  double logit_scale, Address stream) {
    if (x.elements() == 0) return nullptr;
    const auto stride = row_stride(x), dx_stride = row_stride(dx);
    if (!stride) return &x;
    if (!dx_stride) return &dx;
    for (const Tensor* vector : {&target, &weight, &grad})
        if (!is_contiguous(*vector)) return vector;
    Backward backward{};
    backward.of = call_of(x, *stride, target, weight, ignore_index, smoothing, z_loss, softcap, logit_scale);
    backward.statistics = at<const float>(statistics.address);
    backward.grad = at<const void>(grad.address);
    backward.grad_dtype = grad.dtype;
    backward.each = grad.rank == 1;
    backward.denominator = at<const float>(denominator.address);
    backward.dx = {at<const void>(dx.address), *dx_stride};
    // No sum over a row: a chunk is as good as all of it.
    backward.of.lanes = std::min(backward.of.lanes, BLOCK);
    const int vectors = most_vectors(backward.of.classes, 16 / int(bytes_of(x.dtype)));
    const int of_thread = ceil_div(vectors, backward.of.lanes);
    backward.steps = std::max(BATCH * BATCHES, ceil_div(of_thread, int(MOST_GRID_YZ)));
    const int groups = groups_of(backward.of);
    LaunchShape shape;
    shape.grid_x = ceil_div(backward.of.rows, int64_t(groups));
    shape.grid_y = ceil_div(of_thread, backward.steps);
    shape.threads = unsigned(groups * backward.of.lanes);
    void* on = at<void>(stream);
    if (x.dtype == FLOAT32)
        launch_backward<4>(backward, shape, on);
    else
        launch_backward<2>(backward, shape, on);
    return nullptr;
}

}  // namespace gptkern
