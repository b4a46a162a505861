// cross_entropy, forward. backward.cu has the backward.
//
//     lse  = log sum_c exp(s_c)                                        s: the scores (cross_entropy.cuh)
//     loss = (1 - e) * w_y * (lse - s_y)  +  sum_c rest_c * (lse - s_c)  +  z_loss * lse² * w_y
//     rest_c = e / C * w_c                e: the label smoothing
//
// Memory is the floor: C elements a row in, and a few numbers out. A running maximum and sums relative to it take one
// pass over a row of any width. Some 8 instructions and one exponential an element of 2 bytes are under what an H100
// issues in that time (128 and 16 a clock and multiprocessor, for 14.5 bytes).
//
// The target's class is left out of the running sums and added at the end, so that what is left of a loss near 0 and of
// p_y - 1 = -exp(log_others - log_total) has all its digits. Its score is one more read, of a line that the row's walk
// reads too.
//
// Groups of a block add their losses, and a second kernel adds those of the blocks, in a fixed order.
#include "cross_entropy/cross_entropy.cuh"

namespace gptkern {
namespace {

struct Forward {
    Call of;
    void* loss;         // (rows,) of loss_dtype, or null where losses are summed
    float* partial;     // (2, rows): sums of losses and of weights, a block each; or null
    float* statistics;  // (4, rows)
    float* lse;         // (rows,), or null, as entropy and correct
    float* entropy;
    uint8_t* correct;
    int loss_dtype;
};

constexpr int SUMS = 5;  // of a row: others, product, spread, rest, beaten

struct ForwardShared {
    Scratch largest, sums[SUMS];
    float losses[2][BLOCK];  // of groups: loss and weight
};

GPTKERN_DEVICE void store_as(void* to, int dtype, int64_t index, float value) {
    if (dtype == FLOAT32)
        store_global(static_cast<float*>(to) + index, value);
    else
        store_global(static_cast<uint16_t*>(to) + index,
                     uint16_t(dtype == FLOAT16 ? pack<float16>(value, 0.0f) : pack<bfloat16>(value, 0.0f)));
}

// Sums along a row, of the thread's classes but the target's, relative to the largest score so far.
struct Running {
    float m = -INFINITE;
    float others = 0.0f;                // sum of exp(s_c - m)
    float product = 0.0f;               // sum of exp(s_c - m) * (s_c - m)
    float spread = 0.0f, rest = 0.0f;   // sum of rest_c * (s_c - reference), and of rest_c, of all classes
    bool beaten = false;                // a class is likelier than the target's, or as likely and before it

