// adamw in CUDA C++: one launch for all tensors of a kind, and the norm of gradients. blocks.cu has averages in 8 bits.
//
// Memory is the floor: gptkern/operators/adamw/contract.py says the bytes an element, 28 of float32 and 14 of bfloat16
// with states like it. A block of threads does one chunk of one tensor, in vectors of 16 bytes of the widest of its
// tensors; which, and where that tensor, its gradient and its states lie, a table on the device says. The element's own
// arithmetic, with a root and two divisions, is some 60 instructions: half of what an H100 issues in the time of 14
// bytes.
//
// float16 and bfloat16 are one kernel's instance, told apart at run time.
#include "adamw/adamw.cuh"

namespace gptkern {
namespace {

struct Call {
    Tables tables;
    Hyper hyper;
    int chunk, places;
    bool amsgrad, param_is_half, grad_is_half, state_is_half;
};

// Elements of a thread's vectors: 16 bytes of the widest tensor.
template <int PARAM_BYTES, int GRAD_BYTES, int STATE_BYTES>
constexpr int ELEMENTS = PARAM_BYTES == 2 && GRAD_BYTES == 2 && STATE_BYTES == 2 ? 8 : 4;

// With 8 elements a thread needs some 70 registers: three blocks of a multiprocessor have room, else four.
template <int PARAM_BYTES, int GRAD_BYTES, int STATE_BYTES>
__global__ void __launch_bounds__(THREADS, ELEMENTS<PARAM_BYTES, GRAD_BYTES, STATE_BYTES> == 8 ? 3 : 4)
    adamw_update_kernel(const __grid_constant__ Call call) {
    constexpr int V = ELEMENTS<PARAM_BYTES, GRAD_BYTES, STATE_BYTES>;
    if (call.hyper.overflowed()) return;
    const Row row = call.tables.row_of(blockIdx.x);
    const int64_t first = (int64_t(blockIdx.x) - row[FIRST_CHUNK]) * call.chunk;
    const int end = int(min(row[COUNT] - first, int64_t(call.chunk)));
    const Update update(call.hyper, row);
    const auto p_line = line_of<PARAM_BYTES>(row, PARAM, first);
    const auto g_line = line_of<GRAD_BYTES>(row, GRAD, first);
    const auto m_line = line_of<STATE_BYTES>(row, EXP_AVG, first);
    const auto v_line = line_of<STATE_BYTES>(row, EXP_AVG_SQ, first);
    const auto largest_line = line_of<STATE_BYTES>(row, call.amsgrad ? MAX_EXP_AVG_SQ : EXP_AVG_SQ, first);

#pragma unroll 1
    for (int n = int(threadIdx.x) * V; n < end; n += THREADS * V) {
        const auto g_raw = load<V, Reuse::ONCE>(g_line, n, end, end);
        const auto p_raw = load<V, Reuse::ONCE>(p_line, n, end, end);
        const auto m_raw = load<V, Reuse::ONCE>(m_line, n, end, end);
        const auto v_raw = load<V, Reuse::ONCE>(v_line, n, end, end);
        Raw<STATE_BYTES, V> largest_raw{};
        if (call.amsgrad) largest_raw = load<V, Reuse::ONCE>(largest_line, n, end, end);
        float g[V], p[V], m[V], v[V], largest[V];
        to_floats(g_raw, call.grad_is_half, g);
        to_floats(p_raw, call.param_is_half, p);
        to_floats(m_raw, call.state_is_half, m);
        to_floats(v_raw, call.state_is_half, v);
        to_floats(largest_raw, call.state_is_half, largest);
#pragma unroll
        for (int e = 0; e < V; ++e) {
            update.average(g[e], m[e], v[e]);
            // NaN stays, as torch.maximum has it.
            const bool stays = call.amsgrad && (largest[e] > v[e] || largest[e] != largest[e]);
            if (!stays) largest[e] = v[e];
            p[e] = update.moved(p[e], m[e], largest[e]);
        }
        if (call.places != NEAREST) round_at_random(p, row, update.t, first + n, call.places);
        store(p_line, n, end, p, call.param_is_half);
        store(m_line, n, end, m, call.state_is_half);
        store(v_line, n, end, v, call.state_is_half);
        if (call.amsgrad) store(largest_line, n, end, largest, call.state_is_half);
    }
}

// --- Norm -------------------------------------------------------------------------------------------------------------

struct Squares {
    Tables tables;
    float* sums;  // (programs,)
    int64_t chunks;
    int chunk, chunks_of_a_sum;
    bool is_half;
};

struct NormShared {
    Scratch scratch;
};

template <int BYTES>
__global__ void __launch_bounds__(THREADS) adamw_squares_kernel(const __grid_constant__ Squares call) {
    constexpr int V = 16 / BYTES, BATCH = 4;
    auto& shared = shared_memory<NormShared>();
    float sum = 0.0f;
#pragma unroll 1
    for (int i = 0; i < call.chunks_of_a_sum; ++i) {
        const int64_t chunk = int64_t(blockIdx.x) * call.chunks_of_a_sum + i;
        if (chunk >= call.chunks) break;
        const Row row = call.tables.row_of(chunk);
        const int64_t first = (chunk - row[FIRST_CHUNK]) * call.chunk;
        const int end = int(min(row[COUNT] - first, int64_t(call.chunk)));
        const auto line = line_of<BYTES>(row, GRAD, first);
#pragma unroll 1
        for (int n = int(threadIdx.x) * V; n < end; n += BATCH * THREADS * V) {
            Raw<BYTES, V> raw[BATCH];
#pragma unroll
            for (int b = 0; b < BATCH; ++b) raw[b] = load<V>(line, n + b * THREADS * V, end, end);
#pragma unroll
            for (int b = 0; b < BATCH; ++b) {
                float g[V], of_vector = 0.0f;
                to_floats(raw[b], call.is_half, g);
#pragma unroll
                for (int e = 0; e < V; ++e) of_vector += g[e] * g[e];
                sum += of_vector;
            }
        }
    }
    sum = over_group<Sum>(sum, THREADS, shared.scratch);
    if (threadIdx.x == 0) store_global(call.sums + blockIdx.x, sum);
}

constexpr int ROOT_THREADS = 1024;

// One block.
__global__ void __launch_bounds__(ROOT_THREADS) adamw_root_kernel(const float* sums,  // (count,)
                                                                  float* norm,        // ()
                                                                  int64_t count) {
    auto& shared = shared_memory<NormShared>();
    float sum = 0.0f;
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < count; i += ROOT_THREADS) sum += load_global_once(sums + i);
    sum = over_group<Sum>(sum, ROOT_THREADS, shared.scratch);
    // ‖g‖ = √(Σ g²)
    if (threadIdx.x == 0) store_global(norm, sqrtf(sum));
}

// --- Launchers --------------------------------------------------------------------------------------------------------

// Calls `with` with the bytes of a dtype, as a constant.
template <class Function>
void by_bytes(int dtype, Function with) {
    if (dtype == FLOAT32)
        with(std::integral_constant<int, 4>{});
    else
        with(std::integral_constant<int, 2>{});
}

}  // namespace

