// attention, backward.
//
//   S = log2(e) scale Q Kᵀ       P = 2^(S − lse)            as the forward left lse: float32, in base 2
//   delta = sum over head_dim of dO · O
//   dV = Pᵀ dO                   dP = dO Vᵀ
//   dS = P · (dP − delta)        dQ = scale dS K            dK = scale dSᵀ Q
//
// Three kernels: delta; dK and dV, a block for 64 keys of one key/value head, which walks past the queries of all
// query heads that read it; dQ, a block for 64 queries of one head, which walks past the keys. Each gradient is
// summed in float32 in registers, by one block, and written once: no atomics, the same bits on every run.
//
// The rows that a block keeps (X) stay in registers for the whole walk, as operand A; the tiles that it walks past
// (Y) come through shared memory by cp.async, two tiles ahead (one at head_dim above 128). Warps work on the same
// rows in pairs, one of each role:
//
//                           role 0           role 1
//   dK/dV   Z = X Y₁ᵀ       Sᵀ = K Qᵀ        dPᵀ = V dOᵀ
//           exchange        gives P          takes P, computes dS
//           sum += Z Y₂     dV += Pᵀ dO      dK += dSᵀ Q
//   dQ      Z = X Y₁ᵀ       S = Q Kᵀ         dP = dO Vᵀ
//           exchange        gives P          gives dP − delta; both compute dS
//           sum += Z Y₂     dQ += dS K       dQ += dS K           each of half of the columns
//
// Both roles do as many products with the same instructions, a warp keeps one accumulator of two, and Z, an
// accumulator, is the second product's operand A without leaving its lane. What is exchanged is float32 and goes
// from a lane to the same lane of the partner: 16 bytes each, no bank conflict. Causal blocks begin, or stop, at the
// diagonal; only tiles on it, or at the last row of Y, are masked. Heavier blocks come first.
//
// What it costs, for n = batch · heads, lengths L and M, head_dim D, 2 bytes an element:
//   operations       14 n L M D: four products for dK/dV and three for dQ, 2 n L M D each; halved by the mask
//   least bytes      about 2 n D (7 L + 6 M / group) + 20 n L: delta reads dO and O, the others Q, K, V and dO each.
//                    Above lengths of some hundreds the products take longer
//   L2 cache         64 rows of X read Y once: 4 · 64 D operations of dK/dV, 3 · 64 D of dQ, for 4 D bytes: 128 and 96
//                    a byte
//   shared memory    for each mma m16n8k16 a warp reads 128 bytes where it has 32 rows, and 256 where 16 (D = 256,
//                    whose accumulators leave no registers for more). A multiprocessor reads 128 bytes a clock, and
//                    does, by mma.sync, an mma in 2 clocks on sm_80 and in more than 1 on sm_90
// Expected to limit: the tensor cores up to D = 128; at D = 256 shared memory as much as they.
//
// dQ from inside the dK/dV kernel would save two of the seven products and cost float32 atomics: 4 D bytes for each
// query and 64 keys, against 640 D operations; at 400 TFLOP/s that were 2.5 TB/s of additions in the L2 cache, from
// fragments that fill half of each sector, besides a buffer to clear and to round, dS through shared memory, and a
// barrier more. It could gain 7/5 at most and might lose; and with dQ from a kernel of its own the backward has the
// same bits on every run whatever torch.use_deterministic_algorithms says, at any number of query heads a key/value
// head.
//
// parts: GPTKERN_HEAD_DIM = 64, 80, 96, 128, 256
#include "attention/backward.cuh"