    GPTKERN_DEVICE void move(float larger) {
        const float moved = finite(m) - finite(larger), factor = exp_of(m - finite(larger));
        product = (product + moved * others) * factor;
        others *= factor;
        m = larger;
    }
};

template <int BYTES, bool PLAIN>
__global__ void __launch_bounds__(MOST_LANES) cross_entropy_forward_kernel(const __grid_constant__ Forward forward) {
    constexpr int V = 16 / BYTES;
    auto& shared = shared_memory<ForwardShared>();
    const Call& call = forward.of;
    const int group = int(threadIdx.x) / call.lanes, lane = int(threadIdx.x) % call.lanes;
    const int groups = int(blockDim.x) / call.lanes;
    const int64_t row = int64_t(blockIdx.x) * groups + group;
    const Target target = target_of(call, row);
    const int y = target.y, end = y == NO_CLASS ? 0 : call.classes;
    const Line<BYTES> x_line(call.x.start, row * call.x.stride, 1, true);
    const Columns<V> columns{lane, call.lanes, x_line.shift()};
    const float x_y = end ? value_at(x_line.start, dtype_of<BYTES>(call), y) : NOT_A_NUMBER;
    const float s_y = score_of<PLAIN>(call, x_y);
    const bool stats = !PLAIN && forward.lse, spread = !PLAIN && call.smoothing > 0.0f;
    // What spread is summed relative to: near the loss, and no infinity.
    const float reference = finite(s_y);
    // Which class is likeliest the softcap's rounding must not say. NaN counts as the largest.
    const float z_y = x_y != x_y ? INFINITE : x_y * call.scale;

    Running sums;
#pragma unroll 1
    for (int i = 0; columns[i] < end; i += BATCH) {
        Raw<BYTES, V> raw[BATCH];
#pragma unroll
        for (int b = 0; b < BATCH; ++b) raw[b] = load<V, Reuse::ONCE>(x_line, columns[i + b], end, end);
#pragma unroll
        for (int b = 0; b < BATCH; ++b) {
            const int n = columns[i + b];
            if (n >= end) break;
            const unsigned target_at = unsigned(y - n);  // below V: in this vector
            float s[V];
            to_floats(raw[b], call.is_half, s);
            if (stats) {
                float largest = -INFINITE;
#pragma unroll
                for (int e = 0; e < V; ++e) {
                    float z = s[e] != s[e] ? INFINITE : s[e] * call.scale;
                    if (unsigned(n + e) >= unsigned(end)) z = -INFINITE;
                    if (target_at < unsigned(V)) {
                        sums.beaten |= e < int(target_at) ? n + e >= 0 && z >= z_y : e > int(target_at) && z > z_y;
                        z = -INFINITE;
                    }
                    largest = fmaxf(largest, z);
                }
                if (target_at >= unsigned(V)) sums.beaten |= n < y ? largest >= z_y : largest > z_y;
            }
#pragma unroll
            for (int e = 0; e < V; ++e) s[e] = score_of<PLAIN>(call, s[e]);
            if (spread) {
                float weight[V];
                load_parameter<BYTES>(weight, call.weight, 1.0f, call.is_half, 0, n, end, columns.shift);
#pragma unroll
                for (int e = 0; e < V; ++e) {
                    if (unsigned(n + e) >= unsigned(end)) continue;
                    const float rest = call.share * weight[e];
                    sums.rest += rest;
                    sums.spread += rest * (s[e] - reference);
                }
            }
            fill_outside(s, n, end, -INFINITE);
            if (target_at < unsigned(V)) {
#pragma unroll
                for (int e = 0; e < V; ++e)
                    if (e == int(target_at)) s[e] = -INFINITE;
            }
            float largest = s[0];
#pragma unroll
            for (int e = 1; e < V; ++e) largest = fmaxf(largest, s[e]);
            if (largest > sums.m) sums.move(largest);
            const float m = finite(sums.m);
            float others = 0.0f, product = 0.0f;
#pragma unroll
            for (int e = 0; e < V; ++e) {
                const float difference = s[e] - m, exponential = exp_of(difference);
                others += exponential;
                // Far below the maximum exp is 0, and so is the product.
                if (stats) product += exponential * fmaxf(difference, -200.0f);
            }
            sums.others += others;
            sums.product += product;
        }
    }

    // Of the group: all relative to the row's largest score.
    const float largest = over_group<Largest>(sums.m, call.lanes, shared.largest);
    sums.move(largest);
    if (PLAIN) {
        sums.others = over_group<Sum>(sums.others, call.lanes, shared.sums[0]);
    } else {
        float values[SUMS] = {sums.others, sums.product, sums.spread, sums.rest, sums.beaten ? 1.0f : 0.0f};
        over_group<Sum>(values, call.lanes, shared.sums);
        sums.others = values[0];
        sums.product = values[1];
        sums.spread = values[2];
        sums.rest = values[3];
        sums.beaten = values[4] > 0.0f;
    }
    const float m = fmaxf(largest, s_y);
    sums.move(m);

    // lse - s_y, with the digits of a loss near 0: where s_y is the largest, exp(s_y - m) is 1
    const float distance = m - s_y, e_y = exp_of(s_y - finite(m));
    const float log_total = distance == 0.0f ? log1pf(sums.others) : logf(sums.others + e_y), lse = m + log_total;
    // Without weights the classes' shares sum to all of it.
    const float rest = PLAIN || !call.weight.values ? call.smoothing : sums.rest;
    // (1 - e) * w_y * (lse - s_y) + sum_c rest_c * (lse - s_c)
    float loss = (1.0f - call.smoothing) * target.own * (distance + log_total);
    if (spread) loss += rest * (m - reference + log_total) - sums.spread;
    // + z_loss * lse² * w_y
    if (call.z_loss > 0.0f) loss += call.z_loss * lse * lse * target.own;
    if (!target.counts) loss = 0.0f;

    if (lane == 0 && row < call.rows) {
        const float kept[4] = {m, log_total, logf(sums.others), rest};
        for (int k = 0; k < 4; ++k)
            store_global(forward.statistics + (k * call.rows + row), target.counts ? kept[k] : 0.0f);
        if (stats) {
            // -sum p_c log p_c = log_total - sum exp(s_c - m) * (s_c - m) / total
            const float product = sums.product + (e_y == 0.0f ? 0.0f : e_y * (s_y - m));
            const float entropy = log_total - product / (sums.others + e_y);
            store_global(forward.lse + row, target.counts ? lse : 0.0f);
            store_global(forward.entropy + row, target.counts ? entropy : 0.0f);
            store_global(forward.correct + row, uint8_t(y != NO_CLASS && !sums.beaten));
        }
        if (forward.loss) store_as(forward.loss, forward.loss_dtype, row, loss);
    }
    if (!forward.partial) return;
    // Of the block.
    float both[2] = {loss, target.own};
    if (groups > 1) {
        if (lane == 0)
            for (int k = 0; k < 2; ++k) store_shared(&shared.losses[k][group], both[k]);
        __syncthreads();
        if (threadIdx.x >= WARP) return;
        for (int k = 0; k < 2; ++k) {
            both[k] = 0.0f;
            for (int g = int(threadIdx.x); g < groups; g += WARP) both[k] += load_shared(&shared.losses[k][g]);
            both[k] = warp_sum(both[k]);
        }
    }
    if (threadIdx.x == 0)
        for (int k = 0; k < 2; ++k) store_global(forward.partial + (k * call.rows + blockIdx.x), both[k]);
}

// --- The sum over rows ------------------------------------------------------------------------------------------------

constexpr int REDUCE_THREADS = 1024;

struct SumShared {
    Scratch scratch[2];
};

// One block: loss = sum of losses, divided by the sum of weights where that is asked for.
__global__ void __launch_bounds__(REDUCE_THREADS) cross_entropy_reduce_kernel(
    const float* partial,  // (2, pitch): losses and weights, of which there are `count`
    float* denominator,    // (), or null
    void* loss,            // () of `dtype`
    int dtype, int64_t pitch, int64_t count) {
    auto& shared = shared_memory<SumShared>();
    float sums[2] = {0.0f, 0.0f};
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < count; i += REDUCE_THREADS) {
        sums[0] += load_global_once(partial + i);
        if (denominator) sums[1] += load_global_once(partial + (pitch + i));
    }
    over_group<Sum>(sums, REDUCE_THREADS, shared.scratch);
    if (threadIdx.x != 0) return;
    if (denominator) {
        store_global(denominator, sums[1]);
        sums[0] = divide_rn(sums[0], sums[1]);
    }
    store_as(loss, dtype, 0, sums[0]);
}

template <int BYTES>
void launch_forward(const Forward& forward, const LaunchShape& shape, void* stream) {
    if (is_plain(forward.of) && !forward.lse)
        GPTKERN_LAUNCH((cross_entropy_forward_kernel<BYTES, true>), shape, stream, forward);
    else
        GPTKERN_LAUNCH((cross_entropy_forward_kernel<BYTES, false>), shape, stream, forward);
}

}  // namespace

