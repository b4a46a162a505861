// Every piece of inline PTX, each beside its meaning in the emulator. Kernels use these and write no asm.
//
// Layout of the operands of mma.sync in a warp, with g = lane / 4 and t = lane % 4 (PTX ISA, "Matrix Fragments"):
//   m16n8k16, 16-bit   a[0] = A[g][2t, 2t+1]      a[1] = A[g+8][2t, 2t+1]
//                      a[2] = A[g][2t+8, 2t+9]    a[3] = A[g+8][2t+8, 2t+9]
//                      b[0] = B[2t, 2t+1][g]      b[1] = B[2t+8, 2t+9][g]
//   m16n8k32, int8     a[0] = A[g][4t .. 4t+3]    a[1] = A[g+8][4t .. 4t+3]
//                      a[2] = A[g][4t+16 .. +19]  a[3] = A[g+8][4t+16 .. +19]
//                      b[0] = B[4t .. 4t+3][g]    b[1] = B[4t+16 .. +19][g]
//   both               d[0] = D[g][2t]            d[1] = D[g][2t+1]
//                      d[2] = D[g+8][2t]          d[3] = D[g+8][2t+1]
// All 32 lanes call a matrix instruction together.
#pragma once

#include "types.cuh"

namespace gptkern {

#ifndef GPTKERN_EMULATED
namespace detail {
GPTKERN_DEVICE unsigned shared_address(const void* pointer) { return unsigned(__cvta_generic_to_shared(pointer)); }
}  // namespace detail
#endif

// --- Matrix instructions --------------------------------------------------------------------------------------------

// D (16×8, float32) += A (16×16) · B (16×8), T: float16 or bfloat16, rounded to float32 in an order of the unit's own.
template <class T>
GPTKERN_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] GPTKERN_SITE) {
    static_assert(std::is_same_v<T, float16> || std::is_same_v<T, bfloat16>);
#ifdef GPTKERN_EMULATED
    emulator::mma_m16n8k16(std::is_same_v<T, bfloat16>, d, a, b, site);
#else
    if constexpr (std::is_same_v<T, float16>)
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    else
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// D (16×8, int32) += A (16×32, int8) · B (32×8, int8), exactly.
GPTKERN_DEVICE void mma_m16n8k32_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] GPTKERN_SITE) {
#ifdef GPTKERN_EMULATED
    emulator::mma_m16n8k32_s8(d, a, b, site);
#else
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// --- Shared memory to matrix operands -------------------------------------------------------------------------------
// Each loads matrices of 8×8 16-bit values. Lane 8m + i gives the address of row i of matrix m (16 bytes, aligned to
// 16); of x2, lanes 16 to 31 give any readable address. r[m] is M_m[g][2t, 2t+1]; transposed: M_m[2t, 2t+1][g].

GPTKERN_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row GPTKERN_SITE) {
#ifdef GPTKERN_EMULATED
    emulator::ldmatrix(r, 4, false, row, site);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(detail::shared_address(row))
                 : "memory");
#endif
}

GPTKERN_DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* row GPTKERN_SITE) {
#ifdef GPTKERN_EMULATED
    emulator::ldmatrix(r, 2, false, row, site);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(detail::shared_address(row))
                 : "memory");
#endif
}

GPTKERN_DEVICE void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row GPTKERN_SITE) {
#ifdef GPTKERN_EMULATED
    emulator::ldmatrix(r, 4, true, row, site);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(detail::shared_address(row))
                 : "memory");
#endif
}

GPTKERN_DEVICE void ldmatrix_x2_transposed(uint32_t (&r)[2], const void* row GPTKERN_SITE) {
#ifdef GPTKERN_EMULATED
    emulator::ldmatrix(r, 2, true, row, site);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(detail::shared_address(row))
                 : "memory");
#endif
}

