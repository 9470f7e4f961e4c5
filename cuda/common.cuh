// What every kernel shares: element types, 16-byte packs, reductions, and the tensor-core instructions.
// Differences between types and between GPU generations live here and nowhere else.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#ifndef __CUDA_ARCH__
#define __CUDA_ARCH__ 0
#endif

#define DEVICE __device__ __forceinline__

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

template <typename T>
__host__ __device__ constexpr T ceil_div(T a, T b) {
    return (a + b - 1) / b;
}

// ---------------------------------------------------------------- order of kernels in a stream
//
// On SM 9.0 and newer a kernel may start before the one ahead of it is done (jit.Kernel): all kernels here wait by
// themselves. What they do before that must not touch what other kernels write, or read. Older GPUs take turns.
// Pointers to what other kernels write, and pointers that are written to, are not __restrict__: what is provably
// constant would be read through a cache that does not know of the wait.

// Wait for the kernels ahead, and see what they wrote.
DEVICE void wait_for_kernels_ahead() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// From here on the next kernel may start; it is held back by its own wait, not by this.
DEVICE void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---------------------------------------------------------------- element types

template <typename A, typename B>
constexpr bool is_same = false;
template <typename A>
constexpr bool is_same<A, A> = true;

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(__half x) { return __half2float(x); }
DEVICE float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
DEVICE float to_float(unsigned char x) { return x; }

template <typename T>
DEVICE T from_float(float x) {
    if constexpr (is_same<T, __half>)
        return __float2half_rn(x);
    else if constexpr (is_same<T, __nv_bfloat16>)
        return __float2bfloat16_rn(x);
    else
        return x;
}

// Two floats as the 32 bits of two 16-bit elements, lo in the low half: the register of an mma fragment.
template <typename T>
DEVICE unsigned pack2(float lo, float hi) {
    static_assert(sizeof(T) == 2);
    union {
        T v[2];
        unsigned bits;
    } u;
    u.v[0] = from_float<T>(lo), u.v[1] = from_float<T>(hi);
    return u.bits;
}

template <typename T>
DEVICE float2 unpack2(unsigned bits) {
    static_assert(sizeof(T) == 2);
    union {
        unsigned bits;
        T v[2];
    } u;
    u.bits = bits;
    return make_float2(to_float(u.v[0]), to_float(u.v[1]));
}

// ---------------------------------------------------------------- packs of N elements, up to 16 bytes an access

template <int BYTES>
struct Word;
template <>
struct Word<1> {
    using type = unsigned char;
};
template <>
struct Word<2> {
    using type = unsigned short;
};
template <>
struct Word<4> {
    using type = unsigned;
};
template <>
struct Word<8> {
    using type = uint2;
};
template <>
struct Word<16> {
    using type = uint4;
};

template <typename T, int N>
union Pack {
    typename Word<sizeof(T) * N>::type word;
    T v[N];
    DEVICE Pack() {}
};

// p must be aligned to N elements.
template <int N, typename T>
DEVICE void load(const T* p, float (&x)[N]) {
    if constexpr (sizeof(T) * N > 16) {  // eight floats: two accesses
        constexpr int M = 16 / sizeof(T);
#pragma unroll
        for (int k = 0; k < N; k += M) load<M>(p + k, reinterpret_cast<float (&)[M]>(x[k]));
    } else {
        Pack<T, N> pack;
        pack.word = *reinterpret_cast<const typename Word<sizeof(T) * N>::type*>(p);
#pragma unroll
        for (int k = 0; k < N; ++k) x[k] = to_float(pack.v[k]);
    }
}

template <int N, typename T>
DEVICE void store(T* p, const float (&x)[N]) {
    if constexpr (sizeof(T) * N > 16) {
        constexpr int M = 16 / sizeof(T);
#pragma unroll
        for (int k = 0; k < N; k += M) store<M>(p + k, reinterpret_cast<const float (&)[M]>(x[k]));
    } else {
        Pack<T, N> pack;
#pragma unroll
        for (int k = 0; k < N; ++k) pack.v[k] = from_float<T>(x[k]);
        *reinterpret_cast<typename Word<sizeof(T) * N>::type*>(p) = pack.word;
    }
}

// ---------------------------------------------------------------- reductions

// Sum over groups of LANES neighbouring lanes, a power of two up to 32; every lane gets its group's.
template <int LANES = WARP>
DEVICE float warp_sum(float x) {
#pragma unroll
    for (int i = LANES / 2; i > 0; i /= 2) x += __shfl_xor_sync(ALL_LANES, x, i);
    return x;
}

template <int LANES = WARP>
DEVICE float warp_max(float x) {
#pragma unroll
    for (int i = LANES / 2; i > 0; i /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, i));
    return x;
}