namespace gptkern {

// Launches the kernels whose tiles are D wide.
template <int D>
void attention_backward_of_width(const AttentionBackward& call, Dtype dtype, void* stream);

#ifdef GPTKERN_HEAD_DIM

namespace {

// --- delta -----------------------------------------------------------------------------------------------------------

constexpr int DELTA_THREADS = 256;

// Lanes that share a row: 16 bytes each, a power of two for the sum.
template <int D>
constexpr int DELTA_LANES = D <= 64 ? 8 : D <= 128 ? 16 : 32;
template <int D>
constexpr int DELTA_ROWS = DELTA_THREADS / DELTA_LANES<D>;

// Memory: reads dO and O once.
template <class T, int D>
__global__ void __launch_bounds__(DELTA_THREADS) attention_backward_delta(AttentionBackward call) {
    constexpr int LANES = DELTA_LANES<D>, ROWS = DELTA_ROWS<D>;
    using Chunk = Vector<T, 8>;
    int blocks = ceil_div(call.length_q, ROWS);
    int start = int(blockIdx.x) % blocks * ROWS, batch_head = int(blockIdx.x) / blocks;
    int batch = batch_head / call.heads, head = batch_head % call.heads;
    int row = start + int(threadIdx.x) / LANES, column = int(threadIdx.x) % LANES * 8;

    float sum = 0.0f;
    if (row < call.length_q && column < call.head_dim) {
        auto grad = load_global(reinterpret_cast<const Chunk*>(call.grad_output.row<T>(batch, head, row) + column));
        auto output = load_global_once(reinterpret_cast<const Chunk*>(call.output.row<T>(batch, head, row) + column));
#pragma unroll
        for (int i = 0; i < 8; ++i) sum += to_float(grad[i]) * to_float(output[i]);
    }
    // delta = sum over head_dim of dO · O
    sum = warp_sum<LANES>(sum);
    if (row < call.length_q && column == 0)
        store_global(call.delta + int64_t(batch_head) * call.length_q + row, sum);
}

// --- dK and dV -------------------------------------------------------------------------------------------------------

template <class T, int D>
__global__ void __launch_bounds__(Sizes<D>::THREADS, Sizes<D>::BLOCKS) attention_backward_key_value(
    AttentionBackward call) {
    using S = Sizes<D>;
    constexpr int KEYS = S::X_ROWS, QUERIES = S::Y_ROWS, STAGES = S::STAGES, N_TILES = D / 8;
    static_assert(S::ROLE_THREADS >= QUERIES);
    auto& shared = shared_memory<Layout<T, D, 1>>();

    // The first keys are seen by the most queries: their block comes first.
    int blocks = ceil_div(call.length_k, KEYS);
    int start = int(blockIdx.x) % blocks * KEYS, batch_head = int(blockIdx.x) / blocks;
    int batch = batch_head / call.kv_heads, kv_head = batch_head % call.kv_heads;
    int group = call.heads / call.kv_heads;
    int thread = int(threadIdx.x) % S::ROLE_THREADS, role = warp_of_thread() / S::ROW_WARPS;
    int row_warp = warp_of_thread() % S::ROW_WARPS;
    int g = lane_of_thread() / 4, t = lane_of_thread() % 4;
    int warp_row = row_warp * S::WARP_ROWS;

    // Keys past the last one are zeros, and what they get is not stored.
    Kept<D> x;  // K or V
    load_kept(x, shared, call.key.row<T>(batch, kv_head, start), call.key.row_stride,
              call.value.row<T>(batch, kv_head, start), call.value.row_stride, call.length_k - start, call.head_dim,
              role, warp_row);

    // The walk: for each head of the group, the tiles of queries from the first that sees one of the keys.
    int tiles = ceil_div(call.length_q, QUERIES);
    int first_tile = call.is_causal ? min(start / QUERIES, tiles) : 0;
    int steps = (tiles - first_tile) * group;

    int copy_head = kv_head * group, copy_tile = first_tile;
    auto copy_next = [&](int stage, bool more) {
        if (more) {
            int query = copy_tile * QUERIES, rows = call.length_q - query;
            // Each role copies what it multiplies first, and what belongs to the rows of it: lse or delta.
            load_tile<S::ROLE_THREADS>(shared.y[stage][role],
                                       role == 0 ? call.query.row<T>(batch, copy_head, query)
                                                 : call.grad_output.row<T>(batch, copy_head, query),
                                       role == 0 ? call.query.row_stride : call.grad_output.row_stride, rows,
                                       call.head_dim, thread);
            // delta is there where dK is asked for.
            if (thread < QUERIES && (role == 0 || call.grad_key.address))
                cp_async<4>(&shared.statistics[stage][role][thread],
                            (role == 0 ? call.lse : call.delta) +
                                (int64_t(batch) * call.heads + copy_head) * call.length_q + query + thread,
                            thread < rows);
            if (++copy_tile == tiles) copy_tile = first_tile, ++copy_head;
        }
        cp_async_commit();
    };
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) copy_next(i, i < steps);

    float sum[S::M_TILES][N_TILES][4] = {};  // dV or dK / scale
    Scores<D> z;
    // Keys of this warp's lane: first_key + 16 m + 8 half.
    int first_key = start + warp_row + g;
    bool needed = role == 0 ? call.grad_value.address != 0 : call.grad_key.address != 0;

