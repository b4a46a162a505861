// adamw in CUDA C++ with averages in 8 bits: gptkern/operators/adamw/blockwise.py has the map, update.cu the update.
//
//     x(c) = 10^(i − n) · (0.1 + 0.9 · (c − 2^i + 0.5) / 2^i),   i = floor(log2 c),   relative to x of the largest code
//
// A block of averages is up to 256 elements of one row of dimension 0, and a warp does one at a time, 8 elements a lane:
// its largest magnitude is a reduction over the warp.
#include "adamw/adamw.cuh"

namespace gptkern {
namespace {

// gptkern/operators/adamw/blockwise.py
constexpr int BLOCK = 256, SIGNED = 6, UNSIGNED = 7;
constexpr int V = 4, SLOTS = BLOCK / (WARP * V);

struct Call {
    Tables tables;
    Hyper hyper;
    int blocks, places;
    bool param_is_half, grad_is_half;
};

// 10^exponent, of a loop that is unrolled.
constexpr GPTKERN_DEVICE __host__ float power_of_ten(int exponent) {
    switch (exponent) {
        case -8: return 1e-8f;
        case -7: return 1e-7f;
        case -6: return 1e-6f;
        case -5: return 1e-5f;
        case -4: return 1e-4f;
        case -3: return 1e-3f;
        case -2: return 1e-2f;
        case -1: return 1e-1f;
        case 1: return 1e1f;
        case 2: return 1e2f;
        case 3: return 1e3f;
        case 4: return 1e4f;
        case 5: return 1e5f;
        case 6: return 1e6f;
        case 7: return 1e7f;
    }
    return 1.0f;
}

// x of the largest code.
template <int N>
constexpr float TOP = float(0.1 + 0.9 * ((1 << N) - 0.5) / (1 << N));

// x(c) / TOP of a code from 0 on; 0 of 0.
template <int N>
GPTKERN_DEVICE float magnitude_of(int code) {
    const float c = float(code);
    // i and 2^i, from the bits of the float
    const int bits = __float_as_int(c), i = (bits >> 23) - 127;
    const float width = __int_as_float(bits & 0x7f800000);
    float decade = power_of_ten(-N);
#pragma unroll
    for (int step = 1; step <= N; ++step)
        if (i >= step) decade = power_of_ten(step - N);
    const float x = decade * (0.1f + 0.9f * ((c - width + 0.5f) / fmaxf(width, 1.0f))) * (1.0f / TOP<N>);
    return code > 0 ? x : 0.0f;
}

// The code of a magnitude from 0 to 1, relative to the block's largest; 0 below the least decade.
template <int N>
GPTKERN_DEVICE int code_of(float x) {
    x *= TOP<N>;
    float scale = power_of_ten(N), width = 0.0f;
#pragma unroll
    for (int decade = 0; decade <= N; ++decade)
        if (x >= power_of_ten(decade - N - 1)) {
            width = float(1 << decade);
            scale = power_of_ten(N - decade);
        }
    if (width == 0.0f) return 0;
    // c = 2^i + floor(2^i (x / 10^(i−n) − 0.1) / 0.9)
    const float k = floorf((x * scale - 0.1f) * (width * float(1 / 0.9)));
    return int(width + fminf(fmaxf(k, 0.0f), width - 1.0f));
}

// The largest of the warp, NaN where one is.
GPTKERN_DEVICE float largest_of(float value, bool is_nan) {
    value = warp_max(value);
    return ballot(is_nan) ? __int_as_float(0x7fc00000) : value;
}

template <int PARAM_BYTES, int GRAD_BYTES>
__global__ void __launch_bounds__(THREADS) adamw_update_blocks_kernel(const __grid_constant__ Call call) {
    if (call.hyper.overflowed()) return;
    const Row row = call.tables.row_of(blockIdx.x);
    const int64_t width = row[WIDTH], in_a_row = (width + BLOCK - 1) / BLOCK, all = row[COUNT] / width * in_a_row;
    const int64_t first = (int64_t(blockIdx.x) - row[FIRST_CHUNK]) * call.blocks;
    const int64_t last = min(first + call.blocks, all);
    const Update update(call.hyper, row);
    auto* m_scales = row.pointer<float>(EXP_AVG_SCALE);
    auto* v_scales = row.pointer<float>(EXP_AVG_SQ_SCALE);

#pragma unroll 1
    for (int64_t block = first + warp_of_thread(); block < last; block += THREADS / WARP) {
        const int64_t begin = block / in_a_row * width + block % in_a_row * BLOCK;
        const int end = int(min(width - block % in_a_row * BLOCK, int64_t(BLOCK)));
        const auto p_line = line_of<PARAM_BYTES>(row, PARAM, begin);
        const auto g_line = line_of<GRAD_BYTES>(row, GRAD, begin);
        const auto m_line = line_of<1>(row, EXP_AVG, begin), v_line = line_of<1>(row, EXP_AVG_SQ, begin);
        const float m_scale = load_global_written(m_scales + block), v_scale = load_global_written(v_scales + block);

        float m[SLOTS][V], root[SLOTS][V], m_largest = 0.0f, v_largest = 0.0f;
        bool m_is_nan = false, v_is_nan = false;
#pragma unroll
        for (int slot = 0; slot < SLOTS; ++slot) {
            const int n = (slot * WARP + lane_of_thread()) * V;
            const auto m_codes = load<V, Reuse::ONCE>(m_line, n, end, end);
            const auto v_codes = load<V, Reuse::ONCE>(v_line, n, end, end);
            float g[V], p[V];
            to_floats(load<V, Reuse::ONCE>(g_line, n, end, end), call.grad_is_half, g);
            to_floats(load<V, Reuse::ONCE>(p_line, n, end, end), call.param_is_half, p);
#pragma unroll
            for (int e = 0; e < V; ++e) {
                const int m_code = int(int8_t(m_codes.words[0] >> 8 * e));
                const int v_code = int(v_codes.words[0] >> 8 * e & 0xff);
                const float magnitude = magnitude_of<SIGNED>(m_code < 0 ? -m_code : m_code) * m_scale;
                const float before = magnitude_of<UNSIGNED>(v_code) * v_scale;
                float v = before * before;
                m[slot][e] = m_code < 0 ? -magnitude : magnitude;
                update.average(g[e], m[slot][e], v);
                p[e] = update.moved(p[e], m[slot][e], v);
                root[slot][e] = sqrtf(v);
                // What is beyond the row has no part in the block's largest.
                if (n + e >= end) m[slot][e] = root[slot][e] = 0.0f;
                m_largest = fmaxf(m_largest, fabsf(m[slot][e]));
                v_largest = fmaxf(v_largest, root[slot][e]);
                m_is_nan |= m[slot][e] != m[slot][e];
                v_is_nan |= root[slot][e] != root[slot][e];
            }
            if (call.places != NEAREST) round_at_random(p, row, update.t, begin + n, call.places);
            store(p_line, n, end, p, call.param_is_half);
        }
        m_largest = largest_of(m_largest, m_is_nan);
        v_largest = largest_of(v_largest, v_is_nan);
        const float m_divisor = m_largest == 0.0f ? 1.0f : m_largest, v_divisor = v_largest == 0.0f ? 1.0f : v_largest;
#pragma unroll
        for (int slot = 0; slot < SLOTS; ++slot) {
            const int n = (slot * WARP + lane_of_thread()) * V;
            Raw<1, V> m_codes{}, v_codes{};
#pragma unroll
            for (int e = 0; e < V; ++e) {
                const int magnitude = code_of<SIGNED>(fabsf(m[slot][e]) / m_divisor);
                const int m_code = m[slot][e] < 0.0f ? -magnitude : magnitude;
                // Where a block is not all zeros no root is coded 0: the update would divide by eps alone.
                const int v_code = v_largest == 0.0f ? 0 : max(code_of<UNSIGNED>(root[slot][e] / v_divisor), 1);
                m_codes.words[0] |= uint32_t(uint8_t(m_code)) << 8 * e;
                v_codes.words[0] |= uint32_t(v_code) << 8 * e;
            }
            store(m_line, n, end, m_codes);
            store(v_line, n, end, v_codes);
        }
        if (lane_of_thread() == 0) {
            store_global(m_scales + block, m_largest);
            store_global(v_scales + block, v_largest);
        }
    }
}

}  // namespace

Unreadable adamw_update_blocks(const Tensor& table, const Tensor& owners, const Tensor& lr, const Tensor& grad_scale,
                               const Tensor& found_inf, const Tensor& clip, double lr_value, double one_less_beta1,
                               double log_beta1, double beta2, double one_less_beta2, double log_beta2, double eps,
                               double weight_decay, bool maximize, int places, int param_dtype, int grad_dtype,
                               int blocks, Address stream) {
    Call call{};
    call.tables = tables_of(table, owners);
    call.hyper = hyper_of(lr, grad_scale, found_inf, clip, lr_value, one_less_beta1, log_beta1, beta2, one_less_beta2,
                          log_beta2, eps, weight_decay, maximize);
    call.blocks = blocks;
    call.places = places;
    call.param_is_half = param_dtype == FLOAT16;
    call.grad_is_half = grad_dtype == FLOAT16;
    LaunchShape shape;
    shape.grid_x = owners.elements();
    shape.threads = THREADS;
    void* on = at<void>(stream);
    if (param_dtype == FLOAT32 && grad_dtype == FLOAT32)
        GPTKERN_LAUNCH((adamw_update_blocks_kernel<4, 4>), shape, on, call);
    else if (param_dtype == FLOAT32)
        GPTKERN_LAUNCH((adamw_update_blocks_kernel<4, 2>), shape, on, call);
    else if (grad_dtype == FLOAT32)
        GPTKERN_LAUNCH((adamw_update_blocks_kernel<2, 4>), shape, on, call);
    else
        GPTKERN_LAUNCH((adamw_update_blocks_kernel<2, 2>), shape, on, call);
    return nullptr;
}

}  // namespace gptkern