Unreadable cross_entropy_forward(const Tensor& x, const Tensor& target, const Tensor& weight, const Tensor& loss,
                                 const Tensor& statistics, const Tensor& partial, const Tensor& denominator,
                                 const Tensor& lse, const Tensor& entropy, const Tensor& correct, int64_t ignore_index,
                                 double smoothing, double z_loss, double softcap, double logit_scale, Address stream) {
    const auto stride = row_stride(x);
    if (!stride) return &x;
    for (const Tensor* vector : {&target, &weight})
        if (!is_contiguous(*vector)) return vector;
    Forward forward{};
    forward.of = call_of(x, *stride, target, weight, ignore_index, smoothing, z_loss, softcap, logit_scale);
    forward.loss = loss.rank == 1 ? at<void>(loss.address) : nullptr;
    forward.partial = at<float>(partial.address);
    forward.statistics = at<float>(statistics.address);
    forward.lse = at<float>(lse.address);
    forward.entropy = at<float>(entropy.address);
    forward.correct = at<uint8_t>(correct.address);
    forward.loss_dtype = loss.dtype;
    void* on = at<void>(stream);
    const int groups = groups_of(forward.of);
    LaunchShape shape;
    shape.grid_x = ceil_div(forward.of.rows, int64_t(groups));
    shape.threads = unsigned(groups * forward.of.lanes);
    shape.shared_bytes = sizeof(ForwardShared);
    if (x.dtype == FLOAT32)
        launch_forward<4>(forward, shape, on);
    else
        launch_forward<2>(forward, shape, on);
    if (loss.rank == 1) return nullptr;
    LaunchShape reduce;
    reduce.threads = REDUCE_THREADS;
    reduce.shared_bytes = sizeof(SumShared);
    GPTKERN_LAUNCH((cross_entropy_reduce_kernel), reduce, on, forward.partial, at<float>(denominator.address),
                   at<void>(loss.address), int(loss.dtype), forward.of.rows, shape.grid_x);
    return nullptr;
}

}  // namespace gptkern