    int tile = first_tile, stage = 0;
    for (; steps > 0; --steps) {
        cp_async_wait<STAGES - 2>();
        // The tile has come, for all threads, and nobody reads the stage that the next copies write, nor the exchange.
        __syncthreads();
        copy_next(stage == 0 ? STAGES - 1 : stage - 1, steps >= STAGES);

#pragma unroll
        for (int part = 0; part < S::PARTS; ++part) {
            int row = part * S::Z_COLUMNS;
            int first_query = tile * QUERIES + row;
            const float* statistics = shared.statistics[stage][role] + row;
            // Some of the warp's keys are. Where the registers are all taken, tiles on the diagonal are computed whole.
            bool seen = D > 128 || !call.is_causal || first_query + S::Z_COLUMNS > start + warp_row;
            // Sᵀ = K Qᵀ, dPᵀ = V dOᵀ
            if (seen && (role == 0 || needed)) multiply(z, x, shared.y[stage][role], row);
            if (seen && role == 0) {
                // P = 2^(S − lse)
#pragma unroll
                for (int n = 0; n < S::Z_TILES; ++n) {
                    auto lse = load_shared(reinterpret_cast<const Vector<float, 2>*>(statistics + 8 * n + 2 * t));
#pragma unroll
                    for (int m = 0; m < S::M_TILES; ++m)
#pragma unroll
                        for (int i = 0; i < 4; ++i)
                            z[m][n][i] = exp2_approx(z[m][n][i] * call.scale_log2e - lse[i % 2]);
                }
                bool diagonal = call.is_causal && first_query < start + KEYS - 1;
                if (diagonal || first_query + S::Z_COLUMNS > call.length_q) {
#pragma unroll
                    for (int n = 0; n < S::Z_TILES; ++n)
#pragma unroll
                        for (int m = 0; m < S::M_TILES; ++m)
#pragma unroll
                            for (int i = 0; i < 4; ++i) {
                                int key = first_key + 16 * m + i / 2 * 8, query = first_query + 8 * n + 2 * t + i % 2;
                                if (query >= call.length_q || (call.is_causal && key > query)) z[m][n][i] = 0.0f;
                            }
                }
                give<D>(shared.exchange[part][0], row_warp, z);
            }
            __syncthreads();
            if (seen && role == 1 && needed) {
                // dS = P · (dP − delta)
#pragma unroll
                for (int n = 0; n < S::Z_TILES; ++n) {
                    auto delta = load_shared(reinterpret_cast<const Vector<float, 2>*>(statistics + 8 * n + 2 * t));
#pragma unroll
                    for (int m = 0; m < S::M_TILES; ++m) {
                        auto p = load_shared(&shared.exchange[part][0][row_warp][m][n][lane_of_thread()]);
#pragma unroll
                        for (int i = 0; i < 4; ++i) z[m][n][i] = p[i] * (z[m][n][i] - delta[i % 2]);
                    }
                }
            }
            // dV += Pᵀ dO, dK += dSᵀ Q
            if (seen && needed) accumulate<T, D, N_TILES>(sum, z, shared.y[stage][1 - role], row, 0);
        }

        stage = stage + 1 == STAGES ? 0 : stage + 1;
        if (++tile == tiles) tile = first_tile;
    }
    cp_async_wait<0>();
    // The results go where the last tile was.
    __syncthreads();
    if (!needed) return;
    const auto& gradient = role == 0 ? call.grad_value : call.grad_key;
    round_to_tile<T, D, N_TILES>(shared.x(role), warp_row, 0, role == 0 ? 1.0f : call.scale, sum);
    warp_sync();
    store_tile<S::WARP_ROWS, WARP>(shared.x(role), warp_row, gradient.row<T>(batch, kv_head, start + warp_row),
                                   gradient.row_stride, call.length_k - start - warp_row, call.head_dim,
                                   lane_of_thread());
}

// --- dQ --------------------------------------------------------------------------------------------------------------

template <class T, int D>
__global__ void __launch_bounds__(Sizes<D>::THREADS, Sizes<D>::BLOCKS) attention_backward_query(
    AttentionBackward call) {
    using S = Sizes<D>;
    constexpr int QUERIES = S::X_ROWS, KEYS = S::Y_ROWS, STAGES = S::STAGES, N_TILES = ceil_div(D / 16, S::ROLES) * 2;
    auto& shared = shared_memory<Layout<T, D, 2>>();

    // The last queries see the most keys: their block comes first.
    int blocks = ceil_div(call.length_q, QUERIES);
    int start = (blocks - 1 - int(blockIdx.x) % blocks) * QUERIES, batch_head = int(blockIdx.x) / blocks;
    int batch = batch_head / call.heads, head = batch_head % call.heads;
    int kv_head = head / (call.heads / call.kv_heads);
    int thread = int(threadIdx.x), role = warp_of_thread() / S::ROW_WARPS, row_warp = warp_of_thread() % S::ROW_WARPS;
    int g = lane_of_thread() / 4, t = lane_of_thread() % 4;
    int warp_row = row_warp * S::WARP_ROWS;
    int column = role * 8 * N_TILES;

    Kept<D> x;  // Q or dO
    load_kept(x, shared, call.query.row<T>(batch, head, start), call.query.row_stride,
              call.grad_output.row<T>(batch, head, start), call.grad_output.row_stride, call.length_q - start,
              call.head_dim, role, warp_row);

    int seen = call.is_causal ? min(call.length_k, start + QUERIES) : call.length_k;
    int tiles = ceil_div(seen, KEYS);
    int copy_tile = 0;
    auto copy_next = [&](int stage, bool more) {
        if (more) {
            int key = copy_tile * KEYS, rows = call.length_k - key;
            load_tile<S::THREADS>(shared.y[stage][0], call.key.row<T>(batch, kv_head, key), call.key.row_stride,
                                  rows, call.head_dim, thread);
            load_tile<S::THREADS>(shared.y[stage][1], call.value.row<T>(batch, kv_head, key),
                                  call.value.row_stride, rows, call.head_dim, thread);
            ++copy_tile;
        }
        cp_async_commit();
    };
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) copy_next(i, i < tiles);