// Sum over the THREADS of a group: part of a warp, a warp, or the whole block of several warps.
template <int THREADS>
DEVICE float group_sum(float x) {
    if constexpr (THREADS <= WARP) {
        return warp_sum<THREADS>(x);
    } else {
        __shared__ float partial[THREADS / WARP];
        x = warp_sum(x);
        __syncthreads();  // the last call's sums have been read
        if (threadIdx.x % WARP == 0) partial[threadIdx.x / WARP] = x;
        __syncthreads();
        float sum = 0;
#pragma unroll
        for (int i = 0; i < THREADS / WARP; ++i) sum += partial[i];
        return sum;
    }
}

// ---------------------------------------------------------------- functions

// x / 2 (1 + erf(x / sqrt 2)) = x / (1 + exp(-x q(x^2))): the minimax fit of ops/reference.py, exact to a float32
// rounding, and a third of the instructions of erff.
DEVICE float gelu(float x) {
    float z = fminf(fmaxf(x, -5.5f), 5.5f), u = z * z;
    float q = 3.610874488302329e-09f;
    q = fmaf(q, u, -2.6687828835747496e-07f);
    q = fmaf(q, u, 7.938005182950292e-06f);
    q = fmaf(q, u, -1.104788898373954e-04f);
    q = fmaf(q, u, -6.626439426327124e-05f);
    q = fmaf(q, u, 0.07266857475042343f);
    q = fmaf(q, u, 1.5957684516906738f);
    return __fdividef(x, 1.0f + __expf(-z * q));
}

DEVICE float fast_tanh(float x) {
    float t;
    asm("tanh.approx.f32 %0, %1;" : "=f"(t) : "f"(x));
    return t;
}

// gelu(2 x) to within a rounding of a 16-bit type, in half the instructions: by the hardware's tanh of a fitted polynomial.
// The error of the fit to erf is 2.5e-5, that of the hardware's tanh 2^-11.
DEVICE float gelu_of_twice(float x) {
    const float u = fminf(x * x, 4.0f);
    const float t = fast_tanh(x * fmaf(u, fmaf(u, -0.01124992f, 0.2960472f), 1.5950152f));
    return fmaf(x, t, x);
}

// The gelu that is exact to a rounding of T.
template <typename T>
DEVICE float gelu_to(float x) {
    if constexpr (sizeof(T) == 2)
        return gelu_of_twice(0.5f * x);
    else
        return gelu(x);
}

// ---------------------------------------------------------------- shared memory

DEVICE unsigned shared_address(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }

// 16 bytes from global to shared memory, zeros where !valid. Both addresses are multiples of 16.
DEVICE void copy_async16(void* to, const void* from, bool valid = true) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(valid ? 16 : 0)
                 : "memory");
#else
    *static_cast<uint4*>(to) = valid ? *static_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
#endif
}