Unreadable adamw_update(const Tensor& table, const Tensor& owners, const Tensor& lr, const Tensor& grad_scale,
                        const Tensor& found_inf, const Tensor& clip, double lr_value, double one_less_beta1,
                        double log_beta1, double beta2, double one_less_beta2, double log_beta2, double eps,
                        double weight_decay, bool maximize, bool amsgrad, int places, int param_dtype, int grad_dtype,
                        int state_dtype, int chunk, Address stream) {
    Call call{};
    call.tables = tables_of(table, owners);
    call.hyper = hyper_of(lr, grad_scale, found_inf, clip, lr_value, one_less_beta1, log_beta1, beta2, one_less_beta2,
                          log_beta2, eps, weight_decay, maximize);
    call.chunk = chunk;
    call.places = places;
    call.amsgrad = amsgrad;
    call.param_is_half = param_dtype == FLOAT16;
    call.grad_is_half = grad_dtype == FLOAT16;
    call.state_is_half = state_dtype == FLOAT16;
    LaunchShape shape;
    shape.grid_x = owners.elements();
    shape.threads = THREADS;
    void* on = at<void>(stream);
    by_bytes(param_dtype, [&](auto param) {
        by_bytes(grad_dtype, [&](auto grad) {
            by_bytes(state_dtype, [&](auto state) {
                constexpr int PARAM = decltype(param)::value, GRAD = decltype(grad)::value;
                constexpr int STATE = decltype(state)::value;
                GPTKERN_LAUNCH((adamw_update_kernel<PARAM, GRAD, STATE>), shape, on, call);
            });
        });
    });
    return nullptr;
}

Unreadable adamw_norm(const Tensor& table, const Tensor& owners, const Tensor& sums, const Tensor& norm,
                      int grad_dtype, int chunk, int chunks_of_a_sum, Address stream) {
    Squares call{};
    call.tables = tables_of(table, owners);
    call.sums = at<float>(sums.address);
    call.chunks = owners.elements();
    call.chunk = chunk;
    call.chunks_of_a_sum = chunks_of_a_sum;
    call.is_half = grad_dtype == FLOAT16;
    LaunchShape shape;
    shape.grid_x = ceil_div(call.chunks, int64_t(chunks_of_a_sum));
    shape.threads = THREADS;
    shape.shared_bytes = sizeof(NormShared);
    void* on = at<void>(stream);
    by_bytes(grad_dtype, [&](auto bytes) {
        GPTKERN_LAUNCH((adamw_squares_kernel<decltype(bytes)::value>), shape, on, call);
    });
    LaunchShape root;
    root.threads = ROOT_THREADS;
    root.shared_bytes = sizeof(NormShared);
    GPTKERN_LAUNCH((adamw_root_kernel), root, on, call.sums, at<float>(norm.address), shape.grid_x);
    return nullptr;
}

}  // namespace gptkern