    // lse or delta of this lane's queries, first_query + 16 m + 8 half.
    int first_query = start + warp_row + g;
    float statistics[S::M_TILES][2];
#pragma unroll
    for (int m = 0; m < S::M_TILES; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int query = first_query + 16 * m + 8 * half;
            const float* from = (role == 0 ? call.lse : call.delta) + int64_t(batch_head) * call.length_q;
            statistics[m][half] = query < call.length_q ? load_global(from + query) : 0.0f;
        }

    float sum[S::M_TILES][N_TILES][4] = {};  // dQ / scale
    Scores<D> z;
    int stage = 0;
    for (int tile = 0; tile < tiles; ++tile) {
        cp_async_wait<STAGES - 2>();
        // The tile has come, for all threads, and nobody reads the stage that the next copies write, nor the exchange.
        __syncthreads();
        copy_next(stage == 0 ? STAGES - 1 : stage - 1, tile + STAGES - 1 < tiles);

#pragma unroll
        for (int part = 0; part < S::PARTS; ++part) {
            int row = part * S::Z_COLUMNS;
            int first_key = tile * KEYS + row;
            bool sees = !call.is_causal || first_key < start + warp_row + S::WARP_ROWS;  // one of the warp's queries
            // S = Q Kᵀ, dP = dO Vᵀ
            if (sees) multiply(z, x, shared.y[stage][role], row);
            if (sees && role == 0) {
                // P = 2^(S − lse)
#pragma unroll
                for (int m = 0; m < S::M_TILES; ++m)
#pragma unroll
                    for (int n = 0; n < S::Z_TILES; ++n)
#pragma unroll
                        for (int i = 0; i < 4; ++i)
                            z[m][n][i] = exp2_approx(z[m][n][i] * call.scale_log2e - statistics[m][i / 2]);
                bool diagonal = call.is_causal && first_key + S::Z_COLUMNS - 1 > start;
                if (diagonal || first_key + S::Z_COLUMNS > call.length_k) {
#pragma unroll
                    for (int m = 0; m < S::M_TILES; ++m)
#pragma unroll
                        for (int n = 0; n < S::Z_TILES; ++n)
#pragma unroll
                            for (int i = 0; i < 4; ++i) {
                                int key = first_key + 8 * n + 2 * t + i % 2, query = first_query + 16 * m + i / 2 * 8;
                                if (key >= call.length_k || (call.is_causal && key > query)) z[m][n][i] = 0.0f;
                            }
                }
            } else if (sees) {
                // dP − delta
#pragma unroll
                for (int m = 0; m < S::M_TILES; ++m)
#pragma unroll
                    for (int n = 0; n < S::Z_TILES; ++n)
#pragma unroll
                        for (int i = 0; i < 4; ++i) z[m][n][i] -= statistics[m][i / 2];
            }
            if (sees) give<D>(shared.exchange[part][role], row_warp, z);
            __syncthreads();
            if (sees) {
                // dS = P · (dP − delta)
#pragma unroll
                for (int m = 0; m < S::M_TILES; ++m)
#pragma unroll
                    for (int n = 0; n < S::Z_TILES; ++n) {
                        auto others = load_shared(&shared.exchange[part][1 - role][row_warp][m][n][lane_of_thread()]);
#pragma unroll
                        for (int i = 0; i < 4; ++i) z[m][n][i] *= others[i];
                    }
                // dQ += dS K
                accumulate<T, D, N_TILES>(sum, z, shared.y[stage][0], row, column);
            }
        }

        stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
    cp_async_wait<0>();
    // The result goes where the last tile was.
    __syncthreads();
    round_to_tile<T, D, N_TILES>(shared.x(0), warp_row, column, call.scale, sum);
    __syncthreads();
    store_tile<S::X_ROWS, S::THREADS>(shared.x(0), 0, call.grad_query.row<T>(batch, head, start),
                                      call.grad_query.row_stride, call.length_q - start, call.head_dim, thread);
}

// --- Launches --------------------------------------------------------------------------------------------------------

template <class T, int D>
void launch(const AttentionBackward& call, void* stream) {
    using S = Sizes<D>;
    static_assert(sizeof(Layout<T, D, 1>) <= sizeof(Layout<T, D, 2>));
    static_assert(sizeof(Layout<T, D, 2>) <= SHARED_BYTES_EVERYWHERE);
    auto blocks = [&](int length, int rows, int heads) {
        return int64_t(ceil_div(length, rows)) * call.batch * heads;
    };
    bool need_query = call.grad_query.address, need_key = call.grad_key.address, need_value = call.grad_value.address;
    if (need_query || need_key) {
        LaunchShape shape{.grid_x = blocks(call.length_q, DELTA_ROWS<D>, call.heads), .threads = DELTA_THREADS};
        GPTKERN_LAUNCH((attention_backward_delta<T, D>), shape, stream, call);
    }
    if (need_key || need_value) {
        LaunchShape shape{.grid_x = blocks(call.length_k, S::X_ROWS, call.kv_heads),
                          .threads = S::THREADS,
                          .shared_bytes = sizeof(Layout<T, D, 1>)};
        GPTKERN_LAUNCH((attention_backward_key_value<T, D>), shape, stream, call);
    }
    if (need_query) {
        LaunchShape shape{.grid_x = blocks(call.length_q, S::X_ROWS, call.heads),
                          .threads = S::THREADS,
                          .shared_bytes = sizeof(Layout<T, D, 2>)};
        GPTKERN_LAUNCH((attention_backward_query<T, D>), shape, stream, call);
    }
}

}  // namespace