// --- Asynchronous copies, global to shared memory -------------------------------------------------------------------
// A thread's copies since its last commit are a group. After cp_async_wait<N>() all of the thread's groups but the
// newest N have landed, for that thread alone: a __syncthreads() after it shows them to the block. Until then the
// destination holds anything at all.

// BYTES: 4, 8 or 16, the alignment of both addresses. Where `in_range` is false nothing is read (global may be any
// pointer) and zeros land.
template <int BYTES>
GPTKERN_DEVICE void cp_async(void* shared, const void* global, bool in_range = true GPTKERN_SITE) {
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
#ifdef GPTKERN_EMULATED
    emulator::cp_async(shared, global, BYTES, in_range, site);
#else
    unsigned bytes = in_range ? BYTES : 0;
    if constexpr (BYTES == 16)
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(detail::shared_address(shared)),
                     "l"(__cvta_generic_to_global(global)), "r"(bytes)
                     : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(detail::shared_address(shared)),
                     "l"(__cvta_generic_to_global(global)), "r"(bytes), "n"(BYTES)
                     : "memory");
#endif
}

GPTKERN_DEVICE void cp_async_commit() {
#ifdef GPTKERN_EMULATED
    emulator::cp_async_commit();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <int NEWEST>
GPTKERN_DEVICE void cp_async_wait() {
#ifdef GPTKERN_EMULATED
    emulator::cp_async_wait(NEWEST);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(NEWEST) : "memory");
#endif
}

// --- Registers ------------------------------------------------------------------------------------------------------

// The value itself, in the pass >= 0 of a loop, as one that changes from pass to pass as far as the compiler can tell: what
// is computed from it is computed in each pass, and holds no registers across the loop.
GPTKERN_DEVICE int not_hoisted(int value, [[maybe_unused]] int pass) {
#ifndef GPTKERN_EMULATED
    // value + (pass < 0 ? -1 : 0). ptxas sees through an asm without instructions.
    asm volatile("{ .reg .s32 sign; shr.s32 sign, %1, 31; add.s32 %0, %0, sign; }" : "+r"(value) : "r"(pass));
#endif
    return value;
}

// threadIdx.x, read anew where it stands: no register keeps it.
GPTKERN_DEVICE int thread_index_anew() {
#ifdef GPTKERN_EMULATED
    return int(threadIdx.x);
#else
    int index;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
    return index;
#endif
}

// --- Arithmetic -----------------------------------------------------------------------------------------------------

// 2^x to 2 units in the last place of float32; 2^-inf = 0, and results below 2^-126 are 0.
GPTKERN_DEVICE float exp2_approx(float x) {
#ifdef GPTKERN_EMULATED
    float y = std::exp2(x);
    return y < 0x1p-126f ? 0.0f : y;
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// 1 / x to 1 unit in the last place, for x of at least 2^-126; 0 beyond 2^126. A division without a slow path to call.
GPTKERN_DEVICE float reciprocal_approx(float x) {
#ifdef GPTKERN_EMULATED
    float y = 1.0f / x;
    return y < 0x1p-126f ? 0.0f : y;
#else
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// a / b rounded correctly, where the compiler's default may be replaced by a faster one.
GPTKERN_DEVICE float divide_rn(float a, float b) {
#ifdef GPTKERN_EMULATED
    return a / b;
#else
    return __fdiv_rn(a, b);
#endif
}

// The same value, of which the compiler does not know where it comes from: what depends on it is computed here and now,
// not kept in registers from before, or from before a loop.
GPTKERN_DEVICE uint32_t opaque(uint32_t value) {
#ifndef GPTKERN_EMULATED
    asm volatile("" : "+r"(value));
#endif
    return value;
}

// Rounds to the nearest integer, ties to even.
GPTKERN_DEVICE int round_to_int(float x) {
#ifdef GPTKERN_EMULATED
    return int(std::nearbyint(x));
#else
    return __float2int_rn(x);
#endif
}

}  // namespace gptkern