DEVICE void copy_async_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Wait until at most N groups are under way; a barrier must follow before other threads' copies are read.
template <int N>
DEVICE void copy_async_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// ---------------------------------------------------------------- matrix fragments
//
// mma.sync, D[16, 8] += A[16, K] B[K, 8] by one warp; lane l has group g = l / 4 and thread t = l % 4.
//   16-bit, K = 16:  a0 A[g][2t..]  a1 A[g+8][2t..]  a2 A[g][2t+8..]  a3 A[g+8][2t+8..]   two elements each
//                    b0 B[2t..][g]  b1 B[2t+8..][g]
//   tf32,   K = 8:   a0 A[g][t]     a1 A[g+8][t]     a2 A[g][t+4]     a3 A[g+8][t+4]
//                    b0 B[t][g]     b1 B[t+4][g]
//   d0 d1 D[g][2t..]  d2 d3 D[g+8][2t..]

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
DEVICE void load_matrix_x4(unsigned (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

DEVICE void load_matrix_x4_trans(unsigned (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

DEVICE void load_matrix_x2(unsigned (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
}

DEVICE void load_matrix_x2_trans(unsigned (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
}

// T is __half or (SM 8.0 and newer) __nv_bfloat16; SM 7.5 takes K = 16 in two steps of 8.
template <typename T>
DEVICE void mma_16x8x16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    if constexpr (is_same<T, __half>)
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    else
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    static_assert(is_same<T, __half>, "bfloat16 needs SM 8.0");
#pragma unroll
    for (int k = 0; k < 2; ++k)
        asm volatile(
            "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[2 * k]), "r"(a[2 * k + 1]), "r"(b[k]));
#endif
}

// float32 bits rounded to tf32 (nearest, ties away); SM 8.0 and newer, as is the product.
DEVICE unsigned to_tf32(float x) {
    unsigned bits = 0;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
#endif
    return bits;
}

DEVICE void mma_16x8x8_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// ---------------------------------------------------------------- one code for all types

// BYTES from global to shared memory, zeros where !valid. Both addresses are multiples of BYTES.
template <int BYTES>
DEVICE void copy_async(void* to, const void* from, bool valid) {
    if constexpr (BYTES == 16) {
        copy_async16(to, from, valid);
    } else {
#if __CUDA_ARCH__ >= 800
        if constexpr (BYTES >= 4) {
            asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(from),
                         "n"(BYTES), "r"(valid ? BYTES : 0)
                         : "memory");
            return;
        }
#endif
        using W = typename Word<BYTES>::type;
        *static_cast<W*>(to) = valid ? *static_cast<const W*>(from) : W();
    }
}

// 16 bytes, asked for here: a load through the read-only path would be moved past barriers, to where it is used.
DEVICE uint4 load_now(const void* p) {
    uint4 x;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(p));
    return x;
}

// D[16, 8] += A[16, K] B[K, 8] over 32 bytes of k: K = 16 of 16-bit elements, 8 of float (fragments as of tf32).
#if !(__CUDA_ARCH__ >= 800)
// A product of 16 x 8 x 8 floats where there is no tf32: lanes fetch each other's elements. A call, as inlined many times
// over it takes the compiler minutes.
__device__ __noinline__ float4 mma_by_lanes(float4 d, uint4 a, uint2 b) {
    const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const unsigned from_a[4] = {a.x, a.y, a.z, a.w}, from_b[2] = {b.x, b.y};
    float z[4] = {d.x, d.y, d.z, d.w};
#pragma unroll
    for (int k = 0; k < 8; ++k) {
        float x[2], y[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            x[i] = __uint_as_float(__shfl_sync(ALL_LANES, from_a[k / 4 * 2 + i], g * 4 + k % 4));
            y[i] = __uint_as_float(__shfl_sync(ALL_LANES, from_b[k / 4], (t * 2 + i) * 4 + k % 4));
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) z[i] = fmaf(x[i / 2], y[i % 2], z[i]);
    }
    return make_float4(z[0], z[1], z[2], z[3]);
}
#endif

// EXACT float products are as good as float32's: high and low tf32 parts, less low times low, summed outside of the
// tensor core, which truncates its sums. SM 7.5 has no tf32.
template <typename T, bool EXACT>
DEVICE void mma_step(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    if constexpr (sizeof(T) == 2) {
        mma_16x8x16<T>(d, a, b);
    } else {
#if __CUDA_ARCH__ >= 800
        unsigned a_high[4], b_high[2];
#pragma unroll
        for (int i = 0; i < 4; ++i) a_high[i] = to_tf32(__uint_as_float(a[i]));
#pragma unroll
        for (int i = 0; i < 2; ++i) b_high[i] = to_tf32(__uint_as_float(b[i]));
        if constexpr (EXACT) {
            unsigned a_low[4], b_low[2];
#pragma unroll
            for (int i = 0; i < 4; ++i) a_low[i] = to_tf32(__uint_as_float(a[i]) - __uint_as_float(a_high[i]));
#pragma unroll
            for (int i = 0; i < 2; ++i) b_low[i] = to_tf32(__uint_as_float(b[i]) - __uint_as_float(b_high[i]));
            float part[4] = {0, 0, 0, 0};
            mma_16x8x8_tf32(part, a_low, b_high);
            mma_16x8x8_tf32(part, a_high, b_low);
            mma_16x8x8_tf32(part, a_high, b_high);
#pragma unroll
            for (int i = 0; i < 4; ++i) d[i] += part[i];
        } else {
            mma_16x8x8_tf32(d, a_high, b_high);
        }
#else
        const float4 z = mma_by_lanes(make_float4(d[0], d[1], d[2], d[3]), make_uint4(a[0], a[1], a[2], a[3]),
                                      make_uint2(b[0], b[1]));
        d[0] = z.x, d[1] = z.y, d[2] = z.z, d[3] = z.w;
#endif
    }
}

// Sum of the squares of the elements in 32 bits.
template <typename T>
DEVICE float word_squares(unsigned bits) {
    if constexpr (sizeof(T) == 2) {
        const float2 x = unpack2<T>(bits);
        return fmaf(x.x, x.x, x.y * x.y);
    } else {
        const float x = __uint_as_float(bits);
        return x * x;
    }
}

DEVICE float infinity() { return __uint_as_float(0x7f800000u); }

// 2^x to 2 units in the last place; 0 for -infinity().
DEVICE float fast_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