template <>
void attention_backward_of_width<GPTKERN_HEAD_DIM>(const AttentionBackward& call, Dtype dtype, void* stream) {
    if (dtype == FLOAT16)
        launch<float16, GPTKERN_HEAD_DIM>(call, stream);
    else
        launch<bfloat16, GPTKERN_HEAD_DIM>(call, stream);
}

#else

Unreadable attention_backward(const Tensor& grad_output, const Tensor& query, const Tensor& key, const Tensor& value,
                              const Tensor& output, const Tensor& lse, const Tensor& delta, const Tensor& grad_query,
                              const Tensor& grad_key, const Tensor& grad_value, bool is_causal, double scale,
                              Address stream) {
    if (query.elements() == 0 || key.elements() == 0) return nullptr;
    for (const Tensor* tensor : {&grad_output, &query, &key, &value, &output})
        if (!is_readable(*tensor)) return tensor;
    if (!is_contiguous(lse)) return &lse;
    auto rows = [](const Tensor& tensor) {
        if (!tensor.address) return Heads{};
        return Heads{tensor.address, step_of(tensor, 0), step_of(tensor, 1), int(step_of(tensor, 2))};
    };
    const int head_dim = int(query.shape[3]);
    const AttentionBackward call{
        .grad_output = rows(grad_output),
        .query = rows(query),
        .key = rows(key),
        .value = rows(value),
        .output = rows(output),
        .grad_query = rows(grad_query),
        .grad_key = rows(grad_key),
        .grad_value = rows(grad_value),
        .lse = at<const float>(lse.address),
        .delta = at<float>(delta.address),
        .batch = int(query.shape[0]),
        .heads = int(query.shape[1]),
        .kv_heads = int(key.shape[1]),
        .length_q = int(query.shape[2]),
        .length_k = int(key.shape[2]),
        .head_dim = head_dim,
        .scale = float(scale),
        .scale_log2e = float(scale * LOG2E),
        .is_causal = is_causal,
    };
    // The narrowest tile that holds head_dim.
    auto launch = head_dim <= 64    ? attention_backward_of_width<64>
                  : head_dim <= 80  ? attention_backward_of_width<80>
                  : head_dim <= 96  ? attention_backward_of_width<96>
                  : head_dim <= 128 ? attention_backward_of_width<128>
                                    : attention_backward_of_width<256>;
    launch(call, query.dtype, at<void>(stream));
    return nullptr;
}

#endif

}  // namespace gptkern
